"""Settings: frozen, unknown keys refused, one YAML loader with inheritance and dotted overrides."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from g2rpo_ray.files import resolve

QUICKSTART = "embedded:config.yaml"

Device = Literal["cpu", "cuda"]
Resources = dict[str, float]


class Section(BaseModel):
    """What all sections share: nothing changes after loading, nothing unknown gets in."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def ray_options(resources: Resources) -> dict[str, Any]:
    """Resources as options of a Ray actor or task, where CPU and GPU have names of their own."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": custom}


class ModelConfig(Section):
    path: str
    """Diffusers FLUX pipeline: a directory, a hub id, or `embedded:pipeline`."""
    revision: str | None = None
    """Commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the frozen weights and their arithmetic; latents, LoRA and log-probabilities are always float32."""
    height: int = Field(720, gt=0)
    """Pixels; a multiple of the pipeline's latent patch (16 for FLUX)."""
    width: int = Field(720, gt=0)
    guidance_scale: float = Field(3.5, ge=0)
    """Distilled guidance, an input of guidance-distilled models."""
    max_sequence_length: int = Field(512, gt=0, le=512)
    """T5 tokens a prompt is padded or cut to."""
    attention_backend: str | None = None
    """A diffusers attention backend by name; unset: the default of diffusers."""


class LoraConfig(Section):
    rank: int = Field(64, gt=0)
    alpha: float = Field(64, gt=0)
    targets: Literal["all-linear"] | tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    """Name endings of the transformer's linear layers that get an adapter, or `all-linear`."""
    initial: str | None = None
    """Adapter to start from, as this program or diffusers wrote it: file or folder."""


class SamplerConfig(Section):
    steps: int = Field(16, gt=0)
    """T, sampling steps."""
    shift: float | Literal["dynamic"] = 3.0
    """Schedule shift s, or FLUX's resolution-dependent one."""
    kernel: Literal["flow", "dance", "cps"] = "flow"
    eta: float = Field(0.7, gt=0)
    """Noise level of the stochastic step."""
    branch_steps: tuple[int, ...] = tuple(range(8))
    """M: schedule indices at which a group branches off the anchor, ascending."""
    strides: tuple[int, ...] = (1, 2, 3)
    """Λ: the granularities at which each branch is completed."""
    layout: Literal["paper", "authors"] = "paper"
    """How a stride walks to the image: as in the paper, or as in the authors' code."""
    group_size: int = Field(12, ge=2)
    """G, members of a group."""

    @model_validator(mode="after")
    def _steps_fit(self) -> "SamplerConfig":
        if isinstance(self.shift, float) and self.shift <= 0:
            raise ValueError(f"shift: {self.shift} given; must be positive, or `dynamic`")
        last = self.steps - (2 if self.kernel == "cps" else 1)  # cps has no noise in the step that ends at sigma 0
        if not self.branch_steps or list(self.branch_steps) != sorted(set(self.branch_steps)):
            raise ValueError(f"branch_steps: {list(self.branch_steps)} given; name each step once, in ascending order")
        if self.branch_steps[0] < 0 or self.branch_steps[-1] > last:
            raise ValueError(
                f"branch_steps: {list(self.branch_steps)} given; allowed are 0..{last} with steps={self.steps} and "
                f"kernel={self.kernel}: drop the others or raise sampler.steps"
            )
        if not self.strides or min(self.strides) < 1 or len(set(self.strides)) != len(self.strides):
            raise ValueError(f"strides: {list(self.strides)} given; granularities are distinct whole numbers from 1 up")
        return self


class RolloutConfig(Section):
    min_actors: int = Field(1, ge=1)
    """Rollout actors without which the run does not start. The result does not depend on their number."""
    max_actors: int = Field(1, ge=1)
    """Rollout actors asked for, all the time: they join as the cluster finds room, and autoscalers see the demand."""
    device: Device = "cuda"
    threads: int = Field(1, ge=1)
    """CPU threads of one actor."""
    micro_batch: int = Field(8, ge=1)
    """Most latents in one velocity evaluation. Part of the plan: results depend on it by rounding."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory of an actor's device. Given, `micro_batch` is lowered, before anything starts, to what an estimate says
    that it holds; it stays so for the run."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): an actor starts a minute or two later, and rounds otherwise
    than the learner does: watch actor/ratio_initial_max_dev."""
    members_per_unit: int | None = Field(None, ge=1)
    """Members of a group that one work unit holds; unset: the whole group."""
    decode_batch: int = Field(1, ge=1)
    """Most latents in one pass of the VAE, which takes gigabytes an image at 720 px."""
    max_staleness: Literal[0, 1] = 0
    """1: an iteration is sampled while the one before it updates, with weights one version old. The ratio is against
    the policy that sampled; the result depends on this setting, not on timing."""
    max_unscored_units: int = Field(64, ge=1)
    """Units whose images may wait for their scores; beyond that rollout waits for the reward servers."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one actor; a custom resource pins it to its worker group."""
    max_restarts: int = Field(100, ge=0)
    """Deaths of actors (all together) that the run survives."""

    @model_validator(mode="after")
    def _range(self) -> "RolloutConfig":
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors: {self.min_actors} given; may be at most max_actors={self.max_actors}")
        return self


class RewardConfig(Section):
    kind: str
    """One of the kinds in docs/rewards.md, or `module:factory` for your own."""
    weight: float = Field(1.0, gt=0)
    """w_r in the advantage; not used in `eval_rewards`."""
    options: dict[str, Any] = {}
    """Arguments of the reward: checkpoint, architecture, device ..."""
    replicas: int = Field(1, ge=1)
    """Server actors."""
    batch_size: int = Field(16, ge=1)
    """Most images in one forward pass. Part of the plan: results depend on it by rounding."""
    retries: int = Field(2, ge=0)
    """Times a failed or non-finite score is asked for again before it counts as missing."""
    threads: int = Field(1, ge=1)
    """CPU threads of one server."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one server."""
    max_restarts: int = Field(100, ge=0)
    """Deaths of servers (all together) that the run survives."""


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1)
    """DeepSpeed ranks, each a Ray actor. The result does not depend on it beyond rounding."""
    device: Device = "cuda"
    threads: int = Field(1, ge=1)
    """CPU threads of one rank."""
    resources: Resources = {"GPU": 1}
    """Ray resources of one rank."""
    zero_stage: Literal[1, 2, 3] = 2
    micro_batch: int = Field(1, ge=1)
    """Branch states (prompt, step) in one forward and backward pass."""
    gradient_checkpointing: bool = False
    schedule: Literal["per_step", "accumulate"] = "per_step"
    """An optimizer step after each branch step, or one an iteration."""
    lr: float = Field(2e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient."""
    clip_range: float = Field(1e-4, gt=0)
    """ε of the clipped surrogate."""
    kl_beta: float = Field(0.0, ge=0)
    """β of the KL to the model without LoRA."""
    advantage_clip: float = Field(5.0, gt=0)
    max_restarts: int = Field(10, ge=0)
    """Times that the run starts a lost learner again, from the latest checkpoint."""
    ratio_tolerance: float = Field(1e-6, gt=0)
    """Largest |ratio − 1| before the first optimizer step; a run that exceeds it stops. Loosen it for bfloat16."""


class DataConfig(Section):
    train_prompts: str
    """Text (a prompt a line), .jsonl, .json (HPDv2's, too) or .parquet; a pattern for several; see docs/evaluate.md."""
    heldout_prompts: str
    """The same. What is held out is dropped from the training prompts."""
    prompts_per_iteration: int = Field(16, ge=1)
    embeddings: str | None = None
    """Folder or URI of the encoded prompts (Parquet), shared between runs; unset: in the run directory."""
    encoder_device: Device = "cuda"
    encoder_resources: Resources = {"GPU": 1}
    """Ray resources of the actor that encodes prompts, held only until all are encoded."""


class EvaluationConfig(Section):
    every: int = Field(50, ge=0)
    """Iterations between held-out evaluations; 0: only before the first and after the last."""
    seeds: int = Field(2, ge=1)
    """Samples of each held-out prompt; the same noise at every evaluation."""
    grid_prompts: int = Field(8, ge=0)
    """Held-out prompts shown in samples/<iteration>.png."""


class CheckpointConfig(Section):
    every: int = Field(10, ge=1)
    """Iterations between checkpoints; the last iteration always makes one."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints kept, beside the one with the best held-out scores."""


class TrackingConfig(Section):
    tensorboard: bool = True
    timeline_every: int = Field(10, ge=0)
    """Iterations between timelines of who did what when; 0: none."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""


class Config(Section):
    """A run. `name`, `output` and `seed` say which, the sections how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Folder of the run below `output`."""
    output: str = "runs"
    """Where run directories are made: a path that every node of the cluster sees, or a URI such as s3://bucket/runs."""
    seed: int = Field(0, ge=0)
    iterations: int = Field(300, ge=1)
    startup_timeout_s: float = Field(600, gt=0)
    """How long the run waits for its actors to start."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    sampler: SamplerConfig = SamplerConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    """Trained on, by name."""
    eval_rewards: dict[str, RewardConfig] = {}
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
        return self

    @property
    def all_rewards(self) -> dict[str, RewardConfig]:
        """Trained rewards first: their order is the R axis of the advantage."""
        return {**self.rewards, **self.eval_rewards}


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: the embedded default), apply `dotted.key=value` overrides and validate.

    A file may name another with `extends: FILE` (beside itself, or `embedded:X`) and give only what differs.

    Raises:
        ValueError: one line that names the key or file, what was given and what is allowed.
    """
    tree = _read(resolve(path or QUICKSTART))
    for override in overrides:
        _set(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None


def dump_config(config: Config) -> str:
    """The full, resolved configuration as YAML that `load_config` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(path: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"--config: {path} must hold a mapping of settings, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ValueError(f"extends: in {path}: {parent!r} given; must be the name of a file")
    return _merge(_read(str(Path(path).parent / resolve(parent))), tree)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _set(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set: {override!r} given; must look like section.key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"--set {key}: {parent} is not a section")
        tree = child
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {key}: {text!r} is not a YAML value") from None


def _one_line(error: ValidationError) -> str:
    first, *others = error.errors()
    location = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # our own validators name the key themselves
        line = ".".join([*location, message])
    elif first["type"] == "extra_forbidden":
        line = f"{'.'.join(location)}: unknown key; {_allowed(location)}"
    elif first["type"] == "missing":
        line = f"{'.'.join(location)}: missing; add it to the file or give --set {'.'.join(location)}=..."
    else:
        line = f"{'.'.join(location)}: {first['input']!r} given; {message[0].lower()}{message[1:]}"
    return line + (f" (and {len(others)} more)" if others else "")


def _allowed(location: list[str]) -> str:
    section: Any = Config
    for part in location[:-1]:
        section = RewardConfig if section is dict else section.model_fields[part].annotation
        section = dict if part in ("rewards", "eval_rewards") else section
    keys = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], keys, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed are {', '.join(keys)}"
