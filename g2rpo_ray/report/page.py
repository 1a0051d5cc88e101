"""The report of runs: values for its HTML template."""

import base64
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from g2rpo_ray.analysis.statistics import Comparison, compare, interval
from g2rpo_ray.analysis.svg import PALETTE
from g2rpo_ray.report import figures
from g2rpo_ray.report.gallery import gallery
from g2rpo_ray.runs.hacking import LIMITS
from g2rpo_ray.runs.reader import Run, read_run
from g2rpo_ray.runs.storage import Folder, replace_text

logger = logging.getLogger(__name__)

FAULTS = {
    "pool/restarts": "actors replaced",
    "rollout/units_retried": "units retried",
    "pool/hung": "hung calls",
    "rollout/copies": "copied units of slow actors",
    "learner/restarts": "learner restarts",
}


class Figure(NamedTuple):
    """A figure with its caption and its alternative text."""

    caption: str
    words: str
    svg: str
    tag: str = ""


def render(runs: Sequence[Run]) -> str:
    """The HTML page about the runs, in the given order."""
    loader = jinja2.PackageLoader("g2rpo_ray", "report")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"figure": _data_uri, "number": _number, "signed": lambda value: _number(value, "+")}
    trained = list(dict.fromkeys(name for run in runs for name in run.trained))
    unseen = [name for name in dict.fromkeys(name for run in runs for name in run.unseen) if name not in trained]
    return page.get_template("page.html.j2").render(
        runs=[_about(run, colour) for run, colour in zip(runs, PALETTE, strict=False)],
        several=len(runs) > 1,
        results=[_result(run) for run in runs],
        differences=_differences(runs) if len(runs) > 1 else [],
        gallery=gallery(runs),
        panels=[_panel(run) for run in runs],
        curves=_curves(runs, trained, unseen) if any(run.done for run in runs) else {},
        phases=[_phases(run) for run in runs],
        timelines=[(run.name, *run.timeline) for run in runs if run.timeline],
        settings=_settings(runs),
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
    )  # fmt: skip


def write_report(run: Path, kept: Folder | None = None) -> None:
    """Writes report.html of a run from a local folder to `kept`. Errors are logged and never end a run."""
    try:
        replace_text(run / "report.html", render([replace(read_run(str(run)), place=str(kept or run))]))
    except Exception as error:
        logger.warning("report.html could not be written: %s: %s", type(error).__name__, error)


def _curves(runs: Sequence[Run], trained: Sequence[str], unseen: Sequence[str]) -> dict[str, list[Figure]]:
    """The figures by iteration, by section."""
    return {
        "Rewards": [_reward(runs, name, name in trained) for name in (*trained, *unseen)],
        "Update": _update(runs),
        "Signal": _signal(runs),
        "Time": [_time(runs, run) for run in runs if run.done],
    }


def _about(run: Run, colour: str) -> dict[str, Any]:
    settings, last = run.settings, max(run.evaluations, default=0)
    if run.summary and (stopped := run.summary.get("stopped_by")):
        state = f"ended by the hacking panel ({', '.join(stopped)}) after {run.done} of {run.planned} iterations"
    elif run.summary and run.done >= run.planned:
        state = f"ended after {run.done} iterations"
    else:
        state = f"{run.done} of {run.planned} iterations are done"
    faults = {word: int(run.total(metric)) for metric, word in FAULTS.items()}
    faults["scores missing"] = int(sum(run.total(f"reward/{name}/missing") for name in (*run.trained, *run.unseen)))
    seconds, lost = run.total("timing_s/step"), run.total("perf/lost_s")
    return {
        "name": run.name, "place": run.place.partition("?")[0], "colour": colour, "state": state,
        "ended": bool(run.summary),
        "method": settings.get("method"), "model": settings["model"]["path"], "seed": settings["seed"],
        "share": min(1.0, run.done / run.planned), "judged_at": last, "log": run.log, "faults": faults,
        "lost_s": lost, "lost_share": lost / seconds if seconds else 0.0, "seconds": _duration(seconds),
        "prompts": len(run.evaluations[last].prompts) if run.evaluations else 0,
        "trained": run.trained, "unseen": run.unseen, "origin": run.origin,
    }  # fmt: skip


def _result(run: Run) -> dict[str, Comparison]:
    """The newest held-out scores against those before training, by reward, trained ones first."""
    done = sorted(run.evaluations)
    if len(done) < 2:
        return {}
    before, after = run.evaluations[done[0]].scores, run.evaluations[done[-1]].scores
    rewards = [name for name in (*run.trained, *run.unseen) if name in before and name in after]
    return {name: compare(before[name], after[name]) for name in rewards}


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The other runs' newest held-out scores against the first run's, paired by prompt and seed."""
    found = []
    first = runs[0].evaluations.get(max(runs[0].evaluations, default=0))
    for other in runs[1:]:
        last = other.evaluations.get(max(other.evaluations, default=0))
        if first and last and list(first.prompts) == list(last.prompts):
            for name in first.scores.keys() & last.scores.keys():
                if first.scores[name].shape == last.scores[name].shape:
                    paired = compare(first.scores[name], last.scores[name])
                    found.append({"run": other.name, "reward": name, "paired": paired})
    return sorted(found, key=lambda one: (str(one["reward"]), str(one["run"])))


def _panel(run: Run) -> list[dict[str, Any]]:
    """The hacking panel of the newest evaluation against the first."""
    if not run.evaluations:
        return []
    values, base = (run.evaluations[at(run.evaluations)].panel for at in (max, min))
    return [
        {"name": name, "meaning": limit.meaning, "base": base[name], "now": values[name],
         "bound": limit.bound(base[name]), "passed": limit.is_passed(values[name], base[name])}
        for name, limit in LIMITS.items()
        if name in values and name in base
    ]  # fmt: skip


def _reward(runs: Sequence[Run], name: str, trained: bool) -> Figure:
    words = f"{name} by iteration. {_in_words(runs, name)}"
    return Figure(name, words, figures.reward_curve(runs, name), "trained" if trained else "unseen")


def _in_words(runs: Sequence[Run], reward: str) -> str:
    parts = []
    for run in runs:
        for done in (min(run.evaluations, default=0), max(run.evaluations, default=0)):
            if run.evaluations and reward in run.evaluations[done].scores:
                mean = interval(run.evaluations[done].scores[reward]).mean
                parts.append(f"{_where(run, runs)}held out {_number(mean)} after {done} iterations")
    return "; ".join(parts)


def _update(runs: Sequence[Run]) -> list[Figure]:
    wanted: list[tuple[str, dict[str, str], str, bool]] = [
        ("largest |ratio − 1|", {"learner/ratio_max_dev": "in the iteration"}, "|ratio − 1|", True),
        ("clip fraction", {"learner/clip_fraction": "clipped"}, "share of edges", False),
        ("advantages", {"advantage/std": "std", "advantage/zero_std_groups": "groups without spread"}, "", False),
        ("rollout against learner", {"mismatch/velocity": "velocity, relative error"}, "", True),
        (
            "edges lost to rounding",
            {"mismatch/lost_edges": "without gradient, by the rollout's ratios"},
            "share",
            False,
        ),
        ("gradient norm, before clipping", {"learner/grad_norm": "norm"}, "norm", False),
        ("KL to the model without LoRA", {"learner/kl": "KL"}, "nats", False),
    ]
    return _drawn(runs, wanted)


def _signal(runs: Sequence[Run]) -> list[Figure]:
    made = []
    if any("signal/spread/" in name for run in runs for name in run.names):
        words = "spread of the first trained reward by branch step"
        meaning = f"{words}: a taller bar means that noise there changes the score more"
        made.append(Figure(words, meaning, figures.spread_bars(runs)))
    names = dict.fromkeys(name for run in runs for name in run.names if name.startswith("signal/agreement/"))
    agreements = {name: f"λ = {name.rsplit('/', 1)[1]}" for name in names}
    words = "agreement of coarse with finest completions"
    chosen = ("granularity that `auto` chose", {"choice/stride": "λ"}, "λ", False)
    return made + _drawn(runs, [(words, agreements, "correlation", False), chosen])


def _drawn(runs: Sequence[Run], wanted: Sequence[tuple[str, dict[str, str], str, bool]]) -> list[Figure]:
    made = []
    for caption, metrics, label, log in wanted:
        there = {name: word for name, word in metrics.items() if any(run.series(name)[1].any() for run in runs)}
        if there:
            ends = [(run, values) for run in runs for name in there if len(values := run.series(name)[1])]
            words = "; ".join(f"{_where(run, runs)}from {_number(v[0])} to {_number(v[-1])}" for run, v in ends)
            made.append(Figure(caption, f"{caption} by iteration: {words}", figures.curve(runs, there, label, log)))
    return made


def _time(runs: Sequence[Run], run: Run) -> Figure:
    caption = f"{_where(run, runs)}seconds of an iteration by phase"
    return Figure(caption, f"{caption}; the numbers are in the table below", figures.time_areas(run))


def _phases(run: Run) -> dict[str, Any]:
    """Seconds and velocity evaluations of the whole run by phase."""
    seconds = {phase: run.total(f"timing_s/{phase}") for phase in figures.PHASES}
    whole = max(run.total("timing_s/step"), 1e-9)
    seconds["start and other"] = max(0.0, whole - sum(seconds.values()))
    evaluations = {
        "rollout": run.total("rollout/evaluations"),
        "update": run.total("learner/states"),
        "evaluation": run.total("heldout/evaluations"),
    }
    rows = {
        phase: {"seconds": spent, "share": spent / whole, "evaluations": evaluations.get(phase)}
        for phase, spent in seconds.items()
    }
    busy = run.series("perf/rollout_utilisation")[1]
    return {"name": run.name, "rows": rows, "busy": float(busy.mean()) if len(busy) else math.nan}


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[Any], bool]]:
    """Every setting by its dotted key, its value in each run, and whether the runs differ in it."""
    flat = [dict(_flat(run.settings)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, "") for settings in flat]) for key in keys]
    return [(key, values, len(set(map(str, values))) > 1) for key, values in rows]


def _flat(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and bool(value)
        rows += _flat(value, f"{above}{key}.") if nested else [(f"{above}{key}", value)]
    return rows


def _where(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _number(value: float, sign: str = "") -> str:
    """Three digits; a dash for one that is not there."""
    if value is None or math.isnan(value):
        return "–"
    decimals = f"{value:{sign}.3f}" if 0.0995 <= abs(value) < 10 else f"{value:{sign}.3g}"
    return decimals.replace("-", "−") if value else "0"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
