"""Every setting, with its type, its bounds and what it means."""

from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from g2rpo_ray.algo import groups, plan_tree
from g2rpo_ray.config.learner import LearnerConfig, check_learner
from g2rpo_ray.config.resources import Device, Resources
from g2rpo_ray.config.section import Section
from g2rpo_ray.config.tree import CreditConfig, SamplerConfig

PanelName = Literal["diversity", "high_frequency", "periodicity", "saturation", "distance", "unseen"]
MOST_ACTORS = 4096  # of a pool


class ModelConfig(Section):
    path: str
    """Diffusers pipeline of a family in docs/models.md: a directory, a hub id, or `embedded:pipeline`."""
    revision: str | None = None
    """Commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the frozen weights and their arithmetic; latents, LoRA and log-probabilities are always float32."""
    height: int = Field(720, gt=0, le=8192)
    """Pixels; a multiple of the pipeline's latent patch (16 for published models)."""
    width: int = Field(720, gt=0, le=8192)
    """Pixels; the same."""
    guidance_scale: float | None = Field(None, ge=0, le=100)
    """What the pipeline calls so: an input of guidance-distilled models, the scale of classifier-free guidance of the
    others; unset: the pipeline's default."""
    negative_prompt: str | None = None
    """What classifier-free guidance guides away from, "" being a text, too; unset: no such guidance."""
    max_sequence_length: int | None = Field(None, gt=0, le=1024)
    """Tokens a prompt is cut, or padded, to; unset: the pipeline's default."""
    attention_backend: str | None = None
    """A diffusers attention backend by name; unset: the default of diffusers."""


class LoraConfig(Section):
    rank: int = Field(64, gt=0, le=1024)
    """Rank of each adapter."""
    alpha: float = Field(64, gt=0, le=1_000_000)
    """The adapter is scaled by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] | None = None
    """Name endings of the transformer's linear layers that get an adapter, or `all-linear`; unset: those of attention,
    which docs/models.md lists."""
    initial: str | None = None
    """Adapter to start from, as this program or diffusers wrote it: file or folder."""


class RolloutConfig(Section):
    min_actors: int = Field(1, ge=1, le=MOST_ACTORS)
    """Rollout actors without which the run does not start. The result does not depend on their number."""
    max_actors: int = Field(1, ge=1, le=MOST_ACTORS)
    """Rollout actors asked for, all the time: they join as the cluster finds room, and autoscalers see the demand."""
    device: Device = "cuda"
    """Where rollout actors compute."""
    threads: int = Field(1, ge=1, le=256)
    """CPU threads of one actor."""
    micro_batch: int = Field(8, ge=1, le=4096)
    """Most latents in one velocity evaluation. Part of the plan: results depend on it by rounding."""
    memory_gib: float | None = Field(None, gt=0, le=1_000_000)
    """Memory of an actor's device. Given, `micro_batch` is lowered, before anything starts, to what an estimate says
    that it holds; it stays so for the run."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): an actor starts a minute or two later, and rounds otherwise
    than the learner does: watch actor/ratio_initial_max_dev."""
    members_per_unit: int | None = Field(None, ge=1, le=1024)
    """Children that one work unit holds, of all roots at one branch step; unset: all of them."""
    decode_batch: int = Field(1, ge=1, le=1024)
    """Most latents in one pass of the VAE, which takes gigabytes an image at 720 px."""
    max_staleness: Literal[0, 1] = 0
    """1: an iteration is sampled while the one before it updates, with weights one version old. The ratio is against
    the policy that sampled; the result depends on this setting, not on timing."""
    max_unscored_units: int = Field(64, ge=1, le=65_536)
    """Units whose images may wait for their scores; beyond that rollout waits for the reward servers."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one actor; a custom resource pins it to its worker group."""
    max_restarts: int = Field(100, ge=0, le=1_000_000)
    """Deaths of actors (all together) that the run survives."""

    @model_validator(mode="after")
    def _range(self) -> "RolloutConfig":
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors: {self.min_actors} given; may be at most max_actors={self.max_actors}")
        return self


class RewardConfig(Section):
    kind: str
    """One of the kinds in docs/rewards.md, or `module:factory` for your own."""
    weight: float = Field(1.0, gt=0, le=1000)
    """w_r in the advantage; not used in `eval_rewards`."""
    options: dict[str, Any] = {}
    """Arguments of the reward: checkpoint, architecture, device ..."""
    replicas: int = Field(1, ge=1, le=MOST_ACTORS)
    """Server actors."""
    batch_size: int = Field(16, ge=1, le=4096)
    """Most images in one forward pass. Part of the plan: results depend on it by rounding."""
    retries: int = Field(2, ge=0, le=100)
    """Times a failed or non-finite score is asked for again before it counts as missing."""
    threads: int = Field(1, ge=1, le=256)
    """CPU threads of one server."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one server."""
    max_restarts: int = Field(100, ge=0, le=1_000_000)
    """Deaths of servers (all together) that the run survives."""
    win_rate: bool = False
    """Train on the share of its group that an image beats by this reward, a tie being half (Pref-GRPO), in place of its
    score. Held-out scores stay what they are."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the servers, handed on as it is: pip, uv, conda, image_uri ...; docs/rewards.md."""


class DataConfig(Section):
    train_prompts: str
    """Text (a prompt a line), .jsonl, .json (HPDv2's, too) or .parquet; a pattern for several; see docs/evaluate.md."""
    heldout_prompts: str
    """The same. What is held out is dropped from the training prompts."""
    prompts_per_iteration: int = Field(16, ge=1, le=16_384)
    """Prompts drawn for an iteration; each has a tree of its own."""
    embeddings: str | None = None
    """Folder or URI of the encoded prompts (Parquet), shared between runs; unset: in the run directory."""
    encoder_device: Device = "cuda"
    """Where prompts are encoded."""
    encoder_resources: Resources = {"GPU": 1}
    """Ray resources of the actor that encodes prompts, held only until all are encoded."""


class EvaluationConfig(Section):
    anchors: bool = True
    """Carry the trunks on to the image and score it with all rewards: the on-policy evaluation `eval/*`. `method` fills
    it."""
    guidance: bool = True
    """The same as sampler.guidance, of held-out samples and of `evaluate`."""
    every: int = Field(50, ge=0, le=1_000_000)
    """Iterations between held-out evaluations; 0: only before the first and after the last."""
    seeds: int = Field(2, ge=1, le=1024)
    """Samples of each held-out prompt; the same noise at every evaluation."""
    grid_prompts: int = Field(8, ge=0, le=1024)
    """Held-out prompts shown in samples/<iteration>.png."""
    stop_on: tuple[PanelName, ...] = ()
    """Numbers of the hacking panel (docs/rewards.md) that end the run, with its best checkpoint, when they pass their
    limits."""


class CheckpointConfig(Section):
    every: int = Field(10, ge=1, le=1_000_000)
    """Iterations between checkpoints; the last iteration always makes one."""
    keep: int = Field(3, ge=1, le=1_000_000)
    """Newest checkpoints kept, beside the one with the best held-out scores."""


class TrackingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files to `tensorboard/` in the run directory."""
    timeline_every: int = Field(10, ge=0, le=1_000_000)
    """Iterations between timelines of who did what when; 0: none."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""


class Config(Section):
    """A run. `name`, `output` and `seed` say which, the sections how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Folder of the run below `output`."""
    output: str = "runs"
    """Where run directories are made: a path that every node of the cluster sees, or a URI such as s3://bucket/runs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the order of prompts, all noise, and the start of the LoRA."""
    method: str = "g2rpo"
    """What fills the tree's shape, `credit` and the objective, unless they are given beside it or later: a name in
    docs/methods.md, or the import path of a module of your own, with a dot."""
    iterations: int = Field(300, ge=1, le=1_000_000)
    """Iterations of the run: a rollout and an update each."""
    startup_timeout_s: float = Field(600, gt=0, le=604_800)
    """How long the run waits for its actors to start. Once some have, one that takes ten times as long as they did from
    when it has a process, and at least half of this, is taken for hung and started again."""
    hung_after_s: float = Field(1800, gt=0, le=86400)
    """Seconds after which a unit, a score, an update or whatever else an actor does is taken for hung, and the actor
    for dead. Less, but a minute at least, once it is known what such calls usually take: ten times that."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    sampler: SamplerConfig = SamplerConfig()
    credit: CreditConfig = CreditConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, RewardConfig] = Field(min_length=1, max_length=64)
    """Trained on, by name."""
    eval_rewards: dict[str, RewardConfig] = Field({}, max_length=64)
    """Logged and never trained on. Here and in `rewards`, null takes out one that `extends` brought in."""
    learner: LearnerConfig = LearnerConfig()
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("rewards", "eval_rewards", mode="before")
    @classmethod
    def _without_null(cls, rewards: Any) -> Any:
        return {k: v for k, v in rewards.items() if v is not None} if isinstance(rewards, dict) else rewards

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        both = sorted(set(self.rewards) & set(self.eval_rewards))
        if both:
            raise ValueError(f"eval_rewards: {both[0]} is in `rewards` too; give one of them another name")
        self._check_credit()
        check_learner(self.learner, self.sampler, self.data.prompts_per_iteration)
        return self

    def _check_credit(self) -> None:
        weights, strides = self.credit.granularity_weights, self.sampler.strides
        if weights is not None and strides == "auto":
            raise ValueError(
                "credit.granularity_weights: given, but sampler.strides=auto has one at a time: leave it out"
            )
        if weights is not None and len(weights) != len(strides):
            raise ValueError(
                f"credit.granularity_weights: {list(weights)} given; give one for each of "
                f"sampler.strides={list(strides)}"
            )
        for branch_steps in self.sampler.placements():
            tree = plan_tree(self.sampler.shape(branch_steps))
            number = groups(tree, self.credit.group)
            alone = tree.trained & (np.bincount(number)[number] < 2)
            if alone.any():
                raise ValueError(
                    f"credit.group: {self.credit.group} given, but a trained edge that starts at index "
                    f"{tree.start[alone][0]} has none to be compared with: raise sampler.group_size or sampler.roots, "
                    "or set credit.group to step"
                )

    @property
    def velocity_cost(self) -> int:
        """Evaluations that a velocity of rollout and update takes: with classifier-free guidance two."""
        return 1 + (self.sampler.guidance and self.model.negative_prompt is not None)

    @property
    def sample_cost(self) -> int:
        """The same of held-out samples."""
        return 1 + (self.evaluation.guidance and self.model.negative_prompt is not None)

    @property
    def all_rewards(self) -> dict[str, RewardConfig]:
        """Trained rewards first: their order is the R axis of the advantage."""
        return {**self.rewards, **self.eval_rewards}
