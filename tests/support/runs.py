"""Real runs of the command line, small: the quickstart's model, a few iterations of two prompts."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from g2rpo_ray.runs.tracking import read_lines

EMBEDDINGS = tempfile.TemporaryDirectory()  # of all runs of a session: encoding takes longer than an iteration
SMALL = {
    "iterations": 3,
    "sampler.steps": 5,
    "sampler.branch_steps": "[0, 2]",
    "sampler.group_size": 4,
    "data.prompts_per_iteration": 2,
    "rewards.preference.kind": "jpeg_compressibility",  # which loads no network
    "rewards.preference.options": "{}",
    "eval_rewards": "{}",
    "evaluation.every": 0,
    "evaluation.seeds": 1,
    "checkpoint.every": 1,
    "lora.rank": 4,
    "learner.micro_batch": 2,
    "tracking.tensorboard": "false",
    "rollout.max_actors": 1,
    "data.embeddings": EMBEDDINGS.name,
}
PREFERENCE = {  # the quickstart's own reward
    "rewards__preference__kind": "hpsv2",
    "rewards__preference__options": "{checkpoint: embedded:preference.pt, architecture: embedded:preference.json}",
}
PATIENCE = 360  # seconds, for two slow and busy cores
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PORTS = itertools.count(20_000 + 200 * WORKER)  # below those that the system gives away, and no other worker's


def command(output: Path, name: str, *arguments: str, **settings) -> list[str]:
    """The command line of a small run; `settings` are keys with __ for a dot."""
    values = {**dotted(settings), "output": output}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "g2rpo_ray.run", "--name", name, *sets, *arguments]


def dotted(settings) -> dict:
    """The settings of a small run with these; their keys have __ for a dot."""
    return {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}


def head_command(port: int, *options: str) -> list[str]:
    """`ray start` of a head on ports that the clusters of tests beside it do not have; its workers take free ones."""
    ports = [
        f"--port={port}",
        f"--dashboard-agent-listen-port={port + 1000}",
        f"--ray-client-server-port={port + 2000}",
    ]
    workers = ["--min-worker-port=0", "--max-worker-port=0"]
    return [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *ports, *workers, *options]


def free_port() -> int:
    """A port that nothing takes before its user does."""
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def listens(port: int, address: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


class Printing(subprocess.Popen):
    """What it and its children print is read at once: with a pipe that is full they would stand still."""

    def __init__(self, arguments: list[str]):
        how = {"stderr": subprocess.STDOUT, "text": True, "errors": "replace", "start_new_session": True}
        super().__init__(arguments, stdout=subprocess.PIPE, **how)
        self._printed: list[str] = []
        self._reader = threading.Thread(target=lambda: self._printed.extend(self.stdout), daemon=True)
        self._reader.start()

    def communicate(self, given=None, timeout: float | None = None) -> tuple[str, None]:
        """All of it, once nobody can print more: what a run leaves behind may have the last word."""
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout, "".join(self._printed).encode())
        self.wait(timeout)
        return "".join(self._printed), None


def start(output: Path, name: str, *arguments: str, **settings) -> subprocess.Popen:
    return Printing(command(output, name, *arguments, **settings))


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Wait for the end; what it printed."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        printed = (error.output or b"").decode(errors="replace")
        raise AssertionError(f"did not end in {PATIENCE} s:\n{printed}\n{why(process)}") from None
    assert process.returncode == status, f"exit status {process.returncode}:\n{output}"
    return output


def why(process: subprocess.Popen, lines: int = 40) -> str:
    """Why a run that `start` started stands still, maybe: the last lines of its log, and its processes."""
    there = [child.as_dict(["pid", "status", "cpu_times"], "gone") | {"is": title_of(child)} for child in descendants()]
    processes = "\n".join(f"{one['pid']} {one['status']} {one['cpu_times']} {one['is'][:100]}" for one in there)
    given = [str(part) for part in process.args]
    outputs = [part.removeprefix("output=") for part in given if part.startswith("output=")]
    if not outputs or "--name" not in given:
        return processes
    log = Path(outputs[-1]) / given[given.index("--name") + 1] / "run.log"
    ended = log.read_text().splitlines()[-lines:] if log.exists() else [f"no {log}"]
    return "\n".join([*ended, processes])


def run(output: Path, name: str, *arguments: str, status: int = 0, **settings) -> str:
    return finish(start(output, name, *arguments, **settings), status)


def verified(*calls: tuple[Path, int]) -> list[tuple[int, str]]:
    """Exit status and lines of `g2rpo verify` for runs and iterations, in one process, which loads torch once.

    Without the error output: where there is no network, torch writes there that it finds no host name.
    """
    program = (
        "import json, sys; from g2rpo_ray.commands.verify import main\n"
        "for place, number in json.loads(sys.argv[1]): print('status', main([place, '--iteration', str(number)]))"
    )
    given = json.dumps([(str(place), number) for place, number in calls])
    how = {"stdout": subprocess.PIPE, "text": True, "timeout": PATIENCE}
    printed = subprocess.run([sys.executable, "-c", program, given], check=False, **how).stdout
    parts = re.split(r"status (\d+)\n", printed)
    assert len(parts) == 2 * len(calls) + 1, printed
    return [(int(status), said) for said, status in zip(parts[::2], parts[1::2], strict=False)]


def lora(output: Path, name: str, kind: str = "lora"):
    """The final adapter's tensors, or its average's."""
    return tensors(output / name / kind)


def tensors(adapter: Path):
    """By name, of an adapter's folder."""
    return load_file(adapter / "pytorch_lora_weights.safetensors")


def same_lora(a, b) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def metrics(output: Path, name: str) -> list[dict]:
    return read_lines(output / name / "metrics.jsonl")


ROLLOUT_BACK = r"rollout-\d+ on .* is ready"  # of any number: the first replacement can fail, on a node that just died

REWARD_BACK = r"reward preference-\d+ on .* is ready"


def recovery(output: Path, name: str, lost: str, back: str) -> float:
    """Seconds from the line of the run's log where `lost` is found to the next one with `back`; patterns of `re`."""
    log = (output / name / "run.log").read_text().splitlines()
    lines = iter(log)
    first, second = (next((line for line in lines if re.search(part, line)), None) for part in (lost, back))
    assert None not in (first, second), f"{lost!r} or {back!r} after it is not in the log:\n" + "\n".join(log[-40:])
    times = [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") for line in (first, second)]
    seconds = (times[1] - times[0]).total_seconds()
    print(f"{name}: {first[24:]} -> {second[24:]}: {seconds:.1f} s")
    return seconds


def wait_for_iteration(process: subprocess.Popen, output: Path, name: str, iteration: int) -> None:
    wait_for(process, lambda: any(line["iteration"] >= iteration for line in metrics(output, name)))


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "ended with {}:\n{}\n{}".format(process.returncode, *process.communicate())
        assert time.monotonic() < deadline, f"waited too long:\n{why(process)}"
        time.sleep(0.05)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size; the test is skipped without the right to mount one."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk: see tests/isolated")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def fill(file: Path) -> None:
    """Take all that is left of the disk."""
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
        except OSError:
            os.fsync(stream.fileno())


def descendants(process: subprocess.Popen | None = None) -> list[psutil.Process]:
    """All processes below it, or below this one, and those that tests/support/preloaded.py has made for them.

    None where it has ended.
    """
    try:
        found = {child.pid: child for child in psutil.Process(process and process.pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return []
    for child in list(found.values()):
        with suppress(psutil.Error):
            if stood_for := re.fullmatch(r"as (\d+)", child.name()):
                found[int(stood_for[1])] = psutil.Process(int(stood_for[1]))
    return list(found.values())


def raylet_of(worker: psutil.Process) -> int:
    """The process id of the raylet that a worker belongs to."""
    for child in descendants():
        with suppress(psutil.Error):
            if child.name() == f"as {worker.pid}":
                return child.ppid()
    return worker.ppid()


def actors_of(process: subprocess.Popen, title: str) -> list[psutil.Process]:
    """The run's Ray actors whose process title contains `title`."""
    return [child for child in descendants(process) if title in title_of(child)]


def title_of(process: psutil.Process) -> str:
    """Empty where it has ended: any process may, between being listed and being looked at."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_at_work(process: subprocess.Popen, title: str) -> None:
    """Kill one of the run's actors while it does what its process title says."""

    def caught() -> bool:
        for actor in actors_of(process, title):
            with suppress(psutil.NoSuchProcess):
                actor.suspend()  # what the title says of a process that stands still is true
                if title in title_of(actor):
                    actor.kill()
                    return True
                actor.resume()
        return False

    wait_for(process, caught)


def kill_all(process: subprocess.Popen) -> None:
    """End the driver as a power cut would, and what it leaves behind."""
    children = descendants(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):  # Ray's own watchers end them, too
            child.kill()
    psutil.wait_procs(children, timeout=30)
