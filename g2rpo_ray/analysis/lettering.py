"""Draws a line of text, each character with an installed font that has it; a character without a font as its code."""

from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 9
BASELINE = 10  # pixels below the top
UNUSABLE = ("Color", "LastResort", "Blank")  # in names of fonts that Pillow can't draw, or whose letters are all boxes
Font = ImageFont.FreeTypeFont


def line(text: str, width: int, height: int) -> Image.Image:
    """The text in black on white, with line breaks as blanks; text beyond the width is cut off."""
    picture = Image.new("RGB", (width, height), "white")
    draw, x = ImageDraw.Draw(picture), 2.0
    for font, part in _parts(" ".join(text.split())):
        draw.text((x, BASELINE), part, "black", font, anchor="ls")
        x += font.getlength(part)
    return picture


def _parts(text: str) -> Iterator[tuple[Font, str]]:
    """Parts of the text with their fonts; a character without a font is replaced by its code, such as \\u4e2d."""
    for font, characters in groupby(text, key=_font_with):
        part = "".join(characters)
        yield (font, part) if font else (_default_font(), part.encode("unicode_escape").decode())


@cache
def _font_with(character: str) -> Font | None:
    if not character.isprintable():
        return None
    files = (file for find in (_default_files, _installed_files) for file in find())
    faces = (face for file in files if (face := _face(file)))
    return next((font for font, known in faces if ord(character) in known), None)


def _default_font() -> Font:
    return ImageFont.truetype(_default_files()[0], FONT_SIZE)


@cache
def _default_files() -> list[Path]:
    """Matplotlib's font; Pillow's own lacks '²', as in G²RPO, and letters that are not Latin."""
    import matplotlib as mpl

    return [Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"]


@cache
def _installed_files() -> list[Path]:
    """The fonts of this machine, Noto Sans first, because it has all scripts."""
    from matplotlib.font_manager import findSystemFonts

    files = [file for file in map(Path, findSystemFonts()) if not any(word in file.name for word in UNUSABLE)]
    return sorted(files, key=lambda file: ("NotoSans" not in file.name, "Regular" not in file.name, file.name, file))


@cache
def _face(file: Path) -> tuple[Font, frozenset[int]] | None:
    """The font and the codes of its characters; None for a file that can't be used."""
    from matplotlib.ft2font import FT2Font

    try:
        return ImageFont.truetype(file, FONT_SIZE), frozenset(FT2Font(str(file)).get_charmap())
    except (OSError, RuntimeError):  # damaged, or a format of one of the two libraries
        return None
