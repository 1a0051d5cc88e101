"""Settings of a prompt's tree, and of the advantages. A method sets most of them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from g2rpo_ray.algo.completion import Choice, ladder
from g2rpo_ray.algo.tree import Shape, plan_tree
from g2rpo_ray.config.section import Own, Section, Step

Auto = Literal["auto"]


class AutoConfig(Section):
    """Bounds of `auto` in sampler.strides and sampler.branch_steps: see docs/methods.md."""

    every: int = Field(20, ge=1, le=1_000_000)
    """Iterations between probes; the first iteration is a probe."""
    prompts: int = Field(2, ge=1, le=64)
    """Prompts of a probe. They have every granularity of the ladder, from every step."""
    steps: int = Field(2, ge=1, le=1000)
    """Number of branch steps with sampler.branch_steps=auto."""
    largest: int = Field(8, ge=1, le=1000)
    """Coarsest granularity. A run begins with it."""


class SamplerConfig(Section):
    """The shape of a prompt's tree, and its schedule. `method` sets all but the first three."""

    steps: int = Field(16, gt=0, le=1000)
    """T, number of sampling steps."""
    shift: Annotated[float, Field(gt=0, le=1000)] | Literal["dynamic", "pipeline"] = 3.0
    """Schedule shift s; `dynamic`: FLUX.1's resolution-dependent shift; `pipeline`: the pipeline's own grid."""
    guidance: bool = True
    """Classifier-free guidance in rollout and update, if model.negative_prompt is given. It doubles the evaluations."""
    kernel: Literal["flow", "dance", "cps", "ode"] | Own = "flow"
    """Kernel of a stochastic step: see docs/methods.md. `ode`: no noise, for objectives of the forward process. Or your
    own function, `package.module:name`: docs/methods.md, "Write your own"."""
    eta: float = Field(0.7, gt=0, le=100)
    """η, noise level of a stochastic step."""
    roots: int = Field(1, ge=1, le=1024)
    """R, initial noises of a prompt, each with a trunk of ODE steps."""
    branch_steps: tuple[Step, ...] | Auto = tuple(range(8))
    """M, ascending schedule indices at which stochastic edges leave a trunk. `auto`: auto.steps of the first half of
    the schedule, the last ones unless probes prove others better."""
    branch_schedule: Literal["fixed", "slide", "draw"] = "fixed"
    """`fixed`: all of branch_steps. `slide`: all of them, moved by 1 every `slide_every` iterations while their edges
    fit, then from the start again. `draw`: one of them per prompt, by its key."""
    slide_every: int = Field(25, ge=1, le=1_000_000)
    """Iterations between two moves of `slide`."""
    group_size: int = Field(12, ge=1, le=1024)
    """G, children of a trunk at each branch step."""
    stochastic_edges: int = Field(1, ge=1, le=1000)
    """K, consecutive stochastic edges from a branch step."""
    edge_length: int = Field(1, ge=1, le=1000)
    """Steps of one stochastic edge."""
    splits: tuple[Step, ...] = ()
    """Schedule indices at which a node among stochastic edges has `width` children instead of one."""
    width: int = Field(2, ge=1, le=64)
    """Children of a node at `splits`."""
    strides: tuple[Step, ...] | Auto = (1, 2, 3)
    """Λ, granularities at which each branch is completed. `auto`: the coarsest one, unless probes prove a finer one
    better."""
    auto: AutoConfig = AutoConfig()
    layout: Literal["paper", "authors"] = "paper"
    """Steps of a stride to the image: as in the paper, or as in the authors' code."""
    untrained: tuple[Step, ...] = ()
    """Schedule indices at which no trained edge starts, and whose noise levels learner.times=grid omits."""
    trained_share: float = Field(1.0, gt=0, le=1)
    """Share of the other stochastic steps of each child that is trained, drawn by its key."""

    @model_validator(mode="after")
    def _shape_is_one(self) -> "SamplerConfig":
        self._check_auto()
        plan_tree(self.shape())  # raises if the shape is not possible
        for branch_steps in self.placements():
            tree = plan_tree(self.shape(branch_steps))
            if not tree.trained.any():
                raise ValueError(
                    f"untrained: {list(self.untrained)} given, but all edges of branch_steps={list(branch_steps)} "
                    "start there; remove an index, so that some edge is trained"
                )
            if self._ends_without_noise and self.steps in tree.end[tree.trained]:
                raise ValueError(
                    f"kernel: {self.kernel} given, which has no noise in a step that ends at the image; remove the "
                    f"branch steps that reach index {self.steps}, or add the index where that step starts to untrained"
                )
        return self

    def _check_auto(self) -> None:
        """Raises ValueError, in one line, if `auto` has nothing to choose from or to measure."""
        for key in ("branch_steps", "strides"):
            if getattr(self, key) == "auto" and self.kernel == "ode":
                raise ValueError(f"{key}: auto given, but kernel=ode has no stochastic step to measure; give a list")
        if self.branch_steps == "auto" and (self.branch_schedule != "fixed" or self.stochastic_edges > 1):
            raise ValueError(
                "branch_steps: auto given, which needs stochastic_edges=1 and branch_schedule=fixed; they are "
                f"{self.stochastic_edges} and {self.branch_schedule}; give a list"
            )
        if self.strides == "auto" and len(self.all_strides) < 2:
            raise ValueError(
                f"strides: auto given, but no granularity up to auto.largest={self.auto.largest} is cheaper than the "
                f"finest, because ODE steps begin only at index {self._reach} of {self.steps}; give [1]"
            )

    @property
    def _ends_without_noise(self) -> bool:
        """True if the kernel has no noise in a step that ends at the image."""
        if ":" not in self.kernel:
            return self.kernel == "cps"
        from g2rpo_ray.algo.kernels import ends_without_noise  # imports torch

        return ends_without_noise(self.kernel, self.eta)

    @property
    def _reach(self) -> int:
        """Schedule index at which the longest completion starts."""
        return min(self.all_branch_steps, default=0) + self.stochastic_edges * self.edge_length

    @property
    def all_strides(self) -> tuple[int, ...]:
        """The granularities; with `auto`, the ladder that it chooses from."""
        if self.strides == "auto":
            return ladder(self._reach - 1, self.steps, self.auto.largest, self.layout)
        return self.strides

    @property
    def all_branch_steps(self) -> tuple[int, ...]:
        """The branch steps; with `auto`, those that it chooses from: the first half, as far as their edges fit."""
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
        """True if a prompt's tree depends on the run's seed and the prompt."""
        return self.branch_schedule == "draw" or self.trained_share < 1

    @property
    def costliest(self) -> Choice:
        """The most expensive choice of `auto`: the finest granularity, from the first steps."""
        steps = self.all_branch_steps
        first = steps[: self.auto.steps] if self.branch_steps == "auto" else steps
        return Choice((1,) if self.strides == "auto" else self.all_strides, first)

    @property
    def cheapest(self) -> Choice:
        """The cheapest choice of `auto`, with which it starts: the coarsest granularity, from the last steps."""
        steps = self.all_branch_steps
        last = steps[-self.auto.steps :] if self.branch_steps == "auto" else steps
        return Choice(self.all_strides[-1:] if self.strides == "auto" else self.all_strides, last)

    @property
    def probed_steps(self) -> tuple[int, ...]:
        """Ascending schedule indices at which trained stochastic edges may start."""
        starts = range(0, self.stochastic_edges * self.edge_length, self.edge_length)
        found = {step + start for place in self.placements() for step in place for start in starts}
        return tuple(sorted(found - set(self.untrained)))

    @property
    def probed_strides(self) -> tuple[int, ...]:
        """Granularities whose gradients are compared, the finest first: with `auto` the ladder; with a list the finest,
        and 0 for all together, as they are trained."""
        ascending = tuple(sorted(self.all_strides))
        return ascending if self.strides == "auto" or len(ascending) == 1 else (ascending[0], 0)

    def probes(self, iteration: int, slot: int) -> bool:
        """True if the prompt at `slot` of an iteration is a probe."""
        return self.is_auto and iteration % self.auto.every == 0 and slot < self.auto.prompts

    def decided(self, choice: Choice | None, probing: bool = False) -> "SamplerConfig":
        """The settings of a prompt, without `auto`. A probe trains the same steps as other prompts."""
        if not self.is_auto and choice is None:
            return self
        choice = choice or self.cheapest
        if not probing:
            return self.model_copy(update={"strides": choice.strides, "branch_steps": choice.branch_steps})
        more = set(self.all_branch_steps) - set(choice.branch_steps)
        untrained = tuple(sorted({*self.untrained, *more}))
        steps = {"branch_steps": self.all_branch_steps, "untrained": untrained}
        return self.model_copy(update={"strides": self.all_strides, **steps})

    def placements(self) -> list[tuple[int, ...]]:
        """The possible branch steps of a prompt: for `slide` in order, for `draw` equally likely."""
        if self.branch_schedule == "draw":
            return [(step,) for step in self.all_branch_steps]
        if self.branch_schedule == "slide":
            last = self.steps - self.stochastic_edges * self.edge_length
            last -= self._ends_without_noise  # it has no noise in a step that ends at the image
            places = range(max(1, last - self.all_branch_steps[-1] + 1))
            return [tuple(step + moved for step in self.all_branch_steps) for moved in places]
        return [self.all_branch_steps]

    def shape(self, branch_steps: tuple[int, ...] | None = None, anchors: bool = False) -> Shape:
        """The shape of a prompt's tree; `branch_steps` are the prompt's, if they move."""
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
    """Advantages from scores. `method` sets all of it."""

    normalise: Literal["each", "sum"] = "each"
    """`each`: normalise every reward, then sum the advantages by weight. `sum`: sum the scores by weight, then
    normalise the sum (Flow-GRPO, DiffusionNFT and AWM as released); a common factor of all weights has no effect."""
    group: Literal["siblings", "step"] | Own = "siblings"
    """Comparison group of an edge: the edges of its parent, or all of its prompt that start at its index. Or your own
    function, `package.module:name`: docs/methods.md, "Write your own"."""
    spread: Literal["group", "batch"] = "group"
    """Divisor of a difference: the std of the group's values, or that of the reward over the whole iteration."""
    granularity_weights: tuple[Annotated[float, Field(ge=0, le=1000)], ...] | None = None
    """w_j in the advantage, one for each of sampler.strides. Unset: 1."""
    clip: float = Field(5.0, gt=0, le=1000)
    """Maximum absolute advantage."""
    least_spread: float = Field(0.0, ge=0, le=1_000_000)
    """Groups in which a reward's values (largest minus smallest) differ by no more than this have no advantage by it: a
    judge's scores of equally good images are noise (Edit-R1). With `normalise: sum`, of the weighted sum."""

    @model_validator(mode="after")
    def _some_granularity_counts(self) -> "CreditConfig":
        if self.granularity_weights and not any(self.granularity_weights):
            raise ValueError(
                f"granularity_weights: {list(self.granularity_weights)} given; at least one must be above 0"
            )
        return self
