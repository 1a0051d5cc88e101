"""Downloads the Hugging Face hub's files that a configuration names into the cache, before the actors start."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from g2rpo_ray.config import Config, RewardConfig
from g2rpo_ray.messages import one_line
from g2rpo_ray.paths import resolve
from g2rpo_ray.rewards.files import is_hub_file, is_hub_id
from g2rpo_ray.rewards.options import (
    FILE_OPTIONS,
    FOLDER_OPTIONS,
    SERVER_OPTIONS,
    WITHOUT_WEIGHTS,
    check_reward,
    option_defaults,
)
from g2rpo_ray.rewards.registry import KINDS

NETWORK = "transformer/config.json"
SMALL_FILES = ("*.json", "*.txt", "*.model")  # configurations, tokenizers


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of one hub repository, with the setting that names it."""

    key: str
    name: str  # org/name, or org/name:file
    revision: str | None = None
    is_pipeline: bool = False
    weights: bool = True

    def fetch(self) -> Path:
        """Download what the cache lacks, and return the path in the cache.

        Raises:
            ValueError: the hub cannot be reached, has no such files, or denies access; one line.
        """
        try:
            return self._fetch()
        except Exception as error:  # network, authentication, disk, name: the hub client has a class for each
            raise ValueError(
                f"{self.key}: cannot download {self.name} ({one_line(error, 300)}); check the name, and HF_TOKEN for "
                "gated models; or run `g2rpo fetch` with the same HF_HOME where the hub can be reached"
            ) from None

    def cached(self) -> Path | None:
        """The path in the cache if an earlier download is there; of a pipeline, if its configurations are."""
        from huggingface_hub import try_to_load_from_cache

        if self.is_pipeline:
            found = try_to_load_from_cache(self.name, NETWORK, revision=self.revision)
            return Path(found).parents[1] if isinstance(found, str) else None
        try:
            path = self._fetch(local_files_only=True)
        except (OSError, ValueError):  # the hub client's are both
            return None
        weights = path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
        return path if weights or not self.weights else None

    def _fetch(self, local_files_only: bool = False) -> Path:
        from huggingface_hub import hf_hub_download, snapshot_download

        if is_hub_file(self.name):
            return Path(hf_hub_download(*self.name.split(":", 1), local_files_only=local_files_only))
        if self.is_pipeline:
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(self.name, revision=self.revision))  # its components, in one format
        get = partial(snapshot_download, self.name, local_files_only=local_files_only)
        found = Path(get(allow_patterns=[*SMALL_FILES, *(["*.safetensors"] if self.weights else [])]))
        if self.weights and not any(found.glob("*.safetensors")):
            get(allow_patterns=["*.bin"])
        return found


def model_files(config: Config) -> list[HubFiles]:
    """The pipeline's files; empty for a local pipeline."""
    path = config.model.path
    if config.model.is_local or not is_hub_id(path):
        return []
    return [HubFiles("model.path", path, config.model.revision, is_pipeline=True)]


def unchecked_files(key: str, reward: RewardConfig) -> list[str]:
    """A line for each file or server of a reward that is not on this machine; raises as `check_reward`."""
    lines = check_reward(key, reward)
    here = [f"{files.key}: " for files in (reward_files(key, reward) if lines else ()) if files.cached()]
    return [line for line in lines if not line.startswith(tuple(here))]


def reward_files(key: str, reward: RewardConfig) -> list[HubFiles]:
    """The files that a reward of this package loads from the hub; a user's own reward downloads its files itself."""
    return list(_reward_files(key, reward)) if reward.kind in KINDS else []


def _reward_files(key: str, reward: RewardConfig) -> Iterator[HubFiles]:
    options = option_defaults(reward.kind) | reward.options
    if any(option in SERVER_OPTIONS for option in options):  # a server has its model
        return
    for option, given in options.items():
        names_files = is_hub_file if option in FILE_OPTIONS else is_hub_id if option in FOLDER_OPTIONS else None
        if names_files and names_files(given) and not Path(resolve(given)).exists():
            weights = (reward.kind, option) not in WITHOUT_WEIGHTS
            yield HubFiles(f"{key}.options.{option}", given, weights=weights)


def all_files(config: Config) -> list[HubFiles]:
    """All files that a run of this configuration loads from the hub, without duplicates."""
    found = model_files(config)
    for key, reward in config.rewards_by_key.items():
        found += reward_files(key, reward)
    return list({(files.name, files.weights): files for files in reversed(found)}.values())[::-1]
