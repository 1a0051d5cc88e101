"""`edit_quickstart` for the builder: which edits it trains on, and how large and how long trained the model is."""

import base64
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from g2rpo_ray.world_builder.world import EditWorld, Pictures
from g2rpo_ray.worlds.edit_quickstart import draw
from g2rpo_ray.worlds.edit_quickstart.draw import ATTRIBUTES, EDITS, IMAGE_SIZE, THINGS, Edit, Thing, edited
from g2rpo_ray.worlds.edit_quickstart.rules import edit_done, rest_kept
from g2rpo_ray.worlds.quickstart.shapes import SHAPES

JITTERS = 40  # positions and sizes that each thing is drawn at
OTHER_VALUE, OTHER_CHANGE = 0.4, 0.45
"""Of pre-training edits give another value than the instruction, and change another attribute: what RL puts right."""
TRAIN, HELDOUT = 96, 32  # prompts for RL

Case = tuple[Thing, draw.Jitter, Edit]


def _is_held_out(thing: Thing) -> bool:
    """A quarter of the pairs of colour and shape: every colour and every shape is in both parts."""
    return (ATTRIBUTES["colour"].index(thing.colour) + SHAPES.index(thing.shape)) % 4 == 0


@cache
def _cases() -> tuple[list[Case], list[Case]]:
    """Prompts for RL to train on and held-out ones. Kinds of edits take turns; each changes something."""
    rng, parts = np.random.default_rng(0), list[list[Case]]()
    for number, held_out in ((TRAIN, False), (HELDOUT, True)):
        things, part = [thing for thing in THINGS if _is_held_out(thing) == held_out], list[Case]()
        while len(part) < number:
            attribute = list(ATTRIBUTES)[len(part) % len(ATTRIBUTES)]
            thing = things[rng.integers(len(things))]
            edits = [edit for edit in EDITS if edit.attribute == attribute and edited(thing, edit) != thing]
            part.append((thing, draw.draw_jitter(rng), edits[rng.integers(len(edits))]))
        parts.append(part)
    return parts[0], parts[1]


def _write_prompts(folder: Path) -> None:
    for split, cases in zip(("train", "heldout"), _cases(), strict=True):
        rows = [{"prompt": str(edit), "source": _data_uri(draw.draw(thing, place))} for thing, place, edit in cases]
        (folder / f"prompts_{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _data_uri(picture: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _pictures() -> Pictures:
    """Every thing at each of JITTERS places: number thing · JITTERS + place."""
    rng = np.random.default_rng(1)
    places = [draw.draw_jitter(rng) for _ in range(JITTERS)]
    return np.stack([draw.draw(thing, place) for thing in THINGS for place in places])


@cache
def _results() -> Tensor:
    """The number of the thing that comes of each thing by each edit, [192, 18]."""
    number = {thing: at for at, thing in enumerate(THINGS)}
    return torch.tensor([[number[edited(thing, edit)] for edit in EDITS] for thing in THINGS])


def _random_edits(attributes: Tensor) -> Tensor:
    """Numbers of edits with any value of each of these attributes."""
    counts = torch.tensor([len(values) for values in ATTRIBUTES.values()])
    first = counts.cumsum(0) - counts
    return first[attributes] + (torch.rand(len(attributes)) * counts[attributes]).long()


def _lesson(number: int) -> tuple[Tensor, Tensor, Tensor]:
    things, places = torch.randint(len(THINGS), (number,)), torch.randint(JITTERS, (number,))
    attributes = torch.randint(len(ATTRIBUTES), (number,))
    edits = _random_edits(attributes)
    made = torch.where(torch.rand(number) < OTHER_VALUE, _random_edits(attributes), edits)
    results = _results()[things, made]
    others = (attributes + torch.randint(1, len(ATTRIBUTES), (number,))) % len(ATTRIBUTES)
    changed = _results()[results, _random_edits(others)]
    results = torch.where(torch.rand(number) < OTHER_CHANGE, changed, results)
    return things * JITTERS + places, results * JITTERS + places, edits


def _examples() -> tuple[Pictures, list[str]]:
    _, cases = _cases()
    return np.stack([draw.draw(thing, place) for thing, place, _ in cases]), [str(edit) for *_, edit in cases]


def _right(sources: Pictures, results: Pictures, texts: Sequence[str]) -> dict[str, float]:
    known = [{"source": (source,)} for source in sources]
    done, kept = (reward.score(results, texts, known) for reward in (edit_done(), rest_kept()))
    return {"edit": float(done.mean()), "rest": float(kept.mean()), "all": float((done * kept).mean())}


WORLD = EditWorld(
    root=Path(draw.__file__).parent,
    image_size=IMAGE_SIZE,
    instructions=tuple(map(str, EDITS)),
    tokens=8,
    autoencoder={"block_out_channels": (8, 16, 32, 32), "latent_channels": 8},
    text={"width": 32, "heads": 2},
    transformer={"num_layers": 1, "num_single_layers": 3, "num_attention_heads": 3},
    pictures=_pictures,
    lesson=_lesson,
    prompts=_write_prompts,
    examples=_examples,
    right=_right,
    autoencoder_steps=1500,
    autoencoder_batch=32,
    autoencoder_kl=1e-5,
    transformer_steps=3000,
    transformer_batch=64,
)
