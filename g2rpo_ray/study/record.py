"""The record of a study: a JSON line for each finished run. All tables and figures are made from it."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from g2rpo_ray.analysis.statistics import interval
from g2rpo_ray.config.resume import affects_result
from g2rpo_ray.rollout.metrics import mean_of_present
from g2rpo_ray.runs.tracking import read_lines, to_json
from g2rpo_ray.study.plan import Case, settings_given
from g2rpo_ray.types import FloatArray, Images

FILE = "record.jsonl"
REFUSED = "learner: the gradient is not finite"  # a result: the learning rate is too high
Line = dict[str, Any]


class Record:
    """Lines by key, in a folder. An added line survives a kill."""

    def __init__(self, folder: Path):
        self.folder, file = folder, folder / FILE
        try:
            self.lines = {line["key"]: line for line in read_lines(file, "key")}
        except OSError as error:
            raise ValueError(f"--output: cannot read {file} ({error}); repair or delete it") from None

    def add(self, line: Line) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / FILE).open("a+b") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)  # removes a line that a kill cut off
            file.write(to_json(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[line["key"]] = line


class Curve:
    """The results of a run at each look."""

    def __init__(self, case: Case):
        self._case, self.points = case, list[Line]()
        self._scores: Mapping[str, FloatArray] = {}
        self._window: list[Mapping[str, float]] = []

    def iteration(self, metrics: Mapping[str, float]) -> None:
        """Adds an iteration's signals and choices of `auto`, whose means are part of the next point."""
        self._window.append({name: v for name, v in metrics.items() if name.startswith(("signal/", "choice/"))})

    def look(self, done: int, cost: float, seconds: float, scores: Mapping[str, FloatArray]) -> None:
        """Adds a point: held-out scores [prompts, seeds] by reward after `done` iterations."""
        names = dict.fromkeys(name for signals in self._window for name in signals)
        signals = {name.removeprefix("signal/"): _short(self._mean(name)) for name in names}
        means = {name: _short(interval(of).mean) for name, of in scores.items()}
        point = {"iteration": done, "cost": round(cost), "seconds": round(seconds, 1), "means": means}
        self.points.append({**point, **({"signals": signals} if signals else {})})
        self._scores, self._window = scores, []

    def _mean(self, name: str) -> float:
        values = np.array([metrics[name] for metrics in self._window if name in metrics], np.float32)
        return mean_of_present(values)

    def line(self, **more: Any) -> Line:
        """The line of the record, with additional fields `more`."""
        case, config = self._case, self._case.config
        by_prompt = {name: [_short(mean_of_present(row)) for row in of] for name, of in self._scores.items()}
        return {
            "key": case.key, "kind": case.kind, "table": case.table, "variant": case.variant, "seed": config.seed,
            "lr": config.learner.lr, "budget": case.budget, **more, "curve": self.points, "scores": by_prompt,
            "settings": {key: value for key, value in settings_given(config).items() if affects_result(key)},
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip


def picture_file(folder: Path, key: str) -> Path:
    """File of the images of a run's first prompts, stacked vertically."""
    return folder / "pictures" / f"{key}.png"


def save_pictures(file: Path, pictures: Sequence[Images]) -> None:
    """Writes images [H, W, 3], stacked vertically."""
    if pictures:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pictures)).save(file)


def _short(value: float) -> float:
    """Rounded to five digits, far below the difference between seeds."""
    return float(f"{value:.5g}")
