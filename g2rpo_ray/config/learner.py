"""Settings of the learner, and what they must agree on with the tree: objective, kernel, draws, averages."""

from typing import Annotated, Literal

from pydantic import Field

from g2rpo_ray.algo import FORWARD
from g2rpo_ray.config.resources import Device, Resources
from g2rpo_ray.config.section import Section
from g2rpo_ray.config.tree import SamplerConfig

MOST_SUBSTEPS = 16  # of a subpath: each is a forward and backward pass, all held until the last
Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1, le=256)
    """DeepSpeed ranks, each a Ray actor. The result does not depend on it beyond rounding."""
    device: Device = "cuda"
    """Where the learner computes."""
    threads: int = Field(1, ge=1, le=256)
    """CPU threads of one rank."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one rank."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed's: 1 partitions the optimizer's state over the ranks, 2 the gradients, too, 3 all weights."""
    micro_batch: int = Field(1, ge=1, le=4096)
    """States (parents of trained edges, draws of images) in one forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a third more time."""
    objective: Literal[
        "clip", "guard", "dppo", "reinforce", "nft", "awm", "awm_t", "awm_t2", "awm_huber", "awm_ghuber"
    ] = "clip"
    """What is minimised: see g2rpo_ray/algo/objectives.py; from `nft` on, of the forward process: forward.py there."""
    draws: int = Field(1, ge=1, le=100)
    """Of the forward process: noise levels at which an image is trained, each with noise of its own."""
    times: Literal["grid", "uniform", "logit_normal"] = "grid"
    """Their distribution: the sampler's own noise levels but those of sampler.untrained, or any on its schedule."""
    nft_beta: float = Field(1.0, gt=0, le=10)
    """β of `nft`: how far from the old policy its two predictions are, as a multiple of what the policy is."""
    old_decay: tuple[Annotated[float, Field(ge=0, le=1_000_000)], Beta, Beta] | None = None
    """[flat, rate, most]: keep an average of the policy, which after n optimizer steps keeps min(max(0, n − flat) rate,
    most) of itself at the end of an iteration. With `nft` it is the policy that samples."""
    old_kl: float = Field(0.0, ge=0, le=1000)
    """β of the squared difference in velocity to that average, of the forward process."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an average of the LoRA over optimizer steps, min(ema, (1 + n) / (10 + n)) at the n-th: evaluated and
    exported beside it (lora_ema/)."""
    subpaths: tuple[Annotated[int, Field(ge=2, le=MOST_SUBSTEPS)], ...] = ()
    """Of `reinforce` (Pave-GRPO): an edge is rescored along n − 1 ODE substeps and the rest, too, for each n here."""
    edge_weight: float | None = Field(None, gt=0, le=1000)
    """c: an edge weighs c · std of its step (TempFlow-GRPO: 1.73); unset: 1."""
    schedule: Literal["per_step", "accumulate"] = "per_step"
    """An optimizer step for each schedule index at which trained edges start, ascending, or one for all together."""
    updates_per_rollout: int = Field(1, ge=1, le=1024)
    """Equal parts of an iteration's prompts; each makes the optimizer steps of its own, one after another."""
    lr: float = Field(2e-6, gt=0, le=1)
    """Learning rate of AdamW, constant."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's."""
    eps: float = Field(1e-8, gt=0, le=1)
    """AdamW's."""
    weight_decay: float = Field(1e-4, ge=0, le=1000)
    """AdamW's."""
    grad_clip: float = Field(1.0, gt=0, le=1_000_000)
    """Largest norm of the whole gradient."""
    clip_range: float = Field(1e-4, gt=0, le=1000)
    """ε of the clipped surrogate."""
    kl_beta: float = Field(0.0, ge=0, le=1000)
    """β of the KL to the model without LoRA; of the forward process, of the squared difference in velocity."""
    max_restarts: int = Field(10, ge=0, le=1_000_000)
    """Times that the run starts a lost learner again, from the latest checkpoint."""
    ratio_tolerance: float = Field(1e-6, gt=0, le=1000)
    """Largest |ratio − 1| before the first optimizer step; a run that exceeds it stops. Loosen it for bfloat16."""

    @property
    def forward(self) -> bool:
        """Whether images are trained, made noisy again, and not stochastic steps."""
        return self.objective in FORWARD

    @property
    def average_samples(self) -> bool:
        """Whether rollouts are sampled by the average, and not by the policy itself."""
        return self.objective == "nft" and self.old_decay is not None


def check_learner(learner: LearnerConfig, sampler: SamplerConfig, prompts: int) -> None:
    """Raise ValueError, in one line, for settings that contradict each other."""
    if learner.subpaths and learner.objective != "reinforce":
        raise ValueError(
            f"learner.subpaths: {list(learner.subpaths)} given; they are for learner.objective=reinforce alone "
            f"(it is {learner.objective})"
        )
    if learner.updates_per_rollout > prompts:
        raise ValueError(
            f"learner.updates_per_rollout: {learner.updates_per_rollout} given; at most "
            f"data.prompts_per_iteration={prompts}"
        )
    _check_forward(learner, sampler)


def _check_forward(learner: LearnerConfig, sampler: SamplerConfig) -> None:
    if sampler.kernel == "ode":
        _check_ode(learner, sampler)
    if learner.forward and learner.edge_weight is not None:
        raise ValueError(
            f"learner.edge_weight: {learner.edge_weight:g} given, but learner.objective={learner.objective} has no "
            "stochastic edges: leave it out"
        )
    if learner.forward and learner.times == "grid" and set(range(sampler.steps)) <= set(sampler.untrained):
        raise ValueError(
            f"sampler.untrained: {list(sampler.untrained)} given, which leaves no noise level for learner.times=grid"
        )
    _check_average(learner)


def _check_ode(learner: LearnerConfig, sampler: SamplerConfig) -> None:
    if not learner.forward:
        raise ValueError(
            f"sampler.kernel: ode given, whose steps have no probability for learner.objective={learner.objective}; "
            f"choose flow, dance or cps, or an objective of {', '.join(FORWARD)}"
        )
    if sampler.group_size > 1 or sampler.splits or any(len(steps) > 1 for steps in sampler.placements()):
        raise ValueError(
            "sampler.kernel: ode given, which makes all children of a root alike: set sampler.group_size to 1, one "
            "branch step and no splits; sampler.roots are the images to compare"
        )


def _check_average(learner: LearnerConfig) -> None:
    if learner.old_decay is not None and not learner.average_samples and learner.old_kl == 0:
        raise ValueError(
            f"learner.old_decay: {list(learner.old_decay)} given, which learner.objective={learner.objective} uses for "
            "learner.old_kl alone: give that, or leave it out"
        )
    if learner.old_kl > 0 and (learner.old_decay is None or not learner.forward):
        raise ValueError(
            f"learner.old_kl: {learner.old_kl:g} given; it needs learner.old_decay, and an objective of "
            f"{', '.join(FORWARD)} (it is {learner.objective})"
        )
