"""Drawn reference images, and images of a folder, to try rewards on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.data import Prompts, read_records
from g2rpo_ray.messages import one_line
from g2rpo_ray.worlds.quickstart.shapes import COLOURS, SHAPES, caption, render

MIN_TEXT_SIZE = 128  # pixels a side of images with drawn text
MAX_PICTURES = 256  # of a folder
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image uint8 [H, W, 3] with its prompt and metadata."""

    name: str
    prompt: str
    image: NDArray[np.uint8]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def noise(model: ModelConfig, prompts: Prompts, number: int) -> list[Picture]:
    """Images or videos of noise, of the model's size, for the first training prompt."""
    prompt, frames = prompts.train[0], [model.frames] if model.frames > 1 else []
    drawn = np.random.default_rng(0).integers(0, 256, (number, *frames, model.height, model.width, 3), np.uint8)
    return [Picture("noise", prompt, image, prompts.metadata.get(prompt, {})) for image in drawn]


def references(height: int, width: int) -> list[Picture]:
    """Images of shapes in different colours, and, if the size is at least MIN_TEXT_SIZE, two signs with text."""
    rng = np.random.default_rng(0)
    pictures = []
    for colour, shape in zip(COLOURS, SHAPES, strict=False):
        image = Image.fromarray(render(colour, shape, rng)).resize((width, height), Image.Resampling.NEAREST)
        asked = [[f"Is the {shape} {colour}?", "Yes"], [f"How many {shape}s are in the image?", "one"]]
        prompt = caption(colour, shape)
        pictures.append(Picture(prompt, prompt, np.array(image), {"vqa_list": asked}))
    for text in ("Open", "Bakery") if min(height, width) >= MIN_TEXT_SIZE else ():
        sign = Image.new("RGB", (width, height), "white")
        font = ImageFont.load_default(width / 6)
        ImageDraw.Draw(sign).text((width / 2, height / 2), text, "black", font, anchor="mm")
        asked = [[f"Does the sign say {text}?", "Yes"]]
        pictures.append(Picture(text, f'a white sign that says "{text}"', np.array(sign), {"vqa_list": asked}))
    return pictures


def moving(picture: Picture, frames: int) -> Picture:
    """A video uint8 [F, H, W, 3] whose frames are the image, moved to the right by a 16th of its width each time."""
    step = max(1, picture.image.shape[1] // 16)
    video = np.stack([np.roll(picture.image, step * frame, axis=1) for frame in range(frames)])
    return replace(picture, image=video)


def read_pictures(folder: Path, sources: int = 0) -> list[Picture]:
    """The images of a folder.

    The prompt of NAME.png is in NAME.txt, or with metadata in NAME.jsonl, in the format of prompt files with up to
    `sources` source images. Without such a file it is the name, with blanks for underscores.

    Raises:
        ValueError: one line; there are none, or a file is not an image.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
    if not 0 < len(files) <= MAX_PICTURES:
        raise ValueError(f"IMAGES: {folder} has {len(files)} images; give a folder with 1 to {MAX_PICTURES}")
    pictures = []
    for file in files:
        beside = [file.with_suffix(ending) for ending in (".txt", ".jsonl") if file.with_suffix(ending).is_file()]
        records = read_records(str(beside[0]), "IMAGES", sources) if beside else {file.stem.replace("_", " "): {}}
        if len(records) > 1:
            raise ValueError(f"IMAGES: {beside[0]} has {len(records)} prompts; give only that of {file.name}")
        try:
            image = np.array(Image.open(file).convert("RGB"))
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"IMAGES: cannot read {file}: {one_line(error)}; remove it") from None
        ((prompt, metadata),) = records.items()
        pictures.append(Picture(file.name, prompt, image, metadata))
    return pictures
