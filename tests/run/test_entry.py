"""The entry of all commands: Ctrl-C while they load, empty options, names that no file can have, errors of files."""

import multiprocessing
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from g2rpo_ray.commands.main import COMMANDS
from g2rpo_ray.commands.main import main as cli
from g2rpo_ray.exits import Parser, children_ignore_interrupts, command, path_option
from g2rpo_ray.preflight import RAY_JOB
from g2rpo_ray.runs.storage import Folder

MODULES = [f"g2rpo_ray.{name}" for name in (*COMMANDS, "world_builder.build", "world_builder.measure")]

INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
module, imported, *arguments = sys.argv[1:]
sent = []

def interrupt(event, details):
    if event == "import" and details[0] == imported and not sent:
        sent.append(details)
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def interrupted(module, imported, *arguments):
    """Run a command that gets SIGINT when it first imports a module."""
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module, imported, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("module", MODULES)
def test_ctrl_c_while_a_command_loads_is_one_line(module):
    done = interrupted(module, "numpy")
    assert (done.returncode, done.stderr) == (130, "stopped: nothing was started\n")


@pytest.mark.parametrize("arguments", [["run"], ["--help"]])
def test_ctrl_c_while_the_command_line_loads_is_one_line(arguments):
    done = interrupted("g2rpo_ray.commands.main", "numpy", *arguments)
    assert (done.returncode, done.stderr) == (130, "stopped: nothing was started\n")


def test_ctrl_c_before_there_is_a_run_is_one_line(tmp_path):
    done = interrupted("g2rpo_ray.run", "g2rpo_ray.actors.access", "--set", f"output={tmp_path}")
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_terminal_is_for_the_parent_alone():
    """The terminal sends it to all processes of the command; one that loads its modules would print a traceback."""
    child = multiprocessing.get_context("spawn").Process(target=signal.raise_signal, args=(signal.SIGINT,))

    def start():
        with children_ignore_interrupts():
            child.start()
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start()
    child.join(60)
    assert child.exitcode == 0


LONG = "x" * 300

UNKNOWN = "~unknownuser/x"

REFUSED = {
    "run": [
        ["--config", ""], ["--name", ""], ["--address", ""], ["--config", UNKNOWN], ["--config", LONG],
        ["--resume", UNKNOWN], ["--resume", LONG], ["--set", f"output={UNKNOWN}"], ["--set", f"model.path={LONG}"],
        ["--set", f"data.train_prompts={UNKNOWN}"], ["--set", f"lora.initial={LONG}"], ["--no-such-option"],
        ["--set", f"rewards.preference.options.checkpoint={LONG}"],
        ["--set", f"rewards.preference.options.checkpoint={UNKNOWN}"],
    ],
    "bench": [["--config", UNKNOWN], ["--output", UNKNOWN], ["--output", LONG], ["--minutes", "x"]],
    "evaluate": [
        ["--output", ""], ["--output", UNKNOWN], ["--output", LONG], ["--prompts", UNKNOWN], ["--prompts", LONG],
        ["--adapter", f"a={UNKNOWN}"], ["--adapter", f"a={LONG}"],
    ],
    "study": [[UNKNOWN], [LONG], [""], ["quickstart", "--output", LONG], ["quickstart", "--output", UNKNOWN]],
    "scale": [["--rollout", "2", "--output", UNKNOWN], ["--rollout", "2", "--output", LONG], ["--rollout", "x"]],
    "report": [[UNKNOWN], [LONG], [""], ["--output", UNKNOWN, "x"]],
    "demo": [["--adapter", UNKNOWN], ["--adapter", LONG]],
    "rewards": [[UNKNOWN], [LONG], ["quickstart", UNKNOWN], ["quickstart", LONG]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name, cases in REFUSED.items() for arguments in cases]
)
def test_an_option_that_cannot_be_is_one_line_that_shows_it_and_status_2(
    name, arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli([name, *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert len(printed) < 1000
    reasons = {"": "'' given", "~": "no user 'unknownuser'", "x": "255 bytes"}
    given = arguments[-1] if arguments[-1] != "x" else arguments[-2]
    value = given.rpartition("=")[2]
    assert reasons.get(value[:1] if len(value) != 1 else "-", "--help lists the options") in printed
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_a_command_does_not_expect_of_the_system_is_one_line(capsys):
    def work(options):
        return len(options.file.read_text())

    def make_parser():
        parser = Parser()
        parser.add_argument("file", type=path_option)
        return parser

    main = command(make_parser)(work)
    assert main(["/dev/null"]) == 0
    assert main(["/dev/null/x"]) == 2
    assert capsys.readouterr().err == "error: [Errno 20] Not a directory: '/dev/null/x'\n"


def test_control_characters_in_yaml_are_one_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_bytes(b"name: a\x01b\n")
    for arguments in (
        ["run", "--config", f"{tmp_path}/bad.yaml"],
        ["run", "--set", "name=a\x01"],
        ["study", f"{tmp_path}/bad.yaml"],
    ):
        assert cli(arguments) == 2
        printed = capsys.readouterr().err
        assert "unacceptable character #x0001" in printed
        assert printed.count("\n") == 1


def test_the_variable_of_a_ray_job_is_ray_s():
    constants = Path(find_spec("ray").origin).parent / "_private" / "runtime_env" / "constants.py"
    assert f'"{RAY_JOB}"' in constants.read_text()


def test_a_relative_output_is_refused_inside_a_ray_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RAY_JOB, "{}")
    for arguments, key in (
        (["run"], "output: 'runs'"),
        (["run", "--check"], "output: 'runs'"),
        (["run", "--set", f"output={tmp_path}", "--set", "data.embeddings=e"], "data.embeddings: 'e'"),
        (["evaluate"], "output: 'runs'"),
        (["evaluate", "--output", "e"], "--output: 'e'"),
        (["study", "quickstart", "--set", f"output={tmp_path}"], "--output: 'studies/quickstart'"),
        (["study", "quickstart", "--output", str(tmp_path)], "output: 'runs'"),
    ):
        assert cli(arguments) == 2, arguments
        printed = capsys.readouterr().err
        assert f"{key} given, a relative path, which in a Ray job is in a folder that Ray deletes" in printed
        assert "a path that every node can read" in printed
        assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", ["RAY_ADDRESS", "--address"])
def test_the_address_of_ray_s_jobs_is_named_as_that(named, tmp_path, monkeypatch, capsys):
    arguments = ["run", "--set", f"output={tmp_path}"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    else:
        arguments += ["--address", "http://head:8265"]
    for more in ([], ["--check"]):
        assert cli([*arguments, *more]) == 2
        refusal = capsys.readouterr().err.splitlines()[-1]
        assert refusal.startswith(f"error: {named}: http://head:8265 given, which is the address of Ray's jobs")
    assert not list(tmp_path.iterdir())


def test_scale_does_not_open_a_bucket(monkeypatch, capsys):
    """A run there leaves no word of a private cluster; without a network, opening it fails."""

    def unreachable(uri):
        raise OSError("no network")

    monkeypatch.setattr("g2rpo_ray.runs.storage._open", unreachable)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cli(["scale", "--output", "s3://bucket/runs", "--rollout", "2"]) == 2
    assert "RAY_ADDRESS: no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err
    assert cli(["report", "s3://bucket/runs/a"]) == 2
    assert "no network" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/dev/null", "FILE", "FILE/x"])
def test_embeddings_in_a_file_are_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = place.replace("FILE", f"{tmp_path}/file")
    assert cli(["run", "--set", f"output={tmp_path}", "--set", f"data.embeddings={given}"]) == 2
    assert f"data.embeddings: cannot use {given}: " in capsys.readouterr().err


def test_the_folder_above_a_root_is_that_root():
    assert str(Folder("s3://bucket").parent) == "s3://bucket"
    assert str(Folder("/a").parent.parent) == "/"
