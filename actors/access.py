"""Address and token of a run's private cluster, in a file of mode 600 in the run directory."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "ray.json"
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@contextmanager
def reachable(run: Path | None, private: bool) -> Iterator[None]:
    """Write the cluster's address and token for the duration of the context; removes those of a killed run.

    Nothing is written for a shared cluster, nor on object storage, which has no file modes.
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
    """The address of a run's private cluster, or None; puts its token into the environment."""
    try:
        access = json.loads((run / FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"--output: cannot read {run / FILE}: {error}") from None
    os.environ.update({name: access[name] for name in AUTHENTICATION if name in access})
    return str(access["address"])
