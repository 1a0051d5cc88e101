"""Metrics to the console, JSON lines, TensorBoard and Weights & Biases; pictures to PNG."""

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from g2rpo_ray.config import Config
from g2rpo_ray.record.storage import replace_text

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]
Sink = Callable[[int, Metrics], None]


class Tracker:
    """Hands an iteration's metrics to every sink. On resume, what a dead run wrote after its checkpoint is dropped."""

    def __init__(self, config: Config, run: Path, done: int, sinks: Sequence[Sink] = ()):
        self._lines = run / "metrics.jsonl"
        self._sinks: list[Sink] = [json_lines(self._lines, done), *sinks]
        redirected = ExitStack()
        redirected.enter_context(
            logging_redirect_tqdm()
        )  # a warning stands above the progress bar, on a line of its own
        self._closers: list[Callable[[], None]] = [log_to(run / "run.log"), redirected.close]
        if config.tracking.tensorboard:
            self._add_tensorboard(run / "tensorboard", done)
        if config.tracking.wandb_project:
            self._add_wandb(config, run)
        self._name = config.name
        self._bar = tqdm(total=config.iterations, initial=done, unit="iteration", desc=config.name, dynamic_ncols=True)

    def log(self, iteration: int, metrics: Metrics) -> None:
        """Hand the metrics of one iteration, counted from 1 (0: before the first), to every sink."""
        for sink in self._sinks:
            sink(iteration, metrics)

    def rewind(self, done: int) -> None:
        """Go back to `done` iterations; what charts already show is drawn over."""
        self._sinks[0] = json_lines(self._lines, done)
        self._bar.n = done
        self._bar.refresh()

    def phase(self, phase: str) -> None:
        """What is done now, in front of the progress bar; where lines are kept, with its next one."""
        self._bar.set_description_str(f"{self._name}, {phase}", refresh=sys.stderr.isatty())

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Move the progress bar on by an iteration, with these numbers beside it."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
        self._bar.update()

    def say(self, line: str) -> None:
        """A line for the user, above the progress bar."""
        self._bar.write(line)
        logger.info("%s", line)

    def close(self) -> None:
        self._bar.close()
        for close in self._closers:
            close()

    def _add_tensorboard(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory), purge_step=done + 1)
        self._closers.append(writer.close)

        def sink(iteration: int, metrics: Metrics) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, iteration)

        self._sinks.append(sink)

    def _add_wandb(self, config: Config, run: Path) -> None:
        import wandb

        session = wandb.init(
            project=config.tracking.wandb_project, name=config.name, dir=str(run), config=config.model_dump(mode="json")
        )
        self._closers.append(session.finish)
        self._sinks.append(lambda iteration, metrics: session.log(dict(metrics), step=iteration))


def log_to(file: Path) -> Callable[[], None]:
    """Write what our packages log, INFO included, to a file, and warnings alone to the console; ends when called."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for console in logging.getLogger().handlers:
        console.setLevel(logging.WARNING)
    loggers = [logging.getLogger(package) for package in ("g2rpo_ray", "actors", "learner")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)

    def close() -> None:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()

    return close


def json_lines(path: Path, done: int) -> Sink:
    """A sink that appends an object an iteration to a file, of which only the first `done` iterations are kept."""
    kept = [line for line in read_lines(path) if line["iteration"] <= done] if done else []
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def sink(iteration: int, metrics: Metrics) -> None:
        with path.open("a") as file:
            file.write(to_json({"iteration": iteration, **metrics}) + "\n")

    return sink


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON, in which a number that is not finite, such as the mean of no scores, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without the line that a killed run may have left half written."""
    return parse_lines(path.read_text() if path.exists() else "")


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The objects of JSON lines; a whole line ends with a newline."""
    return [json.loads(line) for line in text.split("\n")[:-1]]
