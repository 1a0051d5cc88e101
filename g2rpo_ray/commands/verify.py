"""Replays iterations of a run in this process, and compares them with the run's audit.jsonl."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from g2rpo_ray.exits import FAILED, Parser, command
from g2rpo_ray.messages import one_line
from g2rpo_ray.runs.storage import Folder

if TYPE_CHECKING:  # slow imports happen when the run can be replayed
    from g2rpo_ray.config import Config, RewardConfig
    from g2rpo_ray.local import LocalRun
    from g2rpo_ray.runs.checkpoint import Checkpoint
    from g2rpo_ray.types import Images, PromptEmbedding

Line = Mapping[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo verify`."""
    parser = Parser(
        prog="python -m g2rpo_ray.verify",
        description="Replay an iteration of a run from the nearest checkpoint, in this process without Ray, and "
        "compare it with the run's audit.jsonl. Exit status: 0 equal, 1 different, 2 not replayable. The run "
        "is only read. Equal bits need the same code, libraries and kind of device.",
        epilog="example: python -m g2rpo_ray.verify runs/quickstart --iteration 12",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/quickstart, or its URI")
    parser.add_argument(
        "--iteration", metavar="K", type=int, help="counted from 1, as in metrics.jsonl; default: the last one"
    )
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Replays; returns the exit status: 0 equal, 1 different, 2 invalid input."""
    from g2rpo_ray.runs.audit import read_audit
    from g2rpo_ray.version import code_version

    folder = Folder(options.run)
    lines = read_audit(folder)
    number = max(lines, default=0) if options.iteration is None else options.iteration
    if number not in lines:
        there = f"iterations {min(lines)} to {max(lines)}" if lines else "no iteration"
        raise ValueError(f"--iteration: {number} given; {folder}/audit.jsonl has {there}, or its line is damaged")
    config = _config(folder)
    checkpoint = _nearest(folder, number - 1)
    _check_settings(folder, config)
    _check_ranks(folder, config, checkpoint, number)
    for done, difference in _replay(folder, config, checkpoint, lines, number):
        if difference:
            print(f"iteration {done}: differs, first in {difference}")
            if lines[done].get("code", code_version()) != code_version():
                print(f"the run had g2rpo_ray {lines[done]['code']}; this is {code_version()}")
            return FAILED
        print(f"iteration {done}: the same" if done in lines else f"iteration {done}: replayed; it has no record")
    return 0


def _config(folder: Folder) -> "Config":
    from g2rpo_ray.config import load_config

    with TemporaryDirectory() as aside:
        file = Path(aside) / "config.yaml"
        file.write_bytes(folder.read("config.yaml"))
        return load_config(file)


def _nearest(folder: Folder, done: int) -> "Checkpoint | None":
    """The newest intact checkpoint with at most `done` iterations, of the run or of the one it started from."""
    from g2rpo_ray.runs.checkpoint import find_checkpoint, read_checkpoint
    from g2rpo_ray.runs.start import read_origin

    with suppress(ValueError):  # all are damaged, which a warning says
        if checkpoint := find_checkpoint(folder, done):
            return checkpoint
    origin = read_origin(folder)
    return read_checkpoint(Folder(origin["checkpoint"])) if origin else None


def _declines(folder: Folder, config: "Config", first: int, last: int) -> list[int]:
    """The iterations before `last` after which completions became finer: see `evaluation.on_decline`.

    Raises:
        ValueError: one line; between `first` and `last` the run went back to another learner.
    """
    from g2rpo_ray.runs.checkpoint import find_checkpoint

    newest = None if config.evaluation.on_decline == "continue" else find_checkpoint(folder)
    declines = [done for done in ((newest and newest.budget) or {}).get("declines", []) if done < last]
    if declines and declines[-1] > first and config.evaluation.on_decline == "rewind":
        raise ValueError(
            f"--iteration: {last} given; after iteration {declines[-1]} the run went back to its best checkpoint, and "
            "its checkpoint of that iteration is deleted; give an iteration up to that one, or after a later checkpoint"
        )
    return declines


def _check_settings(folder: Folder, config: "Config") -> None:
    """Raises ValueError, in one line, if settings or prompts are not those of the run's checkpoints."""
    from g2rpo_ray.config.resume import changes_in_words, differences, settings
    from g2rpo_ray.preflight import read_run_prompts
    from g2rpo_ray.runs.checkpoint import STATE, finished_checkpoints
    from g2rpo_ray.runs.tracking import read_json

    if names := finished_checkpoints(folder):
        prompts = read_run_prompts(config)
        now = settings(config, prompts.train, prompts.heldout, prompts.metadata)
        if changed := differences(read_json(folder / "checkpoints" / names[-1], STATE)["settings"], now):
            raise ValueError(f"{folder}: its checkpoints were made with other settings: {changes_in_words(changed)}")


def _check_ranks(folder: Folder, config: "Config", checkpoint: "Checkpoint | None", last: int) -> None:
    """Prints that updates of several ranks are not replayed. ValueError, in one line, if an earlier one is needed."""
    ranks, first = config.learner.ranks, checkpoint.iteration if checkpoint else 0
    if ranks > 1 and first != last - 1:
        names = ", ".join(name for name in (folder / "checkpoints").names() if name.isdigit()) or "none"
        raise ValueError(
            f"learner.ranks: the run had {ranks}, whose sums one process rounds differently, so only the iteration "
            f"after a checkpoint can be replayed, without its update; checkpoints of the run: {names}"
        )
    if ranks > 1:
        print(f"learner.ranks: the run had {ranks}; its update is not replayed")


def _replay(
    folder: Folder, config: "Config", checkpoint: "Checkpoint | None", lines: Mapping[int, Line], last: int
) -> Iterator[tuple[int, str | None]]:
    """The iterations from the checkpoint to `last`, counted from 1, each with its first difference."""
    from g2rpo_ray.models import manifest_of
    from g2rpo_ray.runs.audit import audit_line, first_difference, take_scores

    first = checkpoint.iteration if checkpoint else 0
    declines = _declines(folder, config, first, last)
    run, asked = _local(folder, config, checkpoint, range(first, last))
    run.budget.declines = declines
    rewards, whole = list(config.rewards), config.learner.ranks == 1
    for iteration in range(first, last):
        rollouts, line = run.rollout(iteration), lines.get(iteration + 1)
        if line:
            take_scores(line, asked, rewards, rollouts)
            found = audit_line(manifest_of(run.weights, 0).checksum, run.units, rewards, rollouts)
            if (difference := first_difference(line, found, rollouts)) or not whole:
                yield iteration + 1, difference
                return
        elif asked:
            raise ValueError(
                f"{folder}: iteration {iteration + 1} has no record, and {', '.join(asked)} cannot score it here"
            )
        try:
            run.update(iteration, rollouts)
        except RuntimeError as error:
            if not str(error).startswith("learner:"):  # the engine's own refusals do
                raise
            yield iteration + 1, f"the update: {one_line(error, 300)}"
            return
        if line:
            found["lora"] = manifest_of(run.engine.publish(iteration + 1), 0).checksum
        yield iteration + 1, first_difference(line, found, rollouts) if line else None


def _local(
    folder: Folder, config: "Config", checkpoint: "Checkpoint | None", iterations: range
) -> "tuple[LocalRun, list[str]]":
    """The run in this process, and the names of the rewards whose recorded scores are used.

    Raises:
        ValueError: one line; this process cannot replay it.
    """
    from g2rpo_ray.local import LocalRun
    from g2rpo_ray.numerics import cuda_fault

    if "cuda" in (config.rollout.device, config.learner.device) and (fault := cuda_fault()):
        raise ValueError(f"{folder}: the run had GPUs, but on this machine {fault}")
    rewards, asked = _rewards(config)
    one = config.learner.model_copy(update={"ranks": 1})
    alone = config.model_copy(update={"learner": one, "eval_rewards": {}})
    return LocalRun(
        alone, rewards=rewards, checkpoint=checkpoint, embeddings=_embeddings(folder, config, iterations)
    ), asked


def _rewards(config: "Config") -> tuple[dict[str, Any], list[str]]:
    """The trained rewards for `LocalRun`, and the names of those whose recorded scores are used, with a line each."""
    made, asked = {}, []
    for name, given in config.rewards.items():
        reward, reason = _reward(given)
        if reason:
            print(f"reward {name}: its recorded scores are used, because it {reason}")
            asked.append(name)
        made[name] = {**given.model_dump(), "kind": reward, "runtime_env": {}}
    return made, asked


def _reward(given: "RewardConfig") -> tuple[Any, str]:
    """The reward and "", or a reward without scores and the reason why this process cannot use the given one."""
    from g2rpo_ray.functions import PYTHON
    from g2rpo_ray.rewards import open_reward

    if given.kind == PYTHON or given.runtime_env:
        return _unscored, "is a Python function" if given.kind == PYTHON else "has a runtime_env"
    try:
        reward = open_reward(given)
    except (ValueError, OSError) as error:
        return _unscored, f"cannot be loaded here: {one_line(error, 200)}"
    if hasattr(reward, "waits"):
        return _unscored, "calls a server"
    return (_unscored, "compares groups") if getattr(reward, "scope", "image") == "group" else (reward, "")


def _unscored(images: "Images", prompts: list[str]) -> list[float | None]:
    return [None] * len(images)


def _embeddings(folder: Folder, config: "Config", iterations: range) -> "dict[str, PromptEmbedding]":
    """The run's embeddings of the prompts of these iterations."""
    from g2rpo_ray.data import EmbeddingStore, fingerprint, iteration_prompts
    from g2rpo_ray.preflight import read_run_prompts

    train, per_iteration = read_run_prompts(config).train, config.data.prompts_per_iteration
    prompts = {prompt for i in iterations for prompt in iteration_prompts(train, per_iteration, config.seed, i)}
    place, negative = config.data.embeddings or str(folder / "embeddings"), config.model.negative_prompt
    store = EmbeddingStore(place, fingerprint(config.model), read_only=True)
    try:
        return dict(zip(prompts, store.get(list(prompts), negative), strict=True))
    except KeyError:
        raise ValueError(f"data.embeddings: {place} lacks prompts of the run, which verify does not encode") from None
