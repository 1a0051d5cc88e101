"""How a run's own user reaches its private cluster: a file in the run directory that nobody else can read."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "ray.json"
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@contextmanager
def reachable(run: Path | None, private: bool) -> Iterator[None]:
    """Keep the cluster's address and token in the run directory as long as the context; what a killed run left goes.

    Nothing is written for a cluster that others use, too, nor on object storage, which has no mode 600.
    """
    if run is None:
        yield
        return
    (run / FILE).unlink(missing_ok=True)
    if private:
        import ray

        access = {"address": ray.get_runtime_context().gcs_address}
        access |= {name: os.environ[name] for name in AUTHENTICATION if name in os.environ}
        with open(os.open(run / FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            json.dump(access, file)
    try:
        yield
    finally:
        (run / FILE).unlink(missing_ok=True)


def address_of(run: Path) -> str | None:
    """The address of the private cluster that a run works on, if it does; its token goes to the environment."""
    try:
        access = json.loads((run / FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"--output: cannot read {run / FILE}: {error}") from None
    os.environ.update({name: access[name] for name in AUTHENTICATION if name in access})
    return str(access["address"])
