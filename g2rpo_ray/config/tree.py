"""The settings that a method decides first: the shape of a prompt's tree, and how scores become advantages."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from g2rpo_ray.algo import Shape, plan_tree
from g2rpo_ray.config.section import Section, Step


class SamplerConfig(Section):
    """The shape of a prompt's tree, and its schedule. `method` fills all but the first three."""

    steps: int = Field(16, gt=0, le=1000)
    """T, sampling steps."""
    shift: Annotated[float, Field(gt=0, le=1000)] | Literal["dynamic", "pipeline"] = 3.0
    """Schedule shift s, FLUX.1's resolution-dependent one, or the pipeline's own grid."""
    guidance: bool = True
    """Classifier-free guidance in rollout and update, where model.negative_prompt is given: twice the evaluations."""
    kernel: Literal["flow", "dance", "cps", "ode"] = "flow"
    """Noise of a stochastic step: see docs/methods.md; `ode`: none, for objectives of the forward process."""
    eta: float = Field(0.7, gt=0, le=100)
    """Noise level of a stochastic step."""
    roots: int = Field(1, ge=1, le=1024)
    """R, initial noises of a prompt, each with a trunk of ODE steps."""
    branch_steps: tuple[Step, ...] = tuple(range(8))
    """M: schedule indices at which stochastic edges leave a trunk, ascending."""
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
    strides: tuple[Step, ...] = (1, 2, 3)
    """Λ: the granularities at which each branch is completed."""
    layout: Literal["paper", "authors"] = "paper"
    """How a stride walks to the image: as in the paper, or as in the authors' code."""
    untrained: tuple[Step, ...] = ()
    """Schedule indices from which no edge is trained, and whose noise level is none of learner.times=grid."""
    trained_share: float = Field(1.0, gt=0, le=1)
    """Of the other stochastic steps of each child, the share that is trained, drawn by its key."""

    @model_validator(mode="after")
    def _shape_is_one(self) -> "SamplerConfig":
        plan_tree(self.shape())  # raises for one that leads nowhere
        for branch_steps in self.placements():
            tree = plan_tree(self.shape(branch_steps))
            if not tree.trained.any():
                raise ValueError(
                    f"untrained: {list(self.untrained)} given, but all edges from branch_steps={list(branch_steps)} "
                    "start there: leave some edge to train"
                )
            if self.kernel == "cps" and self.steps in tree.end[tree.trained]:
                raise ValueError(
                    "kernel: cps given, which has no noise in a step that ends at the image: drop the branch steps "
                    f"that reach index {self.steps}, or name the index where that step starts in untrained"
                )
        return self

    def placements(self) -> list[tuple[int, ...]]:
        """The branch steps that a prompt may have: of `slide` in order, of `draw` each as likely as the others."""
        if self.branch_schedule == "draw":
            return [(step,) for step in self.branch_steps]
        if self.branch_schedule == "slide":
            last = self.steps - self.stochastic_edges * self.edge_length
            last -= self.kernel == "cps"  # it has no noise in a step that ends at the image
            places = range(max(1, last - self.branch_steps[-1] + 1))
            return [tuple(step + moved for step in self.branch_steps) for moved in places]
        return [self.branch_steps]

    def shape(self, branch_steps: tuple[int, ...] | None = None, anchors: bool = False) -> Shape:
        """The shape of one prompt's tree; `branch_steps`: where they move, those of the prompt."""
        return Shape(
            steps=self.steps,
            roots=self.roots,
            branch_steps=self.branch_steps if branch_steps is None else branch_steps,
            children=self.group_size,
            stochastic_edges=self.stochastic_edges,
            edge_length=self.edge_length,
            splits=self.splits,
            width=self.width,
            strides=self.strides,
            layout=self.layout,
            untrained=() if self.kernel == "ode" else self.untrained,  # no step is trained
            anchors=anchors,
        )


class CreditConfig(Section):
    """How scores become advantages. `method` fills it."""

    group: Literal["siblings", "step"] = "siblings"
    """What an edge is compared with: the others of its parent, or all of its prompt that start at its index."""
    spread: Literal["group", "batch"] = "group"
    """What a difference is divided by: the std of the group's values, or the reward's over the whole iteration."""
    granularity_weights: tuple[Annotated[float, Field(ge=0, le=1000)], ...] | None = None
    """w_j in the advantage, one for each of sampler.strides; unset: 1."""
    clip: float = Field(5.0, gt=0, le=1000)
    """Largest absolute advantage."""
