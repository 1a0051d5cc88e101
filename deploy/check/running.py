"""Why a job or cluster that was applied does not run: `--running`."""

from collections.abc import Iterator

from deploy.check.image import reason_of
from deploy.check.kubectl import Line, Manifest, get, items
from deploy.check.overlay import home, ray_of

MOST_EVENTS = 5


def running(manifests: list[Manifest]) -> Iterator[Line]:
    """Lines of the RayJob, its RayCluster, its pods, and the latest warnings that Kubernetes has of them."""
    space, ray = home(manifests), ray_of(manifests)
    name, cluster = ray["metadata"]["name"], ray["metadata"]["name"]
    if ray["kind"] == "RayJob":
        job = get(f"/apis/ray.io/v1/namespaces/{space}/rayjobs/{name}")
        yield _of_job(name, job)
        cluster = ((job or {}).get("status") or {}).get("rayClusterName")
    if cluster:
        found = get(f"/apis/ray.io/v1/namespaces/{space}/rayclusters/{cluster}")
        yield from _of_cluster(cluster, found)
    pods = items(f"/api/v1/namespaces/{space}/pods?labelSelector=app.kubernetes.io/part-of=g2rpo-ray")
    for pod in pods:
        yield _of_pod(pod)
    yield from _warnings(space)


def _of_job(name: str, job: Manifest | None) -> Line:
    if job is None:
        return "NO", f"rayjob {name}: not there: kubectl apply -k"
    status = job.get("status") or {}
    state = status.get("jobDeploymentStatus") or "not looked at by the operator yet: does it run? (deploy/README.md, 2)"
    said = f"rayjob {name}: {state}"
    if job["spec"].get("suspend"):
        return "??", f"{said}; suspended: Kueue has not admitted it (kubectl get workloads)"
    details = ": ".join(text for text in (status.get("reason"), status.get("message")) if text)
    said += f"; run {status['jobStatus']}" if status.get("jobStatus") else ""
    said += f"; {details}" if details else ""
    bad = "Failed" in state or status.get("jobStatus") == "FAILED"
    return ("NO" if bad else "ok" if state in ("Running", "Complete") else "??"), said


def _of_cluster(name: str, cluster: Manifest | None) -> Iterator[Line]:
    if cluster is None:
        yield "NO", f"raycluster {name}: not there"
        return
    status = cluster.get("status") or {}
    if status.get("reason"):
        yield "NO", f"raycluster {name}: {status['reason']}"
    for condition in status.get("conditions") or []:
        good = condition["status"] == "True"
        if condition["type"] in ("ReplicaFailure", "RayClusterSuspending", "RayClusterSuspended"):
            good = not good
        if not good:
            text = f"{condition['type']}: {condition.get('reason', '')}: {condition.get('message', '')}".rstrip(": ")
            yield "??", f"raycluster {name}: {text}"
    if status.get("state") == "ready":
        yield "ok", f"raycluster {name}: ready"


def _of_pod(pod: Manifest) -> Line:
    status, labels = pod.get("status", {}), pod["metadata"].get("labels", {})
    name = f"pod {pod['metadata']['name']} ({labels.get('ray.io/group', 'submitter')})"
    ready = all(one.get("ready") for one in status.get("containerStatuses", []))
    if status.get("phase") == "Succeeded" or (status.get("phase") == "Running" and ready):
        return "ok", f"{name}: {status['phase']}"
    reason = reason_of(status)
    return ("NO" if reason else "??"), f"{name}: {status.get('phase', 'Pending')}{f', {reason}' if reason else ''}"


def _warnings(space: str) -> Iterator[Line]:
    events = items(f"/api/v1/namespaces/{space}/events?fieldSelector=type=Warning")
    latest = sorted(events, key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or "")[-MOST_EVENTS:]
    for event in latest:
        about = event["involvedObject"]
        what = f"{about.get('kind', '')} {about.get('name', '')}".lower()
        message = " ".join((event.get("message") or "").split())[:300]
        yield "??", f"event of {what}: {event.get('reason', '')}: {message}"
