"""Reference pictures, drawn: what every reward can be tried on without a model or a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from g2rpo_ray.data import read_records
from g2rpo_ray.messages import one_line
from g2rpo_ray.worlds.quickstart.shapes import COLOURS, SHAPES, caption, render

LEGIBLE = 128  # pixels a side from which on text is drawn, too
MOST = 256  # pictures of a folder
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture uint8 [H, W, 3] and what it is to be scored for."""

    name: str
    prompt: str
    image: NDArray[np.uint8]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def references(height: int, width: int) -> list[Picture]:
    """A shape each in a colour of its own, and, where there is room, two signs with text."""
    rng = np.random.default_rng(0)
    pictures = []
    for colour, shape in zip(COLOURS, SHAPES, strict=False):
        image = Image.fromarray(render(colour, shape, rng)).resize((width, height), Image.Resampling.NEAREST)
        asked = [[f"Is the {shape} {colour}?", "Yes"], [f"How many {shape}s are in the image?", "one"]]
        prompt = caption(colour, shape)
        pictures.append(Picture(prompt, prompt, np.array(image), {"vqa_list": asked}))
    for text in ("Open", "Bakery") if min(height, width) >= LEGIBLE else ():
        sign = Image.new("RGB", (width, height), "white")
        font = ImageFont.load_default(width / 6)
        ImageDraw.Draw(sign).text((width / 2, height / 2), text, "black", font, anchor="mm")
        asked = [[f"Does the sign say {text}?", "Yes"]]
        pictures.append(Picture(text, f'a white sign that says "{text}"', np.array(sign), {"vqa_list": asked}))
    return pictures


def read_pictures(folder: Path, sources: int = 0) -> list[Picture]:
    """The pictures of a folder. The prompt of NAME.png is in NAME.txt, or in NAME.jsonl with its metadata, as prompt
    files have it, with up to `sources` source pictures; else it is the name, with blanks for underscores.

    Raises:
        ValueError: one line; there are none, or a file is no picture.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not 0 < len(files) <= MOST:
        raise ValueError(f"IMAGES: {folder} holds {len(files)} pictures; give a folder with 1 to {MOST} of them")
    pictures = []
    for file in files:
        beside = [file.with_suffix(ending) for ending in (".txt", ".jsonl") if file.with_suffix(ending).is_file()]
        told = read_records(str(beside[0]), "IMAGES", sources) if beside else {file.stem.replace("_", " "): {}}
        if len(told) > 1:
            raise ValueError(f"IMAGES: {beside[0]} holds {len(told)} prompts; write the one of {file.name}")
        try:
            image = np.array(Image.open(file).convert("RGB"))
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"IMAGES: {file} can't be read: {one_line(error)}; leave it out") from None
        ((prompt, metadata),) = told.items()
        pictures.append(Picture(file.name, prompt, image, metadata))
    return pictures
