"""How branches are completed: a reward may be measured cheaply, the policy may not."""

from typing import Literal

import numpy as np
from pydantic import Field

from g2rpo_ray.algo.tree import plan_tree
from g2rpo_ray.config.learner import LearnerConfig
from g2rpo_ray.config.sampler import SamplerConfig
from g2rpo_ray.config.section import Section


class CompletionsConfig(Section):
    """The velocities of branch units, below the stochastic edges: only scores rest on them."""

    quantization: Literal["none", "int8", "int8_weights", "float8", "float8_weights"] = "none"
    """Of the linear layers of the transformer's blocks, through torchao (`pip install g2rpo_ray[completions]`): of
    weights and activations, or of weights alone. `float8` needs a GPU of compute capability 8.9."""
    attention_backend: str | None = None
    """Any backend. Unset: that of `rollout`."""
    compile: bool = False
    """Compile the blocks (torch.compile)."""
    probe_every: int = Field(10, ge=1, le=1_000_000)
    """Every so many iterations the first prompts are completed exactly, too: `signal/agreement/completions`."""
    probe_prompts: int = Field(1, ge=0, le=1024)
    """Prompts of such an iteration."""

    @property
    def differ(self) -> bool:
        """Whether they are computed otherwise than all else."""
        return self.quantization != "none" or self.attention_backend is not None or self.compile

    def probes(self, iteration: int, slot: int) -> bool:
        """Whether a prompt of an iteration is completed both ways."""
        return self.differ and iteration % self.probe_every == 0 and slot < self.probe_prompts


def check_completions(completions: CompletionsConfig, sampler: SamplerConfig, learner: LearnerConfig) -> None:
    """Raise ValueError, in one line, where the likelihood of a trained edge would rest on a cheap velocity."""
    if not completions.differ or learner.forward:  # images have no likelihood
        return
    for branch_steps in sampler.placements():
        tree = plan_tree(sampler.shape(branch_steps))
        inside = np.setdiff1d(tree.source[tree.trained], tree.branch_points)
        if len(inside):
            share = len(inside) / tree.completions
            raise ValueError(
                f"rollout.completions: given, but trained edges start at {share:.0%} of the velocities "
                "of branch units, which have to be exact: leave it out, or train one stochastic edge a branch "
                "(sampler.stochastic_edges=1, no splits)"
            )
