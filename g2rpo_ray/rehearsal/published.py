"""Configuration files of published pipelines, so that estimates need no download.

`published/ORG--NAME/` is a pipeline's folder without weights and tokenizers. Only estimates use it; sampling and
training read the pipeline's own files.
"""

from pathlib import Path

from g2rpo_ray.config import Config

FOLDER = Path(__file__).parent / "published"


def with_shapes(config: Config) -> Config | None:
    """The configuration with a pipeline whose configuration files are on this machine; None if there is none."""
    if config.model.is_local:
        return config
    packaged = FOLDER / config.model.path.replace("/", "--")
    if "/" not in config.model.path or not packaged.is_dir():
        return None
    model = config.model.model_copy(update={"path": str(packaged), "revision": None})
    return config.model_copy(update={"model": model})
