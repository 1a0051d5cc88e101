"""Every method on the quickstart at equal cost: the trained reward on held-out prompts, before and after. No Ray.

    python benchmarks/methods.py --jobs 2
    python benchmarks/methods.py --methods mix_grpo --seeds 0 --lr 3e-4 1e-3 3e-3

Cost: velocity evaluations of rollouts + 3 for each state of the learner, forward and backward, + 1 for each velocity of
another policy there; the budget is that of `make run`. A run is one process: the sampler, the rewards and a learner
rank, as a run on Ray has them.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, parser, report

import torch  # isort: skip  # common makes the packages importable

from g2rpo_ray.config import Config, load_config
from g2rpo_ray.methods import method_names

LEARNING_RATES = {
    "awm": 2e-3, "branch_grpo": 2e-3, "dance_grpo": 2e-3, "diffusion_nft": 2e-3, "e_grpo": 4e-3, "flow_grpo": 4e-3,
    "flow_grpo_fast": 4e-3, "g2rpo": 1e-3, "mix_grpo": 1e-3, "pave_grpo": 2e-3, "tempflow_grpo": 4e-3,
}  # fmt: skip
"""On the quickstart: the best of a grid on a seed that is not reported; see docs/methods.md."""

JUDGED = ("preference", "shape")


class Run:
    """One run of a configuration in this process."""

    def __init__(self, config: Config):
        from g2rpo_ray.data import read_prompts
        from g2rpo_ray.models import FlowModel
        from g2rpo_ray.rewards import build_reward
        from g2rpo_ray.rollout.budget import Budget
        from g2rpo_ray.rollout.sampler import Sampler
        from learner.engine import LearnerEngine

        self.config, self.budget = config, Budget(config)
        self.train, self.heldout = (
            read_prompts(path, "") for path in (config.data.train_prompts, config.data.heldout_prompts)
        )
        encoder = FlowModel.load(config.model, "cpu", text_encoders=True)
        prompts = [*self.train, *self.heldout]
        self.embeddings = dict(zip(prompts, encoder.encode(prompts), strict=True))
        self.rewards = {name: build_reward(r.kind, **r.options) for name, r in config.all_rewards.items()}
        self.sampler, self.engine = Sampler(config), LearnerEngine(config, 0, 1)
        self.states = 0

    @property
    def cost(self) -> int:
        from g2rpo_ray.launch.plan import state_cost

        return round(self.sampler.evaluations + state_cost(self.config) * self.states)

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, score, update; the update's metrics."""
        from g2rpo_ray.data import iteration_prompts
        from g2rpo_ray.launch.plan import learner_states
        from g2rpo_ray.types import TrunkUnit
        from learner.batch import BatchShape, reduce_metrics, spread

        self.sampler.load_weights(self.engine.publish(iteration))
        per_iteration = self.config.data.prompts_per_iteration
        drawn = iteration_prompts(self.train, per_iteration, self.config.seed, iteration)
        choice = self.budget.choice(iteration)
        rollouts = [self._prompt(TrunkUnit(iteration, slot, prompt, choice)) for slot, prompt in enumerate(drawn)]
        self.states += sum(learner_states(self.config, rollout.tree) for rollout in rollouts)
        shards = spread(rollouts, 1)
        metrics = reduce_metrics([self.engine.update(shards[0], BatchShape.of(shards, self.config.learner))])
        return metrics | self.budget.metrics(iteration, self.budget.learn(iteration, rollouts))

    def _prompt(self, unit: Any) -> Any:
        from g2rpo_ray.rollout.plan import branch_part, branch_units, prompt_tree, put_scores
        from g2rpo_ray.types import PromptRollout

        place = (unit.iteration, unit.slot, unit.prompt)
        tree, embedding, branches = prompt_tree(self.config, *place, unit.choice), self.embeddings[unit.prompt], []
        scores = np.full((len(self.config.rewards), len(tree.leaf)), np.nan, np.float32)
        trunk, _ = self.sampler.trunk(unit, embedding)
        for part in branch_units(self.config, tree, unit):
            made, images = self.sampler.branch(part, embedding, trunk)
            found = [self.rewards[name].score(images, [unit.prompt] * len(images)) for name in self.config.rewards]
            put_scores(scores, tree, branch_part(tree, part), found)
            branches.append(made)
        return PromptRollout(*place, tree, scores, embedding, trunk, tuple(branches))

    def judge(self) -> dict[str, np.ndarray]:
        """Scores [prompts, seeds] of held-out samples by reward; they cost nothing here."""
        from g2rpo_ray.types import SampleUnit

        before, seeds = self.sampler.evaluations, tuple(range(self.config.evaluation.seeds))
        self.sampler.load_weights(self.engine.lora_state())
        pictures = {p: self.sampler.sample(SampleUnit(p, seeds), self.embeddings[p]) for p in self.heldout}
        self.sampler.evaluations = before
        return {
            name: np.stack([reward.score(images, [p] * len(images)) for p, images in pictures.items()])
            for name, reward in self.rewards.items()
        }


def budget(share: float = 1.0) -> int:
    """Cost of the quickstart as it is."""
    from g2rpo_ray.rollout.plan import BACKWARD, possible_trees

    config = load_config()
    (tree,) = possible_trees(config)
    prompts = config.iterations * config.data.prompts_per_iteration
    return int(share * prompts * (tree.evaluations + BACKWARD * len(tree.states)))


def one(method: str, seed: int, lr: float, share: float, settings: list[str]) -> dict[str, Any]:
    """A run until another iteration would exceed the budget."""
    from g2rpo_ray.record.heldout import compare

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_PORT=str(probe.getsockname()[1]))
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK="0", RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    config = load_config(None, [f"method={method}", f"seed={seed}", f"learner.lr={lr}", *settings])
    run, limit, start, largest, ratio = Run(config), budget(share), time.perf_counter(), 0, 0.0
    before, iteration = run.judge(), 0
    while run.cost + largest <= limit:
        cost = run.cost
        metrics = run.iterate(iteration)
        largest, ratio = max(largest, run.cost - cost), max(ratio, metrics.get("actor/ratio_initial_max_dev", 0.0))
        iteration += 1
    after = run.judge()
    found = {name: compare(before[name], after[name]) for name in JUDGED}
    return {
        "method": method, "seed": seed, "lr": lr, "iterations": iteration,
        "optimizer_steps": run.engine.optimizer_steps,
        "evaluations": run.sampler.evaluations, "states": run.states, "cost": run.cost, "ratio_initial_max_dev": ratio,
        "seconds": time.perf_counter() - start,
        **{f"{name}_{key}": getattr(c, key) for name, c in found.items()
           for key in ("before", "after", "difference", "standard_error")},
    }  # fmt: skip


def started(method: str, seed: int, lr: float, given: Any) -> dict[str, Any]:
    """`one`, in a process of its own."""
    case = json.dumps([method, seed, lr, given.share, given.set])
    done = subprocess.run([sys.executable, __file__, "--one", case], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method}, seed {seed}, lr {lr:g}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{method} seed {seed} lr {lr:g}: {result['preference_after']:.4f}, {result['seconds']:.0f} s", file=sys.stderr
    )
    return result


def rows_of(results: list[dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for (method, lr), group in itertools.groupby(results, key=lambda result: (result["method"], result["lr"])):
        runs = list(group)
        after = [run["preference_after"] for run in runs]
        rows.append(
            {
                "method": method,
                "lr": lr,
                "iterations": runs[0]["iterations"],
                "optimizer steps": runs[0]["optimizer_steps"],
                "evaluations": runs[0]["evaluations"],
                "learner states": runs[0]["states"],
                "before": runs[0]["preference_before"],
                "after, each seed": ", ".join(f"{value:.4f}" for value in after),
                "mean": float(np.mean(after)),
                "rise in s.e., each seed": ", ".join(
                    f"{run['preference_difference'] / run['preference_standard_error']:.1f}" for run in runs
                ),
                "shape right, mean": float(np.mean([run["shape_after"] for run in runs])),
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--methods", nargs="+", default=method_names())
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--lr", type=float, nargs="+", help="default: each method's own")
    options.add_argument("--share", type=float, default=1.0, help="of the budget")
    options.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a setting")
    options.add_argument("--lines", type=Path, help="also write a JSON line a run")
    options.add_argument("--one", help="internal: one run, told in JSON")
    given = options.parse_args()
    if given.one:
        print(json.dumps(one(*json.loads(given.one))))
        return
    if given.quick:
        given.methods, given.seeds, given.share = given.methods[:2], [0], 0.06
    cases = [
        (m, lr, seed) for m in given.methods for lr in given.lr or [LEARNING_RATES.get(m, 1e-3)] for seed in given.seeds
    ]
    with ThreadPoolExecutor(given.jobs) as pool:
        results = list(pool.map(lambda case: started(case[0], case[2], case[1], given), cases))
    if given.lines:
        given.lines.write_text("".join(json.dumps(result) + "\n" for result in results))
    note = f"Budget {budget(given.share):,}: evaluations + 3 × learner states. Held out: 12 prompts × 8 noises."
    report("Methods on the quickstart, equal cost", rows_of(results), given.json, [note])


if __name__ == "__main__":
    main()
