"""A whole run in this process, without Ray: the sampler, the rewards and one learner rank.

It gives the same bits as `python -m g2rpo_ray.run` with the same settings.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from g2rpo_ray.analysis.video import strip
from g2rpo_ray.config import Config, with_settings
from g2rpo_ray.data import (
    EmbeddingStore,
    drawn_prompts,
    encode_missing,
    fingerprint,
    iteration_prompts,
    negative_prompts,
)
from g2rpo_ray.data.pictures import PictureFile, open_sources, sources_by_prompt
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.rollout.auto import Budget
from g2rpo_ray.rollout.cost import iteration_cost, learner_states, update_cost
from g2rpo_ray.rollout.plan import (
    Look,
    Part,
    branch_part,
    branch_units,
    exact_units,
    heldout_samples,
    heldout_units,
    leaf_scores,
    prompt_tree,
    put_win_rates,
    with_credit_scores,
)
from g2rpo_ray.runs.audit import Digests, digests
from g2rpo_ray.runs.checkpoint import Checkpoint
from g2rpo_ray.runs.hacking import image_traces
from g2rpo_ray.types import (
    Branches,
    BranchUnit,
    FloatArray,
    Images,
    PromptEmbedding,
    PromptRollout,
    Samples,
    SampleUnit,
    TrunkUnit,
)

if TYPE_CHECKING:
    from g2rpo_ray.models import FlowModel

logger = logging.getLogger(__name__)


class LocalRun:
    """A run in this process: `step(0)`, `step(1)` … train, `heldout()` scores held-out prompts."""

    def __init__(
        self,
        config: Config,
        *,
        rewards: Mapping[str, Any] | None = None,
        prompts: Any = None,
        heldout: Any = None,
        on_progress: Callable[[], None] = lambda: None,
        checkpoint: Checkpoint | None = None,
        embeddings: Mapping[str, PromptEmbedding] | None = None,
    ):
        """
        Args:
            config: see `load_config`.
            rewards, prompts, heldout: instead of those of the configuration: see `train`.
            on_progress: called after images were scored or prompts encoded.
            checkpoint: of any run of this configuration; training continues from its iteration.
            embeddings: of all prompts that are used. Default: stored ones; missing ones are encoded.

        Raises:
            ValueError: one line; prompts, model or rewards cannot be loaded, or the settings need several processes.
        """
        given = {"rewards": rewards, "data.train_prompts": prompts, "data.heldout_prompts": heldout}
        config = with_settings(config, given)
        if config.learner.ranks > 1:
            raise ValueError(f"learner.ranks: {config.learner.ranks} given; a run in one process has 1 rank")
        from g2rpo_ray.learner.rendezvous import alone
        from g2rpo_ray.models import FlowModel
        from g2rpo_ray.rewards import open_reward
        from g2rpo_ray.rollout.sampler import Sampler

        self.config, self.prompts = config, read_run_prompts(config)
        self.budget = Budget(config, checkpoint.budget if checkpoint else None)
        """The choices of the run. It makes no evaluations by itself, so `evaluation.on_decline` has no effect."""
        self._on_progress = on_progress
        if embeddings is None:
            per_iteration = config.data.prompts_per_iteration
            used = drawn_prompts(self.prompts.train, per_iteration, config.seed, config.iterations)
            sources = sources_by_prompt(self.prompts.metadata)
            embeddings = _embeddings(config, [*used, *self.prompts.heldout], sources, FlowModel, on_progress)
        self._embeddings = embeddings
        self._rewards = {name: open_reward(r) for name, r in config.all_rewards.items()}
        for name, reward in self._rewards.items():
            if config.all_rewards[name].runtime_env or getattr(reward, "scope", "image") == "group":
                raise ValueError(f"rewards, eval_rewards: {name} compares groups or has a runtime_env, which needs Ray")
        self.sampler = Sampler(config)
        with alone(config.learner.device), checkpoint.folder.reading() if checkpoint else nullcontext() as path:
            from g2rpo_ray.learner.engine import LearnerEngine  # imports DeepSpeed, which reads the environment

            self.engine = LearnerEngine(config, 0, 1, path)
        self.weights: dict[str, FloatArray] = {}
        """The LoRA that the last rollout was sampled with."""
        self.units: dict[str, Digests] = {}
        """Digests of the last rollout's units, by the unit's name."""
        self.states = 0
        """Learner states since the start, each forward and backward."""
        self.updates = 0.0
        """Cost of the learner's updates since the start, in evaluations."""
        self.seconds = 0.0
        """Seconds of iterations since the start, without held-out evaluations."""

    @property
    def cost(self) -> float:
        """Cost of rollouts and updates since the start, in evaluations."""
        return self.sampler.evaluations + self.updates

    def step(self, iteration: int) -> dict[str, float]:
        """One iteration, counted from 0: sample, score, update. Returns metrics of the update, scores and signals.

        Raises:
            RuntimeError: the update is refused; see `LearnerEngine.update`.
        """
        start = time.perf_counter()
        rollouts = self.rollout(iteration)
        metrics = self.update(iteration, rollouts)
        self.seconds += time.perf_counter() - start
        return metrics

    def rollout(self, iteration: int) -> list[PromptRollout]:
        """The scored trees of an iteration's prompts. Call it once per iteration, in order."""
        self.engine.publish(iteration)
        self.weights, self.units = self.engine.copies.versions[iteration - self._staleness(iteration)], {}
        self.sampler.load_weights(self.weights)
        per_iteration = self.config.data.prompts_per_iteration
        drawn = iteration_prompts(self.prompts.train, per_iteration, self.config.seed, iteration)
        choice = self.budget.choice(iteration)
        return [self._prompt(TrunkUnit(iteration, slot, prompt, choice)) for slot, prompt in enumerate(drawn)]

    def update(self, iteration: int, rollouts: Sequence[PromptRollout]) -> dict[str, float]:
        """Updates the LoRA from an iteration's trees; returns and raises as `step`."""
        from g2rpo_ray.learner.batch import BatchShape, reduce_metrics, spread
        from g2rpo_ray.rollout.metrics import reward_metrics

        trees = [rollout.tree for rollout in rollouts]
        self.states += sum(learner_states(self.config, tree) for tree in trees)
        self.updates += update_cost(self.config, trees)
        shards = spread(with_credit_scores(rollouts, self.config), 1)
        _set_threads(self.config.learner.threads)
        batch = BatchShape.of(shards, self.config.learner, on_policy=not self._staleness(iteration))
        updated = self.engine.update(shards[0], batch)
        chosen = self.budget.metrics(iteration, self.budget.learn(iteration, updated.alignment))
        return {**reduce_metrics([updated]), **reward_metrics(rollouts, self.config), **chosen}

    def _staleness(self, iteration: int) -> int:
        """Number of versions by which the sampling LoRA is behind the updated one."""
        return min(iteration, self.config.rollout.max_staleness)

    def run(self, budget: float, looks: int) -> Iterator[tuple[int, Mapping[str, float], Samples | None]]:
        """Runs all iterations within the budget, in evaluations.

        Yields after each iteration the number of iterations done, its metrics, and held-out samples or None. Held-out
        samples are made after every `looks`-th part of the budget, and at the end.
        """
        done, look, train = 0, 1, self.prompts.train
        last = False
        while not last:
            metrics, done = self.step(done), done + 1
            following = iteration_cost(self.config, train, done, self.budget.choice(done))
            last = done == self.config.iterations or self.cost + following > budget
            due = last or self.cost >= look * budget / looks
            look = int(self.cost * looks / budget) + 1
            yield done, metrics, self.heldout() if due else None

    def heldout(self) -> Samples:
        """Held-out samples of the trained policy, scored by every reward. They do not count in the cost."""
        before, prompts = self.sampler.evaluations, self.prompts.heldout
        self.sampler.load_weights(self.engine.lora_state())
        looks = [self._look(unit) for unit in heldout_units(self.config, prompts)]
        taken, self.sampler.evaluations = self.sampler.evaluations - before, before
        return heldout_samples(self.config, prompts, looks, taken)

    def _look(self, unit: SampleUnit) -> Look:
        _set_threads(self.config.rollout.threads)
        images = self.sampler.sample(unit, self._embeddings[unit.prompt])
        scores = {name: self._score(name, images, unit.prompt) for name in self._rewards}
        return Look(strip(images[0]), scores, image_traces(images))

    def load_into(self, pipeline: Any) -> None:
        """Adds the current LoRA to a diffusers pipeline of the base model."""
        with TemporaryDirectory() as folder:
            self.save(folder)
            pipeline.load_lora_weights(folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the current LoRA as an adapter for diffusers."""
        from g2rpo_ray.models import describe_model, export_lora

        family, _ = describe_model(self.config.model)
        export_lora(os.fspath(folder), self.engine.lora_state(), self.config.lora, family.pipeline_class)

    def _prompt(self, unit: TrunkUnit) -> PromptRollout:
        place, rollout = (unit.iteration, unit.slot, unit.prompt), self.config.rollout
        tree, embedding = prompt_tree(self.config, *place, unit.choice), self._embeddings[unit.prompt]
        _set_threads(rollout.threads)
        trunk, of_anchors = self.sampler.trunk(unit, embedding)
        self.units[unit.name] = digests(trunk, of_anchors)

        def grown(units: Iterable[BranchUnit]) -> tuple[tuple[Branches, ...], FloatArray]:
            """The units' results for the learner, and scores [R rewards, Q leaves]."""
            branches: list[Branches] = []
            found: list[tuple[Part, dict[str, FloatArray]]] = []
            for branch in units:
                _set_threads(rollout.threads if branch.exact else rollout.completions_threads)
                made, images = self.sampler.branch(branch, embedding, trunk)
                self.units[branch.name] = digests(made, images)
                scores_by_name = {name: self._score(name, images, unit.prompt) for name in self.config.rewards}
                found.append((branch_part(tree, branch), scores_by_name))
                branches.append(made)
            scores = leaf_scores(self.config, tree, found)
            put_win_rates(scores, tree, self.config)
            return tuple(branches), scores

        branches, scores = grown(branch_units(self.config, tree, unit))
        exact = exact_units(self.config, tree, unit)
        return PromptRollout(*place, tree, scores, embedding, trunk, branches, grown(exact)[1] if exact else None)

    def _score(self, name: str, images: Images, prompt: str) -> FloatArray:
        """Scores [N] of images [N, H, W, 3] of one unit."""
        from g2rpo_ray.rewards import ask_in_chunks, scores_of

        config, known = self.config.all_rewards[name], self.prompts.metadata.get(prompt, {})
        _set_threads(config.threads)
        answer = ask_in_chunks(self._rewards[name], images, prompt, known, config.batch_size, config.frames)
        self._on_progress()
        return scores_of(config, answer)


def _set_threads(number: int) -> None:
    """Sets the threads of the actor whose work comes next: the last bits of a matrix product may depend on them."""
    import torch

    torch.set_num_threads(number)


def _embeddings(
    config: Config,
    prompts: list[str],
    sources: Mapping[str, tuple[PictureFile, ...]],
    loader: "type[FlowModel]",
    on_progress: Callable[[], None],
) -> dict[str, PromptEmbedding]:
    """The embeddings in the shared folder, after encoding missing ones."""
    folder = config.data.embeddings or f"{config.output}/{config.name}/embeddings"
    store, negative = EmbeddingStore(folder, fingerprint(config.model)), config.model.negative_prompt
    missing, unknown = store.missing(prompts), store.missing(negative_prompts(negative, prompts), "negative")
    if missing or unknown:
        encoder = loader.load(config.model, config.data.encoder_device, text_encoders=True)

        def encode(part: Sequence[str], negative: bool = False) -> list[PromptEmbedding]:
            return encoder.encode(part, open_sources(part, sources), negative=negative)

        for _ in encode_missing(store, unknown, partial(encode, negative=True), "negative"):
            on_progress()
        for _ in encode_missing(store, missing, encode):
            on_progress()
        if cut := encoder.take_cut_message():
            logger.warning(cut)
    return dict(zip(prompts, store.get(prompts, negative), strict=True))
