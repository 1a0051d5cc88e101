"""The Ray cluster of a run: an existing one, or a private one on this machine."""

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from g2rpo_ray.actors.pool.packing import Amounts, largest_first, place
from g2rpo_ray.config import Config, Resources
from g2rpo_ray.messages import one_line
from g2rpo_ray.rewards import serving

logger = logging.getLogger(__name__)

SHUTDOWN_CALL_S = 10.0  # time limit of one call to Ray at the end
SHUTDOWN_S = 60.0  # time limit of ending a private cluster, which takes a few seconds on idle cores
MAX_STARTS = 3  # of a private cluster
SLOW_START = "timed out during startup"  # of Ray's message
_lost = threading.Event()

MIN_STORE_BYTES = 1_000_000_000  # of a private cluster; Ray uses the disk if /dev/shm is smaller
MAX_STORE_SHARE = 0.8  # of /dev/shm


@contextmanager
def cluster(address: str | None, store_bytes: int = 0) -> Iterator[bool]:
    """Connect to `address` (or RAY_ADDRESS, which Ray sets in a job), else start a private cluster on this machine.

    A private cluster gets its own token, because Ray's ports are open to the network and allow to run code.
    If this process has imported Ray before, Ray's own token is used. An existing connection of this process is reused.

    Yields whether it is a private cluster, which ends with the context.

    Args:
        store_bytes: size of the object store of a private cluster, bytes.

    Raises:
        ValueError: no cluster answers at the address, or Ray does not start on this machine.
    """
    if _is_connected():
        if address:
            raise ValueError(
                f"--address: {address} given, but Ray is already connected: omit it, or call ray.shutdown()"
            )
        yield False  # the caller ends it
        return
    _lost.clear()
    option, address = named_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # pools handle errors; Ray would print them again
    # Ray reads these once per process: a second cluster has the token of the first
    if not address and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    if address:
        _require_answer(option, address)
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # one attempt of 40 s; the default is 20
    import ray  # reads these variables

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise ValueError(_refusal(option, address, error)) from None
    else:
        _start_private(object_store_memory=_store_memory(store_bytes), **options)
    try:
        yield not address
    finally:
        at_end(is_alive)
        at_end(ray.shutdown, limit_s=SHUTDOWN_S)


def _start_private(**options: Any) -> None:
    """Start a private cluster. Ray gives its node 30 s, so a start that is slow is repeated.

    Raises:
        ValueError: one line; Ray does not start on this machine.
    """
    import ray

    before = psutil.Process().children(recursive=True)
    for attempt in range(1, MAX_STARTS + 1):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:  # Ray has no class for it
            for child in set(psutil.Process().children(recursive=True)).difference(before):
                with suppress(psutil.Error):
                    child.kill()
            if attempt == MAX_STARTS or SLOW_START not in str(error):
                hint = "try again if the machine is busy; set a short RAY_TMPDIR if paths are too long"
                raise ValueError(f"Ray does not start on this machine ({one_line(error)}); {hint}") from None
            logger.warning("Ray did not start within its 30 s, as on a busy machine; starting it again")


def _is_connected() -> bool:
    """Whether this process is connected to Ray. ValueError if that cluster was lost: Ray cannot connect to another."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return False
    if _lost.is_set():
        raise ValueError("Ray: the cluster of an earlier run in this process was lost; restart Python (the kernel)")
    return True


def _store_memory(wanted: int) -> int:
    """Size of a private cluster's object store, bytes: `wanted`, if this machine's shared memory has room for it."""
    try:
        shared = psutil.disk_usage("/dev/shm").free
    except OSError:  # no Linux
        return MIN_STORE_BYTES
    found = max(MIN_STORE_BYTES, min(wanted, int(MAX_STORE_SHARE * shared)))
    if found < wanted:
        logger.warning(
            "the run may need %.1f GB of object store, but /dev/shm has %.1f GB free. Ray will spill to disk, which is "
            "slower. Enlarge /dev/shm, or lower data.prompts_per_iteration or rollout.max_unscored_units",
            wanted / 1e9, shared / 1e9,
        )  # fmt: skip
    return found


def named_address(address: str | None) -> tuple[str, str | None]:
    """The option or variable that names a cluster, and its address; None for a private cluster.

    Raises:
        ValueError: it is the address of Ray's jobs.
    """
    option = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address and address.startswith(("http://", "https://")):
        raise ValueError(
            f"{option}: {address} given, which is the address of Ray's jobs, not of the cluster; give HOST:6379 of its "
            "head, or start the command there with `ray job submit`"
        )
    return option, address


class ClusterLost(RuntimeError):
    """The head of the Ray cluster, or the node of this process, is lost."""

    def __init__(self, reason: str):
        super().__init__(f"the Ray cluster is lost: {reason}. Run the same command on a new cluster to resume")
        _lost.set()


def is_alive() -> bool:
    """Whether Ray's head reports the node of this process as alive; blocks while the head is down."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def at_end(*work: Callable[[], object], limit_s: float | None = None) -> None:
    """Run shutdown calls one after the other, with a time limit each; skips them once the cluster is lost.

    A Ray call that needs a lost head never returns, and ends the process a minute later.
    """
    threads = [threading.Thread(target=_quietly, args=(one,), daemon=True) for one in work]
    for thread in threads:
        if not _lost.is_set():
            thread.start()
            thread.join(SHUTDOWN_CALL_S if limit_s is None else limit_s)
            if thread.is_alive():
                _lost.set()


def _quietly(work: Callable[[], object]) -> None:
    try:
        if work() is False:
            _lost.set()
    except Exception as error:
        logger.warning("shutdown: %s", str(error).split("\n")[0])


def leave(status: int) -> int:
    """The exit status of a command. If the cluster is lost the process ends here, before Ray changes the status."""
    if _lost.is_set():
        for child in psutil.Process().children(recursive=True):  # of a private cluster
            with suppress(psutil.Error):
                child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _require_answer(option: str, address: str) -> None:
    """Raise ValueError if the port is closed; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(f"{option}: no Ray cluster at {address} ({error}); start one, or omit it") from None


def _refusal(option: str, address: str, error: Exception) -> str:
    """The reason of a failed connection, in one line. Ray hides the server's answer in the text of the cause."""
    import ray

    if isinstance(error, ray.exceptions.AuthenticationError) or "AuthenticationError" in str(error.__cause__):
        return (
            f"{option}: the Ray cluster at {address} requires a token, which is missing or wrong; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token or its file"
        )
    reason = str(error).strip().splitlines()[0]
    return f"{option}: no Ray cluster at {address} ({reason}); start one, or omit it"


def demands(config: Config) -> list[tuple[str, int, Resources]]:
    """(settings key, number of actors, resources of each) of the actors that a run needs at the same time."""
    sections = [
        ("rollout.resources", config.rollout.min_actors, config.rollout.resources),
        ("learner.resources", config.learner.ranks, config.learner.resources),
    ]
    completions, served = config.rollout.completions, serving(config.all_rewards)
    if completions.apart:
        sections.append(("rollout.completions.resources", completions.min_actors, completions.resources))
    for key, reward in config.rewards_by_key.items():
        name = key.partition(".")[2]
        if served[name] == name:
            sections.append((f"{key}.resources", reward.replicas, reward.resources))
    return sections


def this_machine() -> dict[str, float]:
    """Resources that a private cluster on this machine would have."""
    import torch

    return {"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}


def _check_environments(config: Config) -> None:
    """Raise ValueError for a runtime_env that Ray refuses."""
    from ray.runtime_env import RuntimeEnv

    given = {"rollout": config.rollout.runtime_env, "learner": config.learner.runtime_env}
    given |= {key: reward.runtime_env for key, reward in config.rewards_by_key.items()}
    for key, environment in given.items():
        for field in environment:
            if field not in RuntimeEnv.known_fields:
                allowed = ", ".join(sorted(RuntimeEnv.known_fields))
                raise ValueError(f"{key}.runtime_env.{field}: Ray has no such field; allowed are {allowed}")
        try:
            RuntimeEnv(**environment)
        except Exception as error:  # Ray raises a class of its own for each field
            raise ValueError(f"{key}.runtime_env: refused by Ray: {one_line(error)}") from None


def check_resources(config: Config, machine: Mapping[str, float] | None = None) -> str:
    """Whether the cluster has room for all actors, as the end of a sentence about it.

    Args:
        machine: resources of this machine, if there is no cluster yet.

    Raises:
        ValueError: the cluster has too few resources, its nodes have no placement for the actors, or Ray refuses a
            runtime environment.
    """
    _check_environments(config)
    if machine is None:
        import ray

        there, free = ray.cluster_resources(), ray.available_resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    else:
        there = free = dict(machine)
        nodes = [machine]
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
    return check_places(config, nodes)


def check_places(config: Config, nodes: Sequence[Amounts]) -> str:
    """The same for nodes with these resources; each actor must fit on one node."""
    encoder, rollout = config.data.encoder_resources, config.rollout
    alone = [("data.encoder_resources", 1, encoder)]
    needed = sorted(demands(config), key=lambda demand: largest_first(demand[2], nodes))
    for asked in (alone, needed):
        found = place([demand[1:] for demand in asked], nodes)
        for (key, number, resources), placed in zip(asked, found, strict=True):
            if placed < number:
                each = ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount)
                raise ValueError(
                    f"{key}: room for {placed} of {number} actors, each with {each} on one node, beside the others; "
                    "lower their number or resources, or add nodes that have as much"
                )
    above = [("rollout", rollout.min_actors, rollout.max_actors, rollout.resources)]
    if (given := rollout.completions).apart:
        above.append(("rollout.completions", given.min_actors, given.max_actors, given.resources))
    more = [(most - least, resources) for _, least, most, resources in above]
    rooms = place([*(demand[1:] for demand in needed), *more], nodes)[len(needed) :]
    for (key, least, most, _), room in zip(above, rooms, strict=True):
        if least + room < most:
            kind = key.removeprefix("rollout.")
            return (
                f"has room for {least + room} {kind} actors, at least {key}.min_actors={least}; the others of "
                f"{key}.max_actors={most} wait for nodes"
            )
    return "has what the run needs"
