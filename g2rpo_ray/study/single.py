"""A whole run in this process: the sampler, the rewards and one learner rank, as a run on Ray has them. No Ray here.

It gives the same bits as `python -m g2rpo_ray.run` with the same settings, and has no actor to start.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from g2rpo_ray.config import Config
from g2rpo_ray.data import EmbeddingStore, drawn_prompts, encode_missing, fingerprint, iteration_prompts
from g2rpo_ray.launch.plan import iteration_cost, learner_states, state_cost
from g2rpo_ray.launch.preflight import read_run_prompts
from g2rpo_ray.rollout.budget import Budget
from g2rpo_ray.rollout.plan import branch_part, branch_units, prompt_tree, put_scores, put_win_rates
from g2rpo_ray.types import FloatArray, Images, PromptEmbedding, PromptRollout, SampleUnit, TrunkUnit

if TYPE_CHECKING:
    from g2rpo_ray.models import FlowModel

Scores = dict[str, FloatArray]  # [P, S] of held-out samples by reward


@dataclass(frozen=True, slots=True)
class Judged:
    """The held-out samples after some iterations; sampling them costs nothing here."""

    scores: Scores
    pictures: list[Images]  # [H, W, 3] of the first prompts, seed 0


class Single:
    """One run of a configuration."""

    def __init__(self, config: Config):
        """
        Raises:
            ValueError: one line; prompts, model or rewards cannot be had, or the settings need several processes.
        """
        if config.learner.ranks > 1 or config.rollout.max_staleness:
            raise ValueError("learner.ranks, rollout.max_staleness: a run in one process has 1 rank and no staleness")
        _alone(config.learner.device)
        from g2rpo_ray.models import FlowModel
        from g2rpo_ray.rewards import build_reward
        from g2rpo_ray.rollout.sampler import Sampler
        from learner.engine import LearnerEngine  # imports DeepSpeed, which reads the environment

        self.config, self.prompts, self._budget = config, read_run_prompts(config), Budget(config)
        per_iteration = config.data.prompts_per_iteration
        used = drawn_prompts(self.prompts.train, per_iteration, config.seed, config.iterations)
        self._embeddings = _embeddings(config, [*used, *self.prompts.heldout], FlowModel)
        self._rewards = {name: build_reward(r.kind, **r.options) for name, r in config.all_rewards.items()}
        for name, reward in self._rewards.items():
            if config.all_rewards[name].runtime_env or getattr(reward, "scope", "image") == "group":
                raise ValueError(f"rewards, eval_rewards: {name} compares groups or has a runtime_env: that takes Ray")
        self.sampler, self.engine = Sampler(config), LearnerEngine(config, 0, 1)
        self.states = 0
        """Learner states since the start, each forward and backward."""
        self.seconds = 0.0
        """Of iterations, without evaluations."""

    @property
    def cost(self) -> float:
        """Evaluations of rollouts, and what the learner's states count in evaluations."""
        return self.sampler.evaluations + state_cost(self.config) * self.states

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, score, update; the update's metrics, and the signals of its rollouts.

        Raises:
            RuntimeError: the update is refused; see `LearnerEngine.update`.
        """
        from g2rpo_ray.record.metrics import signals
        from learner.batch import BatchShape, reduce_metrics, spread

        start = time.perf_counter()
        self.sampler.load_weights(self.engine.publish(iteration))
        per_iteration = self.config.data.prompts_per_iteration
        drawn = iteration_prompts(self.prompts.train, per_iteration, self.config.seed, iteration)
        choice = self._budget.choice(iteration)
        rollouts = [self._prompt(TrunkUnit(iteration, slot, prompt, choice)) for slot, prompt in enumerate(drawn)]
        self.states += sum(learner_states(self.config, rollout.tree) for rollout in rollouts)
        shards = spread(rollouts, 1)
        updated = self.engine.update(shards[0], BatchShape.of(shards, self.config.learner))
        self.seconds += time.perf_counter() - start
        chosen = self._budget.metrics(iteration, self._budget.learn(iteration, rollouts))
        return {**reduce_metrics([updated]), **signals(rollouts, self.config), **chosen}

    def run(self, budget: float, looks: int) -> Iterator[tuple[int, Mapping[str, float], Judged | None]]:
        """All iterations that the budget has: how many are done, the last one's metrics, and what is judged then.

        It is judged whenever another `looks`-th of the budget is spent, and at the end.
        """
        done, look, train = 0, 1, self.prompts.train
        last = False
        while not last:
            metrics, done = self.iterate(done), done + 1
            following = iteration_cost(self.config, train, done, self._budget.choice(done))
            last = done == self.config.iterations or self.cost + following > budget
            due = last or self.cost >= look * budget / looks
            look = int(self.cost * looks / budget) + 1
            yield done, metrics, self.judge() if due else None

    def judge(self) -> Judged:
        """Sample the held-out prompts by the policy that is trained, and score them by every reward."""
        before, seeds = self.sampler.evaluations, tuple(range(self.config.evaluation.seeds))
        self.sampler.load_weights(self.engine.lora_state())
        scores: dict[str, list[FloatArray]] = {name: [] for name in self._rewards}
        pictures: list[Images] = []
        for prompt in self.prompts.heldout:
            images = self.sampler.sample(SampleUnit(prompt, seeds), self._embeddings[prompt])
            for name in self._rewards:
                scores[name].append(self._score(name, images, prompt))
            if len(pictures) < self.config.evaluation.grid_prompts:
                pictures.append(images[0])
        self.sampler.evaluations = before
        return Judged({name: np.stack(rows) for name, rows in scores.items()}, pictures)

    def _prompt(self, unit: TrunkUnit) -> PromptRollout:
        place = (unit.iteration, unit.slot, unit.prompt)
        tree, embedding, branches = prompt_tree(self.config, *place, unit.choice), self._embeddings[unit.prompt], []
        scores = np.full((len(self.config.rewards), len(tree.leaf)), np.nan, np.float32)
        trunk, _ = self.sampler.trunk(unit, embedding)
        for part in branch_units(self.config, tree, unit):
            made, images = self.sampler.branch(part, embedding, trunk)
            found = [self._score(name, images, unit.prompt) for name in self.config.rewards]
            put_scores(scores, tree, branch_part(tree, part), found)
            branches.append(made)
        put_win_rates(scores, tree, self.config)
        return PromptRollout(*place, tree, scores, embedding, trunk, tuple(branches))

    def _score(self, name: str, images: Images, prompt: str) -> FloatArray:
        """Scores [N] of images [N, H, W, 3] of one unit, in the chunks that a reward server makes of them."""
        from g2rpo_ray.rewards import ask

        size, known = self.config.all_rewards[name].batch_size, self.prompts.metadata.get(prompt, {})
        chunks = [images[at : at + size] for at in range(0, len(images), size)]
        parts = [ask(self._rewards[name], chunk, [prompt] * len(chunk), [known] * len(chunk)) for chunk in chunks]
        return np.concatenate(parts)


def _alone(device: str) -> None:
    """What DeepSpeed looks for in the environment, of the only rank."""
    import torch

    if torch.distributed.is_initialized():  # by the run before, in the same process
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def _embeddings(config: Config, prompts: list[str], loader: "type[FlowModel]") -> dict[str, PromptEmbedding]:
    """Those in the folder that runs share, after what it lacks is added."""
    folder = config.data.embeddings or f"{config.output}/{config.name}/embeddings"
    store, negative = EmbeddingStore(folder, fingerprint(config.model)), config.model.negative_prompt
    missing, unknown = store.missing(prompts), [] if negative is None else store.missing([negative], "negative")
    if missing or unknown:
        encoder = loader.load(config.model, config.data.encoder_device, text_encoders=True)
        if unknown:
            store.add(encoder.encode(unknown, negative=True), "negative")
        for _ in encode_missing(store, missing, encoder.encode):
            pass
    return dict(zip(prompts, store.get(prompts, negative), strict=True))
