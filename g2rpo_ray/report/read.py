"""What a run has left so far, read from its folder: on this machine or on object storage, going on or ended."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from g2rpo_ray.record.lineage import in_words, read_changes
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import FloatArray, Images

LOG_LINES = 200  # of those worth telling, the newest
WORTH_TELLING = ("WARNING", "ERROR", "INFO WARNING", "INFO learner lost")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out scores and pictures after some iterations."""

    prompts: Sequence[str]
    scores: Mapping[str, FloatArray]  # [P, S] by reward, NaN where missing
    pictures: Sequence[Images]  # [H, W, 3] of the first prompts, seed 0
    panel: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A run's folder as data."""

    name: str
    place: str
    settings: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl, one an iteration
    evaluations: Mapping[int, Evaluation]  # by iterations done, ascending
    timeline: tuple[int, str] | None  # iteration and SVG
    log: Sequence[str]  # warnings and errors
    summary: Mapping[str, Any] | None
    changes: Sequence[str] = ()  # where its lineage began anew, and with which settings, in words

    @property
    def done(self) -> int:
        return int(self.lines[-1]["iteration"]) if self.lines else 0

    @property
    def planned(self) -> int:
        return int(self.settings["iterations"])

    @property
    def trained(self) -> list[str]:
        """Names of the rewards that are trained on."""
        return list(self.settings["rewards"])

    @property
    def unseen(self) -> list[str]:
        return list(self.settings["eval_rewards"])

    @cached_property
    def names(self) -> list[str]:
        """Of all metrics, in the order in which they first appear."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name != "iteration"))

    def series(self, metric: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Iterations and values, where the metric was written."""
        there = [(line["iteration"], line[metric]) for line in self.lines if line.get(metric) is not None]
        return np.array([i for i, _ in there], dtype=int), np.array([value for _, value in there], dtype=float)

    def total(self, metric: str) -> float:
        return float(self.series(metric)[1].sum())


def read_run(place: str) -> Run:
    """The run in a folder or at a URI.

    Raises:
        ValueError: one line; it holds no run that can be read.
    """
    try:
        folder = Folder(place)
        if not folder.exists("config.yaml"):
            raise ValueError(f"{place} has no config.yaml; name a run's folder, such as runs/quickstart, or its URI")
        settings = yaml.safe_load(folder.read("config.yaml"))
        samples = folder / "samples"
        found = sorted(name for name in samples.names() if name.endswith(".json"))
        return Run(
            name=settings["name"],
            place=str(folder).partition("?")[0],
            settings=settings,
            lines=_lines(folder, "metrics.jsonl"),
            evaluations={int(name.removesuffix(".json")): _evaluation(samples, name) for name in found},
            timeline=_timeline(folder / "timeline"),
            log=_warnings(folder),
            summary=json.loads(folder.read("summary.json")) if folder.exists("summary.json") else None,
            changes=[in_words(line) for line in read_changes(folder)],
        )
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{place}: not a run that can be read ({type(error).__name__}: {reason})") from None


def _lines(folder: Folder, file: str) -> list[dict[str, Any]]:
    text = folder.read(file).decode() if folder.exists(file) else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]  # a whole line ends with a newline


def _evaluation(samples: Folder, name: str) -> Evaluation:
    record = json.loads(samples.read(name))
    scores = {reward: np.array(given, dtype=np.float32) for reward, given in record["scores"].items()}
    shown = record.get("shown", 0)
    pictures: list[Images] = []
    if shown:
        column = np.array(Image.open(io.BytesIO((samples / "pictures").read(name.replace(".json", ".png")))))
        pictures = np.split(column, shown)
    panel = {key: math.nan if value is None else value for key, value in record.get("panel", {}).items()}
    return Evaluation(record["prompts"], scores, pictures, panel)


def _timeline(folder: Folder) -> tuple[int, str] | None:
    drawn = [name for name in folder.names() if name.endswith(".svg")]
    return (int(drawn[-1].removesuffix(".svg")), folder.read(drawn[-1]).decode()) if drawn else None


def _warnings(folder: Folder) -> list[str]:
    """Lines as `2026-11-25 18:09:10,821 WARNING text`."""
    text = folder.read("run.log").decode(errors="replace") if folder.exists("run.log") else ""
    return [line for line in text.splitlines() if line[24:].startswith(WORTH_TELLING)][-LOG_LINES:]
