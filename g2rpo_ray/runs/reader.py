"""Reads a run directory: on this machine or on object storage, of a running or a finished run."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from g2rpo_ray.messages import one_line
from g2rpo_ray.runs.start import METRICS, SOURCES, origin_in_words, read_origin
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.runs.tracking import line_name, read_json, split_lines
from g2rpo_ray.types import FloatArray, Images

MAX_LOG_LINES = 200  # the newest notable ones
NOTABLE = ("WARNING", "ERROR", "INFO WARNING", "INFO learner lost")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out scores and pictures after some iterations."""

    prompts: Sequence[str]
    scores: Mapping[str, FloatArray]  # [P, S] by reward, NaN where missing
    pictures: Sequence[Images]  # [H, W, 3] of the first prompts, seed 0
    panel: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A run directory as data."""

    name: str
    place: str = field(repr=False)  # may contain a key, in the query of a URI
    settings: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl, one an iteration
    evaluations: Mapping[int, Evaluation]  # by iterations done, ascending
    timeline: tuple[int, str] | None  # iteration and SVG
    log: Sequence[str]  # warnings and errors
    summary: Mapping[str, Any] | None
    origin: str = ""  # the checkpoint that it was resumed from, and settings that differ from it
    sources: Sequence[Images] = ()  # [H, W, 3] of the held-out prompts that are shown, where prompts have any

    @property
    def frames(self) -> int:
        """Of a video, whose pictures are strips; 1: pictures."""
        return int(self.settings["model"].get("frames", 1))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of each iteration, counted from 1 (0: before the first), as written in metrics.jsonl."""
        return [dict(line) for line in self.lines]

    @property
    def heldout(self) -> dict[int, dict[str, FloatArray]]:
        """Scores [P, S] of held-out prompts and seeds, by iterations done, then by reward; NaN where missing."""
        return {done: dict(found.scores) for done, found in self.evaluations.items()}

    @property
    def lora(self) -> str:
        """Folder or URI of the adapter, as diffusers reads it."""
        return str(Folder(self.place) / "lora")

    def load_into(self, pipeline: Any) -> None:
        """Add the adapter to a diffusers pipeline of the base model."""
        with Folder(self.lora).reading() as path:
            pipeline.load_lora_weights(str(path))

    def push_to_hub(self, repository: str, *, private: bool = True, token: str | None = None) -> str:
        """Publish the adapter on the Hugging Face hub, with a model card; returns the URL of the commit.

        The card has method, settings, held-out scores and pictures. Settings of the machine and options of rewards are
        omitted.

        Args:
            repository: `owner/name`; created if it does not exist.
            private: whether a created repository is private.
            token: of the hub; default: that of the hub's login.

        Raises:
            ValueError: there is no adapter, or the upload failed.
        """
        from huggingface_hub import HfApi

        from g2rpo_ray.runs.card import write_card

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            write_card(self, Path(folder), repository)
            try:
                api.create_repo(repository, private=private, exist_ok=True)
                made = api.upload_folder(
                    repo_id=repository, folder_path=folder, commit_message=f"Adapter of {self.name}"
                )
            except Exception as error:  # network, authentication, name: the hub client has a class for each
                raise ValueError(f"push_to_hub: {repository} could not be written: {one_line(error)}") from error
        return str(made.commit_url)

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
        """Names of all metrics, in the order of their first appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name != "iteration"))

    def series(self, metric: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Iterations and values at which the metric was written."""
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
        lines, damaged = split_lines(folder.read(METRICS) if folder.exists(METRICS) else b"", "iteration")
        found = sorted(name for name in samples.names() if name.endswith(".json"))
        return Run(
            name=settings["name"],
            place=str(folder),
            settings=settings,
            lines=lines,
            evaluations={int(name.removesuffix(".json")): _evaluation(samples, name) for name in found},
            timeline=_timeline(folder / "timeline"),
            log=[*(f"{line_name(METRICS, number)} is damaged and left out" for number in damaged), *_warnings(folder)],
            summary=read_json(folder, "summary.json") if folder.exists("summary.json") else None,
            origin=origin_in_words(origin) if (origin := read_origin(folder)) else "",
            sources=_sources(samples, settings),
        )
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{place}: not a run that can be read ({type(error).__name__}: {reason})") from None


def _evaluation(samples: Folder, name: str) -> Evaluation:
    record = read_json(samples, name)
    scores = {reward: np.array(given, dtype=np.float32) for reward, given in record["scores"].items()}
    shown = record.get("shown", 0)
    pictures: list[Images] = []
    if shown:
        column = np.array(Image.open(io.BytesIO((samples / "pictures").read(name.replace(".json", ".png")))))
        pictures = np.split(column, shown)
    panel = {key: math.nan if value is None else value for key, value in record.get("panel", {}).items()}
    return Evaluation(record["prompts"], scores, pictures, panel)


def _sources(samples: Folder, settings: Mapping[str, Any]) -> list[Images]:
    pictures = samples / "pictures"
    if not pictures.exists(SOURCES):
        return []
    column = np.array(Image.open(io.BytesIO(pictures.read(SOURCES))))
    return np.split(column, len(column) // settings["model"]["height"])


def _timeline(folder: Folder) -> tuple[int, str] | None:
    drawn = [name for name in folder.names() if name.endswith(".svg")]
    return (int(drawn[-1].removesuffix(".svg")), folder.read(drawn[-1]).decode()) if drawn else None


def _warnings(folder: Folder) -> list[str]:
    """Lines as `2026-11-25 18:09:10,821 WARNING text`."""
    text = folder.read("run.log").decode(errors="replace") if folder.exists("run.log") else ""
    return [line for line in text.splitlines() if line[24:].startswith(NOTABLE)][-MAX_LOG_LINES:]
