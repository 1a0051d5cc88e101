"""All settings, with type, bounds and documentation."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, field_validator, model_validator

from g2rpo_ray.algo.tree import groups, plan_tree
from g2rpo_ray.config.completions import CompletionsConfig, check_completions
from g2rpo_ray.config.learner import LearnerConfig, check_learner
from g2rpo_ray.config.prompts import listed
from g2rpo_ray.config.resources import MAX_ACTORS, ActorSection, OneDevice, Resources, device_of
from g2rpo_ray.config.sampler import CreditConfig, SamplerConfig
from g2rpo_ray.config.section import Own, PathName, PlaceName, Section
from g2rpo_ray.functions import as_settings, value_in_words
from g2rpo_ray.messages import shown
from g2rpo_ray.paths import resolve

PanelName = Literal[
    "diversity", "high_frequency", "periodicity", "saturation", "exposure", "distance", "unseen", "decline"
]
MAX_FRAMES = 257
TORCH_ATTENTION = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Attention backends of diffusers whose backward pass torch makes deterministic."""


class ModelConfig(Section):
    path: PathName
    """Diffusers pipeline of a family in docs/models.md: a directory, a hub id, or `embedded:pipeline`."""
    revision: str | None = None
    """Commit of a hub id."""
    family: Own | None = None
    """Class of your own model family, `package.module:name`: see docs/models.md. Unset: by the pipeline's class."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights and their arithmetic. Latents, LoRA and log-probabilities are always float32."""
    height: int = Field(720, gt=0, le=8192)
    """Height of images in pixels; a multiple of the pipeline's latent patch (16 for published models)."""
    width: int = Field(720, gt=0, le=8192)
    """Width of images in pixels; a multiple of the same."""
    frames: int = Field(1, ge=1, le=MAX_FRAMES)
    """Frames of a video, for a pipeline of videos (Wan: 1 + 4n); 1: an image."""
    guidance_scale: float | None = Field(None, ge=0, le=100)
    """The pipeline's `guidance_scale`: an input of guidance-distilled models, the scale of classifier-free guidance of
    the others. Unset: the pipeline's default."""
    guidance_scale_2: float | None = Field(None, ge=0, le=100)
    """The same for the second network of Wan 2.2 A14B, for low noise. Unset: guidance_scale."""
    negative_prompt: str | None = None
    """Negative prompt of classifier-free guidance; "" is a negative prompt too. Unset: no classifier-free guidance."""
    sources: int = Field(0, ge=0, le=10)
    """Maximum source images of a prompt, for editing pipelines; 0: prompts are text only. The estimate of memory
    assumes this many sources of the result's size."""
    source_area: int | None = Field(None, ge=1024, le=2**24)
    """Pixels, about, at which the model sees a source; FLUX.2 sees a smaller one as it is. Fewer are cheaper. Unset: as
    the pipeline does, about a megapixel; its own call does not know this setting."""
    max_sequence_length: int | None = Field(None, gt=0, le=1024)
    """Tokens to which a prompt is truncated or padded. Unset: the pipeline's default."""
    attention_backend: str | None = None
    """Name of a diffusers attention backend, for rollout and learner. Unset: the default of diffusers. With
    `deterministic` it must be one of torch's (`native` ...): others have no deterministic backward pass."""

    @property
    def location(self) -> str:
        """The local path or hub id, for diffusers' `from_pretrained`."""
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
    """The adapter is scaled by alpha / rank in training. Its file has the scale in B, and alpha = rank."""
    targets: Literal["all-linear"] | tuple[str, ...] | None = None
    """Suffixes of the names of the transformer's linear layers that get an adapter, or `all-linear`. Unset: the
    attention layers listed in docs/models.md."""
    initial: PathName | None = None
    """Adapter to start from, with its own alpha: file or folder, in a format of docs/models.md."""


class RolloutConfig(ActorSection):
    min_actors: int = Field(1, ge=1, le=MAX_ACTORS)
    """Rollout actors required to start the run. The result does not depend on their number."""
    max_actors: int = Field(1, ge=1, le=MAX_ACTORS)
    """Rollout actors always requested. They join as the cluster finds room, and autoscalers see the demand. The
    learner and reward servers have priority: if they cannot be placed, rollout actors above min_actors end."""
    micro_batch: int = Field(8, ge=1, le=4096)
    """Maximum latents per velocity evaluation. Results depend on it by rounding."""
    memory_gib: float | None = Field(None, gt=0, le=1_000_000)
    """Memory of an actor's device in GiB. If given, `micro_batch` is lowered before anything starts to what fits by an
    estimate, and stays so for the run."""
    attention_backend: str | None = None
    """Attention backend of the rollout actors. They have no backward pass, so any backend works, also `_flash_3` and
    `sage`. Unset: that of `model`."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile). An actor starts a minute or two later, and rounds differently
    from the learner: watch mismatch/velocity."""
    members_per_unit: int | None = Field(None, ge=1, le=1024)
    """Children in one work unit, of all roots at one branch step. Unset: all of them."""
    decode_batch: int = Field(1, ge=1, le=1024)
    """Maximum latents per pass of the VAE, which takes gigabytes per image at 720 px."""
    completions: CompletionsConfig = CompletionsConfig()
    """Cheaper computation of branches below their stochastic edges: docs/methods.md."""
    max_staleness: Literal[0, 1] = 0
    """1: an iteration is sampled during the update of the one before, with weights one version old. The ratio is
    against the policy that sampled. The result does not depend on timing."""
    max_unscored_units: int = Field(64, ge=1, le=65_536)
    """Maximum units whose images wait for scores; at least two per rollout actor are allowed. Beyond that rollout
    waits for the reward servers."""
    resources: OneDevice = {"GPU": 1}
    """Ray resources of one actor. With GPU it computes on the GPU that Ray assigns, else on the CPU, by as many threads
    as CPU (at least 1). A custom resource pins it to its worker group."""
    max_restarts: int = Field(100, ge=0, le=1_000_000)
    """Maximum deaths of rollout actors, in total, before the run fails."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the rollout actors and of the prompt encoder: env_vars, image_uri ..."""

    @model_validator(mode="after")
    def _range(self) -> "RolloutConfig":
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors: {self.min_actors} given; may be at most max_actors={self.max_actors}")
        return self

    @property
    def completions_batch(self) -> int:
        """Maximum latents per evaluation of a completion."""
        return self.completions.micro_batch or self.micro_batch

    @property
    def completions_threads(self) -> int:
        """CPU threads of an actor that computes completions."""
        return self.completions.threads if self.completions.apart else self.threads


Frames = Literal["all", "first", "last"] | tuple[Annotated[int, Field(ge=-MAX_FRAMES, lt=MAX_FRAMES)], ...]


class RewardConfig(ActorSection):
    kind: str
    """A kind of docs/rewards.md, or `module:factory` for your own; in Python also a function."""
    weight: float = Field(1.0, gt=0, le=1000)
    """w_r in the advantage; ignored in `eval_rewards`."""
    options: dict[str, Any] = {}
    """Arguments of the reward: checkpoint, architecture, dtype ..."""
    replicas: int = Field(1, ge=1, le=MAX_ACTORS)
    """Number of server actors."""
    batch_size: int = Field(16, ge=1, le=4096)
    """Maximum images per forward pass. Results depend on it by rounding."""
    frames: Frames = "all"
    """Frames of a video that are scored: `all`, `first`, `last`, or a list of indices, negative ones from the end. A
    reward of images gives the mean of their scores."""
    retries: int = Field(2, ge=0, le=100)
    """Retries of a failed or non-finite score before it counts as missing."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one server; its device and threads follow from them, as in `rollout`."""
    max_restarts: int = Field(100, ge=0, le=1_000_000)
    """Maximum deaths of servers, in total, before the run fails."""
    win_rate: bool = False
    """Train on the share of its group that an image beats by this reward instead of on its score; a tie counts half
    (Pref-GRPO). Held-out scores do not change."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of the servers: pip, uv, conda, image_uri ...; docs/rewards.md."""

    @model_validator(mode="before")
    @classmethod
    def _given_in_python(cls, given: Any) -> Any:
        return as_settings(given)

    @field_serializer("options", when_used="json")
    def _in_words(self, options: dict[str, Any]) -> dict[str, Any]:
        return {name: value_in_words(value) for name, value in options.items()}


RESERVED_NAMES = ("rollout", "completions")  # names of pools in `scale` and in the metrics


def _usable_names(rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
    """Raises ValueError unless all reward names can be part of metric names and file names."""
    for name in rewards:
        if name in RESERVED_NAMES:
            raise ValueError(f"{name}: this name is reserved for the rollout actors; give the reward another name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                f"{shown(name)}: not usable as a name in metrics and files; give 1 to 100 characters of A-Z, a-z, 0-9, "
                "'.', '_' and '-', beginning with a letter or a digit"
            )
    return rewards


Rewards = Annotated[dict[str, RewardConfig], Field(max_length=64), AfterValidator(_usable_names)]


PromptSource = Annotated[PathName | tuple[str | dict[str, Any], ...], BeforeValidator(listed)]
"""A file, or prompts."""


class DataConfig(Section):
    train_prompts: PromptSource
    """File of training prompts: text (one per line), .jsonl, .json (also HPDv2's), .csv, .tsv or .parquet, also as .gz;
    or a pattern for several files: docs/evaluate.md. Or a list of texts, or of objects as in the lines of a .jsonl."""
    heldout_prompts: PromptSource
    """Held-out prompts, in the same forms. They are dropped from the training prompts."""
    prompts_per_iteration: int = Field(16, ge=1, le=16_384)
    """Prompts drawn for an iteration; each has its own tree."""
    embeddings: PlaceName | None = None
    """Folder or URI of the encoded prompts (Parquet), to share between runs. Unset: in the run directory."""
    encoder_resources: OneDevice = {"GPU": 1}
    """Ray resources of the prompt encoder, released when all prompts are encoded. With GPU it computes on a GPU."""

    @property
    def encoder_device(self) -> str:
        """`cuda` or `cpu`."""
        return device_of(self.encoder_resources)


class EvaluationConfig(Section):
    anchors: bool = True
    """Complete the trunks to images and score them with all rewards: the on-policy evaluation `eval/*`. `method` sets
    it."""
    guidance: bool = True
    """Classifier-free guidance of held-out samples and of `evaluate`, as sampler.guidance."""
    every: int = Field(50, ge=0, le=1_000_000)
    """Iterations between held-out evaluations; 0: only before the first iteration and after the last."""
    seeds: int = Field(2, ge=1, le=1024)
    """Samples of each held-out prompt, with the same noise at every evaluation."""
    grid_prompts: int = Field(8, ge=0, le=1024)
    """Held-out prompts shown in samples/<iteration>.png."""
    stop_on: tuple[PanelName, ...] = ()
    """Numbers of the hacking panel (docs/rewards.md) that end the run with its best checkpoint when they pass their
    limits."""
    on_decline: Literal["continue", "finer", "rewind"] = "continue"
    """What follows an evaluation at which the trained rewards are significantly below their best one (`decline` of the
    hacking panel): a warning only; completions of half of the stride from then on; or also the learner of the best
    checkpoint. The last two need one stride above 1."""


class CheckpointConfig(Section):
    every: int = Field(10, ge=1, le=1_000_000)
    """Iterations between checkpoints; the last iteration always writes one."""
    keep: int = Field(3, ge=1, le=1_000_000)
    """Newest checkpoints kept, in addition to the one with the best held-out scores."""


class TrackingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files to `tensorboard/` in the run directory."""
    timeline_every: int = Field(10, ge=0, le=1_000_000)
    """Iterations between timelines of all actors' work; 0: none."""
    wandb_project: str | None = None
    """Weights & Biases project to log to (needs `pip install wandb`). A resumed run continues the same W&B run."""


class Config(Section):
    """All settings of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Folder of the run below `output`."""
    output: PlaceName = "runs"
    """Parent of run directories: a path that every node of the cluster can read, or a URI such as s3://bucket/runs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the order of prompts, all noise, and the initial LoRA."""
    method: str = "g2rpo"
    """Preset of the tree's shape, `credit` and the objective; settings beside it or later override it. A name in
    docs/methods.md, or the import path of your own module, with a dot."""
    iterations: int = Field(300, ge=1, le=1_000_000)
    """Iterations of the run: a rollout and an update each."""
    startup_timeout_s: float = Field(600, gt=0, le=604_800)
    """Time limit in seconds for the start of the actors. After the first start, an actor that takes ten times as long
    from when it has a process, and at least half of this limit, counts as hung and is restarted."""
    hung_after_s: float = Field(1800, gt=0, le=86400)
    """Time limit in seconds of a call (a unit, a score, an update ...) while typical durations are unknown. After that:
    ten times the typical duration, at least a minute. The actor of a hung call is replaced."""
    deterministic: bool = True
    """The same bits in every run on the same kind of device. false: faster attention and convolutions on GPUs, with
    different last bits in each run."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    sampler: SamplerConfig = SamplerConfig()
    credit: CreditConfig = CreditConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: Rewards = Field(min_length=1)
    """Trained rewards by name: 1 to 100 characters of A-Z, a-z, 0-9, `.`, `_` and `-`, and not `rollout`."""
    eval_rewards: Rewards = {}
    """Rewards that are only logged. Here and in `rewards`, null removes a reward of an extended file."""
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
                raise ValueError(f"{section}.{name}: has the same name as {other} in Prometheus; rename one of them")
        self._check_credit()
        self._check_attention()
        self._check_frames()
        check_learner(self.learner, self.sampler, self.data.prompts_per_iteration, self.iterations)
        check_completions(self.rollout.completions, self.sampler, self.learner)
        self._check_decline()
        return self

    def _check_decline(self) -> None:
        """Raises ValueError, in one line, if `evaluation.on_decline` has nothing to make finer."""
        answer, strides = self.evaluation.on_decline, self.sampler.strides
        if answer == "continue":
            return
        if strides == "auto" or len(strides) != 1 or strides[0] == 1:
            given = "auto" if strides == "auto" else list(strides)
            raise ValueError(
                f"evaluation.on_decline: {answer} given, which makes completions finer, but sampler.strides is "
                f"{given}; give one stride above 1, such as [8], or continue"
            )
        if answer == "rewind" and self.rollout.max_staleness:
            raise ValueError(
                "evaluation.on_decline: rewind given, but with rollout.max_staleness the next rollout has begun when "
                "an evaluation ends; give finer, or set rollout.max_staleness to 0"
            )

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
                "credit.granularity_weights: given, but sampler.strides=auto uses one granularity at a time; remove it"
            )
        if weights is not None and len(weights) != len(strides):
            raise ValueError(
                f"credit.granularity_weights: {list(weights)} given; give one weight for each of "
                f"sampler.strides={list(strides)}"
            )
        for branch_steps in self.sampler.placements():
            tree = plan_tree(self.sampler.shape(branch_steps))
            number = groups(tree, self.credit.group)
            alone = tree.trained & (np.bincount(number)[number] < 2)
            if alone.any():
                raise ValueError(
                    f"credit.group: {self.credit.group} given, but a trained edge that starts at index "
                    f"{tree.start[alone][0]} is alone in its group; raise sampler.group_size or sampler.roots, "
                    "or set credit.group to step"
                )

    def _check_attention(self) -> None:
        """Raises ValueError if the learner cannot use `model.attention_backend`."""
        given = self.model.attention_backend
        if given is None:
            return
        if given == "_flash_3" or "sage" in given:
            raise ValueError(
                f"model.attention_backend: {given} given, which has no backward pass for the learner; set "
                "rollout.attention_backend instead"
            )
        if self.deterministic and given not in TORCH_ATTENTION:
            raise ValueError(
                f"model.attention_backend: {given} given; with deterministic=true the learner can use "
                f"{', '.join(TORCH_ATTENTION)}; set rollout.attention_backend instead, or deterministic to false"
            )

    @property
    def rollout_model(self) -> ModelConfig:
        """The model of rollout actors."""
        backend = self.rollout.attention_backend or self.model.attention_backend
        return self.model.model_copy(update={"attention_backend": backend})

    @property
    def completions_model(self) -> ModelConfig:
        """The model of completions."""
        backend = self.rollout.completions.attention_backend or self.rollout_model.attention_backend
        return self.model.model_copy(update={"attention_backend": backend})

    @property
    def velocity_cost(self) -> int:
        """Evaluations per velocity in rollout and update: 2 with classifier-free guidance, else 1."""
        return 1 + (self.sampler.guidance and self.model.negative_prompt is not None)

    @property
    def velocity_tolerance(self) -> float:
        """See `LearnerConfig.velocity_tolerance`."""
        given = self.learner.velocity_tolerance
        return given or (1e-5 if self.model.dtype == "float32" else 0.03)

    @property
    def sample_cost(self) -> int:
        """Evaluations per velocity of held-out samples."""
        return 1 + (self.evaluation.guidance and self.model.negative_prompt is not None)

    @property
    def credit_weights(self) -> list[float]:
        """Weights w_r of the scores in the advantage: see `rollout.plan.with_credit_scores`."""
        weights = [reward.weight for reward in self.rewards.values()]
        return [1.0] if self.credit.normalise == "sum" else weights

    @property
    def all_rewards(self) -> dict[str, RewardConfig]:
        """All rewards by name, trained ones first. Their order is the R axis of scores."""
        return {**self.rewards, **self.eval_rewards}

    @property
    def rewards_by_key(self) -> dict[str, RewardConfig]:
        """All rewards by dotted key, such as `rewards.preference`."""
        sections = {"rewards": self.rewards, "eval_rewards": self.eval_rewards}
        return {f"{section}.{name}": reward for section, has in sections.items() for name, reward in has.items()}
