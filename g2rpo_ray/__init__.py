"""Reinforcement learning on sampling trees for text-to-image flow models, as an actor/learner system on Ray.

from g2rpo_ray import load_config, train
run = train(load_config("quickstart"), rewards={"brightness": lambda images, prompts: images.mean((1, 2, 3))})
run.load_into(pipeline)
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from g2rpo_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from g2rpo_ray.config import Config, load_config
    from g2rpo_ray.evaluation.run import evaluate
    from g2rpo_ray.local import LocalRun
    from g2rpo_ray.rewards import Reward
    from g2rpo_ray.runs.reader import Run, read_run
    from g2rpo_ray.training import train

for _name in ("diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # where torchao is installed they warn of its version

__all__ = ["Config", "LocalRun", "Reward", "Run", "evaluate", "load_config", "read_run", "train"]

_PLACES = {
    "Config": "config",
    "LocalRun": "local",
    "Reward": "rewards",
    "Run": "runs.reader",
    "evaluate": "evaluation.run",
    "load_config": "config",
    "read_run": "runs.reader",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
