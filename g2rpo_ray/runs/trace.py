"""Reports an unexpected error in one line, and writes its traceback to a file."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from g2rpo_ray.exits import RunFailed
from g2rpo_ray.messages import one_line
from g2rpo_ray.runs.storage import Folder

FILE = "error.log"


@contextmanager
def traced(folder: Folder, kind: type[Exception] = Exception) -> Iterator[None]:
    """An error of this kind inside becomes RunFailed; its traces, those of actors included, go to `folder`."""
    try:
        yield
    except RunFailed:
        raise
    except kind as error:
        where = f"the whole trace is in {folder / FILE}"
        try:
            folder.write(FILE, "".join(traceback.format_exception(error)).encode())
        except OSError as unwritten:
            where = f"no trace could be written: {unwritten}"
        cause = getattr(error, "cause", None) or error
        raise RunFailed(f"{type(cause).__name__}: {one_line(cause, 500)} ({where})") from error
