"""Questions to the API server, by kubectl."""

import json
import subprocess
from typing import Any

Manifest = dict[str, Any]
Line = tuple[str, str]
"""`ok`, `??` or `NO`, and a text."""


class Refused(OSError):
    """kubectl or the API server said no, in one line."""


def kubectl(*arguments: str, given: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Refused("kubectl: not installed") from None
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"kubectl: {done.returncode}")
    return done.stdout


def get(path: str) -> Manifest | None:
    """What the API server has at a path; None if it has nothing there.

    Raises:
        Refused: it does not answer, or not to this user.
    """
    try:
        return json.loads(kubectl("get", "--raw", path))
    except Refused as error:
        if "NotFound" in str(error) or "could not find" in str(error):
            return None
        raise


def items(path: str) -> list[Manifest]:
    return (get(path) or {}).get("items") or []


def create(path: str, what: Manifest) -> Manifest:
    return json.loads(kubectl("create", "--raw", path, "-f", "-", given=json.dumps(what)))


def delete(path: str) -> None:
    kubectl("delete", "--raw", path)
