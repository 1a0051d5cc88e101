"""Published methods as presets: a tree, a credit rule and an objective. One module for each method.

A preset is a function from the number of sampling steps to the settings that differ from NEUTRAL. Settings of the model
(learning rate, resolution, schedule shift, batch) are in configs/. Each module's docstring names the source, and lists
the differences between paper and code.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from g2rpo_ray.messages import one_line, shown

Settings = dict[str, dict[str, Any]]

DEFAULT_METHOD = "g2rpo"

NEUTRAL: Settings = {
    "sampler": {
        "kernel": "flow", "eta": 0.7, "roots": 1, "branch_steps": [0], "branch_schedule": "fixed", "slide_every": 25,
        "group_size": 12, "stochastic_edges": 1, "edge_length": 1, "splits": [], "width": 2, "strides": [1],
        "layout": "paper", "untrained": [], "trained_share": 1.0,
    },
    "credit": {
        "normalise": "each", "group": "siblings", "spread": "group", "granularity_weights": None, "clip": 5.0,
        "least_spread": 0.0,
    },
    "learner": {
        "objective": "clip", "clip_range": 1e-4, "subpaths": [], "edge_weight": None, "schedule": "accumulate",
        "updates_per_rollout": 1, "kl_beta": 0.0, "draws": 1, "times": "grid", "nft_beta": 1.0, "old_decay": None,
        "old_kl": 0.0,
    },
    "evaluation": {"anchors": False},
}  # fmt: skip


def method_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def preset(name: str, steps: int | None = None) -> Settings:
    """All settings of a method at `steps` sampling steps (None: the paper's number), `sampler.steps` among them.

    Raises:
        ValueError: there is no such method, or its preset has a section that presets may not set.
    """
    module = _module(name)
    make: Callable[[int], Settings] = module.preset
    chosen = module.STEPS if steps is None else steps
    given = make(chosen)
    if unknown := sorted(set(given) - set(NEUTRAL)):
        raise ValueError(f"method: the preset {name} has a section {unknown[0]}; allowed are {', '.join(NEUTRAL)}")
    settings = {section: {**values, **given.get(section, {})} for section, values in NEUTRAL.items()}
    settings["sampler"]["steps"] = chosen
    return settings


def _module(name: Any) -> Any:
    """The module of a method: one of this package, or the user's own by its import path."""
    known = method_names()
    parts = name.split(".") if isinstance(name, str) else []
    if name not in known and not (len(parts) > 1 and all(part.isidentifier() for part in parts)):
        raise ValueError(
            f"method: {shown(name)} given; allowed are {', '.join(known)}, or the import path (with a dot) of your own "
            "module with STEPS and preset"
        )
    path = f"{__name__}.{name}" if name in known else name
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(f"method: {name} cannot be imported ({error}); put its folder on PYTHONPATH") from None
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything, or end the process
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"method: {name} cannot be imported ({reason}); correct it") from error
    if not hasattr(module, "STEPS") or not hasattr(module, "preset"):
        raise ValueError(f"method: the module {name} lacks STEPS or preset; see docs/methods.md")
    return module
