"""The check that starts a pod: the image can be pulled, and takes the overlay's settings."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from deploy.check.kubectl import Line, Manifest, Refused, create, delete, get, kubectl
from deploy.check.overlay import cluster_of, home, settings_of

PULL_S = 1800
UNSCHEDULABLE_S = 120  # that no node takes the pod: an autoscaler would have said by then that it adds one
TELL_EVERY_S = 30
LOOK_EVERY_S = 2.0
LOOK = (
    'printf %s "$SETTINGS" > /tmp/settings.yaml && '
    "exec python -m g2rpo_ray.run --config /tmp/settings.yaml --set output=/tmp/runs --check settings"
)


def image(manifests: list[Manifest]) -> Iterator[Line]:
    """Start a pod as the head's, with the image alone; it looks at the settings as the driver would."""
    name, path = f"g2rpo-check-{int(time.time())}", f"/api/v1/namespaces/{home(manifests)}/pods"
    pod = _pod(manifests)
    of = f"image {pod['containers'][0]['image']}"
    try:
        create(path, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod})
    except Refused as error:
        yield "NO", f"{of}: no pod can be made: {error}"
        return
    except KeyboardInterrupt:  # it may have been made
        with suppress(Refused):
            delete(f"{path}/{name}")
        raise
    try:
        yield from _watch(f"{path}/{name}", of)
    finally:
        delete(f"{path}/{name}")


def _pod(manifests: list[Manifest]) -> Manifest:
    spec = cluster_of(manifests)["headGroupSpec"]["template"]["spec"]
    (container,) = spec["containers"]
    kept = {key: container[key] for key in ("name", "image", "imagePullPolicy", "securityContext")}
    kept["resources"] = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
    kept["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]
    settings = settings_of(manifests)
    if settings is None:
        kept["command"] = ["python", "-c", "import g2rpo_ray"]
    else:
        kept |= {"command": ["sh", "-c", LOOK], "env": [{"name": "SETTINGS", "value": settings}]}
    pod = {key: spec[key] for key in ("imagePullSecrets", "securityContext")}
    volumes = [{"name": "tmp", "emptyDir": {}}]
    return pod | {
        "containers": [kept], "volumes": volumes, "restartPolicy": "Never", "automountServiceAccountToken": False
    }  # fmt: skip


def _watch(path: str, of: str) -> Iterator[Line]:
    began = told = time.monotonic()
    reason = "not scheduled"
    while time.monotonic() - began < PULL_S:
        status = (get(path) or {}).get("status", {})
        if status.get("phase") in ("Succeeded", "Failed"):
            yield from _said(path, of, status["phase"] == "Succeeded")
            return
        reason = reason_of(status) or "not scheduled"
        if reason.startswith(("ErrImage", "ImagePull", "InvalidImage", "CreateContainer")):
            yield "NO", f"{of}: {reason}"
            return
        if reason.startswith("Unschedulable") and time.monotonic() - began > UNSCHEDULABLE_S:
            yield "??", f"{of}: no node takes a pod of 0.1 CPUs and 512 MiB: {reason}"
            return
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            print(f"    {of}: waiting for {told - began:.0f} s: {reason}", file=sys.stderr, flush=True)
        time.sleep(LOOK_EVERY_S)
    yield "??", f"{of}: not there after {PULL_S} s ({reason})"


def _said(path: str, of: str, good: bool) -> Iterator[Line]:
    log = [line for line in kubectl("get", "--raw", f"{path}/log").splitlines() if line.strip()]
    error = next((line for line in reversed(log) if line.startswith("error: ")), None)
    if good:
        yield "ok", of
        yield "ok", "settings.yaml"
    elif error:
        yield "ok", of
        yield "NO", f"settings.yaml: {error.removeprefix('error: ')}"
    else:
        last = log[-1] if log else "it said nothing"
        yield "NO", f"{of}: pulled, and has no g2rpo_ray that looks at settings: {last}"


def reason_of(status: Manifest) -> str | None:
    """Why a pod does not run, by its status; None if it does not say."""
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for state in (one.get("state", {}) for one in containers):
        waiting, ended = state.get("waiting"), state.get("terminated")
        if waiting and waiting.get("reason") not in ("PodInitializing", "ContainerCreating"):
            return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
        if ended and ended.get("exitCode"):
            return f"{ended.get('reason', 'ended')}: exit status {ended['exitCode']}"
    for condition in status.get("conditions", []):
        if condition.get("status") == "False" and condition.get("reason") == "Unschedulable":
            return f"Unschedulable: {condition.get('message', '')}"
    return None
