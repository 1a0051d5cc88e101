"""What can be found wrong before anything starts: files, model, adapter, checkpoint."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from g2rpo_ray.config import Config
from g2rpo_ray.config.resume import describe, settings
from g2rpo_ray.data import Prompts, iteration_prompts, read_records, without_heldout
from g2rpo_ray.files import resolve
from g2rpo_ray.record.checkpoint import Checkpoint
from g2rpo_ray.record.lineage import Beginning, find_beginning
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.types import Metadata
from g2rpo_ray.words import one_line, shown

MODEL_FILES = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def open_run(config: Config) -> Folder:
    """The run directory, within reach.

    Raises:
        ValueError: one line; `output` is no place for it.
    """
    try:
        run = Folder(config.output) / config.name
        run.names()
    except (ValueError, OSError) as error:
        raise _no_place(config, error) from None
    return run


def check_writable(config: Config, run: Folder) -> None:
    """Raise ValueError, in one line, if nothing can be written in the run directory."""
    try:
        run.require_writable()
    except OSError as error:
        raise _no_place(config, error) from None


def _no_place(config: Config, error: Exception) -> ValueError:
    return ValueError(f"output: cannot use {config.output.rpartition('@')[2]}: {one_line(error)}")


def read_run_prompts(config: Config) -> Prompts:
    """The prompts that the configuration names.

    Raises:
        ValueError: one line; a file is missing or empty, or too short for an iteration, or a reward needs more of it.
    """
    heldout = read_records(config.data.heldout_prompts, "data.heldout_prompts")
    given = read_records(config.data.train_prompts, "data.train_prompts")
    train = without_heldout(tuple(given), tuple(heldout))
    if not train:
        raise ValueError(f"data.train_prompts: all {len(given)} are among data.heldout_prompts, too; give others")
    iteration_prompts(train, config.data.prompts_per_iteration, config.seed, 0)
    used = {prompt: given[prompt] for prompt in train} | heldout
    check_prompts(config, used)
    metadata = {prompt: known for prompt, known in used.items() if known}
    return Prompts(train, tuple(heldout), len(given) - len(train), metadata)


def check_prompts(config: Config, records: Mapping[str, Metadata]) -> None:
    """Raise ValueError, in one line, if a reward can never score one of the prompts, given with their metadata."""
    from g2rpo_ray.rewards import prompt_check

    for section in ("rewards", "eval_rewards"):
        for name, reward in getattr(config, section).items():
            check = prompt_check(reward.kind)
            for prompt, metadata in records.items():
                try:
                    check(prompt, metadata)
                except ValueError as error:
                    raise ValueError(f"{section}.{name}: the prompt {shown(prompt)} {error}") from None


def find_start(run: Folder, resume: Sequence[str], config: Config, prompts: Prompts) -> Beginning:
    """Where `--resume` says that the run goes on. Settings that count must be those of the checkpoint, or `changed`.

    Raises:
        ValueError: one line; there is no such checkpoint, or settings differ.
    """
    where = [word for word in resume if word != "changed"] or ["auto"]
    if len(where) > 1:
        raise ValueError(
            f"--resume: {' '.join(where)} given; give one of auto, never and PATH, and `changed` beside it"
        )
    beginning = find_beginning(run, where[0], settings(config, prompts.train, prompts.heldout, prompts.metadata))
    checkpoint, changed = beginning.checkpoint, beginning.changed
    if checkpoint and checkpoint.iteration > config.iterations:
        raise ValueError(
            f"iterations: {config.iterations} given, but {checkpoint.iteration} are done: give more, or go back with "
            f"--resume {checkpoint.folder.parent}/<iteration>"
        )
    if checkpoint and changed and "changed" not in resume:
        raise ValueError(
            f"--resume: not the settings of {checkpoint.folder}: {describe(changed)}; --resume changed goes on with "
            f"these, from iteration {checkpoint.iteration} on, and keeps what was before; or give another --name"
        )
    return beginning


def check_models(config: Config) -> list[str]:
    """Check the model and the rewards that the configuration names; what could not be checked here, a line each.

    Raises:
        ValueError: one line that names the key, what was given and what is expected.
    """
    from g2rpo_ray.rewards import check_reward

    unchecked = _check_model(config)
    for section in ("rewards", "eval_rewards"):
        for name, reward in getattr(config, section).items():
            unchecked += check_reward(f"{section}.{name}", reward.kind, reward.options, bool(reward.runtime_env))
    return unchecked


def check_files(config: Config, checkpoint: Checkpoint | None) -> list[str]:
    """`check_models`, that the adapters which the run starts from are of this model, and that it can be tracked."""
    unchecked = check_models(config)
    if config.tracking.wandb_project and not find_spec("wandb"):
        raise ValueError("tracking.wandb_project: wandb is not installed here: `pip install wandb`, or leave it out")
    if config.lora.initial or checkpoint:
        unchecked += _check_adapters(config, checkpoint, model_is_here=not _check_model(config))
    return unchecked


def fit_batches(config: Config) -> Config:
    """The configuration with `rollout.micro_batch` lowered to what `rollout.memory_gib`, if given, holds.

    Decided by the configuration alone: actors on other hardware, or after a resume, make the same batches.

    Raises:
        ValueError: one line; not even one latent fits, or the model's configuration cannot be read here.
    """
    given = config.rollout.memory_gib
    if given is None:
        return config
    from g2rpo_ray.models.estimate import fitting_micro_batch, with_micro_batch

    fits = fitting_micro_batch(config, int(given * 2**30))
    if not fits:
        raise ValueError(
            f"rollout.memory_gib: {given:g} given; not enough for one latent of this model: lower "
            f"rollout.decode_batch={config.rollout.decode_batch} or the size of the images, or use a larger device"
        )
    return with_micro_batch(config, fits)


def _check_model(config: Config) -> list[str]:
    given, path = config.model.path, Path(resolve(config.model.path))
    if path.is_dir():
        for name in MODEL_FILES:
            if not (path / name).is_file():
                raise ValueError(f"model.path: {given} has no {name}; expected a pipeline in diffusers' format")
        return []
    if given.count("/") == 1 and not given.startswith((".", "/", "~")) and not path.exists():
        return [f"model.path: {given} is taken for a hub id; its files are looked for when the actors start"]
    raise ValueError(f"model.path: {given} is not a directory; give a diffusers pipeline's, or a hub id like org/name")


def _check_adapters(config: Config, checkpoint: Checkpoint | None, model_is_here: bool) -> list[str]:
    """Compare the adapters that the run would start from with the one that the configuration describes."""
    if not model_is_here:
        return ["lora.initial, --resume: not compared with the model, which is not on this machine"]
    from g2rpo_ray.models import check_lora, lora_shapes, read_lora

    shapes = lora_shapes(config.model, config.lora)
    for key, given in (("lora.initial", config.lora.initial), ("--resume", checkpoint and checkpoint.folder / "lora")):
        if given:
            try:
                with given.reading() if isinstance(given, Folder) else nullcontext(resolve(given)) as path:
                    check_lora(shapes, read_lora(str(path)))
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    return []
