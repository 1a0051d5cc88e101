"""The rendezvous of a learner's ranks: a store that one process serves, and the environment that DeepSpeed reads."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch.distributed import TCPStore


def serve(address: str) -> TCPStore:
    """A store on a free port of this address. The port is bound at once, so that no other process can take it.

    The object serves it as long as it exists; the ranks need its `port`.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    port = listening.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def set_environment(rank: int, ranks: int, address: str, port: int, device: str) -> None:
    """Sets the environment that `LearnerEngine` reads, for a store of `serve`."""
    os.environ.update(_variables(rank, ranks, address, port, device))


@contextmanager
def alone(device: str) -> Iterator[None]:
    """A context with the environment of a single rank, whose process serves the store. Create the engine in it.

    The environment is restored at its end, so that processes started later, such as torchrun, do not use this store.
    """
    made = _variables(0, 1, "127.0.0.1", _store().port, device)
    before = {name: os.environ.get(name) for name in made}
    os.environ.update(made)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _variables(rank: int, ranks: int, address: str, port: int, device: str) -> dict[str, str]:
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "LOCAL_RANK": "0",  # Ray makes only the rank's GPU visible
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for a store that rank 0 must not open itself
        "TORCHELASTIC_RESTART_COUNT": "0",
        **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}),
    }


@cache
def _store() -> TCPStore:
    return serve("127.0.0.1")  # until the process ends
