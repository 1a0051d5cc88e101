"""Metrics to the console, JSON lines, TensorBoard and Weights & Biases; pictures to PNG."""

import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from g2rpo_ray.config import Config
from g2rpo_ray.runs.storage import Folder, replace_text

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]
Sink = Callable[[int, Metrics], object]
"""Takes an iteration, counted from 1 (0: before the first), and its metrics."""
WANDB_ID = "wandb_id"  # file of the run directory: a resumed run is the same run of W&B


class Tracker:
    """Hands an iteration's metrics to every sink. On resume, what a dead run wrote after its checkpoint is dropped."""

    def __init__(self, config: Config, run: Path, done: int, sinks: Sequence[Sink] = ()):
        redirected = ExitStack()
        redirected.enter_context(
            logging_redirect_tqdm()
        )  # a warning stands above the progress bar, on a line of its own
        self._closers: list[Callable[[], None]] = [log_to(run / "run.log"), redirected.close]
        self._lines = run / "metrics.jsonl"
        self._sinks: list[Sink] = [json_lines(self._lines, done), *sinks]
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

    def amend(self, iteration: int, metrics: Metrics) -> None:
        """Add metrics to those of an iteration that has its line."""
        lines = read_lines(self._lines)
        write_lines(self._lines, [{**line, **metrics} if line["iteration"] == iteration else line for line in lines])
        for sink in self._sinks[1:]:
            sink(iteration, metrics)

    def rewind(self, done: int) -> None:
        """Go back to `done` iterations; what charts already show is drawn over."""
        self._sinks[0] = json_lines(self._lines, done)
        self._bar.n = done
        self._bar.refresh()

    def phase(self, phase: str) -> None:
        """Show the current phase before the progress bar; in a log file, with its next line."""
        self._bar.set_description_str(f"{self._name}, {phase}", refresh=sys.stderr.isatty())

    def start_clock(self) -> None:
        """Count the progress bar's time from now on."""
        self._bar.unpause()

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

        file = run / WANDB_ID
        if not file.exists():
            replace_text(file, uuid.uuid4().hex)
        session = wandb.init(
            project=config.tracking.wandb_project, id=file.read_text(), resume="allow", name=config.name, dir=str(run),
            config=config.model_dump(mode="json"), allow_val_change=True,
        )  # fmt: skip
        # not W&B's own step, which must rise: a run that goes on writes iterations again that came after its checkpoint
        session.define_metric("*", step_metric="iteration")
        self._closers.append(session.finish)
        self._sinks.append(lambda iteration, metrics: session.log({"iteration": iteration, **metrics}))


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


def json_lines(path: Path, done: int) -> Callable[[int, Mapping[str, Any]], None]:
    """A sink that appends an object an iteration to a file, of which only the first `done` iterations are kept.

    Damaged lines of it are set aside: see `mend_lines`.
    """
    write_lines(path, [line for line in mend_lines(path, "iteration") if line["iteration"] <= done] if done else [])
    return lambda iteration, metrics: append_line(path, {"iteration": iteration, **metrics})


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON, in which a number that is not finite, such as the mean of no scores, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(folder: Folder, file: str) -> Any:
    """The content of a JSON file. ValueError if it is damaged."""
    try:
        return json.loads(folder.read(file).decode())
    except ValueError as error:
        raise ValueError(f"{folder / file} is damaged, not JSON ({error}); restore it") from None


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an object to a JSON lines file; it outlives a power cut."""
    with path.open("a") as file:
        file.write(to_json(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Make objects the content of a JSON lines file."""
    replace_text(path, "".join(to_json(entry) + "\n" for entry in entries))


def read_lines(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without the line that a killed run may have left half written.

    A damaged line is left out, with a warning; so is an object without `key`.
    """
    lines, damaged = split_lines(path.read_bytes() if path.exists() else b"", key)
    for number in damaged:
        logger.warning("%s is damaged and left out", line_name(path, number))
    return lines


def mend_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """As `read_lines`, of a file that is this process's to write: a damaged line moves to `<name>.damaged` beside it.

    A power cut leaves such lines, of zeros, where the file's length was written and its content was not.
    """
    lines, damaged = split_lines(path.read_bytes() if path.exists() else b"", key)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in damaged.values())
        write_lines(path, lines)
        for number in damaged:
            logger.warning("%s is damaged: moved to %s", line_name(path, number), aside.name)
    return lines


def line_name(file: object, number: int) -> str:
    """The name of a line in messages, counted from 1."""
    return f"{file}, line {number}"


def split_lines(content: bytes, key: str | None = None) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The objects of JSON lines, and by its number, from 1, each line that is no JSON object, or has no such key.

    A whole line ends with a newline; what follows the last one is in neither.
    """
    lines, damaged = list[dict[str, Any]](), dict[int, bytes]()
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line.decode())  # of bytes with zeros, json.loads would guess another encoding
        except ValueError:
            entry = None
        if isinstance(entry, dict) and (key is None or key in entry):
            lines.append(entry)
        else:
            damaged[number] = line
    return lines, damaged
