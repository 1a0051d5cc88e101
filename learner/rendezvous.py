"""The rendezvous of a learner's ranks: a store that one process serves, and the environment that DeepSpeed reads."""

import os
import socket
from functools import cache

from torch.distributed import TCPStore, is_initialized


def serve(address: str) -> TCPStore:
    """A store on a free port of this address, bound from now on: no other process can take the port before the ranks.

    It is served as long as the object lives; its `port` is what the ranks are given.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    port = listening.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def set_environment(rank: int, ranks: int, address: str, port: int, device: str) -> None:
    """Set the environment that `LearnerEngine` reads, for a store that is already served."""
    # Ray has made the rank's GPU the only visible one: number 0
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), LOCAL_RANK="0")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    # torch's own name for a store that rank 0 must not open itself
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def set_up_alone(device: str) -> None:
    """The environment of the only rank, in a process that serves the store itself."""
    if not is_initialized():  # by the run before, in the same process
        set_environment(0, 1, "127.0.0.1", _store().port, device)


@cache
def _store() -> TCPStore:
    return serve("127.0.0.1")  # for as long as the process lives
