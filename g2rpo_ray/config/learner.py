"""Settings of the learner, and their consistency with the tree: objective, kernel, draws, averages."""

from typing import Annotated, Any, Literal

from pydantic import Field

from g2rpo_ray.config.resources import ActorSection, OneDevice
from g2rpo_ray.config.sampler import SamplerConfig
from g2rpo_ray.config.section import Own

FORWARD = ("nft", "awm", "awm_t", "awm_t2", "awm_huber", "awm_ghuber")  # objectives of the forward process
MAX_SUBSTEPS = 16  # of a subpath: the activations of all its passes are held at once
Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerConfig(ActorSection):
    ranks: int = Field(1, ge=1, le=256)
    """DeepSpeed ranks, each a Ray actor. They change the result only by rounding."""
    resources: OneDevice = {"GPU": 1}
    """Ray resources of one rank; its device and threads follow from them, as in `rollout`. Several ranks need a whole
    GPU each, or no GPU."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed's ZeRO stage: 1 partitions the optimizer's state over the ranks, 2 also the gradients, 3 also all
    weights. 2 saves at most 4 bytes per trained parameter and reduces gradients at each micro-batch, 1 at each step."""
    micro_batch: int = Field(1, ge=1, le=4096)
    """States (parents of trained edges, or draws of images) per forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a third more time."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile). The first update starts some minutes later, and rounds
    differently from a rollout without `rollout.compile`. Not possible with `zero_stage` 3."""
    objective: (
        Literal["clip", "guard", "dppo", "reinforce", "nft", "awm", "awm_t", "awm_t2", "awm_huber", "awm_ghuber"] | Own
    ) = "clip"
    """Loss: see g2rpo_ray/algo/objectives.py. From `nft` on, of the forward process: see g2rpo_ray/algo/forward.py.
    Or your own function of stochastic edges, `package.module:name`."""
    draws: int = Field(1, ge=1, le=100)
    """For the forward process: number of noise levels at which an image is trained, each with its own noise."""
    times: Literal["grid", "uniform", "logit_normal"] = "grid"
    """Distribution of these noise levels: the sampler's own except sampler.untrained (`grid`), or any on its
    schedule."""
    nft_beta: float = Field(1.0, gt=0, le=10)
    """β of `nft`: distance of its two predictions from the old policy, as a multiple of the policy's distance."""
    old_decay: tuple[Annotated[float, Field(ge=0, le=1_000_000)], Beta, Beta] | None = None
    """[flat, rate, maximum] of an average of the policy. At the end of an iteration, after n optimizer steps, its decay
    is min(max(0, n − flat) rate, maximum). With `nft` the average samples."""
    old_kl: float = Field(0.0, ge=0, le=1000)
    """β of the squared difference in velocity to that average, for the forward process."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an average of the LoRA over optimizer steps, min(ema, (1 + n) / (10 + n)) at the n-th. It is evaluated
    and exported too (lora_ema/)."""
    subpaths: tuple[Annotated[int, Field(ge=2, le=MAX_SUBSTEPS)], ...] = ()
    """For `reinforce` (Pave-GRPO): an edge is also scored along n − 1 ODE substeps and the rest, for each n."""
    edge_weight: Annotated[float, Field(gt=0, le=1000)] | Literal["time"] | None = None
    """Weight of an edge in the loss. A number c: c · std of its step (TempFlow-GRPO: 1.73). `time`: √(σ / ((1 − σ)
    |Δσ|)), for videos, whose large shifts make the gradients of early steps vanish (LongCat-Video). Unset: 1."""
    schedule: Literal["per_step", "accumulate"] = "per_step"
    """`per_step`: an optimizer step for each schedule index at which trained edges start, ascending. `accumulate`: one
    for all."""
    updates_per_rollout: int = Field(1, ge=1, le=1024)
    """Number of equal parts of an iteration's prompts. Each makes its own optimizer steps, one part after another."""
    lr: float = Field(2e-6, gt=0, le=1)
    """Learning rate of AdamW, after the warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """`linear` and `cosine` (half a period) fall to 0 at the end of the run."""
    lr_iterations: int | None = Field(None, ge=1, le=1_000_000)
    """Iterations after which `linear` and `cosine` reach 0. Unset: `iterations`, fixed when the run is resumed."""
    warmup: int = Field(0, ge=0, le=1_000_000)
    """Iterations over which the learning rate rises linearly to `lr`."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Betas of AdamW."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Epsilon of AdamW. If it is not far below √v̂ of the gradients it shortens the steps: docs/tuning.md."""
    weight_decay: float = Field(1e-4, ge=0, le=1000)
    """Weight decay of AdamW."""
    grad_clip: float = Field(1.0, gt=0, le=1_000_000)
    """Maximum norm of the whole gradient."""
    clip_range: float = Field(1e-4, gt=0, le=1000)
    """ε of the clipped surrogate."""
    kl_beta: float = Field(0.0, ge=0, le=1000)
    """β of the KL to the model without LoRA; for the forward process, of the squared difference in velocity."""
    max_restarts: int = Field(10, ge=0, le=1_000_000)
    """Maximum restarts of a lost learner, each from the latest checkpoint. Moves off drained nodes do not count."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the ranks: env_vars such as NCCL_SOCKET_IFNAME; docs/howto/several_nodes.md."""
    old_log_prob: Literal["learner", "rollout"] = "learner"
    """Source of the old log-probabilities. `learner`: the learner evaluates them itself, so the first ratio is exactly
    1. `rollout`: those of the rollout."""
    velocity_tolerance: float | None = Field(None, gt=0, le=1000)
    """Maximum relative error of the learner's velocity against the rollout's, at the same state and weights. A run that
    exceeds it stops before its next optimizer step. Unset: 1e-5 in float32, 0.03 in bfloat16."""

    @property
    def forward(self) -> bool:
        """True for objectives of the forward process, which train noised images instead of stochastic steps."""
        return self.objective in FORWARD

    @property
    def evaluates_old(self) -> bool:
        """True if the learner evaluates the sampling policy at edges; `reinforce` needs none."""
        return self.old_log_prob == "learner" and self.compares_edges

    @property
    def compares_edges(self) -> bool:
        """True if the objective compares log-probabilities of edges with old ones."""
        return not self.forward and self.objective != "reinforce"

    @property
    def average_samples(self) -> bool:
        """True if the average of the policy samples, and not the policy itself."""
        return self.objective == "nft" and self.old_decay is not None


def check_learner(learner: LearnerConfig, sampler: SamplerConfig, prompts: int, iterations: int) -> None:
    """Raises ValueError, in one line, for settings that contradict each other."""
    if learner.subpaths and learner.objective != "reinforce":
        raise ValueError(
            f"learner.subpaths: {list(learner.subpaths)} given; only learner.objective=reinforce uses them "
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
            "needs gradients of stochastic steps, which the forward process does not have; give lists"
        )
    if sampler.is_auto and (learner.zero_stage == 3 or learner.compile):
        given = "zero_stage: 3" if learner.zero_stage == 3 else "compile: true"
        raise ValueError(
            f"learner.{given} given, but `auto` of sampler.branch_steps or sampler.strides needs gradients of "
            "single states, which it does not give; use zero_stage 1 or 2 without compile, or give lists"
        )
    if learner.compile and learner.zero_stage == 3:
        raise ValueError(
            "learner.compile: true given, but learner.zero_stage=3 gathers weights in hooks of each layer, which "
            "torch.compile cannot trace; remove one of the two"
        )
    if learner.old_log_prob == "rollout" and not learner.compares_edges:
        raise ValueError(
            f"learner.old_log_prob: rollout given, but learner.objective={learner.objective} does not use "
            "log-probabilities of the rollout; remove it"
        )
    if learner.updates_per_rollout > prompts:
        raise ValueError(
            f"learner.updates_per_rollout: {learner.updates_per_rollout} given; may be at most "
            f"data.prompts_per_iteration={prompts}"
        )
    _check_rate(learner, iterations)
    _check_forward(learner, sampler)


def _check_rate(learner: LearnerConfig, iterations: int) -> None:
    given, falls = learner.lr_iterations, learner.lr_schedule != "constant"
    if given is not None and not falls:
        raise ValueError(f"learner.lr_iterations: {given} given, but learner.lr_schedule is constant; remove it")
    if given is not None and given < iterations:
        raise ValueError(
            f"learner.lr_iterations: {given} given; the learning rate would be 0 before the last of "
            f"iterations={iterations}; give at least {iterations}"
        )
    if learner.warmup and learner.warmup >= (given or iterations):
        raise ValueError(f"learner.warmup: {learner.warmup} given; must be less than {given or iterations} iterations")


def _check_forward(learner: LearnerConfig, sampler: SamplerConfig) -> None:
    if sampler.kernel == "ode":
        _check_ode(learner, sampler)
    if learner.forward and learner.edge_weight is not None:
        raise ValueError(
            f"learner.edge_weight: {learner.edge_weight} given, but learner.objective={learner.objective} has no "
            "stochastic edges; remove it"
        )
    if learner.forward and learner.times == "grid" and set(range(sampler.steps)) <= set(sampler.untrained):
        raise ValueError(
            f"sampler.untrained: {list(sampler.untrained)} given, but learner.times=grid needs a noise level; "
            "remove an index"
        )
    _check_average(learner)


def _check_ode(learner: LearnerConfig, sampler: SamplerConfig) -> None:
    if not learner.forward:
        raise ValueError(
            f"sampler.kernel: ode given, whose steps have no probability for learner.objective={learner.objective}; "
            f"give flow, dance or cps, or an objective of {', '.join(FORWARD)}"
        )
    if sampler.group_size > 1 or sampler.splits or any(len(steps) > 1 for steps in sampler.placements()):
        raise ValueError(
            "sampler.kernel: ode given, which makes all children of a root equal; set sampler.group_size to 1, one "
            "branch step and no splits, and sampler.roots to the number of images to compare"
        )


def _check_average(learner: LearnerConfig) -> None:
    if learner.old_decay is not None and not learner.average_samples and learner.old_kl == 0:
        raise ValueError(
            f"learner.old_decay: {list(learner.old_decay)} given, but learner.objective={learner.objective} uses it "
            "only for learner.old_kl; set learner.old_kl, or remove learner.old_decay"
        )
    if learner.old_kl > 0 and (learner.old_decay is None or not learner.forward):
        raise ValueError(
            f"learner.old_kl: {learner.old_kl:g} given; it needs learner.old_decay, and an objective of "
            f"{', '.join(FORWARD)} (it is {learner.objective})"
        )
