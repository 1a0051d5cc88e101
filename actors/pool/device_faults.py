"""Device faults: CUDA, NCCL and memory errors after which a process cannot continue, and the quarantine of devices."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

from g2rpo_ray.actors.pool.actor import Actor, here
from g2rpo_ray.messages import one_line
from g2rpo_ray.types import Place
from g2rpo_ray.version import check_code

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_DEVICE_FAULTS = 2  # of one device, after which it is quarantined
MAX_FAULTY_ACTORS = 3  # whose device may fail on one call
STICKY = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|NCCL error")  # later calls fail as well


class DeviceFault(RuntimeError):
    """The process of an actor cannot continue. The caller treats the actor as dead."""

    def __init__(self, reason: str, node: str, device: str) -> None:
        """`device`: the device on this node, or "" for other causes: too little memory, the network between ranks."""
        super().__init__(reason, node, device)  # so that it survives pickling
        self.node, self.device = node, device

    def __str__(self) -> str:
        return str(self.args[0])


def device_fault(error: BaseException) -> DeviceFault | None:
    """The DeviceFault that a call failed with, or None."""
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, DeviceFault) else None


@contextmanager
def device_faults(memory: bool = True) -> Iterator[None]:
    """In an actor: raises DeviceFault for an error after which the process cannot continue; others pass unchanged.

    `memory`: whether running out of memory is such an error. If not, the settings do not fit the device.
    """
    try:
        yield
    except Exception as error:
        fault = _fault(error, memory)
        if fault:
            raise fault from None
        raise


def with_memory(work: Callable[[], T]) -> T:
    """The result of `work`; after an out-of-memory error it is retried once with an empty cache.

    Raises:
        DeviceFault: the retry failed too, or another error after which the process cannot continue.
    """
    import torch

    with device_faults():
        try:
            return work()
        except torch.OutOfMemoryError:
            logger.warning("out of memory: retried with an empty cache")
        # not in the handler, where the frames of the error keep the tensors
        torch.cuda.empty_cache()
        return work()


def _fault(error: BaseException | None, memory: bool) -> DeviceFault | None:
    """The fault behind an error or its causes, since loaders of rewards wrap errors; None if there is none."""
    import torch

    while error is not None:
        network = isinstance(error, torch.distributed.DistError)
        too_little = isinstance(error, torch.OutOfMemoryError)
        sticks = isinstance(error, torch.AcceleratorError) or (
            isinstance(error, RuntimeError) and STICKY.search(str(error))
        )
        if network or sticks or (too_little and memory):
            ids = [] if network or too_little else ray.get_gpu_ids()
            reason = f"{type(error).__name__}: {one_line(error, 400)}"
            reason += "; lower the actor's batch sizes, or reserve more of the GPU for it" if too_little else ""
            return DeviceFault(reason, ray.get_runtime_context().get_node_id(), ",".join(f"GPU {id}" for id in ids))
        error = error.__cause__
    return None


class DeviceActor:
    """An actor that loads a model in `ready`, not in its constructor, so that a fault of its device is reported."""

    _place: Place

    def where(self, code: str) -> Place:
        """The place of its process; ValueError if its code differs from the run's, whose version is given."""
        check_code(code)
        self._place = here()
        return self._place

    def ready(self) -> Place:
        """Load the model; the place of the process and what the reward accepts."""
        with device_faults(memory=False):  # out of memory: the settings do not fit the device
            self._load()
        return self._place

    def _load(self) -> None:
        raise NotImplementedError


class Quarantine:
    """Keeps Ray from assigning a failed device again: the actor that holds it stays alive without calls."""

    def __init__(self) -> None:
        self._faults: Counter[tuple[str, str]] = Counter()
        self._held: list[tuple[str, Actor]] = []

    def holds(self, error: BaseException, actor: Actor) -> bool:
        """Whether the actor, which failed with this error, must stay alive to hold its device."""
        fault = device_fault(error)
        if fault is None or not fault.device:
            return False
        self._faults[fault.node, fault.device] += 1
        if self._faults[fault.node, fault.device] < MAX_DEVICE_FAULTS:
            return False
        times = MAX_DEVICE_FAULTS
        logger.warning("%s of node %s failed %d times and is not used again", fault.device, fault.node, times)
        self._held.append((fault.node, actor))
        return True

    def release(self, nodes: Collection[str] | None = None) -> None:
        """End the actors that hold devices, on these nodes or on all."""
        for node, actor in self._held:
            if nodes is None or node in nodes:
                actor.end()
        self._held = [(node, actor) for node, actor in self._held if nodes is not None and node not in nodes]
