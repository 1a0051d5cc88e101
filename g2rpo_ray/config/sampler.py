"""The settings that a method decides first: the shape of a prompt's tree, and how scores become advantages."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from g2rpo_ray.algo.completion import Choice, ladder
from g2rpo_ray.algo.tree import Shape, plan_tree
from g2rpo_ray.config.section import Own, Section, Step

Auto = Literal["auto"]


class AutoConfig(Section):
    """What `auto` is bound to, in sampler.strides and sampler.branch_steps: see docs/methods.md."""

    every: int = Field(20, ge=1, le=1_000_000)
    """Iterations between probes, the first one being a probe."""
    prompts: int = Field(2, ge=1, le=64)
    """Prompts of such an iteration that probe: they have every granularity of the ladder, from every step."""
    steps: int = Field(2, ge=1, le=1000)
    """Branch steps that are taken, of sampler.branch_steps=auto."""
    largest: int = Field(8, ge=1, le=1000)
    """Coarsest granularity, with which a run begins."""


class SamplerConfig(Section):
    """The shape of a prompt's tree, and its schedule. `method` fills all but the first three."""

    steps: int = Field(16, gt=0, le=1000)
    """T, sampling steps."""
    shift: Annotated[float, Field(gt=0, le=1000)] | Literal["dynamic", "pipeline"] = 3.0
    """Schedule shift s, FLUX.1's resolution-dependent one, or the pipeline's own grid."""
    guidance: bool = True
    """Classifier-free guidance in rollout and update, where model.negative_prompt is given: twice the evaluations."""
    kernel: Literal["flow", "dance", "cps", "ode"] | Own = "flow"
    """Noise of a stochastic step: see docs/methods.md; `ode`: none, for objectives of the forward process. Or your own
    function, `package.module:name`: see KERNELS in g2rpo_ray/algo/kernels.py."""
    eta: float = Field(0.7, gt=0, le=100)
    """Noise level of a stochastic step."""
    roots: int = Field(1, ge=1, le=1024)
    """R, initial noises of a prompt, each with a trunk of ODE steps."""
    branch_steps: tuple[Step, ...] | Auto = tuple(range(8))
    """M: schedule indices at which stochastic edges leave a trunk, ascending; `auto`: auto.steps of the first half of
    the schedule, the last ones unless probes prove others better as the run goes on."""
    branch_schedule: Literal["fixed", "slide", "draw"] = "fixed"
    """`fixed`: all of branch_steps, always; `slide`: all of them, moved on by 1 every `slide_every` iterations, as long
    as their edges fit, and from the start again; `draw`: one of them for each prompt, by its key."""
    slide_every: int = Field(25, ge=1, le=1_000_000)
    """Iterations between two moves of `slide`."""
    group_size: int = Field(12, ge=1, le=1024)
    """G, children of a trunk at each branch step."""
    stochastic_edges: int = Field(1, ge=1, le=1000)
    """K, stochastic edges in a row from a branch step on."""
    edge_length: int = Field(1, ge=1, le=1000)
    """Steps that one stochastic edge spans."""
    splits: tuple[Step, ...] = ()
    """Schedule indices at which a node among stochastic edges has `width` children in place of one."""
    width: int = Field(2, ge=1, le=64)
    """Children of a node at `splits`."""
    strides: tuple[Step, ...] | Auto = (1, 2, 3)
    """Λ: the granularities at which each branch is completed; `auto`: the coarsest one, unless probes prove a finer one
    better as the run goes on."""
    auto: AutoConfig = AutoConfig()
    layout: Literal["paper", "authors"] = "paper"
    """How a stride walks to the image: as in the paper, or as in the authors' code."""
    untrained: tuple[Step, ...] = ()
    """Schedule indices from which no edge is trained, and whose noise level is none of learner.times=grid."""
    trained_share: float = Field(1.0, gt=0, le=1)
    """Of the other stochastic steps of each child, the share that is trained, drawn by its key."""

    @model_validator(mode="after")
    def _shape_is_one(self) -> "SamplerConfig":
        self._check_auto()
        plan_tree(self.shape())  # raises for one that leads nowhere
        for branch_steps in self.placements():
            tree = plan_tree(self.shape(branch_steps))
            if not tree.trained.any():
                raise ValueError(
                    f"untrained: {list(self.untrained)} given, but all edges from branch_steps={list(branch_steps)} "
                    "start there: leave some edge to train"
                )
            if self._ends_without_noise and self.steps in tree.end[tree.trained]:
                raise ValueError(
                    f"kernel: {self.kernel} given, which has no noise in a step that ends at the image: drop the "
                    f"branch steps that reach index {self.steps}, or name the index where that step starts in untrained"
                )
        return self

    def _check_auto(self) -> None:
        """Raise ValueError, in one line, where `auto` has nothing to choose from, or nothing to measure."""
        for key in ("branch_steps", "strides"):
            if getattr(self, key) == "auto" and self.kernel == "ode":
                raise ValueError(f"{key}: auto given, but with kernel=ode no stochastic step is measured: give a list")
        if self.branch_steps == "auto" and (self.branch_schedule != "fixed" or self.stochastic_edges > 1):
            raise ValueError(
                "branch_steps: auto given, which needs stochastic_edges=1 and branch_schedule=fixed; these are "
                f"{self.stochastic_edges} and {self.branch_schedule}: give a list"
            )
        if self.strides == "auto" and len(self.all_strides) < 2:
            raise ValueError(
                f"strides: auto given, but no granularity up to auto.largest={self.auto.largest} is cheaper than the "
                f"finest: stochastic edges reach index {self._reach} of {self.steps}, from where it is ODE; give [1]"
            )

    @property
    def _ends_without_noise(self) -> bool:
        """Whether the kernel has no noise in a step that ends at the image."""
        if ":" not in self.kernel:
            return self.kernel == "cps"
        from g2rpo_ray.algo.kernels import ends_without_noise  # imports torch

        return ends_without_noise(self.kernel, self.eta)

    @property
    def _reach(self) -> int:
        """Schedule index where the longest completion starts."""
        return min(self.all_branch_steps, default=0) + self.stochastic_edges * self.edge_length

    @property
    def all_strides(self) -> tuple[int, ...]:
        """The granularities, or, of `auto`, those of the ladder that it chooses from."""
        if self.strides == "auto":
            return ladder(self._reach - 1, self.steps, self.auto.largest, self.layout)
        return self.strides

    @property
    def all_branch_steps(self) -> tuple[int, ...]:
        """The branch steps, or, of `auto`, those that it chooses from: the first half, as far as their edges fit."""
        if self.branch_steps == "auto":
            last = self.steps - self.edge_length - self._ends_without_noise
            first_half = range(max(1, min(self.steps // 2, last + 1)))
            return tuple(step for step in first_half if step not in self.untrained) or tuple(first_half)
        return self.branch_steps

    @property
    def is_auto(self) -> bool:
        return "auto" in (self.strides, self.branch_steps)

    @property
    def is_drawn(self) -> bool:
        """Whether a prompt's tree depends on the run's seed and on the prompt."""
        return self.branch_schedule == "draw" or self.trained_share < 1

    @property
    def dearest(self) -> Choice:
        """Of what `auto` may choose: the finest granularity, from the first steps."""
        steps = self.all_branch_steps
        first = steps[: self.auto.steps] if self.branch_steps == "auto" else steps
        return Choice((1,) if self.strides == "auto" else self.all_strides, first)

    @property
    def cheapest(self) -> Choice:
        """Of what `auto` may choose, and before anything is measured: the coarsest granularity, from the last steps."""
        steps = self.all_branch_steps
        last = steps[-self.auto.steps :] if self.branch_steps == "auto" else steps
        return Choice(self.all_strides[-1:] if self.strides == "auto" else self.all_strides, last)

    @property
    def probed_steps(self) -> tuple[int, ...]:
        """Schedule indices at which stochastic edges may start that are trained, ascending."""
        starts = range(0, self.stochastic_edges * self.edge_length, self.edge_length)
        found = {step + start for place in self.placements() for step in place for start in starts}
        return tuple(sorted(found - set(self.untrained)))

    @property
    def probed_strides(self) -> tuple[int, ...]:
        """What the gradients of probes are compared by: each granularity of the ladder, the finest first; of a list
        the finest alone, and 0 for all together, as they are trained."""
        ascending = tuple(sorted(self.all_strides))
        return ascending if self.strides == "auto" or len(ascending) == 1 else (ascending[0], 0)

    def probes(self, iteration: int, slot: int) -> bool:
        """Whether a prompt of an iteration has all that `auto` chooses from."""
        return self.is_auto and iteration % self.auto.every == 0 and slot < self.auto.prompts

    def decided(self, choice: Choice | None, probing: bool = False) -> "SamplerConfig":
        """The settings of a prompt, without `auto`. A probe trains only what it would if it were none."""
        if not self.is_auto:
            return self
        choice = choice or self.cheapest
        if not probing:
            return self.model_copy(update={"strides": choice.strides, "branch_steps": choice.branch_steps})
        more = set(self.all_branch_steps) - set(choice.branch_steps)
        untrained = tuple(sorted({*self.untrained, *more}))
        steps = {"branch_steps": self.all_branch_steps, "untrained": untrained}
        return self.model_copy(update={"strides": self.all_strides, **steps})

    def placements(self) -> list[tuple[int, ...]]:
        """The branch steps that a prompt may have: of `slide` in order, of `draw` each as likely as the others."""
        if self.branch_schedule == "draw":
            return [(step,) for step in self.all_branch_steps]
        if self.branch_schedule == "slide":
            last = self.steps - self.stochastic_edges * self.edge_length
            last -= self._ends_without_noise  # it has no noise in a step that ends at the image
            places = range(max(1, last - self.all_branch_steps[-1] + 1))
            return [tuple(step + moved for step in self.all_branch_steps) for moved in places]
        return [self.all_branch_steps]

    def shape(self, branch_steps: tuple[int, ...] | None = None, anchors: bool = False) -> Shape:
        """The shape of one prompt's tree; `branch_steps`: where they move, those of the prompt."""
        return Shape(
            steps=self.steps,
            roots=self.roots,
            branch_steps=self.all_branch_steps if branch_steps is None else branch_steps,
            children=self.group_size,
            stochastic_edges=self.stochastic_edges,
            edge_length=self.edge_length,
            splits=self.splits,
            width=self.width,
            strides=self.all_strides,
            layout=self.layout,
            untrained=() if self.kernel == "ode" else self.untrained,  # no step is trained
            anchors=anchors,
        )


class CreditConfig(Section):
    """How scores become advantages. `method` fills it."""

    normalise: Literal["each", "sum"] = "each"
    """Of several rewards: `each` normalises every reward, then adds up the advantages by weight; `sum` adds up the
    scores by weight, then normalises the sum (Flow-GRPO, DiffusionNFT and AWM as released). With `sum` a common factor
    of all weights has no effect."""
    group: Literal["siblings", "step"] | Own = "siblings"
    """What an edge is compared with: the others of its parent, or all of its prompt that start at its index. Or a
    function of your own, `package.module:name`: see GROUPS in g2rpo_ray/algo/tree.py."""
    spread: Literal["group", "batch"] = "group"
    """What a difference is divided by: the std of the group's values, or the reward's over the whole iteration."""
    granularity_weights: tuple[Annotated[float, Field(ge=0, le=1000)], ...] | None = None
    """w_j in the advantage, one for each of sampler.strides; unset: 1."""
    clip: float = Field(5.0, gt=0, le=1000)
    """Largest absolute advantage."""
    least_spread: float = Field(0.0, ge=0, le=1_000_000)
    """Groups whose values under a reward differ by no more than this, largest minus smallest, have no advantage by it:
    what a judge makes of images that are equally good is noise (Edit-R1). With `normalise: sum` of the weighted sum."""

    @model_validator(mode="after")
    def _some_granularity_counts(self) -> "CreditConfig":
        if self.granularity_weights and not any(self.granularity_weights):
            raise ValueError(
                f"granularity_weights: {list(self.granularity_weights)} given; one must be above 0, to train"
            )
        return self
