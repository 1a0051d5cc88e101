"""Checks that a run trains. Each has a name, a metric, and a warning when it fails."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from g2rpo_ray.config import Config
from g2rpo_ray.runs.tracking import Metrics

MAX_FLAT_GROUPS = 0.9
MAX_EPS_SHARE = 0.1
MIN_DELIVERED = 0.5  # share of the LoRA's effect on the learner's velocity
MIN_EFFECT = {"float32": 1e-4, "bfloat16": 0.01}  # relative effect of the LoRA on the velocity; below it is rounding


@dataclass(slots=True)
class TrainingChecks:
    """Names the invariants that an iteration breaks: once, and again only after they have held."""

    config: Config
    _broken: set[str] = field(default_factory=set)

    def lines(self, metrics: Metrics) -> list[str]:
        """A line for each invariant that these metrics of an iteration newly break."""
        found = dict(_broken(metrics, self.config))
        new = [f"WARNING: {name}: {line}" for name, line in found.items() if name not in self._broken]
        self._broken = set(found)
        return new


def _broken(metrics: Mapping[str, float], config: Config) -> Iterator[tuple[str, str]]:
    """The metric of each invariant that does not hold, and what to do."""

    def value(name: str, default: float) -> float:
        return metrics.get(name, default)

    if count := int(value("watch/duplicate_children", 0)):
        yield "watch/duplicate_children", f"{count} children equal another one of their group: their noise is the same"
    if int(value("watch/other_versions", 0)):
        yield "watch/other_versions", "units were sampled with other weights than those that were published for them"
    if (share := value("watch/flat_groups", 0.0)) > MAX_FLAT_GROUPS:
        yield (
            "watch/flat_groups",
            f"{share:.0%} of the groups have equal scores and teach nothing: look at samples/, and try another reward, "
            "harder prompts or a higher sampler.eta",
        )
    for name in config.rewards:
        if value(f"reward/{name}/std", 1.0) == 0:
            yield f"reward/{name}/std", f"reward {name} gives all images the same score: check it with `g2rpo rewards`"
    if (share := value("watch/trained_modules", 1.0)) < 1:
        yield (
            "watch/trained_modules",
            f"only {share:.0%} of the LoRA's modules have a gradient: check lora.targets, and whether advantages are 0",
        )
    if (share := value("learner/eps_share", 0.0)) > MAX_EPS_SHARE:
        yield (
            "learner/eps_share",
            f"learner.eps={config.learner.eps:g} is larger than the gradient of {share:.0%} of the parameters, which "
            "hardly move: lower it",
        )
    least = MIN_EFFECT[config.model.dtype]
    if value("watch/lora_effect", 0.0) > least and (share := value("watch/lora_delivered", 1.0)) < MIN_DELIVERED:
        yield (
            "watch/lora_delivered",
            f"the rollout's velocities have {share:.0%} of what the LoRA changes: rollout actors sample another policy",
        )
