"""A folder: a path that every node sees, or object storage by a pyarrow or fsspec URI."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from g2rpo_ray.messages import shown
from g2rpo_ray.paths import local_path, place_fault

CHUNK = 1 << 22  # bytes read at a time


class Folder:
    """A folder by its name. Files are written whole or not at all. The storage is opened at first use.

    What fails raises OSError; a kind of storage that neither pyarrow nor fsspec knows raises ValueError.
    """

    def __init__(self, name: str | os.PathLike[str]):
        """
        Args:
            name: a path, or a URI such as `s3://bucket/runs?region=eu-west-1` (pyarrow) or one that fsspec knows.
                Credentials come from the environment, as the storage's own tools take them.

        Raises:
            ValueError: no folder can have this name, or the URI has credentials.
        """
        text = os.fspath(name)
        self._path: Path | None = None
        if "://" not in text:
            self._path = local_path(text).absolute()
        elif text.startswith("file://"):
            self._path = local_path(urlsplit(text).path)
        else:
            _check_uri(text)
        self._name = str(self._path or text)

    @cached_property
    def _storage(self) -> tuple[fs.FileSystem, str]:
        return (fs.LocalFileSystem(), self._name) if self._path else _open(self._name)

    @property
    def _fs(self) -> fs.FileSystem:
        return self._storage[0]

    @property
    def _root(self) -> str:
        return self._storage[1]

    def __str__(self) -> str:
        return self._name

    def __truediv__(self, child: str) -> "Folder":
        address, mark, query = self._parts()
        return Folder(f"{address}/{child}{mark}{query}")

    @property
    def parent(self) -> "Folder":
        """The folder above; of a root, that root."""
        if self._path:
            return Folder(self._path.parent)
        address, mark, query = self._parts()
        above = address.rpartition("/")[0]
        return self if above.endswith(":/") else Folder(f"{above}{mark}{query}")

    @property
    def name(self) -> str:
        return self._parts()[0].rpartition("/")[2]

    @property
    def path(self) -> Path | None:
        """The folder on this machine, None where it is object storage."""
        return self._path

    def names(self) -> list[str]:
        """Names of the entries of the folder, sorted; empty if it does not exist."""
        found = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def exists(self, file: str) -> bool:
        return self._fs.get_file_info(self._at(file)).type is fs.FileType.File

    def open(self, file: str) -> pa.NativeFile:
        """A file, to read anywhere in it."""
        return self._fs.open_input_file(self._at(file))

    def read(self, file: str) -> bytes:
        with self.open(file) as stream:
            return stream.read()

    def require_writable(self) -> None:
        """Write a file here, and leave nothing; OSError where that cannot be."""
        made = []
        try:
            for folder in [*reversed(self._path.parents), self._path] if self._path else []:
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
            self.write(".writable", b"")
            self.delete(".writable")
        finally:
            for folder in reversed(made):
                folder.rmdir()

    def write(self, file: str, content: bytes | pa.Buffer) -> None:
        """Write a file so that a reader sees the old content or the new, never a part."""
        if self._path:
            write_file(self._path / file, content)
        else:  # an object is there when its stream is closed
            with self._fs.open_output_stream(self._at(file)) as stream:
                stream.write(content)

    def files(self) -> list[str]:
        """Every file in the folder and below, by its name from here, sorted."""
        found = self._fs.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        files = sorted(os.path.relpath(info.path, self._root) for info in found if info.type is fs.FileType.File)
        for file in files:
            if ".." in file.split("/"):  # an object's key may be anything; it must not lead out of the folder
                raise OSError(f"{self} holds {file!r}, which would be written outside of it; delete that object")
        return files

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file in the folder and below."""
        return {file: self._digest(file) for file in self.files()}

    def delete(self, file: str | None = None) -> None:
        """Delete a file, or the folder with all that is in it; nothing happens where there is none."""
        if file is not None:
            if self.exists(file):
                self._fs.delete_file(self._at(file))
        elif self._fs.get_file_info(self._root).type is fs.FileType.Directory:
            self._fs.delete_dir(self._root)

    @contextmanager
    def reading(self) -> Iterator[Path]:
        """The folder's content as a path on this machine."""
        if self._path:
            yield self._path
            return
        with tempfile.TemporaryDirectory() as aside:
            self._download(Path(aside))
            yield Path(aside)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A path on this machine whose content is in the folder when the context ends."""
        if self._path:
            self._path.mkdir(parents=True, exist_ok=True)
            yield self._path
            return
        with tempfile.TemporaryDirectory() as aside:
            yield Path(aside)
            self.take(Path(aside))

    def take(self, source: Path, newer_than: float = 0.0) -> None:
        """Upload the files below a path that were changed since a time (seconds of the epoch), to object storage."""
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            if file.stat().st_mtime >= newer_than:
                with file.open("rb") as content:
                    self._upload(content, file.relative_to(source).as_posix())

    @contextmanager
    def workspace(self, without: tuple[str, ...]) -> Iterator[Path]:
        """The folder itself; of object storage a copy on this machine, but for what is not needed there."""
        if self._path:
            self._path.mkdir(parents=True, exist_ok=True)
            yield self._path
            return
        with tempfile.TemporaryDirectory(prefix="g2rpo_ray-") as aside:
            self._download(Path(aside), without)
            yield Path(aside)

    def _download(self, target: Path, without: tuple[str, ...] = ()) -> None:
        for file in self.files():
            if file.split("/")[0] not in without:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                with self.open(file) as content, (target / file).open("wb") as stream:
                    shutil.copyfileobj(content, stream, CHUNK)

    def _upload(self, content: Any, file: str) -> None:
        with self._fs.open_output_stream(self._at(file)) as stream:
            shutil.copyfileobj(content, stream, CHUNK)

    def _parts(self) -> tuple[str, str, str]:
        """Address, `?` and query of a URI."""
        address, mark, query = self._name.partition("?") if self._path is None else (self._name, "", "")
        return address.rstrip("/"), mark, query

    def _at(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}"

    def _digest(self, file: str) -> str:
        digest = hashlib.sha256()
        with self.open(file) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


def write_file(path: Path, content: bytes | pa.Buffer) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, and it outlives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def replace_text(path: Path, text: str) -> None:
    """`write_file` for text."""
    write_file(path, text.encode())


def _check_uri(uri: str) -> None:
    if urlsplit(uri).password is not None:
        address = uri.rpartition("@")[2]
        raise ValueError(f"a URI with a password, for {address}: it would be written down; give it by the environment")
    if fault := place_fault(uri):
        raise ValueError(f"{shown(uri)} given; {fault}")


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, ValueError):  # not one of pyarrow's own
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{uri} is neither a path nor a URI that pyarrow or fsspec knows ({error})") from None
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path
