"""Classifies Ray's errors: an actor that died and why, an object that was lost."""

import re

from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from g2rpo_ray.actors.pool.device_faults import device_fault
from g2rpo_ray.messages import one_line

# Ray raises no RayActorError for an actor that was killed for memory, whose node was drained, or without environment.
DEATHS = (
    *(RayActorError, ActorUnschedulableError, OutOfMemoryError, NodeDiedError, WorkerCrashedError),
    RuntimeEnvSetupError,
)


def is_lost_object(error: BaseException) -> bool:
    """Whether an object was lost with the node that held it. It can be computed again."""
    return isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError)


def is_death(error: BaseException) -> bool:
    """Whether the called process died, or cannot continue."""
    gone = isinstance(error, DEATHS) and not isinstance(error, RayTaskError)  # a RayTaskError comes from a live process
    return gone or device_fault(error) is not None


def exit_reason(error: BaseException) -> str:
    """The reason of an actor's death in one line: what its start raised, or how its process ended."""
    if fault := device_fault(error):
        return str(fault)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RuntimeEnvSetupError):
        why = next(filter(_says_why, reversed(lines)), lines[-1])
        return f"its runtime_env could not be created: {one_line(why, 400)}"
    if getattr(error, "actor_init_failed", False):
        return one_line(lines[-1])
    why = next((line for line in lines if "Worker exit detail: " in line), first_line(error))
    return one_line(why.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0])


def _says_why(line: str) -> bool:
    """Whether a line of a failed runtime environment is an exception or an error of the installer."""
    return bool(re.match(r"(\w+\.)*\w*(Error|Exception): |ERROR: |error: |× ", line))


def first_line(error: BaseException) -> str:
    """The line of an error's message that says what happened: the first, or of a RayTaskError the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if isinstance(error, RayTaskError) else 0] if lines else type(error).__name__
