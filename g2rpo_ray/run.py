"""The training loop.

prompts ─► trees ─► images ─► scores ─► advantages of edges ─► loss ─► LoRA ─► next iteration
           └─ rollout actors ─┘  └ reward servers ┘  └───── learner ─────┘
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from g2rpo_ray.launch.command import launch, make_parser

__all__ = ["main", "make_parser", "train"]

if TYPE_CHECKING:  # Ray is loaded when there is something to run
    from actors.session import Session


async def train(run: "Session") -> None:
    """Train to the last iteration. The session knows signals, stale rollouts and what to do about a lost learner."""
    async for iteration in run.iterations():
        rollout = await run.rollout(iteration)  # grow the trees of this iteration's prompts, score their leaves
        update = await run.update(rollout)  # credit, objective, optimizer steps
        await run.publish(iteration + 1)  # the LoRA, for all rollouts from now on
        await run.record(iteration + 1, rollout, update)  # metrics; held-out evaluation and checkpoint, when due


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    return launch(train, arguments)


if __name__ == "__main__":
    sys.exit(main())
