"""How the advantages of coarse completions agree with those of the finest, by granularity and solver. No Ray.

    python benchmarks/completions.py --after 0 10 30 --set 'sampler.strides=[4]'

A policy trains in this process; after so many iterations, fresh groups are completed at every granularity by Euler
steps and by DPM-Solver++(2M), and the correlation within groups with the finest Euler completions is averaged over
prompts and branch steps. An evaluation costs the same with either solver: a row compares them at equal cost.
"""

import itertools
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from common import Row, parser, report

import torch  # isort: skip  # common makes the packages importable
from torch import Tensor  # isort: skip

from g2rpo_ray.algo.completion import completion_path
from g2rpo_ray.algo.kernels import ode_step, transition
from g2rpo_ray.algo.tree import plan_tree
from g2rpo_ray.config import Config, load_config
from g2rpo_ray.local import LocalRun
from g2rpo_ray.models import FlowModel
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.rewards import open_reward
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import edge_key, prompt_tree
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import TrunkUnit

SOLVERS = ("euler", "dpmpp_2m")
MEASURED = 1_000_000  # the iteration in the keys of what is measured: no iteration that trains has it


def completed(velocity: Any, x: Tensor, sigmas: Sequence[float], solver: str) -> Tensor:
    """Latents at σ = 0 of x [N, L, D] at the first of the sigmas.

    `dpmpp_2m` (arXiv 2211.01095, as MixGRPO-Flash has it, order 2, midpoint): x' = σ'/σ x − α' (e^−h − 1) D with
    D = x̂0 + h / (2 h_before) (x̂0 − x̂0_before), α = 1 − σ, h the step in ln α/σ. Without history, and to σ = 0, D = x̂0:
    then it is the Euler step.
    """
    before: tuple[float, Tensor] | None = None  # step in ln α/σ, x̂0
    for now, then in itertools.pairwise(sigmas):
        v = velocity(x, torch.full((len(x),), now))
        image, h = x - now * v, _log_ratio(then) - _log_ratio(now)
        if solver == "euler" or before is None or then == 0:
            x = ode_step(x, v, now, then)
        else:
            towards = image + h / (2 * before[0]) * (image - before[1])
            x = then / now * x - (1 - then) * math.expm1(-h) * towards
        before = h, image
    return x


def _log_ratio(sigma: float) -> float:
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


class Groups:
    """The same groups, prompts and noise, at any time of a training."""

    def __init__(self, config: Config, prompts: int, strides: Sequence[int]):
        self.config, self.strides = config, strides
        self._prompts = read_run_prompts(config).train[:prompts]
        self._embeddings = FlowModel.load(config.model, "cpu", text_encoders=True).encode(self._prompts)
        self._model = FlowModel.load(config.model, "cpu", transformer=True, vae=True)
        self._sigmas = sigma_grid(config.sampler, self._model)
        self.sampler = Sampler(config, self._model)
        reward = next(iter(config.rewards.values()))
        self._reward = open_reward(reward)

    @torch.inference_mode()
    def scores(self) -> dict[tuple[str, int, int], list[np.ndarray]]:
        """[G] of every group by the first trained reward, by solver, stride and branch step."""
        found: dict[tuple[str, int, int], list[np.ndarray]] = {}
        sampler, sigmas = self.config.sampler, self._sigmas
        for slot, (prompt, embedding) in enumerate(zip(self._prompts, self._embeddings, strict=True)):
            unit, tree = TrunkUnit(MEASURED, slot, prompt), prompt_tree(self.config, MEASURED, slot, prompt)
            trunk, _ = self.sampler.trunk(unit, embedding)
            velocity = partial(self._model.velocity, conditioning=self._model.condition([embedding], None))
            for at, step in enumerate(tree.index[tree.branch_points].tolist()):
                keys = [edge_key(self.config, unit, tree, int(edge)) for edge in np.flatnonzero(tree.start == step)]
                noise = torch.stack([self._model.initial_noise(generator(*key)) for key in keys])
                x, v = (torch.tensor(part[[at]]) for part in (trunk.latents, trunk.velocities))
                children = transition(sampler.kernel, x, v, sigmas, step, sampler.eta, noise=noise).next_x
                for solver, stride in itertools.product(SOLVERS, self.strides):
                    path = sigmas[completion_path(step, sampler.steps, stride, sampler.layout)].tolist()
                    latents = completed(velocity, children, path, solver)
                    images = self._model.decode(latents).numpy()
                    scores = self._reward.score(images, [prompt] * len(images))
                    found.setdefault((solver, stride, step), []).append(np.asarray(scores, np.float64))
        return found

    def rows(self, after: int) -> list[Row]:
        found, steps = self.scores(), self.config.sampler.all_branch_steps
        sets = [(stride,) for stride in self.strides]
        sets += [pair for pair in itertools.combinations(self.strides, 2) if 1 not in pair]
        rows: list[Row] = []
        for chosen in sets:
            made: Row = {
                "after": after,
                "Λ": "{" + ", ".join(map(str, chosen)) + "}",
                "evaluations a member": self._evaluations(chosen),
            }
            for solver in SOLVERS:
                agreed = [
                    np.corrcoef(sum(normal(found[solver, one, step][at]) for one in chosen), fine)[0, 1]
                    for step in steps
                    for at, fine in enumerate(found["euler", 1, step])
                    if fine.std() > 0
                ]
                made[solver] = float(np.nanmean(agreed))
            rows.append(made)
        return rows

    def _evaluations(self, strides: tuple[int, ...]) -> float:
        """Of one member, at all branch steps together."""
        sampler = self.config.sampler
        one = sampler.model_copy(update={"strides": strides, "group_size": 1})
        return plan_tree(one.shape()).evaluations - max(sampler.all_branch_steps) - 1


def normal(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean()) / (scores.std() + 1e-8)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--config", help="a configuration; default: the quickstart")
    options.add_argument("--after", type=int, nargs="+", default=[0, 10, 30], help="iterations of training")
    options.add_argument("--strides", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    options.add_argument("--prompts", type=int, default=6, help="prompts whose groups are completed")
    options.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a setting")
    given = options.parse_args()
    if given.quick:
        given.after, given.strides, given.prompts = [0], [1, 4], 1
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(given.config, [f"data.embeddings={folder}", *given.set])
        run, groups = LocalRun(config), Groups(config, given.prompts, given.strides)
    rows: list[Row] = []
    for iteration in range(max(given.after) + 1):
        weights = run.engine.publish(iteration)
        if iteration in given.after:
            groups.sampler.load_weights(weights)
            rows += groups.rows(iteration)
        if iteration < max(given.after):
            run.step(iteration)
    note = f"{given.prompts} prompts × {len(config.sampler.all_branch_steps)} groups of {config.sampler.group_size}."
    report("Agreement of completions with the finest by Euler steps", rows, given.json, [note])


if __name__ == "__main__":
    main()
