"""Settings of a small run whose branch steps and strides are `auto`."""

from g2rpo_ray.config import load_config

AUTO = ("sampler.strides=auto", "sampler.branch_steps=auto")


def auto(*overrides):
    return load_config(None, [*AUTO, *overrides])
