"""Scores of an evaluation, saved as they arrive, so that an interrupted evaluation resumes."""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from g2rpo_ray.runs.tracking import append_line, mend_lines, write_lines
from g2rpo_ray.types import Cell, FloatArray, Images

FILE = "scores.jsonl"


class ScoreBook:
    """Scores (lines of `scores.jsonl`) and images of cells, in a folder. One process at a time may write."""

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            lines = mend_lines(folder / FILE, "key")
        except OSError as error:
            raise ValueError(f"--output: cannot read {folder / FILE} ({error}); delete it to score again") from None
        self._scores: dict[tuple[str, int | None, str], dict[str, FloatArray]] = {
            (line["key"], line["steps"], line["prompt"]): {
                name: np.array(scores, dtype=np.float32) for name, scores in line["scores"].items()
            }
            for line in lines
        }
        if lines:  # removes a line that a kill cut off
            write_lines(folder / FILE, lines)

    def has(self, cell: Cell) -> bool:
        return cell.name in self._scores and (not cell.shown or self._picture_file(cell).exists())

    def scores(self, cell: Cell, reward: str) -> FloatArray:
        """Scores [S] by seed, NaN where missing."""
        return self._scores[cell.name][reward]

    def picture(self, cell: Cell) -> Images:
        """The image [H, W, 3] of the first seed."""
        return np.array(Image.open(self._picture_file(cell)))

    def add(self, cell: Cell, scores: dict[str, FloatArray], picture: Images | None) -> None:
        """Saves the image, then the scores, so that a cell is never incomplete."""
        if picture is not None:
            file = self._picture_file(cell)
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.partial")
            Image.fromarray(picture).save(aside, format="PNG")
            os.replace(aside, file)
        key, steps, prompt = cell.name
        lists = {name: by_seed.tolist() for name, by_seed in scores.items()}
        append_line(self._folder / FILE, {"key": key, "steps": steps, "prompt": prompt, "scores": lists})
        self._scores[cell.name] = scores

    def _picture_file(self, cell: Cell) -> Path:
        prompt = hashlib.sha256(cell.unit.prompt.encode()).hexdigest()[:16]
        return self._folder / "pictures" / f"{cell.key}-{cell.unit.steps}-{prompt}.png"
