"""Checks of the cluster as a whole: Kubernetes, the operator, what is installed beside it, its nodes."""

import re
from collections.abc import Iterator

from deploy.check.kubectl import Line, Manifest, Refused, create, get, items
from deploy.check.overlay import (
    Amounts,
    amounts,
    asked,
    cluster_of,
    home,
    of_kind,
    pods_of,
    ray_of,
    show,
)

OPERATOR = "1.7"
OLDEST_KUBERNETES = (1, 28)  # what KubeRay 1.7 is made for
STATUS_TIMEOUT = "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"
SHORTEST_TIMEOUT_S, DEFAULT_TIMEOUT_S = 900, 300
TLS_GATE = "RayClusterMTLS=true"
QUEUE = "kueue.x-k8s.io/queue-name"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


class Unreachable(OSError):
    """Nothing can be asked."""


def versions(_: list[Manifest]) -> Iterator[Line]:
    try:
        told = get("/version") or {}
    except Refused as error:
        raise Unreachable(f"the API server does not answer: {error}") from None
    version = (int(told["major"]), int(re.sub(r"\D", "", told["minor"])))
    name = "Kubernetes {}.{}".format(*version)
    yield ("ok", name) if version >= OLDEST_KUBERNETES else ("NO", f"{name}: KubeRay {OPERATOR} needs 1.28 or newer")


def operator(manifests: list[Manifest]) -> Iterator[Line]:
    everywhere = items("/apis/apps/v1/deployments")
    found = [one for one in everywhere if one["metadata"]["name"] == "kuberay-operator"]  # helm's and kubectl's
    if not found:
        yield "NO", "operator: none is installed (deploy/README.md, 2)"
    for one in found:
        (container, *_others) = one["spec"]["template"]["spec"]["containers"]
        where = f"operator {container['image']} in {one['metadata']['namespace']}"
        if f"v{OPERATOR}." not in container["image"]:
            yield "??", f"{where}: tried with {OPERATOR}"
        if not one.get("status", {}).get("availableReplicas"):
            yield "NO", f"{where}: not running"
        yield _status_timeout(container, where)
        if (cluster_of(manifests).get("tlsOptions") or {}).get("enabled"):
            gates = TLS_GATE in " ".join(container.get("args") or [])
            yield ("ok", f"{where}: {TLS_GATE}") if gates else ("NO", f"{where}: {TLS_GATE} is not among its gates")


def _status_timeout(container: Manifest, where: str) -> Line:
    entry = next((one for one in container.get("env") or [] if one["name"] == STATUS_TIMEOUT), {})
    if "valueFrom" in entry:
        return "??", f"{where}: {STATUS_TIMEOUT} comes from elsewhere; it should be {SHORTEST_TIMEOUT_S} or more"
    text = entry.get("value", str(DEFAULT_TIMEOUT_S))
    if not re.fullmatch(r"\d+", text) or int(text) == 0:  # what the operator does, too
        said = f"{STATUS_TIMEOUT}: {text!r} is no number of seconds, the operator takes {DEFAULT_TIMEOUT_S}"
        return "NO", f"{where}: {said}; set 1800"
    said = f"{where}: a head may be away for {text} s"
    if int(text) >= SHORTEST_TIMEOUT_S:
        return "ok", said
    return "NO", f"{said}; then the job fails for good: set {STATUS_TIMEOUT}=1800"


def definitions(manifests: list[Manifest]) -> Iterator[Line]:
    kinds = ["rayjobs.ray.io", "rayclusters.ray.io"]
    if (cluster_of(manifests).get("tlsOptions") or {}).get("enabled"):
        kinds.append("certificates.cert-manager.io")
    for kind in kinds:
        found = get(f"{DEFINITIONS}/{kind}")
        served = {version["name"] for version in found["spec"]["versions"] if version["served"]} if found else set()
        yield ("ok", f"{kind} v1") if "v1" in served else ("NO", f"{kind}: no such resource, or no v1")


def access(manifests: list[Manifest]) -> Iterator[Line]:
    """Whether this user may make what the overlay has."""
    wanted = {("ray.io", "rayjobs"), ("ray.io", "rayclusters"), ("", "persistentvolumeclaims"), ("", "configmaps")}
    if of_kind(manifests, "PriorityClass"):
        wanted.add(("scheduling.k8s.io", "priorityclasses"))
    for group, resource in sorted(wanted):
        name = f"{resource}.{group}".rstrip(".")
        asked_for = {"group": group, "resource": resource, "verb": "create"}
        if resource != "priorityclasses":
            asked_for["namespace"] = home(manifests)
        review = {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked_for},
        }  # fmt: skip
        answer = create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        if answer["status"]["allowed"]:
            yield "ok", f"you may create {name}"
        elif resource == "priorityclasses":
            yield "NO", f"you may not create {name}: have an administrator apply deploy/priority/classes.yaml"
        else:
            yield "NO", f"you may not create {name}: ask for the role in deploy/README.md, 3"


def queue(manifests: list[Manifest]) -> Iterator[Line]:
    name = ray_of(manifests)["metadata"].get("labels", {}).get(QUEUE)
    if name is None:
        return
    path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{home(manifests)}/localqueues/{name}"
    found = get(path)
    where = f"queue {name} in {home(manifests)}"
    missing = f"{where}: no such LocalQueue (deploy/overlays/kueue/queues.yaml)"
    yield ("ok", where) if found is not None else ("NO", missing)


def room(manifests: list[Manifest]) -> Iterator[Line]:
    try:
        nodes = [node for node in items("/api/v1/nodes") if not node["spec"].get("unschedulable")]
    except Refused as error:
        yield "??", f"nodes cannot be looked at: {error}; asked for at most {show(asked(manifests, 'maxReplicas'))}"
        return
    each = [amounts(one["status"]["allocatable"]) for one in nodes]
    have = sum(each, Amounts())
    for name, _, wanted in pods_of(manifests, "replicas"):
        if not any(wanted <= node for node in each):
            yield "??", f"no node is large enough for a pod of {name} ({show(wanted)}): can an autoscaler add one?"
    for text, replicas in (("at the start", "replicas"), ("at most", "maxReplicas")):
        wanted = asked(manifests, replicas)
        yield "ok" if wanted <= have else "??", f"{text} {show(wanted)}; the nodes have {show(have)}, in use or not"
