"""Configuration files of published pipelines, so that their shapes are known before a byte of them is fetched.

`published/ORG--NAME/` has what a pipeline's folder has without weights and tokenizers. It serves to count and to plan;
what samples and trains reads the pipeline's own files.
"""

from pathlib import Path

from g2rpo_ray.config import Config

FOLDER = Path(__file__).parent / "published"


def with_shapes(config: Config) -> Config | None:
    """The configuration, with a pipeline whose configuration files are on this machine; None if there are none."""
    if config.model.is_local:
        return config
    packaged = FOLDER / config.model.path.replace("/", "--")
    if "/" not in config.model.path or not packaged.is_dir():
        return None
    model = config.model.model_copy(update={"path": str(packaged), "revision": None})
    return config.model_copy(update={"model": model})
