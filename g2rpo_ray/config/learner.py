"""Settings of the learner, and what they must agree on with the tree: objective, kernel, draws, averages."""

from typing import Annotated, Any, Literal

from pydantic import Field

from g2rpo_ray.config.resources import Device, OneDevice
from g2rpo_ray.config.sampler import SamplerConfig
from g2rpo_ray.config.section import Own, Section

FORWARD = ("nft", "awm", "awm_t", "awm_t2", "awm_huber", "awm_ghuber")  # objectives of the forward process
MOST_SUBSTEPS = 16  # of a subpath: each is a forward and backward pass, all held until the last
Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1, le=256)
    """DeepSpeed ranks, each a Ray actor. The result does not depend on it beyond rounding."""
    threads: int = Field(1, ge=1, le=256)
    """CPU threads of one rank."""
    resources: OneDevice = {"GPU": 1}
    """Ray resources of one rank. Several ranks need a whole GPU each, or none."""
    device: Device = Field("auto", validate_default=True)
    """Device of the ranks. `auto`: the GPU that Ray assigned if `resources` has one, else the CPU."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed's: 1 partitions the optimizer's state over the ranks, 2 the gradients, too, 3 all weights. 2 saves at
    most 4 bytes a trained parameter, and reduces gradients over the network at each micro-batch, 1 at each step."""
    micro_batch: int = Field(1, ge=1, le=4096)
    """States (parents of trained edges, draws of images) in one forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a third more time."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): a rank starts its first update some minutes later, and rounds
    otherwise than a rollout without `rollout.compile`. Not with `zero_stage` 3."""
    objective: (
        Literal["clip", "guard", "dppo", "reinforce", "nft", "awm", "awm_t", "awm_t2", "awm_huber", "awm_ghuber"] | Own
    ) = "clip"
    """What is minimised: see g2rpo_ray/algo/objectives.py; from `nft` on, of the forward process: forward.py there.
    Or a function of your own, `package.module:name`, of stochastic edges."""
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
    edge_weight: Annotated[float, Field(gt=0, le=1000)] | Literal["time"] | None = None
    """Weight of an edge in the loss. A number c: c · std of its step (TempFlow-GRPO: 1.73). `time`: √(σ / ((1 − σ)
    |Δσ|)), for videos, whose large shifts make the gradients of early steps vanish (LongCat-Video). Unset: 1."""
    schedule: Literal["per_step", "accumulate"] = "per_step"
    """An optimizer step for each schedule index at which trained edges start, ascending, or one for all together."""
    updates_per_rollout: int = Field(1, ge=1, le=1024)
    """Equal parts of an iteration's prompts; each makes the optimizer steps of its own, one after another."""
    lr: float = Field(2e-6, gt=0, le=1)
    """Learning rate of AdamW, after the warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Constant, or falling to 0 at the end of the run: linearly, or along half a cosine."""
    lr_iterations: int | None = Field(None, ge=1, le=1_000_000)
    """Iterations after which `linear` and `cosine` reach 0. Unset: `iterations`, which a resumed run must keep."""
    warmup: int = Field(0, ge=0, le=1_000_000)
    """Iterations over which the learning rate rises linearly to `lr`."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's."""
    eps: float = Field(1e-8, gt=0, le=1)
    """AdamW's. Where it is not far below √v̂ of the gradients it shortens the steps: docs/tuning.md."""
    weight_decay: float = Field(1e-4, ge=0, le=1000)
    """AdamW's."""
    grad_clip: float = Field(1.0, gt=0, le=1_000_000)
    """Largest norm of the whole gradient."""
    clip_range: float = Field(1e-4, gt=0, le=1000)
    """ε of the clipped surrogate."""
    kl_beta: float = Field(0.0, ge=0, le=1000)
    """β of the KL to the model without LoRA; of the forward process, of the squared difference in velocity."""
    max_restarts: int = Field(10, ge=0, le=1_000_000)
    """Times that the run starts a lost learner again, from the latest checkpoint. Moves off drained nodes do not
    count."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the ranks: env_vars such as NCCL_SOCKET_IFNAME; docs/howto/several_nodes.md."""
    old_log_prob: Literal["learner", "rollout"] = "learner"
    """`learner`: the learner evaluates the old log-probabilities itself, so that the first ratio is exactly 1.
    `rollout`: the ratio is against the log-probabilities that the rollout computed."""
    velocity_tolerance: float | None = Field(None, gt=0, le=1000)
    """Largest relative error of the learner's velocity against the rollout's, at the same state and weights. A run that
    exceeds it stops before its next optimizer step. Unset: 1e-5 in float32, 0.03 in bfloat16."""

    @property
    def forward(self) -> bool:
        """Whether images are trained, made noisy again, and not stochastic steps."""
        return self.objective in FORWARD

    @property
    def evaluates_old(self) -> bool:
        """Whether the learner evaluates the policy that sampled, at edges: `reinforce` is without one."""
        return self.old_log_prob == "learner" and self.compares_edges

    @property
    def compares_edges(self) -> bool:
        """Whether the objective compares log-probabilities of edges with old ones."""
        return not self.forward and self.objective != "reinforce"

    @property
    def average_samples(self) -> bool:
        """Whether rollouts are sampled by the average, and not by the policy itself."""
        return self.objective == "nft" and self.old_decay is not None


def check_learner(learner: LearnerConfig, sampler: SamplerConfig, prompts: int, iterations: int) -> None:
    """Raise ValueError, in one line, for settings that contradict each other."""
    if learner.subpaths and learner.objective != "reinforce":
        raise ValueError(
            f"learner.subpaths: {list(learner.subpaths)} given; they are for learner.objective=reinforce alone "
            f"(it is {learner.objective})"
        )
    gpus = learner.resources.get("GPU", 0)
    if learner.ranks > 1 and 0 < gpus < 1:
        raise ValueError(
            f"learner.resources.GPU: {gpus:g} given; must be 1 with learner.ranks={learner.ranks}, because NCCL does "
            "not let two ranks share a GPU"
        )
    if sampler.is_auto and learner.forward:
        raise ValueError(
            f"learner.objective: {learner.objective} given, but `auto` of sampler.branch_steps or sampler.strides "
            "compares gradients of stochastic steps, which the forward process has not: give lists"
        )
    if sampler.is_auto and (learner.zero_stage == 3 or learner.compile):
        given = "zero_stage: 3" if learner.zero_stage == 3 else "compile: true"
        raise ValueError(
            f"learner.{given} given, but `auto` of sampler.branch_steps or sampler.strides compares gradients of "
            "single states, which that does not give: use zero_stage 1 or 2 without compile, or give lists"
        )
    if learner.compile and learner.zero_stage == 3:
        raise ValueError(
            "learner.compile: true given, but learner.zero_stage=3 gathers weights in hooks of each layer, which "
            "torch.compile cannot take into a graph: leave out one of the two"
        )
    if learner.old_log_prob == "rollout" and not learner.compares_edges:
        raise ValueError(
            f"learner.old_log_prob: rollout given, but learner.objective={learner.objective} does not use "
            "log-probabilities of the rollout: leave it out"
        )
    if learner.updates_per_rollout > prompts:
        raise ValueError(
            f"learner.updates_per_rollout: {learner.updates_per_rollout} given; at most "
            f"data.prompts_per_iteration={prompts}"
        )
    _check_rate(learner, iterations)
    _check_forward(learner, sampler)


def _check_rate(learner: LearnerConfig, iterations: int) -> None:
    given, falls = learner.lr_iterations, learner.lr_schedule != "constant"
    if given is not None and not falls:
        raise ValueError(f"learner.lr_iterations: {given} given, but learner.lr_schedule is constant: leave it out")
    if given is not None and given < iterations:
        raise ValueError(
            f"learner.lr_iterations: {given} given; the learning rate would be 0 before the last of "
            f"iterations={iterations}: give at least as many"
        )
    if learner.warmup and learner.warmup >= (given or iterations):
        raise ValueError(f"learner.warmup: {learner.warmup} given; must be less than {given or iterations} iterations")


def _check_forward(learner: LearnerConfig, sampler: SamplerConfig) -> None:
    if sampler.kernel == "ode":
        _check_ode(learner, sampler)
    if learner.forward and learner.edge_weight is not None:
        raise ValueError(
            f"learner.edge_weight: {learner.edge_weight} given, but learner.objective={learner.objective} has no "
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
