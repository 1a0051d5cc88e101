"""The learner's copies of the LoRA: versions that sampled, and averages.

Every rank has whole copies on the CPU, as states of `g2rpo_ray.models.lora`. Copies that the loss evaluates are moved
to the device for an update.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from g2rpo_ray.config import LearnerConfig
from g2rpo_ray.types import FloatArray

LoraState = dict[str, FloatArray]
Lora = Callable[[], LoraState]
"""Function that copies the LoRA. It is a collective, so all ranks must call it or none."""

AVERAGE, EMA, BEHAVIOUR = KINDS = ("average", "ema", "behaviour")
"""Kinds of copies in a checkpoint: two averages, and the version before the newest."""


@dataclass(slots=True)
class Copies:
    """`average` moves toward the policy after each update (`old_decay`), `ema` after each optimizer step (`ema`)."""

    learner: LearnerConfig
    device: str
    keeps: bool  # True to keep versions, to sample with or to evaluate again
    averages: dict[str, LoraState]
    versions: dict[int, LoraState]  # the newest published one and the one before
    old: dict[str, Tensor] | None = None
    """During an update, on the device: the sampling policy. None if it is the updated one."""
    average: dict[str, Tensor] | None = None
    """During an update, on the device, if the loss needs it."""
    _sampled: LoraState = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        learner: LearnerConfig,
        device: str,
        rank: int,
        lora: Lora,
        saved: Mapping[str, LoraState],
        version: int | None,
    ) -> "Copies":
        """The copies of a run; `saved` and `version` (of BEHAVIOUR) are a checkpoint's. New averages equal the LoRA."""
        wanted = {AVERAGE: learner.old_decay, EMA: learner.ema}
        averages = {kind: saved.get(kind) or lora() for kind, given in wanted.items() if given is not None}
        versions = {} if version is None else {version: saved[BEHAVIOUR]}
        return cls(learner, device, rank == 0 or learner.forward or learner.evaluates_old, averages, versions)

    def publish(self, version: int, lora: Lora) -> LoraState:
        """The next sampling policy: the LoRA, or its average if `average_samples`."""
        state = self.averages[AVERAGE] if self.learner.average_samples else lora()
        if self.keeps:
            self.versions = {**{v: s for v, s in self.versions.items() if v == version - 1}, version: state}
        return state

    def begin(self, lora: Lora, on_policy: bool) -> None:
        """Call before an update. Its rollouts are of the newest version, or the one before if not `on_policy`."""
        if self.learner.evaluates_old and not on_policy:
            self.old = self._on_device(self.versions[min(self.versions)])
        if not self.learner.forward:
            return
        averaged = self.learner.average_samples
        now = self.averages[AVERAGE] if averaged else lora()
        self._sampled = now if on_policy else self.versions[min(self.versions)]
        self.old = self._on_device(self._sampled) if averaged or not on_policy else None
        self.average = self._on_device(self.averages[AVERAGE]) if self.learner.old_kl > 0 else None

    def stepped(self, lora: Lora, steps: int) -> None:
        """Call after the `steps`-th optimizer step of the run."""
        if self.learner.forward and self.old is None:  # the policy now differs from the sampling policy
            self.old = self._on_device(self._sampled)
        if self.learner.ema is not None:
            self._move(EMA, lora(), min(self.learner.ema, (1 + steps) / (10 + steps)))

    def end(self, lora: Lora, steps: int) -> None:
        """Call after an update."""
        self.old, self.average, self._sampled = None, None, {}
        if self.learner.old_decay is not None:
            flat, rate, most = self.learner.old_decay
            self._move(AVERAGE, lora(), min(max(0.0, (steps - flat) * rate), most))

    def to_save(self) -> tuple[dict[str, LoraState], int | None]:
        """The copies by kind, and the version of BEHAVIOUR, if there is one."""
        if len(self.versions) < 2:
            return self.averages, None
        version = min(self.versions)
        return {**self.averages, BEHAVIOUR: self.versions[version]}, version

    def _move(self, kind: str, lora: LoraState, decay: float) -> None:
        before = self.averages[kind]  # published arrays must not change, so new ones are made
        self.averages[kind] = {name: decay * before[name] + (1 - decay) * lora[name] for name in lora}

    def _on_device(self, state: LoraState) -> dict[str, Tensor]:
        return {name: torch.tensor(array, device=self.device) for name, array in state.items()}
