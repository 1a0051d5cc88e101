"""Every setting, with its type, its bounds and what it means."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, field_validator, model_validator

from g2rpo_ray.algo.tree import groups, plan_tree
from g2rpo_ray.config.completions import CompletionsConfig, check_completions
from g2rpo_ray.config.learner import LearnerConfig, check_learner
from g2rpo_ray.config.prompts import listed
from g2rpo_ray.config.resources import Device, OneDevice, Resources
from g2rpo_ray.config.sampler import CreditConfig, SamplerConfig
from g2rpo_ray.config.section import Own, PathName, PlaceName, Section
from g2rpo_ray.functions import as_settings, value_in_words
from g2rpo_ray.messages import shown
from g2rpo_ray.paths import resolve

PanelName = Literal[
    "diversity", "high_frequency", "periodicity", "saturation", "exposure", "distance", "unseen", "decline"
]
MOST_ACTORS = 4096  # of a pool
MAX_FRAMES = 257
TORCH_ATTENTION = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Attention backends of diffusers whose backward pass torch makes deterministic."""


class ModelConfig(Section):
    path: PathName
    """Diffusers pipeline of a family in docs/models.md: a directory, a hub id, or `embedded:pipeline`."""
    revision: str | None = None
    """Commit of a hub id."""
    family: Own | None = None
    """Class of your own model family, `package.module:name`: see docs/models.md; unset: by the pipeline's class."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights and their arithmetic; latents, LoRA and log-probabilities are always float32."""
    height: int = Field(720, gt=0, le=8192)
    """Pixels; a multiple of the pipeline's latent patch (16 for published models)."""
    width: int = Field(720, gt=0, le=8192)
    """Pixels; the same."""
    frames: int = Field(1, ge=1, le=MAX_FRAMES)
    """Frames of a video, for a pipeline of videos (Wan: 1 + 4n); 1: a picture."""
    guidance_scale: float | None = Field(None, ge=0, le=100)
    """What the pipeline calls so: an input of guidance-distilled models, the scale of classifier-free guidance of the
    others; unset: the pipeline's default."""
    negative_prompt: str | None = None
    """What classifier-free guidance guides away from, "" being a text, too; unset: no such guidance."""
    sources: int = Field(0, ge=0, le=10)
    """Source pictures that a prompt may have, for a pipeline that edits; 0: prompts are text alone. Memory is estimated
    for so many of the size of the result."""
    max_sequence_length: int | None = Field(None, gt=0, le=1024)
    """Tokens a prompt is cut, or padded, to; unset: the pipeline's default."""
    attention_backend: str | None = None
    """A diffusers attention backend by name, for rollout and learner; unset: the default of diffusers. With
    `deterministic` one of torch's own (`native` ...): others have a backward pass of other bits each time, or none."""

    @property
    def location(self) -> str:
        """The path on this machine, or the hub id, as diffusers' `from_pretrained` takes it."""
        return resolve(self.path)

    @property
    def pixels(self) -> int:
        """Of a picture, or of all frames of a video."""
        return self.frames * self.height * self.width

    @property
    def is_local(self) -> bool:
        """Whether the pipeline is a directory on this machine."""
        return Path(self.location).is_dir()


class LoraConfig(Section):
    rank: int = Field(64, gt=0, le=1024)
    """Rank of each adapter."""
    alpha: float = Field(64, gt=0, le=1_000_000)
    """The adapter is scaled by alpha / rank in training; its file has this in B, and alpha = rank."""
    targets: Literal["all-linear"] | tuple[str, ...] | None = None
    """Name endings of the transformer's linear layers that get an adapter, or `all-linear`; unset: those of attention,
    which docs/models.md lists."""
    initial: PathName | None = None
    """Adapter to start from, with the effect of its own alpha: file or folder, in a format of docs/models.md."""


class RolloutConfig(Section):
    min_actors: int = Field(1, ge=1, le=MOST_ACTORS)
    """Rollout actors without which the run does not start. The result does not depend on their number."""
    max_actors: int = Field(1, ge=1, le=MOST_ACTORS)
    """Rollout actors asked for, all the time: they join as the cluster finds room, and autoscalers see the demand. The
    learner and reward servers have priority: where they find no place, rollout actors above min_actors end."""
    threads: int = Field(1, ge=1, le=256)
    """CPU threads of one actor."""
    micro_batch: int = Field(8, ge=1, le=4096)
    """Most latents in one velocity evaluation. Part of the plan: results depend on it by rounding."""
    memory_gib: float | None = Field(None, gt=0, le=1_000_000)
    """Memory of an actor's device. Given, `micro_batch` is lowered, before anything starts, to what an estimate says
    that it holds; it stays so for the run."""
    attention_backend: str | None = None
    """The same for rollout actors alone, which have no backward pass: any backend, `_flash_3` and `sage` too. Unset:
    that of `model`."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): an actor starts a minute or two later, and rounds otherwise
    than the learner does: watch mismatch/velocity."""
    members_per_unit: int | None = Field(None, ge=1, le=1024)
    """Children that one work unit holds, of all roots at one branch step; unset: all of them."""
    decode_batch: int = Field(1, ge=1, le=1024)
    """Most latents in one pass of the VAE, which takes gigabytes an image at 720 px."""
    completions: CompletionsConfig = CompletionsConfig()
    """How branches are completed below their stochastic edges, where it is not as all else: docs/methods.md."""
    max_staleness: Literal[0, 1] = 0
    """1: an iteration is sampled while the one before it updates, with weights one version old. The ratio is against
    the policy that sampled; the result depends on this setting, not on timing."""
    max_unscored_units: int = Field(64, ge=1, le=65_536)
    """Units whose images may wait for their scores, or two for each rollout actor where that is more; beyond that
    rollout waits for the reward servers."""
    resources: OneDevice = {"GPU": 1}
    """Ray resources of one actor; a custom resource pins it to its worker group."""
    device: Device = Field("auto", validate_default=True)
    """Device of the rollout actors. `auto`: the GPU that Ray assigned if `resources` has one, else the CPU."""
    max_restarts: int = Field(100, ge=0, le=1_000_000)
    """Deaths of actors (all together) that the run survives."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the rollout actors, and of the one that encodes prompts: env_vars, image_uri ..."""

    @model_validator(mode="after")
    def _range(self) -> "RolloutConfig":
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors: {self.min_actors} given; may be at most max_actors={self.max_actors}")
        return self


Frames = Literal["all", "first", "last"] | tuple[Annotated[int, Field(ge=-MAX_FRAMES, lt=MAX_FRAMES)], ...]


class RewardConfig(Section):
    kind: str
    """One of the kinds in docs/rewards.md, or `module:factory` for your own; in Python a function, too."""
    weight: float = Field(1.0, gt=0, le=1000)
    """w_r in the advantage; not used in `eval_rewards`."""
    options: dict[str, Any] = {}
    """Arguments of the reward: checkpoint, architecture, dtype ..."""
    replicas: int = Field(1, ge=1, le=MOST_ACTORS)
    """Server actors."""
    batch_size: int = Field(16, ge=1, le=4096)
    """Most images in one forward pass. Part of the plan: results depend on it by rounding."""
    frames: Frames = "all"
    """Frames of a video whose mean score counts, for a reward of pictures: `all`, `first`, `last`, or a list of
    indices, those below 0 from the end."""
    retries: int = Field(2, ge=0, le=100)
    """Times a failed or non-finite score is asked for again before it counts as missing."""
    threads: int = Field(1, ge=1, le=256)
    """CPU threads of one server."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one server."""
    device: Device = Field("auto", validate_default=True)
    """Device of the servers, for rewards that have an argument `device`. `auto`: as in `rollout`."""
    max_restarts: int = Field(100, ge=0, le=1_000_000)
    """Deaths of servers (all together) that the run survives."""
    win_rate: bool = False
    """Train on the share of its group that an image beats by this reward, a tie being half (Pref-GRPO), in place of its
    score. Held-out scores stay what they are."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the servers: pip, uv, conda, image_uri ...; docs/rewards.md."""

    @model_validator(mode="before")
    @classmethod
    def _given_in_python(cls, given: Any) -> Any:
        return as_settings(given)

    @field_serializer("options", when_used="json")
    def _in_words(self, options: dict[str, Any]) -> dict[str, Any]:
        return {name: value_in_words(value) for name, value in options.items()}


RESERVED_NAMES = ("rollout",)  # `scale` and the metrics have the rollout actors under this name


def _usable_names(rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
    """Reward names are parts of metric names and of file names."""
    for name in rewards:
        if name in RESERVED_NAMES:
            raise ValueError(f"{name}: this name is reserved for the rollout actors; give the reward another name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                f"{shown(name)}: cannot be a name in metrics and files; give 1 to 100 characters of A-Z, a-z, 0-9, "
                "'.', '_' and '-', the first one a letter or a digit"
            )
    return rewards


Rewards = Annotated[dict[str, RewardConfig], Field(max_length=64), AfterValidator(_usable_names)]


PromptSource = Annotated[PathName | tuple[str | dict[str, Any], ...], BeforeValidator(listed)]
"""A file, or prompts."""


class DataConfig(Section):
    train_prompts: PromptSource
    """Text (a prompt a line), .jsonl, .json (HPDv2's, too), .csv, .tsv or .parquet, also as .gz; a pattern for several;
    see docs/evaluate.md. Or the prompts: a list of texts, or of objects that a .jsonl file could have as lines."""
    heldout_prompts: PromptSource
    """The same. What is held out is dropped from the training prompts."""
    prompts_per_iteration: int = Field(16, ge=1, le=16_384)
    """Prompts drawn for an iteration; each has a tree of its own."""
    embeddings: PlaceName | None = None
    """Folder or URI of the encoded prompts (Parquet), shared between runs; unset: in the run directory."""
    encoder_resources: OneDevice = {"GPU": 1}
    """Ray resources of the actor that encodes prompts, held only until all are encoded."""
    encoder_device: Device = Field("auto", validate_default=True)
    """Device on which prompts are encoded. `auto`: as in `rollout`."""


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
    """Also log to this Weights & Biases project (needs `pip install wandb`). A resumed run is the same run there."""


class Config(Section):
    """A run. `name`, `output` and `seed` say which, the sections how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Folder of the run below `output`."""
    output: PlaceName = "runs"
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
    deterministic: bool = True
    """The same bits each time on the same kind of device. false: faster attention and convolutions on GPUs, other last
    bits each time."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    sampler: SamplerConfig = SamplerConfig()
    credit: CreditConfig = CreditConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: Rewards = Field(min_length=1)
    """Trained on, by name: 1 to 100 characters of A-Z, a-z, 0-9, `.`, `_` and `-`, and not `rollout`."""
    eval_rewards: Rewards = {}
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
        exported: dict[str, str] = {}
        for name in self.all_rewards:
            other = exported.setdefault(re.sub(r"\W", "_", name), name)
            if other != name:
                section = "rewards" if name in self.rewards else "eval_rewards"
                raise ValueError(f"{section}.{name}: Prometheus cannot tell it from {other}; rename one of them")
        self._check_credit()
        self._check_attention()
        self._check_frames()
        check_learner(self.learner, self.sampler, self.data.prompts_per_iteration, self.iterations)
        check_completions(self.rollout.completions, self.sampler, self.learner)
        return self

    def _check_frames(self) -> None:
        count = self.model.frames
        for key, reward in self.rewards_by_key.items():
            outside = [] if isinstance(reward.frames, str) else [f for f in reward.frames if not -count <= f < count]
            if outside or not reward.frames:
                raise ValueError(
                    f"{key}.frames: {list(reward.frames)} given; give indices from {-count} to {count - 1}, or all, "
                    f"first or last: model.frames is {count}"
                )

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

    def _check_attention(self) -> None:
        """The learner uses `model.attention_backend`."""
        given = self.model.attention_backend
        if given is None:
            return
        if given == "_flash_3" or "sage" in given:
            raise ValueError(
                f"model.attention_backend: {given} given, which has no backward pass for the learner; give it as "
                "rollout.attention_backend"
            )
        if self.deterministic and given not in TORCH_ATTENTION:
            raise ValueError(
                f"model.attention_backend: {given} given; with deterministic=true the learner can use "
                f"{', '.join(TORCH_ATTENTION)}: give it as rollout.attention_backend, or set deterministic to false"
            )

    @property
    def rollout_model(self) -> ModelConfig:
        """The model as rollout actors load it."""
        backend = self.rollout.attention_backend or self.model.attention_backend
        return self.model.model_copy(update={"attention_backend": backend})

    @property
    def completions_model(self) -> ModelConfig:
        """The model as branches are completed with it."""
        backend = self.rollout.completions.attention_backend or self.rollout_model.attention_backend
        return self.model.model_copy(update={"attention_backend": backend})

    @property
    def velocity_cost(self) -> int:
        """Evaluations that a velocity of rollout and update takes: with classifier-free guidance two."""
        return 1 + (self.sampler.guidance and self.model.negative_prompt is not None)

    @property
    def velocity_tolerance(self) -> float:
        """See `LearnerConfig.velocity_tolerance`."""
        given = self.learner.velocity_tolerance
        return given or (1e-5 if self.model.dtype == "float32" else 0.03)

    @property
    def sample_cost(self) -> int:
        """The same of held-out samples."""
        return 1 + (self.evaluation.guidance and self.model.negative_prompt is not None)

    @property
    def credit_weights(self) -> list[float]:
        """w_r of the scores that credit takes: see `rollout.plan.with_credit_scores`."""
        weights = [reward.weight for reward in self.rewards.values()]
        return [1.0] if self.credit.normalise == "sum" else weights

    @property
    def all_rewards(self) -> dict[str, RewardConfig]:
        """Trained rewards first: their order is the R axis of the advantage."""
        return {**self.rewards, **self.eval_rewards}

    @property
    def rewards_by_key(self) -> dict[str, RewardConfig]:
        """The same by their dotted keys, such as `rewards.preference`, for messages and for what a section has."""
        sections = {"rewards": self.rewards, "eval_rewards": self.eval_rewards}
        return {f"{section}.{name}": reward for section, has in sections.items() for name, reward in has.items()}
