"""The run directory: configuration, metrics, pictures, held-out scores and the summary of a run."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from g2rpo_ray.analysis.grid import picture_grid
from g2rpo_ray.analysis.statistics import compare, compare_all, interval, judges
from g2rpo_ray.analysis.tables import before_and_after
from g2rpo_ray.config import Config, dump_config
from g2rpo_ray.config.schema import PanelName
from g2rpo_ray.messages import number
from g2rpo_ray.runs.audit import AUDIT
from g2rpo_ray.runs.checkpoint import is_evaluated
from g2rpo_ray.runs.hacking import decline, hacked, panel, tripped
from g2rpo_ray.runs.lease import LeaseLost
from g2rpo_ray.runs.start import SOURCES, first_iteration, origin_in_words, read_origin
from g2rpo_ray.runs.storage import Folder, replace_text
from g2rpo_ray.runs.timeline import write_timeline
from g2rpo_ray.runs.tracking import Metrics, Sink, Tracker, json_lines, read_json, read_lines, to_json
from g2rpo_ray.runs.training_checks import TrainingChecks
from g2rpo_ray.types import FloatArray, Images, Samples, Span

logger = logging.getLogger(__name__)

HACKING_WINDOW = 20  # iterations over which trained and judging rewards are compared


class Journal:
    """Records a run, iteration by iteration; a resumed run appends to its record."""

    def __init__(
        self, config: Config, run: Path, done: int, sinks: Sequence[Sink] = (), kept: Folder | None = None,
        guard: Callable[[], None] = lambda: None, sources: Sequence[Images] = (),
    ):  # fmt: skip
        """
        Args:
            run: the run directory, or a copy of it on this machine.
            kept: where the run is kept, if that is another place: `keep` brings what is new there.
            guard: called before anything is written; raises LeaseLost where nothing may be.
            sources: of the held-out prompts that are shown, of the size of results, where prompts have any.
        """
        self._config, self._run, self._kept, self.guard = config, run, kept, guard
        self.first = first_iteration(Folder(run))
        """The iteration at which the run started; held-out scores are compared with those there."""
        self._kept_at = 0.0
        self._spans: list[Span] = []
        (run / "samples" / "pictures").mkdir(parents=True, exist_ok=True)
        self._sources = {"source": sources} if sources else {}
        if sources:
            Image.fromarray(np.concatenate(sources)).save(run / "samples" / "pictures" / SOURCES)
        origin = read_origin(Folder(run))
        header = f"# {origin_in_words(origin)}\n" if origin else ""
        replace_text(run / "config.yaml", header + dump_config(config))
        self._tracker = Tracker(config, run, done, sinks)
        self._audit = json_lines(run / AUDIT, done)
        self.stopped_by: list[PanelName] = []
        """Names of the panel's numbers that end the run, by `evaluation.stop_on`."""
        if origin and done == self.first:
            self.say(origin_in_words(origin))
        self._means: tuple[int, dict[str, float]] = (0, {})  # of the evaluation after so many iterations
        self._checks = TrainingChecks(config)
        self._window: deque[Metrics] = deque(maxlen=HACKING_WINDOW)
        self._seconds: dict[str, float] = {}
        self._lost, self._rewinds = 0.0, 0
        self._start = self._safe_at = time.perf_counter()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tracker.close()
        with suppress(LeaseLost):
            self.keep()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time inside as `timing_s/<phase>` of the next line."""
        started, start = time.time(), time.perf_counter()
        self._tracker.phase(phase)
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
            self._spans.append(Span("run", "driver", phase, started, seconds))

    def keep(self) -> None:
        """Bring what was written since the last call to where the run is kept: a checkpoint is there, or almost."""
        self.guard()
        self._safe_at = time.perf_counter()
        if self._kept and self._kept.path != self._run:
            now = time.time()
            self._kept.take(self._run, newer_than=self._kept_at)
            self._kept_at = now

    def rewind(self, done: int, planned: bool = False) -> None:
        """Forget what was written after `done` iterations: the learner starts again from there.

        The time since the last checkpoint is lost; it goes into the next line, with a restart unless it was `planned`.
        """
        self._lost += time.perf_counter() - self._safe_at
        self._rewinds += not planned
        self._tracker.rewind(done)
        self._audit = json_lines(self._run / AUDIT, done)

    def start_clock(self) -> None:
        """Estimate the time that is left from now on: the start took longer than an iteration."""
        self._tracker.start_clock()

    def say(self, line: str) -> None:
        self._tracker.say(line)

    def heldout(
        self, done: int, samples: Samples, distance: float = math.nan, ema: Samples | None = None
    ) -> float | None:
        """Keep the scores after `done` iterations and draw the pictures; the means go into that iteration's line.

        Returns the policy's score, by which BEST is chosen; None where a reward that it needs is missing, or where the
        hacking panel ends the run, for a policy that exploits its rewards is not the best one.
        """
        self.guard()
        lists = {name: scores.tolist() for name, scores in samples.scores.items()}
        start = samples.scores if done == self.first else _read_scores(self._run, self.first)
        weights = {name: reward.weight for name, reward in self._config.rewards.items() if name in samples.scores}
        earlier = [_read_scores(self._run, at) for at in evaluations_before(self._run, done)]
        unseen = list(self._config.eval_rewards)
        values = panel(samples.traces, samples.scores, start, unseen, distance, weights, earlier)
        record = {"prompts": samples.prompts, "shown": len(samples.pictures), "scores": lists, "panel": values}
        averaged = {} if ema is None else ema.scores
        record |= {"ema": {name: scores.tolist() for name, scores in averaged.items()}}
        if samples.pictures:
            first = self._keep_pictures(done, samples.pictures)
            columns = {**self._sources, self._first_column(): first, f"iteration {done}": samples.pictures}
            columns |= {"its average": ema.pictures} if ema else {}
            shown = samples.prompts[: len(samples.pictures)]
            picture_grid(self._run / "samples" / f"{done:06d}.png", shown, columns, self._config.model.frames)
        replace_text(self._run / "samples" / f"{done:06d}.json", to_json(record) + "\n")
        means = {name: interval(scores).mean for name, scores in samples.scores.items()}
        self.say(
            f"held-out after {done} iterations: " + ", ".join(f"{name} {number(mean)}" for name, mean in means.items())
        )
        panels = {f"panel/{name}": value for name, value in values.items()}
        of_scores = {f"heldout/{name}/mean": mean for name, mean in means.items()}
        of_scores |= {f"heldout_ema/{name}/mean": interval(scores).mean for name, scores in averaged.items()}
        evaluations = samples.evaluations + (ema.evaluations if ema else 0)
        self._means = done, {**of_scores, **panels, "heldout/evaluations": evaluations}
        if self._line(done):  # of an iteration whose evaluation was interrupted
            self._tracker.amend(done, self._means[1])
        elif done == self.first:
            self._write(done, {})
        passed = passed_limits(Folder(self._run), done)
        self.say("hacking panel: " + ", ".join(f"{name} {number(value, '.3g')}" for name, value in values.items()))
        for line in passed.values():
            self.say(f"WARNING: hacking panel: {line}")
        self.stopped_by = sorted(passed.keys() & set(self._config.evaluation.stop_on))
        return None if self.stopped_by else self._score(start, samples.scores)

    def _score(self, start: Mapping[str, FloatArray], now: Mapping[str, FloatArray]) -> float | None:
        """The weighted sum of the trained rewards' means, None where one is missing. A mean is the start's and the
        paired rise since: a prompt whose scores are missing now makes no policy look better."""
        names = judges(self._config.rewards, self._config.eval_rewards, start)
        means = {name: interval(start[name]).mean + compare(start[name], now[name]).difference for name in names}
        if missing := [name for name, mean in means.items() if math.isnan(mean)]:
            self.say(f"WARNING: no held-out scores of {', '.join(missing)}: this policy can't be the best one (BEST)")
        elif means:
            return sum(self._config.all_rewards[name].weight * mean for name, mean in means.items())
        return None

    def distance(self, done: int) -> float:
        """Distance of the LoRA after `done` iterations to the one at the run's start; NaN if unknown."""
        if done == self.first:
            return math.nan if done else 0.0
        known = self._line(done).get("lora/distance")
        return math.nan if known is None else known

    def _line(self, done: int) -> dict[str, Any]:
        """The recorded metrics of an iteration; empty if there are none."""
        lines = read_lines(self._run / "metrics.jsonl")
        return next((line for line in lines if line["iteration"] == done), {})

    def iteration(
        self, done: int, metrics: Metrics, counts: Metrics, spans: Sequence[Span] = (),
        audit: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write the line of iteration number `done`, counted from 1, and its timeline if that is due.

        Args:
            metrics: of rollout and update.
            counts: of actors and faults, since the last line.
            spans: what the actors did since then.
            audit: see `g2rpo_ray.runs.audit`.
        """
        every = self._config.tracking.timeline_every
        if every and spans and (done == 1 or done % every == 0):
            write_timeline(self._run, done, [*spans, *self._spans])
        self._spans.clear()
        again = {"perf/lost_s": counts.get("perf/lost_s", 0.0) + self._lost, "learner/restarts": self._rewinds}
        counts = {**counts, **again}
        self._lost, self._rewinds = 0.0, 0
        self._write(done, {**metrics, **counts})
        if audit:
            self._audit(done, audit)
        for line in self._checks.lines(metrics):
            self.say(line)
        self._tracker.advance({name: metrics[f"reward/{name}/mean"] for name in self._config.rewards})
        self._window.append(metrics)
        if done % HACKING_WINDOW == 0 and hacked(
            self._window, list(self._config.rewards), list(self._config.eval_rewards)
        ):
            self.say(
                f"WARNING: over the last {HACKING_WINDOW} iterations the trained rewards rose on deterministic samples "
                "and all of eval_rewards fell: look at samples/, the policy may exploit what it is trained on"
            )

    def _write(self, done: int, metrics: Metrics) -> None:
        seconds = {f"timing_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        step = {"timing_s/step": time.perf_counter() - self._start}
        evaluated, means = self._means
        self.guard()
        self._tracker.log(done, {**metrics, **(means if evaluated == done else {}), **step, **seconds})
        self._seconds, self._start = {}, time.perf_counter()

    def _first_column(self) -> str:
        return f"iteration {self.first}" if self.first else "base"

    def _keep_pictures(self, done: int, pictures: Sequence[Images]) -> Sequence[Images]:
        """Write the pictures below each other in a PNG, for the report and for a resumed run; those of the base."""
        folder = self._run / "samples" / "pictures"
        Image.fromarray(np.concatenate(pictures)).save(folder / f"{done:06d}.png")
        return np.split(np.array(Image.open(folder / f"{self.first:06d}.png")), len(pictures))


def is_finished(config: Config, run: Folder, done: int) -> bool:
    """Whether a run with a checkpoint after `done` iterations has nothing left to do."""
    return is_evaluated(run, done) and (done >= config.iterations or is_stopped(config, run, done))


def is_stopped(config: Config, run: Folder, done: int) -> bool:
    """Whether the hacking panel ends the run after these iterations, by `evaluation.stop_on`."""
    stop_on = config.evaluation.stop_on
    return bool(stop_on) and is_evaluated(run, done) and not passed_limits(run, done).keys().isdisjoint(stop_on)


def passed_limits(run: Folder, done: int) -> dict[PanelName, str]:
    """The panel's numbers beyond their limits after these iterations, with a sentence each; empty if not evaluated."""
    first = first_iteration(run)
    try:
        values, base = (read_json(run / "samples", f"{at:06d}.json")["panel"] for at in (done, first))
    except OSError:
        return {}
    return tripped(*({name: math.nan if v is None else v for name, v in made.items()} for made in (values, base)))


def summarize(config: Config, run: Path, done: int) -> str:
    """Write summary.json of a run that is finished after `done` iterations; the held-out comparison as a table."""
    lines, origin = read_lines(run / "metrics.jsonl", "iteration"), read_origin(Folder(run))
    first = first_iteration(Folder(run))
    start = _read_scores(run, first)
    comparisons, averaged = (compare_all(start, _read_scores(run, done, of)) for of in ("scores", "ema"))
    summary = {
        "iterations": done,
        "resumed_from": origin,
        "stopped_by": sorted(set(config.evaluation.stop_on) & passed_limits(Folder(run), done).keys()),
        "heldout": {name: asdict(found) for name, found in comparisons.items()},
        **({"heldout_ema": {name: asdict(found) for name, found in averaged.items()}} if averaged else {}),
        "evaluations": sum(int(line.get("rollout/evaluations", 0)) for line in lines),
        "seconds": {
            phase: sum(line.get(f"timing_s/{phase}", 0.0) for line in lines)
            for phase in ("step", "rollout", "reward", "update", "broadcast", "evaluation", "checkpoint")
        },
        "restarts": sum(int(line.get("pool/restarts", 0)) for line in lines),
        "lost_s": sum(line.get("perf/lost_s", 0.0) for line in lines),
    }
    replace_text(run / "summary.json", to_json(summary, indent=2) + "\n")
    note = f"\nbefore: after {first} iterations, at the start of this run" if first else ""
    tables = [before_and_after(comparisons, list(config.rewards))]
    tables += ["Its average (lora_ema/):", before_and_after(averaged, list(config.rewards))] if averaged else []
    return "\n\n".join(tables) + note


def has_declined(config: Config, run: Path, done: int, since: int) -> bool:
    """Whether the trained rewards after `done` iterations are significantly below the best evaluation from `since` on.

    Evaluations at the end of a run that was extended later do not count, for they depend on where it ended.
    """
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    every, first = config.evaluation.every, first_iteration(Folder(run))
    regular = [at for at in evaluations_before(run, done) if at >= since and (at == first or at % every == 0)]
    return decline(_read_scores(run, done), weights, [_read_scores(run, at) for at in regular]) < 0


def evaluations_before(run: Path, done: int) -> list[int]:
    """Iterations after which the run was evaluated, of those before `done`."""
    names = (file.stem for file in (run / "samples").glob("*.json"))
    return sorted(int(name) for name in names if name.isdecimal() and int(name) < done)


def _read_scores(run: Path, done: int, of: str = "scores") -> dict[str, FloatArray]:
    """Of the policy, or of its average (`ema`), if it has one."""
    record = read_json(Folder(run / "samples"), f"{done:06d}.json")
    return {name: np.array(scores, dtype=np.float32) for name, scores in record.get(of, {}).items()}
