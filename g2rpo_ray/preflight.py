"""Checks before anything starts: files, model, adapter, checkpoint."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from g2rpo_ray.config import Config, RewardConfig
from g2rpo_ray.data import Prompts, iteration_prompts, read_records, without_heldout
from g2rpo_ray.messages import one_line, shown
from g2rpo_ray.paths import resolve
from g2rpo_ray.runs.checkpoint import Checkpoint
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import Metadata, text_of

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the environment of a job's entrypoint."""
MODEL_FILES = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def open_run(config: Config) -> Folder:
    """The run directory, after checking access to it.

    Raises:
        ValueError: one line; `output` cannot hold it.
    """
    try:
        run = Folder(config.output) / config.name
        run.names()
    except (ValueError, OSError) as error:
        raise _no_place(config, error) from None
    if config.data.embeddings is not None:
        _check_embeddings(config.data.embeddings)
    return run


def _check_embeddings(given: str) -> None:
    """Raises ValueError, in one line, if the folder of embeddings cannot be read or created."""
    try:
        folder = Folder(given)
        folder.names()
    except (ValueError, OSError) as error:
        raise ValueError(f"data.embeddings: cannot use {given.rpartition('@')[2]}: {one_line(error)}") from None
    above = next((place for place in (folder.path.parents if folder.path else ()) if place.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"data.embeddings: cannot use {given}: {above} is a file; name a folder")


def check_lasting(config: Config) -> None:
    """Raises ValueError, in one line, if the run's files would be deleted with its Ray job."""
    require_lasting("output", config.output)
    if config.data.embeddings is not None:
        require_lasting("data.embeddings", config.data.embeddings)


def require_lasting(key: str, name: str) -> None:
    """Raises ValueError, in one line, for a relative path in a Ray job, whose working directory is deleted later."""
    if RAY_JOB in os.environ and "://" not in name and not os.path.isabs(resolve(name)):
        raise ValueError(
            f"{key}: {shown(name)} given, a relative path, which in a Ray job is in a folder that Ray deletes; "
            f"give a path that every node can read, such as {key}=/shared/runs, or a URI such as s3://bucket/runs"
        )


def check_writable(config: Config, run: Folder) -> None:
    """Raises ValueError, in one line, if the run directory is not writable."""
    try:
        run.require_writable()
    except OSError as error:
        raise _no_place(config, error) from None


def _no_place(config: Config, error: Exception) -> ValueError:
    return ValueError(f"output: cannot use {config.output.rpartition('@')[2]}: {one_line(error)}")


def read_run_prompts(config: Config) -> Prompts:
    """The prompts of a configuration, checked for its rewards.

    Raises:
        ValueError: one line; a file is missing, empty, too short for an iteration, or a reward cannot score a prompt.
    """
    prompts = read_unscored_prompts(config)
    check_prompts(config, prompts.records)
    return prompts


def read_unscored_prompts(config: Config) -> Prompts:
    """Like `read_run_prompts`, without checking them for the rewards."""
    heldout = read_records(config.data.heldout_prompts, "data.heldout_prompts", config.model.sources)
    given = read_records(config.data.train_prompts, "data.train_prompts", config.model.sources)
    train = without_heldout(tuple(given), tuple(heldout))
    if not train:
        raise ValueError(f"data.train_prompts: all {len(given)} are also in data.heldout_prompts; give others")
    iteration_prompts(train, config.data.prompts_per_iteration, config.seed, 0)
    used = {prompt: given[prompt] for prompt in train} | heldout
    metadata = {prompt: known for prompt, known in used.items() if known}
    return Prompts(train, tuple(heldout), len(given) - len(train), metadata)


def check_prompts(config: Config, records: Mapping[str, Metadata]) -> None:
    """Raises ValueError, in one line, if a reward can never score one of the prompts, given with their metadata."""
    for key, reward in config.rewards_by_key.items():
        check_prompts_of(key, reward, records)


def check_prompts_of(key: str, reward: RewardConfig, records: Mapping[str, Metadata]) -> None:
    """Like `check_prompts`, for one reward."""
    from g2rpo_ray.rewards import prompt_check

    check = prompt_check(reward.kind)
    for prompt, metadata in records.items():
        try:
            check(text_of(prompt), metadata)
        except ValueError as error:
            raise ValueError(f"{key}: the prompt {shown(prompt)} {error}") from None


def check_models(config: Config) -> list[str]:
    """Checks the model and the rewards of a configuration; returns a line for each item that could not be checked.

    Raises:
        ValueError: one line with the key, the given value and the expected one.
    """
    from g2rpo_ray.hub import unchecked_files

    unchecked = check_model(config)
    for key, reward in config.rewards_by_key.items():
        unchecked += unchecked_files(key, reward)
    return unchecked


def check_files(config: Config, checkpoint: Checkpoint | None) -> list[str]:
    """Like `check_models`, and checks the initial adapters and the packages that settings need."""
    unchecked = check_models(config)
    check_packages(config)
    if config.lora.initial or checkpoint:
        unchecked += check_adapters(config, checkpoint, model_is_here=not check_model(config))
    return unchecked


def check_packages(config: Config) -> None:
    """Raises ValueError, in one line, if a package that a setting needs is not installed on this machine."""
    if config.tracking.wandb_project and not find_spec("wandb"):
        raise ValueError("tracking.wandb_project: given, but wandb is not installed; pip install wandb, or remove it")
    quantized, apart = config.rollout.completions.quantization != "none", config.rollout.runtime_env
    if quantized and not apart and not find_spec("torchao"):
        raise ValueError(
            "rollout.completions.quantization: given, but torchao is not installed; pip install "
            "'g2rpo_ray[completions]', or remove it"
        )


def fit_batches(config: Config) -> Config:
    """The configuration with `rollout.micro_batch` lowered to fit `rollout.memory_gib`, if given.

    It depends on the configuration only: actors on other hardware, or after a resume, use the same batches.

    Raises:
        ValueError: one line; no latent fits, or the model's configuration cannot be read on this machine.
    """
    given = config.rollout.memory_gib
    if given is None:
        return config
    from g2rpo_ray.models.estimate import fitting_micro_batch, with_micro_batch

    fits = fitting_micro_batch(config, int(given * 2**30))
    if not fits:
        raise ValueError(
            f"rollout.memory_gib: {given:g} given; not enough for one latent of this model; lower "
            f"rollout.decode_batch={config.rollout.decode_batch} or the size of the images, or use a larger device"
        )
    return with_micro_batch(config, fits)


def check_model(config: Config) -> list[str]:
    """Checks that `model.path` is a pipeline; returns a line if it is not on this machine."""
    given, path = config.model.path, Path(resolve(config.model.path))
    if path.is_dir():
        for name in MODEL_FILES:
            if not (path / name).is_file():
                raise ValueError(f"model.path: {given} has no {name}; expected a pipeline in diffusers' format")
        return []
    if given.count("/") == 1 and not given.startswith((".", "/", "~")) and not path.exists():
        return [f"model.path: {given} is a hub id; its files are fetched before the actors start"]
    raise ValueError(f"model.path: {given} is not a directory; give one of a diffusers pipeline, or a hub id org/name")


def check_network(config: Config) -> None:
    """Raises ValueError, in one line, for a size, LoRA or attention backend that the model cannot have.

    The model's configuration files must be on this machine.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    from g2rpo_ray.models import FlowModel, lora_shapes
    from g2rpo_ray.rollout.sigmas import check_trained, sigma_grid

    lora_shapes(config.model, config.lora)
    model = FlowModel.load(config.model, "cpu")
    check_trained(config, sigma_grid(config.sampler, model), model.lora_from)
    backends = [backend.value for backend in AttentionBackendName]
    for key, section in (("model", config.model), ("rollout", config.rollout)):
        if section.attention_backend not in (None, *backends):
            raise ValueError(
                f"{key}.attention_backend: {section.attention_backend!r} given; allowed are {', '.join(backends)}"
            )


def check_adapters(config: Config, checkpoint: Checkpoint | None, model_is_here: bool) -> list[str]:
    """Compares the initial adapters of the run with `lora` of the configuration.

    Returns a line if the configuration files of the model are not on this machine.

    Raises:
        ValueError: one line; an adapter is of another model, or cannot be read.
    """
    from g2rpo_ray.models import check_adapter_file, check_lora, describe_model, lora_shapes, read_lora

    pipeline = describe_model(config.model)[0].pipeline_class if model_is_here else None
    shapes = lora_shapes(config.model, config.lora) if model_is_here else {}
    for key, given in (("lora.initial", config.lora.initial), ("--resume", checkpoint and checkpoint.folder / "lora")):
        if given:
            try:
                with given.reading() if isinstance(given, Folder) else nullcontext(resolve(given)) as path:
                    if model_is_here:
                        check_lora(shapes, read_lora(str(path), config.lora, pipeline))
                    else:
                        check_adapter_file(str(path))
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    where = "not compared with the model, which is not on this machine"
    return [] if model_is_here else [f"lora.initial, --resume: {where}"]
