"""A command that must refuse its input."""

import subprocess
import sys


def refused(arguments, parts, tmp_path):
    command = [sys.executable, "-m", "g2rpo_ray.run", "--set", f"output={tmp_path}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in done.stderr.splitlines() if "Failed to determine local IP" not in line]  # Ray's, offline
    assert_refused(done.returncode, "\n".join(errors), parts, tmp_path)


def assert_refused(status, printed, parts, tmp_path):
    assert status == 2, printed
    assert len(printed.splitlines()) == 1, printed
    assert printed.startswith("error: ")
    for part in parts:
        assert part in printed
    assert not list(tmp_path.iterdir())  # not even a run directory
