"""The run directory: configuration, metrics, pictures, held-out scores and the summary of a run."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from g2rpo_ray.config import Config, dump_config
from g2rpo_ray.config.schema import PanelName
from g2rpo_ray.record.heldout import compare_all, picture_grid, table
from g2rpo_ray.record.lease import LeaseLost
from g2rpo_ray.record.lineage import in_words, judged_since, read_changes
from g2rpo_ray.record.metrics import hacked, mean_of_present, rollout_metrics
from g2rpo_ray.record.panel import panel, tripped
from g2rpo_ray.record.storage import Folder, replace_text
from g2rpo_ray.record.timeline import write_timeline
from g2rpo_ray.record.tracking import Metrics, Sink, Tracker, read_lines, to_json
from g2rpo_ray.types import FloatArray, Images, Rollout, Samples, Span
from g2rpo_ray.words import number

logger = logging.getLogger(__name__)

HACKING_WINDOW = 20  # iterations over which trained and judging rewards are compared


class Journal:
    """Writes down what happens in a run, iteration by iteration; a run that goes on finds what it had written."""

    def __init__(
        self, config: Config, run: Path, done: int, sinks: Sequence[Sink] = (), kept: Folder | None = None,
        guard: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """
        Args:
            run: the run directory, or a copy of it on this machine.
            kept: where the run is kept, if that is another place: `keep` brings what is new there.
            guard: called before anything is written; raises LeaseLost where nothing may be.
        """
        self._config, self._run, self._kept, self.guard = config, run, kept, guard
        changes = read_changes(Folder(run))
        self.judged_since = judged_since(changes)
        """Held-out scores since this iteration can be compared."""
        self._kept_at = 0.0
        self._spans: list[Span] = []
        (run / "samples" / "pictures").mkdir(parents=True, exist_ok=True)
        replace_text(run / "config.yaml", dump_config(config))
        self._tracker = Tracker(config, run, done, sinks)
        self.stopped_by: list[PanelName] = []
        """What of the hacking panel ends the run, by `evaluation.stop_on`."""
        for line in changes[-1:]:
            if line["iteration"] == done:
                self.say(in_words(line))
        self._means: tuple[int, dict[str, float]] = (0, {})  # of the evaluation after so many iterations
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

    def rewind(self, done: int) -> None:
        """Forget what was written after `done` iterations: the learner starts again from there.

        The time since the last checkpoint is lost; it goes into the next line.
        """
        self._lost += time.perf_counter() - self._safe_at
        self._rewinds += 1
        self._tracker.rewind(done)

    def say(self, line: str) -> None:
        self._tracker.say(line)

    def heldout(
        self, done: int, samples: Samples, distance: float = math.nan, ema: Samples | None = None
    ) -> float | None:
        """Keep the scores after `done` iterations and draw the pictures; the means go into that iteration's line.

        Returns the weighted sum of the trained rewards' means: the higher, the better the policy; None where the
        hacking panel ends the run, for a policy that exploits its rewards is not the best one.
        """
        self.guard()
        lists = {name: scores.tolist() for name, scores in samples.scores.items()}
        start = samples.scores if done == self.judged_since else _read_scores(self._run, self.judged_since)
        values = panel(samples.traces, samples.scores, start, list(self._config.eval_rewards), distance)
        record = {"prompts": samples.prompts, "shown": len(samples.pictures), "scores": lists, "panel": values}
        averaged = {} if ema is None else ema.scores
        record |= {"ema": {name: scores.tolist() for name, scores in averaged.items()}}
        if samples.pictures:
            first = self._keep_pictures(done, samples.pictures)
            columns = {self._first_column(): first, f"iteration {done}": samples.pictures}
            columns |= {"its average": ema.pictures} if ema else {}
            shown = samples.prompts[: len(samples.pictures)]
            picture_grid(self._run / "samples" / f"{done:06d}.png", shown, columns)
        replace_text(scores_file(self._run, done), to_json(record) + "\n")
        means = {name: mean_of_present(scores) for name, scores in samples.scores.items()}
        self.say(
            f"held-out after {done} iterations: " + ", ".join(f"{name} {number(mean)}" for name, mean in means.items())
        )
        panels = {f"panel/{name}": value for name, value in values.items()}
        of_scores = {f"heldout/{name}/mean": mean for name, mean in means.items()}
        of_scores |= {f"heldout_ema/{name}/mean": mean_of_present(scores) for name, scores in averaged.items()}
        evaluations = samples.evaluations + (ema.evaluations if ema else 0)
        self._means = done, {**of_scores, **panels, "heldout/evaluations": evaluations}
        lines = read_lines(self._run / "metrics.jsonl")
        if done == self.judged_since and all(line["iteration"] != done for line in lines):
            self._write(done, {})
        passed = passed_limits(Folder(self._run), done)
        self.say("hacking panel: " + ", ".join(f"{name} {number(value, '.3g')}" for name, value in values.items()))
        for line in passed.values():
            self.say(f"WARNING: hacking panel: {line}: look at samples/, the policy may exploit what it is trained on")
        self.stopped_by = sorted(passed.keys() & set(self._config.evaluation.stop_on))
        if self.stopped_by:
            return None
        known = {name: mean for name, mean in means.items() if math.isfinite(mean)}  # not those that compare in groups
        judges = known.keys() & self._config.rewards.keys() or known
        return sum(self._config.all_rewards[name].weight * known[name] for name in sorted(judges))

    def report(self) -> None:
        """Write report.html about the run so far. What goes wrong there is logged, and ends no run."""
        from g2rpo_ray.report import read_run, render

        try:
            run = replace(read_run(str(self._run)), place=str(self._kept or self._run))
            replace_text(self._run / "report.html", render([run]))
        except Exception as error:
            logger.warning("no report could be written: %s: %s", type(error).__name__, error)

    def iteration(
        self, done: int, rollout: Rollout, update: Metrics, counts: Metrics, spans: Sequence[Span] = ()
    ) -> None:
        """Write the line of iteration number `done`, counted from 1, and its timeline if that is due."""
        every = self._config.tracking.timeline_every
        if every and spans and (done == 1 or done % every == 0):
            write_timeline(self._run, done, [*spans, *self._spans])
        self._spans.clear()
        again = {"perf/lost_s": counts.get("perf/lost_s", 0.0) + self._lost, "learner/restarts": self._rewinds}
        counts = {**counts, **again}
        self._lost, self._rewinds = 0.0, 0
        metrics = rollout_metrics(rollout, self._config)
        reward = {"timing_s/reward": rollout.seconds - rollout.sampling_seconds}
        self._write(done, {**metrics, **update, **counts, **reward})
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
        return f"iteration {self.judged_since}" if self.judged_since else "base"

    def _keep_pictures(self, done: int, pictures: Sequence[Images]) -> Sequence[Images]:
        """Write the pictures below each other in a PNG, for the report and a run that goes on; the base model's."""
        folder = self._run / "samples" / "pictures"
        Image.fromarray(np.concatenate(pictures)).save(folder / f"{done:06d}.png")
        return np.split(np.array(Image.open(folder / f"{self.judged_since:06d}.png")), len(pictures))


def scores_file(run: Path, done: int) -> Path:
    return run / "samples" / f"{done:06d}.json"


def is_finished(config: Config, run: Folder, done: int) -> bool:
    """Whether a run with `done` iterations behind it has nothing left to do."""
    if done >= config.iterations:
        return (run / "samples").exists(f"{config.iterations:06d}.json")
    stop_on = config.evaluation.stop_on
    return bool(stop_on) and not passed_limits(run, done).keys().isdisjoint(stop_on)


def passed_limits(run: Folder, done: int) -> dict[PanelName, str]:
    """What the hacking panel found after these iterations, if they were evaluated; a sentence each."""
    first = judged_since(read_changes(run))
    try:
        values, base = (json.loads((run / "samples").read(f"{at:06d}.json"))["panel"] for at in (done, first))
    except OSError:
        return {}
    return tripped(*({name: math.nan if v is None else v for name, v in made.items()} for made in (values, base)))


def summarize(config: Config, run: Path) -> str:
    """Write summary.json of a finished run; the held-out comparison as a table."""
    lines, changes = read_lines(run / "metrics.jsonl"), read_changes(Folder(run))
    done, since = int(lines[-1]["iteration"]), judged_since(changes)
    start = _read_scores(run, since)
    comparisons, averaged = (compare_all(start, _read_scores(run, done, of)) for of in ("scores", "ema"))
    summary = {
        "iterations": done,
        "changes": changes,
        "heldout_since": since,
        "stopped_by": sorted(set(config.evaluation.stop_on) & passed_limits(Folder(run), done).keys()),
        "heldout": comparisons,
        **({"heldout_ema": averaged} if averaged else {}),
        "evaluations": sum(int(line.get("rollout/evaluations", 0)) for line in lines),
        "seconds": {
            phase: sum(line.get(f"timing_s/{phase}", 0.0) for line in lines)
            for phase in ("step", "rollout", "reward", "update", "broadcast", "evaluation", "checkpoint")
        },
        "restarts": sum(int(line.get("rollout/restarts", 0)) for line in lines),
        "lost_s": sum(line.get("perf/lost_s", 0.0) for line in lines),
    }
    replace_text(run / "summary.json", to_json(summary, indent=2) + "\n")
    note = f"\nbefore: after {since} iterations, since when all scores are of the same settings" if since else ""
    average = "\n\nIts average (lora_ema/):\n\n" + table(averaged, list(config.rewards)) if averaged else ""
    return table(comparisons, list(config.rewards)) + average + note


def _read_scores(run: Path, done: int, of: str = "scores") -> dict[str, FloatArray]:
    """Of the policy, or of its average (`ema`), if it has one."""
    record = json.loads(scores_file(run, done).read_text())
    return {name: np.array(scores, dtype=np.float32) for name, scores in record.get(of, {}).items()}
