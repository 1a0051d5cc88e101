"""The training loop.

prompts ─► trees ─► images ─► scores ─► advantages of edges ─► loss ─► LoRA ─► next iteration
           └─ rollout actors ─┘  └ reward servers ┘  └───── learner ─────┘
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Ray is loaded when there is something to run
    from g2rpo_ray.actors.session import Session


async def training_loop(run: "Session") -> None:
    """Train to the last iteration. The session knows signals, stale rollouts and what to do about a lost learner."""
    async for iteration in run.iterations():
        rollout = await run.rollout(iteration)  # grow the trees of this iteration's prompts, score their leaves
        update = await run.update(rollout)  # credit, objective, optimizer steps
        await run.publish(iteration + 1)  # the LoRA, for all rollouts from now on
        await run.record(iteration + 1, rollout, update)  # metrics; held-out evaluation and checkpoint, when due


if __name__ == "__main__":
    from g2rpo_ray.exits import start

    start("g2rpo_ray.commands.train")
