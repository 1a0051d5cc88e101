"""The overlays of deploy/, rendered, and the rules that they must keep."""

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tests.support.kuberay.render import Manifest, render

ROOT = Path(__file__).parents[2]

DEPLOY = ROOT / "deploy"

SCHEMAS = ROOT / "tests" / "support" / "kuberay"

OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())

KUSTOMIZATIONS = [*OVERLAYS, *(f"{name}/cluster" for name in OVERLAYS)]


def overlay(name: str) -> list[Manifest]:
    """Rendered once; each caller gets manifests of its own."""
    return copy.deepcopy(_rendered(name))


@cache
def _rendered(name: str) -> list[Manifest]:
    return render(DEPLOY / "overlays" / name)


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def ray_manifest(name: str) -> Manifest:
    return only(overlay(name), "RayCluster" if name.endswith("/cluster") else "RayJob")


def cluster_of(manifest: Manifest) -> Manifest:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


# ------------------------------------------------------------------------------------------------------------- schema


@cache
def schemas(name: str) -> Manifest:
    return json.loads((SCHEMAS / name).read_text())


def schema_errors(manifest: Manifest) -> list[str]:
    kuberay, kubernetes = schemas("schema.json"), schemas("kubernetes.json")
    kind = manifest["kind"]
    if kind in kuberay["kinds"]:
        schema = {**kuberay["kinds"][kind], "$defs": kuberay["$defs"]}
    elif kind in ("Pod", "Job", "Deployment"):  # a pod is what a Ray pod's template is made of
        template = {"metadata": manifest["metadata"], "spec": manifest["spec"]}
        template = template if kind == "Pod" else manifest["spec"]["template"]
        cluster = {"headGroupSpec": {"rayStartParams": {}, "template": template}}
        return schema_errors({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {}, "spec": cluster})
    else:
        known = kubernetes["kinds"][kind]
        head = {"apiVersion": {"const": known["apiVersion"]}, "kind": {}, "metadata": {"type": "object"}}
        schema = {"type": "object", "additionalProperties": False, "required": ["metadata", *known["required"]]}
        schema |= {"properties": {**head, **known["properties"]}, "$defs": kubernetes["$defs"]}
    errors = Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def head(job: Manifest) -> Manifest:
    return cluster_of(job)["headGroupSpec"]


# ------------------------------------------------------------------------------------------------------------ security


def pods(tree: Any) -> Iterator[Manifest]:
    if isinstance(tree, list):
        for part in tree:
            yield from pods(part)
    elif isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for part in tree.values():
            yield from pods(part)


def insecure(manifest: Manifest) -> list[str]:
    found = []
    for pod in pods(manifest):
        if not pod["securityContext"].get("runAsNonRoot") or not pod["securityContext"].get("runAsUser"):
            found.append("pod may run as root")
        found += [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        found += ["hostPath" for volume in volumes.values() if "hostPath" in volume]
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            found += _loose(container.get("securityContext", {}))
            written = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            found += [] if "emptyDir" in written.get("/tmp", {}) else ["/tmp can't be written"]
            if not container.get("resources", {}).get("limits", {}).get("memory"):
                found.append("no memory limit")
            found += [
                f"{env['name']} in plain text"
                for env in container.get("env", [])
                if re.search("TOKEN|SECRET|PASSWORD|KEY", env["name"]) and "value" in env
            ]
    if manifest["kind"] in ("RayCluster", "RayJob"):
        found += _loose(cluster_of(manifest)["autoscalerOptions"].get("securityContext", {}))
    return found


def _loose(context: Manifest) -> list[str]:
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    loose = [key for key, value in wanted.items() if context.get(key) != value]
    return loose + (["privileged"] if context.get("privileged") else [])


def references(tree: Any, kind: str, key: str) -> set[str]:
    if isinstance(tree, list):
        return set().union(*(references(part, kind, key) for part in tree)) if tree else set()
    if not isinstance(tree, dict):
        return set()
    own = {tree[kind][key]} if isinstance(tree.get(kind), dict) and key in tree[kind] else set()
    return own.union(*(references(part, kind, key) for part in tree.values()))
