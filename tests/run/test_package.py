"""The package as its user has it: a wheel, in a fresh environment, used from another folder."""

import importlib
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from g2rpo_ray.commands.main import COMMANDS, make_parser
from g2rpo_ray.config import RewardConfig, load_config
from g2rpo_ray.rewards.options import check_reward

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(ROOT)], check=True, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command of an environment that has the wheel, and this one's packages but for our own."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home / "venv"), "platbase": str(home / "venv")}))
    pip = [sys.executable, "-m", "pip", "--python", str(home / "venv" / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after our own: the wheel comes first
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*command):
        program = str(home / "venv" / "bin" / command[0])
        done = subprocess.run([program, *command[1:]], cwd=elsewhere, env=clean, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def test_a_wheel_holds_what_is_read_at_run_time(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in ("worlds/quickstart/config.yaml", "worlds/quickstart/preference.pt",
                 "worlds/scenes/prompts_heldout.txt", "worlds/edit_quickstart/prompts_heldout.jsonl",
                 "worlds/video_quickstart/prompts_heldout.txt",
                 "report/page.html.j2", "report/page.css", "configs/flux_hps.yaml",
                 "configs/prompts/train.txt",
                 "rehearsal/published/Qwen--Qwen-Image/transformer/config.json"):  # fmt: skip
        assert f"g2rpo_ray/{file}" in names
    assert {"g2rpo_ray/actors/system.py", "g2rpo_ray/learner/engine.py"} < names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_command_works_in_another_folder(installed):
    status, where = installed("python", "-c", "import g2rpo_ray; print(g2rpo_ray.__file__)")
    assert status == 0
    assert str(ROOT) not in where
    status, said = installed("g2rpo", "--help")
    assert status == 0
    assert all(command in said for command in (*COMMANDS, "completion", "examples:"))
    program = "from g2rpo_ray.config import load_config; print(load_config('flux_hps_clip').data.train_prompts)"
    assert installed("python", "-c", program) == (0, "embedded:prompts/train.txt\n")
    status, said = installed("g2rpo", "report", "nowhere")
    assert (status, said) == (
        2,
        "error: nowhere has no config.yaml; name a run's folder, such as runs/quickstart, or its URI\n",
    )
    status, said = installed("g2rpo", "completion", "bash")
    assert status == 0
    assert "--adapter" in said


def test_every_command_says_what_it_does_and_shows_an_example():
    for module, _ in COMMANDS.values():
        assert "example" in importlib.import_module(module).make_parser().format_help()
    assert make_parser().parse_args(["run", "--check"]).check


def test_packaged_configurations_are_found_by_name(tmp_path, monkeypatch):
    assert load_config("flux_hps") == load_config(str(ROOT / "configs" / "flux_hps.yaml"))
    with pytest.raises(ValueError, match="--config: flux_hpz is .* packaged configuration; these are .*flux_hps,"):
        load_config("flux_hpz")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux_hps").write_text("extends: embedded:config.yaml\nname: mine\n")
    assert load_config("flux_hps").name == "mine"  # a file goes first


@pytest.mark.parametrize(
    ("kind", "package", "command"),
    [("hpsv2", "hpsv2", "--no-deps hpsv2==1.2.0 clint args"), ("ocr", "rapidocr", "rapidocr onnxruntime")],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(kind, package, command, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"rewards.x.kind: {kind} needs the package {package}.* pip install {command}"
    ):
        check_reward("rewards.x", RewardConfig(kind=kind, resources={"CPU": 1}))
