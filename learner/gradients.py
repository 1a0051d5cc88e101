"""Checks of an update's gradients: the modules that they reach, and the share that Adam's epsilon exceeds."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from g2rpo_ray.learner.batch import RankMetrics


class ReachedModules:
    """Records the LoRA layers with a nonzero gradient of B; that of A is 0 while B is 0."""

    def __init__(self, lora: Mapping[str, nn.Parameter], device: str) -> None:
        self._up = [name for name in lora if ".lora_B." in name]
        self._reached = torch.zeros(len(self._up), dtype=torch.bool, device=device)
        for place, name in enumerate(self._up):
            lora[name].register_hook(partial(self._look, place))

    def _look(self, place: int, gradient: Tensor) -> None:
        self._reached[place] |= (gradient != 0).any()  # on the device: no synchronisation

    def forget(self) -> None:
        """Clears the record, since hooks also see gradients outside updates."""
        self._reached.zero_()

    def take(self, metrics: RankMetrics) -> None:
        """Adds the share of layers that any rank's gradients reached. All ranks must call it."""
        reached = self._reached.to(torch.int32)
        torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX)
        idle = [name for name, there in zip(self._up, reached.tolist(), strict=True) if not there]
        metrics.largest("watch/trained_modules", 1 - len(idle) / len(self._up))
        self.forget()


def observe_eps(states: Mapping[Any, Mapping[str, Tensor]], eps: float, beta: float, metrics: RankMetrics) -> None:
    """Adds the numbers of parameters with a gradient, and of those whose √v̂ is below Adam's epsilon."""
    below = there = 0
    for state in states.values():
        moment = state["exp_avg_sq"]
        root = (moment / (1 - beta ** float(state["step"]))).sqrt()
        below += int(((root < eps) & (moment > 0)).sum())
        there += int((moment > 0).sum())
    metrics.add("eps_below", below)
    metrics.add("eps_of", there)
