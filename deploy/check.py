"""Whether a Kubernetes cluster has what an overlay needs, a line each:  python deploy/check.py deploy/overlays/gpu-20

It asks by kubectl, for the context that is set, and starts one pod, which pulls the image and ends. A line begins with
`ok`, with `??` (look at it: not known, or too little for the overlay's largest size) or with `NO`; exit status 1 if any
is `NO`.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
Line = tuple[str, str]
Amounts = Counter[str]  # cpu in cores, memory in bytes, nvidia.com/gpu in GPUs

OPERATOR = "1.7"
OLDEST_KUBERNETES = (1, 28)  # what KubeRay 1.7 is made for
STATUS_TIMEOUT = "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"
OF_ONE_MACHINE = (
    "local-path",
    "hostpath",
    "no-provisioner",
    "ebs.csi",
    "aws-ebs",
    "pd.csi",
    "gce-pd",
    "disk.csi.azure",
)
UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
PULL_S = 1800


def main(folder: str) -> int:
    manifests = list(yaml.safe_load_all(kubectl("kustomize", folder)))
    bad = 0
    for check in (versions, operator, definitions, namespace, token, storage, room, quotas, image):
        for state, text in check(manifests):
            print(f"{state}  {text}", flush=True)
            bad += state == "NO"
    return int(bad > 0)


# ----------------------------------------------------------------------------------------------------- what is asked


def kubectl(*arguments: str, given: str | None = None) -> str:
    done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"kubectl: {done.returncode}")
    return done.stdout


def get(path: str) -> Manifest | None:
    """What the API server has at a path; None if it has nothing there.

    Raises:
        OSError: it does not answer, or not to this user.
    """
    try:
        return json.loads(kubectl("get", "--raw", path))
    except OSError as error:
        if "NotFound" in str(error) or "could not find" in str(error):
            return None
        raise


def items(path: str) -> list[Manifest]:
    return (get(path) or {"items": []})["items"]


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def home(manifests: list[Manifest]) -> str:
    return of_kind(manifests, "RayJob", "RayCluster")[0]["metadata"]["namespace"]


def cluster_of(manifests: list[Manifest]) -> Manifest:
    (ray,) = of_kind(manifests, "RayJob", "RayCluster")
    return ray["spec"].get("rayClusterSpec", ray["spec"])


# ------------------------------------------------------------------------------------------------ what it asks for


def amount(text: str | int | float) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def requests(pod: Manifest) -> Amounts:
    """Of one pod, by its template's spec."""
    each = [container["resources"]["requests"] for container in pod["containers"]]
    return sum((Amounts({kind: amount(text) for kind, text in one.items()}) for one in each), Amounts())


def pods_of(manifests: list[Manifest], replicas: str) -> list[tuple[str, int, Amounts]]:
    """(name, number, requests of each) of all pods, with each group's `replicas` or `maxReplicas`."""
    cluster = cluster_of(manifests)
    head = requests(cluster["headGroupSpec"]["template"]["spec"])
    if cluster.get("enableInTreeAutoscaling"):  # the operator adds a container
        head += requests({"containers": [cluster["autoscalerOptions"]]})
    groups = [(one["groupName"], one[replicas], one["template"]["spec"]) for one in cluster["workerGroupSpecs"]]
    jobs = [("submitter", 1, job["spec"]["submitterPodTemplate"]["spec"]) for job in of_kind(manifests, "RayJob")]
    others = [("redis", 1, one["spec"]["template"]["spec"]) for one in of_kind(manifests, "Deployment")]
    return [("head", 1, head), *((name, number, requests(pod)) for name, number, pod in [*groups, *jobs, *others])]


def asked(manifests: list[Manifest], replicas: str) -> Amounts:
    """Of all pods together."""
    return sum((each for _, number, each in pods_of(manifests, replicas) for _ in range(number)), Amounts())


def show(amounts: Amounts) -> str:
    return f"{amounts['cpu']:.3g} CPUs, {amounts['memory'] / 2**30:.3g} GiB, {amounts['nvidia.com/gpu']:.0f} GPUs"


# ------------------------------------------------------------------------------------------------------- the checks


def versions(_: list[Manifest]) -> Iterator[Line]:
    told = get("/version") or {}
    version = (int(told["major"]), int(re.sub(r"\D", "", told["minor"])))
    name = "Kubernetes {}.{}".format(*version)
    yield ("ok", name) if version >= OLDEST_KUBERNETES else ("NO", f"{name}: KubeRay {OPERATOR} needs 1.28 or newer")


def operator(_: list[Manifest]) -> Iterator[Line]:
    try:
        everywhere = items("/apis/apps/v1/deployments")
    except OSError as error:
        yield "??", f"operator: {error}"
        return
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
        env = {entry["name"]: entry.get("value", "") for entry in container.get("env") or []}
        seconds = int(env.get(STATUS_TIMEOUT, 300))
        text = f"{where}: a head may be away for {seconds} s"
        yield (
            ("ok", text)
            if seconds >= 900
            else ("NO", f"{text}; then the job fails for good: set {STATUS_TIMEOUT}=1800")
        )


def definitions(manifests: list[Manifest]) -> Iterator[Line]:
    for kind in ("rayjobs", "rayclusters"):
        found = get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{kind}.ray.io")
        served = {version["name"] for version in found["spec"]["versions"] if version["served"]} if found else set()
        yield ("ok", f"{kind}.ray.io v1") if "v1" in served else ("NO", f"{kind}.ray.io: no such resource, or no v1")


def namespace(manifests: list[Manifest]) -> Iterator[Line]:
    name = home(manifests)
    found = get(f"/api/v1/namespaces/{name}")
    if found is None:
        yield "NO", f"namespace {name}: missing: kubectl create namespace {name}"
        return
    level = found["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce", "not enforced")
    yield "ok", f"namespace {name}, pod security: {level}"


def token(manifests: list[Manifest]) -> Iterator[Line]:
    wanted = {(cluster_of(manifests)["authOptions"]["secretName"], "auth_token")}
    for name, key in secret_keys(cluster_of(manifests)) | wanted:
        found = get(f"/api/v1/namespaces/{home(manifests)}/secrets/{name}")
        there = found is not None and key in found.get("data", {})
        yield ("ok", f"secret {name}") if there else ("NO", f"secret {name}: missing, or without the key {key}")


def secret_keys(tree: Any) -> set[tuple[str, str]]:
    if isinstance(tree, list):
        return set().union(*map(secret_keys, tree))
    if not isinstance(tree, dict):
        return set()
    own = tree.get("secretKeyRef")
    return set().union(*map(secret_keys, tree.values()), {(own["name"], own["key"])} if own else set())


def storage(manifests: list[Manifest]) -> Iterator[Line]:
    classes = {one["metadata"]["name"]: one for one in items("/apis/storage.k8s.io/v1/storageclasses")}
    mark = "storageclass.kubernetes.io/is-default-class"
    default = [n for n, one in classes.items() if one["metadata"].get("annotations", {}).get(mark) == "true"]
    for claim in of_kind(manifests, "PersistentVolumeClaim"):
        (mode,) = claim["spec"]["accessModes"]
        name = f"volume {claim['metadata']['name']}"
        there = get(f"/api/v1/namespaces/{home(manifests)}/persistentvolumeclaims/{claim['metadata']['name']}")
        wanted = claim["spec"].get("storageClassName") or (default[0] if default else None)
        remedy = "in deploy/base/storage.yaml"
        if there is not None and there["spec"]["accessModes"] != [mode]:
            modes = ", ".join(there["spec"]["accessModes"])
            yield "NO", f"{name}: is {modes}, {mode} is asked for: delete it, or use another namespace"
        elif there is not None and there.get("status", {}).get("phase") == "Bound":
            yield "ok", f"{name}: bound"
        elif wanted not in classes:
            yield "NO", f"{name}: no storage class {wanted or 'is the default'}: name one {remedy}"
        elif mode == "ReadWriteMany" and any(part in classes[wanted]["provisioner"] for part in OF_ONE_MACHINE):
            made = classes[wanted]["provisioner"]
            yield "NO", f"{name}: class {wanted} ({made}) has no {mode}: name another {remedy}"
        else:
            yield "ok", f"{name}: {mode} of class {wanted} ({classes[wanted]['provisioner']})"


def room(manifests: list[Manifest]) -> Iterator[Line]:
    nodes = [node for node in items("/api/v1/nodes") if not node["spec"].get("unschedulable")]
    each = [Amounts({kind: amount(text) for kind, text in one["status"]["allocatable"].items()}) for one in nodes]
    have = sum(each, Amounts())
    for name, _, wanted in pods_of(manifests, "replicas"):
        if not any(wanted <= node for node in each):
            yield "??", f"no node is large enough for a pod of {name} ({show(wanted)}): can an autoscaler add one?"
    for text, replicas in (("at the start", "replicas"), ("at most", "maxReplicas")):
        wanted = asked(manifests, replicas)
        yield "ok" if wanted <= have else "??", f"{text} {show(wanted)}; the nodes have {show(have)}, in use or not"


def quotas(manifests: list[Manifest]) -> Iterator[Line]:
    wanted = asked(manifests, "maxReplicas")
    found = items(f"/api/v1/namespaces/{home(manifests)}/resourcequotas")
    for quota in found:
        used = quota["status"].get("used", {})
        short = []
        for kind, limit in quota["status"].get("hard", {}).items():
            need = wanted[kind.removeprefix("requests.")] if "limits." not in kind else 0
            if need > amount(limit) - amount(used.get(kind, 0)):
                short.append(f"{kind} {limit}, {used.get(kind, 0)} used")
        name = f"quota {quota['metadata']['name']}"
        yield ("NO", f"{name}: {'; '.join(short)}; asked for {show(wanted)}") if short else ("ok", name)
    if not found:
        yield "ok", "no quota"


def image(manifests: list[Manifest]) -> Iterator[Line]:
    """Start a pod as the head's, with the image alone."""
    spec = cluster_of(manifests)["headGroupSpec"]["template"]["spec"]
    (container,) = spec["containers"]
    kept = {key: container[key] for key in ("name", "image", "imagePullPolicy", "securityContext")}
    resources = {kind: {"cpu": "100m", "memory": "256Mi"} for kind in ("requests", "limits")}
    kept |= {"command": ["python", "-c", "import g2rpo_ray"], "resources": resources}
    pod = {key: spec[key] for key in ("imagePullSecrets", "securityContext")}
    pod |= {"containers": [kept], "restartPolicy": "Never", "automountServiceAccountToken": False}
    path, name = f"/api/v1/namespaces/{home(manifests)}/pods", f"g2rpo-check-{int(time.time())}"
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
    try:
        kubectl("create", "--raw", path, "-f", "-", given=json.dumps(whole))
    except OSError as error:
        yield "NO", f"image {container['image']}: no pod can be made: {error}"
        return
    try:
        yield pulled(f"{path}/{name}", container["image"])
    finally:
        kubectl("delete", "--raw", f"{path}/{name}")


def pulled(path: str, name: str) -> Line:
    reason, deadline = "", time.monotonic() + PULL_S
    while time.monotonic() < deadline:
        status = (get(path) or {}).get("status", {})
        if status.get("phase") in ("Succeeded", "Failed"):
            good = status["phase"] == "Succeeded"
            return ("ok", f"image {name}") if good else ("NO", f"image {name}: pulled, and has no g2rpo_ray")
        waiting = [one["state"].get("waiting", {}) for one in status.get("containerStatuses", [])]
        reason = next((f"{one.get('reason')}: {one.get('message', '')}" for one in waiting if one), "not scheduled")
        if reason.startswith(("ErrImage", "ImagePull", "InvalidImage", "CreateContainer")):
            return "NO", f"image {name}: {reason}"
        time.sleep(2)
    return "??", f"image {name}: not there after {PULL_S} s ({reason})"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "kustomization.yaml").exists():
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1]))
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"NO  {error or 'interrupted'}")
