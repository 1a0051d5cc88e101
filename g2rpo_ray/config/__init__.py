"""Settings: pydantic models, and the YAML loader."""

from g2rpo_ray.config.learner import LearnerConfig
from g2rpo_ray.config.loading import dump_config, load_config, with_settings
from g2rpo_ray.config.resources import Resources, ray_options
from g2rpo_ray.config.sampler import SamplerConfig
from g2rpo_ray.config.schema import Config, LoraConfig, ModelConfig, RewardConfig

__all__ = [
    "Config",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "Resources",
    "RewardConfig",
    "SamplerConfig",
    "dump_config",
    "load_config",
    "ray_options",
    "with_settings",
]
