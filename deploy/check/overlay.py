"""An overlay's manifests, and what they ask of a cluster."""

from collections import Counter
from typing import Any

import yaml
from kubernetes.utils.quantity import parse_quantity

from deploy.check.kubectl import Manifest, kubectl

Amounts = Counter[str]  # cpu in cores, memory in bytes, nvidia.com/gpu in GPUs


def read_overlay(folder: str) -> list[Manifest]:
    """Its manifests, as kustomize makes them.

    Raises:
        OSError: one line; it cannot be rendered, or is no overlay.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    manifests = [manifest for manifest in yaml.load_all(kubectl("kustomize", folder), loader) if manifest]
    found = of_kind(manifests, "RayJob", "RayCluster")
    if len(found) != 1 or "namespace" not in found[0]["metadata"]:
        raise OSError(f"{folder}: has no RayJob or RayCluster with a namespace; give a folder of deploy/overlays/")
    return manifests


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def ray_of(manifests: list[Manifest]) -> Manifest:
    """The RayJob or RayCluster."""
    return of_kind(manifests, "RayJob", "RayCluster")[0]


def home(manifests: list[Manifest]) -> str:
    return ray_of(manifests)["metadata"]["namespace"]


def cluster_of(manifests: list[Manifest]) -> Manifest:
    spec = ray_of(manifests)["spec"]
    return spec.get("rayClusterSpec", spec)


def settings_of(manifests: list[Manifest]) -> str | None:
    """The text of settings.yaml."""
    return next((one["data"]["settings.yaml"] for one in of_kind(manifests, "ConfigMap")), None)


def secret_keys(tree: Any) -> set[tuple[str, str]]:
    """(secret, key) of all that is required by reference."""
    if isinstance(tree, list):
        return set().union(*map(secret_keys, tree))
    if not isinstance(tree, dict):
        return set()
    own = tree.get("secretKeyRef")
    mine = {(own["name"], own["key"])} if own and not own.get("optional") else set()
    return set().union(*map(secret_keys, tree.values()), mine)


def amount(text: str | int | float) -> float:
    """A Kubernetes quantity as a number."""
    return float(parse_quantity(str(text)))


def amounts(quantities: Manifest) -> Amounts:
    return Amounts({kind: amount(text) for kind, text in quantities.items()})


def resources(pod: Manifest, which: str = "requests") -> Amounts:
    """`requests` or `limits` of one pod, by its template's spec."""
    each = (amounts(container["resources"].get(which, {})) for container in pod["containers"])
    return sum(each, Amounts())


def pods_of(manifests: list[Manifest], replicas: str, which: str = "requests") -> list[tuple[str, int, Amounts]]:
    """(name, number, resources of each) of all pods, with each group's `replicas` or `maxReplicas`."""
    cluster = cluster_of(manifests)
    head = resources(cluster["headGroupSpec"]["template"]["spec"], which)
    if cluster.get("enableInTreeAutoscaling"):  # the operator adds a container
        head += resources({"containers": [cluster["autoscalerOptions"]]}, which)
    groups = [(one["groupName"], one[replicas], one["template"]["spec"]) for one in cluster["workerGroupSpecs"]]
    jobs = [("submitter", 1, job["spec"]["submitterPodTemplate"]["spec"]) for job in of_kind(manifests, "RayJob")]
    others = [("redis", 1, one["spec"]["template"]["spec"]) for one in of_kind(manifests, "Deployment")]
    workers = ((name, number, resources(pod, which)) for name, number, pod in [*groups, *jobs, *others])
    return [("head", 1, head), *workers]


def asked(manifests: list[Manifest], replicas: str, which: str = "requests") -> Amounts:
    """Of all pods together."""
    pods = pods_of(manifests, replicas, which)
    return sum((each for _, number, each in pods for _ in range(number)), Amounts())


def show(wanted: Amounts) -> str:
    return f"{wanted['cpu']:.3g} CPUs, {wanted['memory'] / 2**30:.3g} GiB, {wanted['nvidia.com/gpu']:.0f} GPUs"
