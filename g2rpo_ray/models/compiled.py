"""torch.compile of a transformer's repeated blocks: a graph for each kind of block, whatever the number of blocks."""

from typing import Any

import torch

MAX_GRAPHS = 64  # of a kind of block; torch's own limit of 8 is below what a learner needs


def compile_blocks(transformer: Any) -> None:
    """Compile the blocks, with their LoRA, which is an input of the graphs: new weights are not compiled again.

    Batches of one latent have graphs of their own, and so have passes with and without gradient, with the LoRA, with
    another policy in its place, and without.
    """
    torch.compiler.config.recompile_limit = max(MAX_GRAPHS, torch.compiler.config.recompile_limit)
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
