"""A line about a run whose process ends without one: it was killed, or Ray ended it, whose node or head is gone.

Ray ends a driver from within when its raylet dies, at the next object that it looks for, and no handler runs. So
another process waits at the end of a pipe; this file is all that it loads.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINE = (
    "error: the run's process ended without a word: it was killed, or Ray ended it because its node or its head is "
    "gone; the same command goes on from the latest checkpoint"
)

ENDING_S = 20.0


@contextmanager
def witness(log: Path | None) -> Iterator[None]:
    """Have it said, on the error output and in the file `log`, if this process ends before the context does."""
    arguments = [sys.executable, "-S", __file__, *([str(log)] if log else [])]
    # of a session of its own: neither Ctrl-C nor what ends the run's process group is for it
    other = subprocess.Popen(arguments, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        try:
            other.communicate(b"it ended as it should", timeout=ENDING_S)
        except subprocess.TimeoutExpired:  # it stands still, or what was forked here holds the pipe
            other.kill()
            other.wait()


def _wait(log: str | None) -> None:
    if not sys.stdin.buffer.read():
        sys.stderr.write(f"\n{LINE}\n")
        if log:
            Path(log).write_text(f"{LINE}\n")


if __name__ == "__main__":
    _wait(sys.argv[1] if len(sys.argv) > 1 else None)
