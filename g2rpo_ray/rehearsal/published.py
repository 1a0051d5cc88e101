"""Configuration files of pipelines on the hub, so that estimates need no download.

They are those in the hub's cache, or else in `published/ORG--NAME/`, a pipeline's folder without weights and
tokenizers. Only estimates use it; sampling and training read the pipeline's own files.
"""

from pathlib import Path

from g2rpo_ray.config import Config
from g2rpo_ray.hub import model_files

FOLDER = Path(__file__).parent / "published"


def with_shapes(config: Config) -> Config | None:
    """The configuration with a pipeline whose configuration files are on this machine; None if there is none."""
    if config.model.is_local:
        return config
    for files in model_files(config):
        folder = files.cached() or FOLDER / files.name.replace("/", "--")
        if folder.is_dir():
            model = config.model.model_copy(update={"path": str(folder), "revision": None})
            return config.model_copy(update={"model": model})
    return None
