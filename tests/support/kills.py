"""Kills a process at every point of what it writes."""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from g2rpo_ray.runs.storage import Folder


def killed(folder: Path, kind: str, act: Callable[[Folder], object], stride: int = 1) -> Iterator[Folder]:
    """Copies of `folder/template` in which `act` was killed before change number 0, `stride`, ... to the file system.

    `kind`: "path", or "objects" for a store that has no folders and no renaming. In the last one it was not killed.
    """
    fsspec.register_implementation("objects", Objects, clobber=True)
    for number in itertools.count(0, stride):
        place = folder / str(number)
        shutil.copytree(folder / "template", place)
        run = Folder(place if kind == "path" else f"objects://{place}")
        pid = os.fork()
        if not pid:
            try:
                die_before_change(number)
                act(run)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), f"it failed at change {number}"
        yield run
        if not status:
            return


class Objects(LocalFileSystem):
    """On this disk, but as an object store does it: no folders to make, and a move is a copy and a deletion."""

    protocol = "objects"

    def __init__(self):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("objects://"))

    def mv(self, path1, path2, **_):
        self.cp_file(path1, path2)
        self.rm_file(path1)


def die_before_change(number):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "shutil.rmtree")
        if changes or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
