"""What KubeRay 1.7's operator refuses, or does badly with, that a schema lets pass: a list of complaints."""

import json
import re
from collections.abc import Iterator
from typing import Any

Manifest = dict[str, Any]

MAX_NAME = 47
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DEFAULT_DRAIN_S = 30
START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
AUTH_SINCE = (2, 52)
QUEUE = "kueue.x-k8s.io/queue-name"
MAX_QUEUED_GROUPS = 7


def complaints(manifest: Manifest) -> list[str]:
    """Each complaint starts with the name of its rule."""
    job = manifest["kind"] == "RayJob"
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec") if job else spec
    found = [*_name(manifest)]
    if job:
        found += _job(spec)
    if cluster is not None:
        found += _cluster(cluster)
        if QUEUE in manifest["metadata"].get("labels", {}):
            found += _queued(spec, cluster, job)
    return found


def groups(cluster: Manifest) -> dict[str, Manifest]:
    """The worker groups by name."""
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def _name(manifest: Manifest) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    if len(name) > MAX_NAME:
        yield f"name: {name} has {len(name)} characters, more than {MAX_NAME}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name: {name} is no DNS-1035 label"


def _job(spec: Manifest) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    cluster = spec.get("rayClusterSpec")
    if cluster is None and not spec.get("clusterSelector"):
        yield "cluster: neither rayClusterSpec nor clusterSelector"
    if spec.get("suspend") and not shutdown:
        yield "suspend: needs shutdownAfterJobFinishes"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "suspend: not with clusterSelector"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttl: needs shutdownAfterJobFinishes"
    if spec.get("submissionMode") == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if key in spec:
                yield f"sidecar: SidecarMode forbids {key}"
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "interactive: no backoffLimit"
    if spec.get("backoffLimit", 0) > 0 and "--resume never" in spec["entrypoint"]:
        yield "retry: a retry would be refused, as the run has a checkpoint"
    yield from _deletion(spec, autoscaling=bool(cluster and cluster.get("enableInTreeAutoscaling")))
    resources = spec.get("entrypointResources")
    if cluster is not None and not resources:
        yield "driver: without entrypointResources it dies with the head"
    elif cluster is not None:
        asked = {"CPU": spec.get("entrypointNumCpus", 0), **json.loads(resources)}
        hosts = [
            name
            for name, group in groups(cluster).items()
            if all(float(group["resources"].get(kind, 0)) >= amount for kind, amount in asked.items())
        ]
        if hosts != ["learner"]:
            yield f"driver: {asked} can be placed on {hosts}, not on the learner's group alone"


def _deletion(spec: Manifest, autoscaling: bool) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules", [])
    legacy = [strategy[key]["policy"] for key in ("onSuccess", "onFailure") if key in strategy]
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "deletion: deletionRules and shutdownAfterJobFinishes exclude each other"
    if rules and legacy:
        yield "deletion: deletionRules and onSuccess/onFailure exclude each other"
    if not rules and len(legacy) < 2:
        yield "deletion: needs deletionRules, or both onSuccess and onFailure"
    if autoscaling and "DeleteWorkers" in [*legacy, *(rule["policy"] for rule in rules)]:
        yield "deletion: DeleteWorkers is refused with autoscaling"


def _cluster(cluster: Manifest) -> Iterator[str]:
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    options = cluster.get("autoscalerOptions", {})
    autoscaling, version = cluster.get("enableInTreeAutoscaling", False), options.get("version")
    for group in (head, *workers):
        yield from _group(group, group.get("groupName", "head"), v2=autoscaling and version == "v2")
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "head: num-cpus must be 0, or it gets work"
    if autoscaling and version != "v2":
        yield "autoscaler: version v2 must be written out"
    for group in workers:
        if "idleTimeoutSeconds" in group and version != "v2":
            yield f"idle: {group['groupName']}: idleTimeoutSeconds needs autoscaler v2"
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"replicas: {group['groupName']}: not minReplicas <= replicas <= maxReplicas"
        if group["groupName"] == "learner" and group["minReplicas"] != group["maxReplicas"]:
            yield "learner: minReplicas and maxReplicas must be equal"
        if autoscaling and group.get("suspend"):
            yield f"suspend: {group['groupName']}: not with autoscaling"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "auth: mode must be token"
    elif tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2]) < AUTH_SINCE:
        yield "auth: token needs rayVersion 2.52 or newer, written out"


def _queued(spec: Manifest, cluster: Manifest, job: bool) -> Iterator[str]:
    """What Kueue refuses of a job or cluster that waits in one of its queues."""
    if cluster.get("enableInTreeAutoscaling"):
        yield "kueue: a job in a queue must not use the autoscaler"
    if len(cluster["workerGroupSpecs"]) > MAX_QUEUED_GROUPS:
        yield f"kueue: more than {MAX_QUEUED_GROUPS} groups"
    if job and not (spec.get("suspend") and spec.get("shutdownAfterJobFinishes")):
        yield "kueue: a job in a queue starts suspended and shuts its cluster down"


def _group(group: Manifest, name: str, v2: bool) -> Iterator[str]:
    start, pod = group["rayStartParams"], group["template"]["spec"]
    if group.get("resources") and any(key in start for key in START_RESOURCES):
        yield f"resources: {name}: in rayStartParams and at the top level"
    if "labels" in start:
        yield f"labels: {name}: belong at the top level, not in rayStartParams"
    if v2 and pod.get("restartPolicy", "Never") != "Never":
        yield f"restart: {name}: restartPolicy must be Never or unset with autoscaler v2"
    if v2 and any(env["name"] == "RAY_enable_autoscaler_v2" for env in pod["containers"][0].get("env", [])):
        yield f"autoscaler: {name}: version is set by an environment variable too"
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0].get("env", [])}
    drain, grace = float(env.get(DRAIN, DEFAULT_DRAIN_S)), pod.get("terminationGracePeriodSeconds", 30)
    if grace <= drain:
        yield f"grace: {name}: {grace} s is not more than the drain's {drain:g} s"
    yield from _sizes_agree(group, name, pod["containers"][0]["resources"]["limits"])


def _sizes_agree(group: Manifest, name: str, limits: Manifest) -> Iterator[str]:
    """What Ray is told that a pod has, against what Kubernetes gives it."""
    told = group.get("resources", {})
    for kind, limit in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")):
        if told and float(told.get(kind, 0)) != float(limits.get(limit, 0)):
            yield f"sizes: {name}: Ray is told {told.get(kind, 0)} {kind}, the pod has {limits.get(limit, 0)}"
