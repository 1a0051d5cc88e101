"""Checks of the overlay's namespace: secrets, volumes, quotas."""

import base64
from collections import Counter
from collections.abc import Iterator

from deploy.check.kubectl import Line, Manifest, get, items
from deploy.check.overlay import amount, asked, cluster_of, home, of_kind, pods_of, secret_keys, show

# By what a provisioner's name has in it: of files, which many machines can mount, and of one machine or disk.
OF_MANY = (
    "nfs", "efs.csi", "fsx.", "filestore", "file.csi.azure", "cephfs", "longhorn", "juicefs", "gluster", "lustre",
    "weka", "beegfs", "manila", "smb.csi", "quobyte", "gpfs", "spectrumscale",
)  # fmt: skip
OF_ONE = (
    "local-path", "hostpath", "no-provisioner", "ebs.csi", "aws-ebs", "pd.csi", "gce-pd", "disk.csi.azure", "dobs.csi",
    "csi.hetzner", "rbd.csi", "cinder", "topolvm", "linodebs", "block.csi", "blockvolume", "diskplugin", "openebs",
    "csi.scaleway", "lvm",
)  # fmt: skip


def namespace(manifests: list[Manifest]) -> Iterator[Line]:
    name = home(manifests)
    found = get(f"/api/v1/namespaces/{name}")
    if found is None:
        yield "NO", f"namespace {name}: missing: kubectl create namespace {name}"
        return
    level = found["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce", "not enforced")
    yield "ok", f"namespace {name}, pod security: {level}"


def secrets(manifests: list[Manifest]) -> Iterator[Line]:
    wanted = {(cluster_of(manifests)["authOptions"]["secretName"], "auth_token")}
    for name, key in sorted(secret_keys(manifests) | wanted):
        found = get(f"/api/v1/namespaces/{home(manifests)}/secrets/{name}")
        if found is None or key not in (found.get("data") or {}):
            yield "NO", f"secret {name}: missing, or without the key {key}"
        elif not base64.b64decode(found["data"][key]).strip():
            yield "NO", f"secret {name}: {key} is empty"
        else:
            yield "ok", f"secret {name}"
    pod = cluster_of(manifests)["headGroupSpec"]["template"]["spec"]
    for name in (entry["name"] for entry in pod.get("imagePullSecrets") or []):
        found = get(f"/api/v1/namespaces/{home(manifests)}/secrets/{name}")
        if found is None:
            yield "ok", f"no secret {name}: the image is public, or on the nodes"
        elif found.get("type") != "kubernetes.io/dockerconfigjson":
            yield "NO", f"secret {name}: is {found.get('type')}, not of a registry (deploy/README.md, 3)"
        else:
            yield "ok", f"secret {name}, for the registry"


def storage(manifests: list[Manifest]) -> Iterator[Line]:
    found = {one["metadata"]["name"]: one for one in items("/apis/storage.k8s.io/v1/storageclasses")}
    mark = "storageclass.kubernetes.io/is-default-class"
    default = [name for name, one in found.items() if one["metadata"].get("annotations", {}).get(mark) == "true"]
    for claim in of_kind(manifests, "PersistentVolumeClaim"):
        there = get(_path(manifests, "persistentvolumeclaims", claim))
        wanted = claim["spec"].get("storageClassName") or (default[0] if default else None)
        state, text = _of_claim(claim, there) if there else of_class(claim, wanted, found.get(wanted or ""))
        yield state, f"volume {claim['metadata']['name']}: {text}"


def _of_claim(claim: Manifest, there: Manifest) -> Line:
    """A volume that is asked for already: it cannot be changed."""
    (mode,), modes = claim["spec"]["accessModes"], there["spec"]["accessModes"]
    if modes != [mode]:
        return "NO", f"is {', '.join(modes)}, {mode} is asked for: delete it, or use another namespace"
    status, size = there.get("status", {}), claim["spec"]["resources"]["requests"]["storage"]
    if status.get("phase") != "Bound":
        return "??", f"is {status.get('phase', 'not there yet')}; it may wait for its first pod"
    has = status.get("capacity", {}).get("storage", "0")
    if amount(has) < amount(size):
        return "NO", f"has {has}, {size} are asked for: delete it, or write its size into the overlay"
    return "ok", f"bound, {has}"


def of_class(claim: Manifest, wanted: str | None, found: Manifest | None) -> Line:
    (mode,) = claim["spec"]["accessModes"]
    remedy = "in deploy/base/storage.yaml"
    if found is None:
        return "NO", f"no storage class {wanted or 'is the default'}: name one {remedy}"
    made = found["provisioner"]
    if mode != "ReadWriteMany" or any(part in made for part in OF_MANY):
        return "ok", f"{mode} of class {wanted} ({made})"
    if any(part in made for part in OF_ONE):
        return "NO", f"class {wanted} ({made}) has no {mode}: name another {remedy}"
    return "??", f"class {wanted} ({made}): whether it has {mode} is not known here"


def quotas(manifests: list[Manifest]) -> Iterator[Line]:
    found = items(f"/api/v1/namespaces/{home(manifests)}/resourcequotas")
    needs = _needs(manifests) if found else Counter()
    for quota in found:
        used = quota["status"].get("used", {})
        name, short, unknown = f"quota {quota['metadata']['name']}", [], []
        for kind, limit in quota["status"].get("hard", {}).items():
            if kind not in needs:
                unknown.append(kind)
            elif needs[kind] > amount(limit) - amount(used.get(kind, 0)):
                short.append(f"{kind} {limit}, {used.get(kind, 0)} used, {needs[kind]:.6g} more needed")
        if short:
            yield "NO", f"{name}: {'; '.join(short)}; asked for {show(asked(manifests, 'maxReplicas'))}"
        elif unknown:
            yield "??", f"{name}: not known here: {', '.join(sorted(unknown))}"
        else:
            yield "ok", name
    if not found:
        yield "ok", "no quota"


def _needs(manifests: list[Manifest]) -> Counter[str]:
    """What the overlay still needs, by the names that quotas have for it, at its largest size."""
    needs: Counter[str] = Counter()
    for which in ("requests", "limits"):
        for kind, wanted in asked(manifests, "maxReplicas", which).items():
            needs[f"{which}.{kind}"] = wanted
            if which == "requests":
                needs[kind] = wanted
    needs["pods"] = needs["count/pods"] = sum(number for _, number, _ in pods_of(manifests, "maxReplicas")) + 1
    jobs = len(of_kind(manifests, "RayJob"))
    needs["count/jobs.batch"] = needs["count/rayjobs.ray.io"] = jobs
    needs["count/rayclusters.ray.io"] = 1
    needs["services"] = needs["count/services"] = 1 + jobs + len(of_kind(manifests, "Service"))  # of the head, and job
    needs["count/deployments.apps"] = len(of_kind(manifests, "Deployment"))
    needs["secrets"] = needs["count/secrets"] = 0
    for kind in ("ConfigMap", "PersistentVolumeClaim"):
        plural = f"{kind.lower()}s"
        new = [one for one in of_kind(manifests, kind) if get(_path(manifests, plural, one)) is None]
        needs[plural] = needs[f"count/{plural}"] = len(new)
        if kind == "PersistentVolumeClaim":
            needs["requests.storage"] = sum(amount(one["spec"]["resources"]["requests"]["storage"]) for one in new)
    return needs


def _path(manifests: list[Manifest], plural: str, one: Manifest) -> str:
    return f"/api/v1/namespaces/{home(manifests)}/{plural}/{one['metadata']['name']}"
