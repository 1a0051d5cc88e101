"""Pictures that stand beside a prompt: what it edits, what should come of it, and what may change."""

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from g2rpo_ray.messages import one_line, shown
from g2rpo_ray.paths import local_path
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import Images, Metadata, sources_in, sources_of

NAMES = {
    "source": ("source", "source_image", "input_image"),
    "target": ("target", "target_image", "output_image", "edited_image"),
    "mask": ("mask",),
}
"""Of the pictures in metadata, and what files call them; the first one that is there is used."""
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 64 * 10**6  # of a picture
DOWNLOAD_TIMEOUT_S = 60.0
ROTATED = (5, 6, 7, 8)  # values of EXIF's orientation with rows for columns
ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture by the content of its file. As text it is its digest, wherever it is."""

    digest: str  # first 32 hexadecimal digits of the SHA-256 of its bytes
    size: tuple[int, int]  # width, height
    place: str | bytes = field(repr=False, compare=False)  # path or URI, or the bytes themselves

    def __str__(self) -> str:
        return self.digest

    def read(self) -> bytes:
        """Its bytes. ValueError, in one line, if they cannot be had, or are no longer those that were read at first."""
        if isinstance(self.place, bytes):
            return self.place
        content = _fetched(self.place)
        if _digest(content) != self.digest:
            raise ValueError(f"{shown(self.place)} is not what it was when the prompts were read; restore it")
        return content

    def open(self) -> Image.Image:
        """The picture, RGB, upright, over white where it is transparent."""
        picture: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(self.read())))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return picture.convert("RGB")


def picture_file(given: Any, folder: Path) -> PictureFile:
    """The picture that an entry of a prompt file names.

    Args:
        given: path, relative to `folder`, URI, bytes, or an object with `bytes` or `path`, as `datasets` writes them.

    Raises:
        ValueError: one line; it cannot be read, is no picture or too large.
    """
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if not isinstance(given, str | bytes) or not given:
        raise ValueError(f"{shown(given)} is no path, URI or bytes of a picture")
    place = given if isinstance(given, bytes) or _is_uri(given) else str((folder / local_path(given)).absolute())
    content = place if isinstance(place, bytes) else _fetched(place)
    try:
        picture = Image.open(io.BytesIO(content))  # the header alone
        width, height = picture.size
        turned = picture.getexif().get(ORIENTATION) in ROTATED
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{shown(given)} is no picture that Pillow reads ({one_line(error)})") from None
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{shown(given)} has {width} x {height} pixels; at most {MAX_PIXELS} are read: make it smaller"
        )
    return PictureFile(_digest(content), (height, width) if turned else (width, height), place)


def pictures_in(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The pictures in an object or a row: `source`, a tuple, `target` and `mask`, as far as they are there."""
    found: dict[str, Any] = {}
    for kind, names in NAMES.items():
        given = next((entry[name] for name in names if entry.get(name) is not None), None)
        if given is not None and kind == "source":
            several = given if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
            found[kind] = tuple(picture_file(each, folder) for each in several)
        elif given is not None:
            found[kind] = picture_file(given, folder)
    return found


def with_sources(text: str, sources: Sequence[PictureFile]) -> str:
    """The prompt of a text and its sources: see `types.SOURCES`."""
    parts = "".join(f" {source.size[0]}x{source.size[1]} {source.digest}" for source in sources)
    return f"{text} [source{parts}]" if parts else text


def with_content(metadata: Metadata) -> Metadata:
    """Metadata whose pictures have their bytes in them: they may be far from who uses them."""
    return _each_picture(metadata, lambda file: replace(file, place=file.read()))


def with_pictures(metadata: Metadata) -> Metadata:
    """Metadata as rewards get it, with pictures uint8 [H, W, 3] in place of files."""

    def pixels(file: PictureFile) -> NDArray[np.uint8]:
        return np.asarray(file.open())

    return _each_picture(metadata, pixels)


def shown_sources(prompts: Sequence[str], metadata: Mapping[str, Metadata], size: Sequence[int]) -> list[Images]:
    """The first source of each prompt, fitted into `size` (height, width) on white; [] if no prompt has one."""
    if not any(sources_in(metadata.get(prompt, {})) for prompt in prompts):
        return []
    shown = []
    for prompt in prompts:
        files = sources_in(metadata.get(prompt, {}))
        picture = files[0].open() if files else Image.new("RGB", (1, 1), "white")
        shown.append(np.asarray(ImageOps.pad(picture, (size[1], size[0]), color="white")))
    return shown


def has_pictures(metadata: Metadata) -> bool:
    return not NAMES.keys().isdisjoint(metadata)


def sources_by_prompt(metadata: Mapping[str, Metadata]) -> dict[str, tuple[PictureFile, ...]]:
    """The files of sources, by what stands for them in a prompt."""
    return {sources_of(prompt): sources_in(known) for prompt, known in metadata.items() if sources_in(known)}


def open_sources(prompts: Sequence[str], files: Mapping[str, tuple[PictureFile, ...]]) -> dict[str, list[Image.Image]]:
    """The sources of these prompts, decoded, by the same."""
    wanted = dict.fromkeys(filter(None, map(sources_of, prompts)))
    return {name: [file.open() for file in files[name]] for name in wanted}


def _each_picture(metadata: Metadata, change: Any) -> Metadata:
    def changed(value: Any) -> Any:
        if isinstance(value, PictureFile):
            return change(value)
        return tuple(map(changed, value)) if isinstance(value, tuple) else value

    return {name: changed(value) for name, value in metadata.items()} if has_pictures(metadata) else metadata


def _is_uri(place: str) -> bool:
    return "://" in place or place.startswith("data:")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _fetched(place: str) -> bytes:
    try:
        if place.startswith("data:"):
            content = base64.b64decode(place.partition(";base64,")[2], validate=True)
        elif place.startswith(("http://", "https://")):
            content = _downloaded(place)
        elif "://" in place:
            folder, _, name = place.rpartition("/")
            content = Folder(folder).read(name)
        else:
            content = Path(place).read_bytes()
    except (OSError, ValueError, binascii.Error) as error:
        raise ValueError(f"{shown(place)} cannot be read ({one_line(error)})") from None
    if not 0 < len(content) <= MAX_BYTES:
        raise ValueError(f"{shown(place)} has {len(content)} bytes; a picture has 1 to {MAX_BYTES}")
    return content


def _downloaded(uri: str) -> bytes:
    import httpx

    content = bytearray()
    try:
        with httpx.stream("GET", uri, timeout=DOWNLOAD_TIMEOUT_S, follow_redirects=True) as answer:
            answer.raise_for_status()
            for part in answer.iter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    break
    except httpx.HTTPError as error:
        raise OSError(one_line(error)) from None
    return bytes(content)
