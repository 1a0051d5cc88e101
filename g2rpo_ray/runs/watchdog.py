"""Watchdog process: reports a run whose process was killed.

Ray ends a driver from within after its raylet dies, and no handler runs. So another process waits at the end of a pipe.
This file is all that it loads.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINE = (
    "error: the run's process was killed, or ended by Ray because its node or its head died. Run the same command to "
    "resume from the latest checkpoint"
)

SHUTDOWN_S = 20.0  # time limit of the watchdog's own end


@contextmanager
def watchdog(log: Path | None) -> Iterator[None]:
    """Report on stderr, and in the file `log`, if this process ends before the context does."""
    arguments = [sys.executable, "-S", __file__, *([str(log)] if log else [])]
    # in a session of its own, so that Ctrl-C and signals to the run's process group do not reach it
    other = subprocess.Popen(arguments, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        try:
            other.communicate(b"the context ended", timeout=SHUTDOWN_S)
        except subprocess.TimeoutExpired:  # it hangs, or a forked process holds the pipe
            other.kill()
            other.wait()


def _wait(log: str | None) -> None:
    if not sys.stdin.buffer.read():
        sys.stderr.write(f"\n{LINE}\n")
        if log:
            Path(log).write_text(f"{LINE}\n")


if __name__ == "__main__":
    _wait(sys.argv[1] if len(sys.argv) > 1 else None)
