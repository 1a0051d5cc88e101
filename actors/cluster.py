"""The Ray cluster that a run works on: one that is there, or a private one on this machine."""

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from g2rpo_ray.config import Config, Resources
from g2rpo_ray.rewards import serving
from g2rpo_ray.words import one_line

logger = logging.getLogger(__name__)

ENDING_S = 10.0  # for Ray to do what it is told at the end
SHUTDOWN_S = 60.0  # for it to end a private cluster, which takes a few on idle cores
_lost = threading.Event()

OBJECT_STORE_BYTES = 1_000_000_000  # of a private cluster; Ray would take 30 % of the machine's memory


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to `address` (or RAY_ADDRESS, as set inside a Ray job), else start Ray here; leave or end it at the end.

    A private cluster gets a token of its own: Ray's ports are open to the network, and who reaches them runs code. Call
    this before anything imports Ray.

    Raises:
        ValueError: no cluster answers at the address, or none can be started here.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    if address:
        _require_answer(address)
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # attempts, of 40 s each; Ray would make 20
    import ray  # reads those variables now

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise ValueError(_refusal(address, error)) from None
    else:
        try:
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)
        except Exception as error:  # Ray has no class for it
            why = one_line(error)
            hint = "is it too busy? try again; are paths the reason? give a short RAY_TMPDIR"
            raise ValueError(f"Ray does not start on this machine ({why}); {hint}") from None
    try:
        yield
    finally:
        at_end(is_alive)
        at_end(ray.shutdown, limit_s=SHUTDOWN_S)


class ClusterLost(RuntimeError):
    """The head of the Ray cluster, or the node of this process, is gone."""

    def __init__(self, reason: str):
        super().__init__(f"the Ray cluster is lost: {reason}; with a cluster, the same command goes on from there")
        _lost.set()


def is_alive() -> bool:
    """Whether Ray's head answers and knows the node of this process as alive; blocks while the head is gone."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def at_end(*work: Callable[[], object], limit_s: float | None = None) -> None:
    """Have Ray do what it is told, in turn, for some seconds each; not at all once the cluster is known as lost.

    Ray calls that need a head which is gone never return, and a minute later they end the process.
    """
    threads = [threading.Thread(target=_quietly, args=(one,), daemon=True) for one in work]
    for thread in threads:
        if not _lost.is_set():
            thread.start()
            thread.join(ENDING_S if limit_s is None else limit_s)
            if thread.is_alive():
                _lost.set()


def _quietly(work: Callable[[], object]) -> None:
    try:
        if work() is False:
            _lost.set()
    except Exception as error:
        logger.warning("at the end: %s", str(error).split("\n")[0])


def leave(status: int) -> int:
    """The exit status of a command. Without a cluster Ray would end the process with another one: it ends here."""
    if _lost.is_set():
        for child in psutil.Process().children(recursive=True):  # of a private cluster
            with suppress(psutil.Error):
                child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _require_answer(address: str) -> None:
    """Ray itself would wait for minutes where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(f"--address: no Ray cluster at {address} ({error}); start one, or leave it out") from None


def _refusal(address: str, error: Exception) -> str:
    """Why there is no connection, in one line. Ray hides what its server said in the text of the cause."""
    import ray

    if isinstance(error, ray.exceptions.AuthenticationError) or "AuthenticationError" in str(error.__cause__):
        return (
            f"--address: the Ray cluster at {address} asks for a token that is missing or wrong here; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token or its file"
        )
    reason = str(error).strip().splitlines()[0]
    return f"--address: no Ray cluster at {address} ({reason}); start one, or leave it out"


def demands(config: Config) -> list[tuple[str, int, Resources]]:
    """(key in the configuration, number of actors, resources of each) of what a run needs alive at once."""
    sections = [
        ("rollout.resources", config.rollout.min_actors, config.rollout.resources),
        ("learner.resources", config.learner.ranks, config.learner.resources),
    ]
    served = serving(config.all_rewards)
    for section in ("rewards", "eval_rewards"):
        for name, reward in getattr(config, section).items():
            if served[name] == name:
                sections.append((f"{section}.{name}.resources", reward.replicas, reward.resources))
    return sections


def this_machine() -> dict[str, float]:
    """What a private cluster would have, found without one."""
    import torch

    return {"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}


def _check_environments(config: Config) -> None:
    """Raise ValueError, in one line, for a reward's runtime_env that Ray does not take."""
    from ray.runtime_env import RuntimeEnv

    for section in ("rewards", "eval_rewards"):
        for name, reward in getattr(config, section).items():
            key, given = f"{section}.{name}.runtime_env", reward.runtime_env
            for field in given:
                if field not in RuntimeEnv.known_fields:
                    allowed = ", ".join(sorted(RuntimeEnv.known_fields))
                    raise ValueError(f"{key}.{field}: Ray has no such field; allowed are {allowed}")
            try:
                RuntimeEnv(**given)
            except Exception as error:  # Ray raises a class of its own for each field
                raise ValueError(f"{key}: Ray does not take it: {one_line(error)}") from None


def check_resources(config: Config, machine: Mapping[str, float] | None = None) -> None:
    """Raise ValueError, in one line, if the cluster is smaller than what the run keeps alive at once, or Ray does not
    take an environment that it asks for.

    `machine`: what there would be, where there is no cluster yet.
    """
    _check_environments(config)
    if machine is None:
        import ray

        there, free = ray.cluster_resources(), ray.available_resources()
    else:
        there = free = dict(machine)
    asked = demands(config)
    encoder = config.data.encoder_resources
    for resource in sorted({kind for _, _, resources in asked for kind in resources} | set(encoder)):
        parts = {key: number * resources.get(resource, 0) for key, number, resources in asked}
        total, alone = sum(parts.values()), encoder.get(resource, 0)
        if alone > total:
            parts, total = {"data.encoder_resources": alone}, alone
        if total > there.get(resource, 0):
            wanted = ", ".join(f"{key} {amount:g}" for key, amount in parts.items() if amount)
            largest = max(parts, key=lambda key: parts[key])
            where = "the cluster" if machine is None else "this machine"
            raise ValueError(
                f"{largest}: the run asks for {total:g} {resource} in all ({wanted}); {where} has "
                f"{there.get(resource, 0):g}: lower the number of actors or their resources, or add nodes"
            )
        if total > free.get(resource, 0):
            logger.warning("the run waits for %g %s, of which %g are free now", total, resource, free.get(resource, 0))
