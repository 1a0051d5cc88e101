"""The record of a study: a JSON line for each finished run, from which alone all tables and figures are made."""

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
from g2rpo_ray.study.plan import Case
from g2rpo_ray.study.schema import flat
from g2rpo_ray.types import FloatArray, Images

FILE = "record.jsonl"
REFUSED = "learner: the gradient is not finite"  # the learning rate is too high: that is a result
Line = dict[str, Any]


class Record:
    """Lines by key, in a folder; what is added is there after a kill."""

    def __init__(self, folder: Path):
        self.folder, file = folder, folder / FILE
        try:
            self.lines = {line["key"]: line for line in read_lines(file, "key")}
        except OSError as error:
            raise ValueError(f"--output: cannot read {file} ({error}); mend or delete it") from None

    def add(self, line: Line) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / FILE).open("a+b") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)  # without a line that a kill cut off
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
        """The signals of an iteration, and the choices of `auto`: their means go into the next point."""
        self._window.append({name: v for name, v in metrics.items() if name.startswith(("signal/", "choice/"))})

    def look(self, done: int, cost: float, seconds: float, scores: Mapping[str, FloatArray]) -> None:
        """Held-out scores [P, S] after `done` iterations."""
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
        """The record's line."""
        case, config = self._case, self._case.config
        given = flat(config.model_dump(mode="json", exclude_defaults=True))
        by_prompt = {name: [_short(mean_of_present(row)) for row in of] for name, of in self._scores.items()}
        return {
            "key": case.key, "kind": case.kind, "table": case.table, "variant": case.variant, "seed": config.seed,
            "lr": config.learner.lr, "budget": case.budget, **more, "curve": self.points, "scores": by_prompt,
            "settings": {key: value for key, value in given if affects_result(key)},
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip


def picture_file(folder: Path, key: str) -> Path:
    """The pictures of the first prompts of a run that is shown, below each other."""
    return folder / "pictures" / f"{key}.png"


def save_pictures(file: Path, pictures: Sequence[Images]) -> None:
    """Pictures [H, W, 3] below each other."""
    if pictures:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pictures)).save(file)


def _short(value: float) -> float:
    """Five digits: far below what a seed changes."""
    return float(f"{value:.5g}")
