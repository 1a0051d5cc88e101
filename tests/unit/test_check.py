"""`python -m deploy.check` before good and bad clusters: what an API server answers, by path."""

import base64
import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from deploy.check import __main__ as command
from deploy.check import image, space
from tests.support.kuberay.render import Manifest

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")

ROOT = Path(__file__).parents[2]

OVERLAYS = ROOT / "deploy" / "overlays"

SPACE = "/api/v1/namespaces/g2rpo-gpu-20"

CRDS, CLASSES = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "/apis/storage.k8s.io/v1/storageclasses"

DEPLOYMENTS, REVIEWS = "/apis/apps/v1/deployments", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"

CLAIMS, QUOTAS = f"{SPACE}/persistentvolumeclaims", f"{SPACE}/resourcequotas"

FORBIDDEN = "forbidden"

DEFAULT_CLASS = {"storageclass.kubernetes.io/is-default-class": "true"}


def allocatable(**amounts: str) -> Manifest:
    kinds = {"gpu": "nvidia.com/gpu"}
    return {"spec": {}, "status": {"allocatable": {kinds.get(kind, kind): text for kind, text in amounts.items()}}}


def of_operator(**container) -> Manifest:
    env = [{"name": "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "value": "1800"}]
    whole = {"image": "quay.io/kuberay/operator:v1.7.0", "env": env, **container}
    return {
        "metadata": {"name": "kuberay-operator", "namespace": "kuberay-system"},
        "spec": {"template": {"spec": {"containers": [whole]}}}, "status": {"availableReplicas": 1},
    }  # fmt: skip


def storage_class(provisioner: str) -> Manifest:
    return {"items": [{"metadata": {"name": "it", "annotations": DEFAULT_CLASS}, "provisioner": provisioner}]}


def claim(mode: str, size: str | None) -> Manifest:
    bound = {"phase": "Bound", "capacity": {"storage": size}} if size else {"phase": "Pending"}
    return {"spec": {"accessModes": [mode]}, "status": bound}


def quota(**hard_and_used: tuple[str, str]) -> Manifest:
    hard, used = ({key: pair[number] for key, pair in hard_and_used.items()} for number in (0, 1))
    return {"items": [{"metadata": {"name": "small"}, "status": {"hard": hard, "used": used}}]}


def secret(text: str, **others) -> Manifest:
    return {"data": {"auth_token": base64.b64encode(text.encode()).decode()}, **others}


def good_cluster() -> dict[str, Manifest]:
    """Enough for gpu-20."""
    served = {"spec": {"versions": [{"name": "v1", "served": True}]}}
    return {
        "/version": {"major": "1", "minor": "32+"},
        DEPLOYMENTS: {"items": [of_operator()]},
        f"{CRDS}/rayjobs.ray.io": served,
        f"{CRDS}/rayclusters.ray.io": served,
        SPACE: {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
        f"{SPACE}/secrets/g2rpo-ray-token": secret("x"),
        CLASSES: storage_class("nfs.csi.k8s.io"),
        "/api/v1/nodes": {"items": [allocatable(cpu="64", memory="512Gi", gpu="8") for _ in range(3)]},
        QUOTAS: {"items": []},
        REVIEWS: {"status": {"allowed": True}},
        f"{SPACE}/pods": {"phase": "Succeeded"},
        "log": "settings:      ok\n",
    }


class Api(BaseHTTPRequestHandler):
    """Answers by path; a pod that is made has the status that `.../pods` holds, and says `log`."""

    def do_GET(self):
        path = unquote(self.path)
        if path.endswith("/log"):
            self.answer(self.server.answers["log"])
        elif "/pods/" in path:
            self.answer({"status": self.server.answers[path.rpartition("/")[0]]})
        else:
            self.answer(self.server.answers.get(path))

    def do_POST(self):
        assert self.headers["Transfer-Encoding"] == "chunked"
        text = b""
        while size := int(self.rfile.readline(), 16):
            text += self.rfile.read(size)
            self.rfile.readline()
        given, answer = json.loads(text), self.server.answers[self.path]
        if given["kind"] == "Pod" and answer != FORBIDDEN:
            self.server.pods[given["metadata"]["name"]] = answer = given
            self.server.made.append(given)
        self.answer(answer)

    def do_DELETE(self):
        self.answer(self.server.pods.pop(self.path.rpartition("/")[2]))

    def answer(self, what):
        status = 404 if what is None else 403 if what == FORBIDDEN else 200
        if status != 200:
            reason = {404: "NotFound", 403: "Forbidden"}[status]
            message = "the server could not find the requested resource" if what is None else "you may not look at it"
            what = {
                "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message,
                "code": status,
            }  # fmt: skip
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(what, str) else "application/json")
        self.end_headers()
        self.wfile.write(what.encode() if isinstance(what, str) else json.dumps(what).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def api(tmp_path, monkeypatch):
    """An API server for kubectl; `api.answers` by path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.answers, server.pods, server.made = good_cluster(), {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(image, "LOOK_EVERY_S", 0.1)
    yield server
    server.shutdown()
    assert not server.pods  # the one that pulls the image is taken away


@pytest.fixture
def check(api, monkeypatch, capsys):
    """Exit status and lines of the command; `changes` are answers by path, None for nothing there."""

    def run(changes: dict[str, Manifest | str | None], *arguments: str, overlay: str | Path = "gpu-20"):
        api.answers = {path: what for path, what in {**good_cluster(), **changes}.items() if what is not None}
        monkeypatch.setattr(sys, "argv", ["check", str(OVERLAYS / overlay), *arguments])
        try:
            status = command.main()
        except SystemExit as end:
            return 1, [str(end.code)]
        printed = capsys.readouterr()
        api.told = printed.err
        return status, printed.out.splitlines()

    return run


def test_a_cluster_that_has_everything_is_told_so(check, api):
    status, lines = check({})
    assert status == 0
    assert all(line.startswith("ok  ") for line in lines), lines
    (pod,) = api.made
    (container,) = pod["spec"]["containers"]
    assert container["command"][2].endswith("--check settings")
    assert container["env"][0]["value"] == (OVERLAYS / "gpu-20" / "cluster" / "settings.yaml").read_text()


WAITS = {"state": {"waiting": {"reason": "ErrImagePull"}}}

LACKS = {
    "old Kubernetes": ({"/version": {"major": "1", "minor": "24"}}, "NO  Kubernetes 1.24"),
    "no operator": ({DEPLOYMENTS: {"items": []}}, "NO  operator: none is installed"),
    "operator's default": ({DEPLOYMENTS: {"items": [of_operator(env=None)]}}, "300 s; then the job fails for good"),
    "odd variable": (
        {DEPLOYMENTS: {"items": [of_operator(env=[{"name": "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "value": "30m"}])]}},
        "'30m' is no number of seconds, the operator takes 300"),
    "variable from elsewhere": (
        {DEPLOYMENTS: {"items": [of_operator(env=[
            {"name": "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "valueFrom": {"configMapKeyRef": {}}}])]}},
        "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS comes from elsewhere"),
    "no definition": ({f"{CRDS}/rayjobs.ray.io": None}, "NO  rayjobs.ray.io: no such resource"),
    "no namespace": ({SPACE: None}, "NO  namespace g2rpo-gpu-20: missing"),
    "no right": ({REVIEWS: {"status": {"allowed": False}}}, "NO  you may not create rayjobs.ray.io: ask for the role"),
    "no token": ({f"{SPACE}/secrets/g2rpo-ray-token": None}, "NO  secret g2rpo-ray-token: missing"),
    "empty token": ({f"{SPACE}/secrets/g2rpo-ray-token": secret(" \n")}, "g2rpo-ray-token: auth_token is empty"),
    "no registry's secret": (
        {f"{SPACE}/secrets/g2rpo-registry": secret("x", type="Opaque")}, "NO  secret g2rpo-registry: is Opaque"),
    "no class": ({CLASSES: {"items": []}}, "NO  volume g2rpo-models: no storage class is the default"),
    "block storage": (
        {CLASSES: storage_class("ebs.csi.aws.com")}, "NO  volume g2rpo-models: class it (ebs.csi.aws.com) has no Read"),
    "a class that nobody knows": (
        {CLASSES: storage_class("x.example.com")}, "??  volume g2rpo-models: class it (x.example.com): whether"),
    "volume of one": (
        {f"{CLAIMS}/g2rpo-runs": claim("ReadWriteOnce", "1Pi")}, "NO  volume g2rpo-runs: is ReadWriteOnce, ReadWriteM"),
    "small volume": (
        {f"{CLAIMS}/g2rpo-runs": claim("ReadWriteMany", "100Gi")}, "NO  volume g2rpo-runs: has 100Gi, 200Gi are asked"),
    "volume that waits": (
        {f"{CLAIMS}/g2rpo-runs": claim("ReadWriteMany", None)}, "??  volume g2rpo-runs: is Pending"),
    "small nodes": (
        {"/api/v1/nodes": {"items": [allocatable(cpu="64", memory="1e12", gpu="1")]}}, "??  no node is large enough"),
    "few nodes": (
        {"/api/v1/nodes": {"items": [allocatable(cpu="64", memory="1Pi", gpu="8")]}}, "??  at most 122 CPUs"),
    "no pod": ({f"{SPACE}/pods": FORBIDDEN}, "NO  image g2rpo-ray:0.2.0-gpu: no pod can be made: Error from server (F"),
    "no image": (
        {f"{SPACE}/pods": {"phase": "Pending", "containerStatuses": [WAITS]}},
        "NO  image g2rpo-ray:0.2.0-gpu: ErrImagePull"),
    "an image without the project": (
        {f"{SPACE}/pods": {"phase": "Failed"}, "log": "No module\n"}, "NO  image g2rpo-ray:0.2.0-gpu: pulled, a"),
    "settings": (
        {f"{SPACE}/pods": {"phase": "Failed"}, "log": "x\nerror: learner.lr: -1 given\n"},
        "NO  settings.yaml: learner.lr: -1 given"),
    "an unknown quota": ({QUOTAS: quota(**{"count/widgets.io": ("0", "0")})}, "??  quota small: not known here"),
}  # fmt: skip


def together() -> list[list[str]]:
    """The cases in as few clusters as can be: no two in one that change the same answer."""
    groups: list[tuple[set[str], list[str]]] = []
    for case, (changes, _) in LACKS.items():
        free = next((group for group in groups if not group[0] & changes.keys()), None)
        if free is None:
            groups.append(free := (set(), []))
        free[0].update(changes)
        free[1].append(case)
    return [cases for _, cases in groups]


@pytest.mark.parametrize("cases", together(), ids=", ".join)
def test_what_a_cluster_lacks_is_a_line(cases, check):
    status, lines = check({path: answer for case in cases for path, answer in LACKS[case][0].items()})
    for case in cases:
        assert any(LACKS[case][1] in line for line in lines), (case, lines)
    assert status == any(line.startswith("NO") for line in lines)


QUOTAS_TOO_SMALL = [
    ("requests.memory", "64Gi", "0"), ("limits.memory", "1Ti", "0"), ("limits.cpu", "130", "20"),
    ("requests.nvidia.com/gpu", "20", "1"), ("pods", "25", "5"), ("count/pods", "5", "0"),
    ("persistentvolumeclaims", "2", "0"), ("requests.storage", "1Ti", "300Gi"), ("services", "5", "4"),
    ("count/rayjobs.ray.io", "3", "3"), ("count/configmaps", "7", "7"),
]  # fmt: skip


def test_each_quota_that_is_too_small_is_a_line(check):
    together = [quota(**{kind: (hard, used)})["items"][0] for kind, hard, used in QUOTAS_TOO_SMALL]
    status, lines = check({QUOTAS: {"items": together}})
    assert status == 1
    told = [line for line in lines if line.startswith("NO")]
    assert len(told) == len(QUOTAS_TOO_SMALL)
    for line, (kind, hard, used) in zip(told, QUOTAS_TOO_SMALL, strict=True):
        assert line.startswith(f"NO  quota small: {kind} {hard}, {used} used, ")


@pytest.mark.parametrize(
    "provisioner, state",
    [("dobs.csi.digitalocean.com", "NO"), ("csi.hetzner.cloud", "NO"), ("rook-ceph.rbd.csi.ceph.com", "NO"),
     ("cinder.csi.openstack.org", "NO"), ("topolvm.io", "NO"), ("rook-ceph.cephfs.csi.ceph.com", "ok"),
     ("efs.csi.aws.com", "ok"), ("filestore.csi.storage.gke.io", "ok"), ("disks.example.com", "??")],
)  # fmt: skip
def test_only_storage_of_files_can_be_mounted_by_many(provisioner, state):
    many, one = ({"spec": {"accessModes": [mode]}} for mode in ("ReadWriteMany", "ReadWriteOnce"))
    assert space.of_class(many, "it", {"provisioner": provisioner})[0] == state
    assert space.of_class(one, "it", {"provisioner": provisioner})[0] == "ok"


def test_a_quota_counts_what_is_still_to_be_made(check):
    """Volumes and settings that are there need no more; a quota for what the overlay has not is no hindrance."""
    there = {f"{CLAIMS}/g2rpo-{name}": claim("ReadWriteMany", "1Ti") for name in ("runs", "embeddings", "models")}
    full = {"persistentvolumeclaims": ("3", "3"), "count/configmaps": ("7", "7"), "secrets": ("9", "9")}
    status, lines = check({**there, f"{SPACE}/configmaps/g2rpo-settings": {"data": {}}, QUOTAS: quota(**full)})
    assert status == 0
    assert "ok  quota small" in lines


def test_who_has_a_namespace_alone_sees_all_that_he_may(check):
    hidden = dict.fromkeys(("/api/v1/nodes", CLASSES, DEPLOYMENTS, f"{CRDS}/rayjobs.ray.io", SPACE), FORBIDDEN)
    status, lines = check(hidden)
    unknown = [line for line in lines if line.startswith("??")]
    assert [line.split()[1].rstrip(":") for line in unknown] == [
        "operator", "definitions", "namespace", "storage", "nodes",
    ]  # fmt: skip
    assert all("Forbidden" in line for line in unknown)
    assert status == 0
    assert "ok  you may create rayjobs.ray.io" in lines
    assert "ok  settings.yaml" in lines


@pytest.mark.parametrize("gates", [["--feature-gates=RayClusterMTLS=true"], []])
def test_encryption_wants_a_gate_and_cert_manager(gates, check, tmp_path):
    folder = shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    cluster = folder / "overlays" / "gpu-20" / "cluster" / "kustomization.yaml"
    cluster.write_text(cluster.read_text().replace("- ../../../priority\n", "- ../../../priority\n  - ../../../tls\n"))
    changes = {DEPLOYMENTS: {"items": [of_operator(args=gates)]}}
    if gates:
        changes[f"{CRDS}/certificates.cert-manager.io"] = {"spec": {"versions": [{"name": "v1", "served": True}]}}
    status, lines = check(changes, overlay=folder / "overlays" / "gpu-20")
    assert status == (not gates)
    assert any(("RayClusterMTLS=true is not among its gates" in line) == (not gates) for line in lines)
    assert any(line.startswith(f"{'ok' if gates else 'NO'}  certificates.cert-manager.io") for line in lines)


@pytest.mark.parametrize("there", [True, False])
def test_a_queue_must_be_there(there, check):
    def moved(what):
        return {path.replace("g2rpo-gpu-20", "g2rpo-kueue"): answer for path, answer in what.items()}

    queue = "/apis/kueue.x-k8s.io/v1beta2/namespaces/g2rpo-kueue/localqueues/g2rpo"
    _, lines = check({**moved(good_cluster()), queue: {} if there else None}, overlay="kueue")
    assert any(line.startswith(f"{'ok' if there else 'NO'}  queue g2rpo in g2rpo-kueue") for line in lines)


@pytest.mark.parametrize("folder", ["../base", "../priority", "../nothing"])
def test_what_is_no_overlay_is_told_in_a_line(folder, check):
    status, (line,) = check({}, overlay=folder)
    assert status == 1
    assert line.startswith("NO  ")


def test_a_server_that_does_not_answer_is_told_in_a_line(check, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    status, (line,) = check({})
    assert status == 1
    assert line.startswith("NO  the API server does not answer: ")


UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}],
}


def test_a_pod_that_finds_no_node_is_told_of_and_given_up(check, api, monkeypatch):
    monkeypatch.setattr(image, "UNSCHEDULABLE_S", 1.0)
    monkeypatch.setattr(image, "TELL_EVERY_S", 0.3)
    status, lines = check({f"{SPACE}/pods": UNSCHEDULABLE})
    assert status == 0
    assert lines[-1].endswith("no node takes a pod of 0.1 CPUs and 512 MiB: Unschedulable: 0/3 nodes")
    assert re.search(r"waiting for \d s: Unschedulable: 0/3 nodes", api.told)  # how soon is the machine's to say


def test_sigterm_takes_the_pod_away(api):
    api.answers[f"{SPACE}/pods"] = UNSCHEDULABLE
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.check", OVERLAYS / "gpu-20"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "no quota" in line:
            break
    while not api.pods:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1].splitlines()[-1] == "NO  interrupted"
    assert process.returncode == 1


# ------------------------------------------------------------------------------------------------------------ running

OF_RAY = "/apis/ray.io/v1/namespaces/g2rpo-gpu-20"

JOB, CLUSTER = f"{OF_RAY}/rayjobs/g2rpo", f"{OF_RAY}/rayclusters/g2rpo-abcde"

PODS = f"{SPACE}/pods?labelSelector=app.kubernetes.io/part-of=g2rpo-ray"

EVENTS = f"{SPACE}/events?fieldSelector=type=Warning"


def ray_pod(group: str, **status) -> Manifest:
    return {"metadata": {"name": f"g2rpo-{group}-0", "labels": {"ray.io/group": group}}, "status": status}


def job_status(**status) -> Manifest:
    return {"spec": {}, "status": {"rayClusterName": "g2rpo-abcde", **status}}


STARTS = {
    JOB: job_status(jobDeploymentStatus="Initializing"),
    CLUSTER: {"status": {"conditions": [
        {"type": "HeadPodReady", "status": "False", "reason": "ContainersNotReady", "message": "ray-head"}]}},
    PODS: {"items": [
        ray_pod("headgroup", phase="Running", containerStatuses=[{"ready": True, "state": {"running": {}}}]),
        ray_pod("learner", **UNSCHEDULABLE),
        ray_pod("rollout", phase="Pending", containerStatuses=[
            {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]),
    ]},
    EVENTS: {"items": [{"involvedObject": {"kind": "RayCluster", "name": "g2rpo-abcde"}, "reason": "FailedToCreatePod",
                        "message": "exceeded quota:\nsmall", "lastTimestamp": "2026-11-30T00:00:00Z"}]},
}  # fmt: skip


def test_why_a_job_does_not_start_is_said(check):
    status, lines = check(copy.deepcopy(STARTS), "--running")
    assert lines == [
        "??  rayjob g2rpo: Initializing",
        "??  raycluster g2rpo-abcde: HeadPodReady: ContainersNotReady: ray-head",
        "ok  pod g2rpo-headgroup-0 (headgroup): Running",
        "NO  pod g2rpo-learner-0 (learner): Pending, Unschedulable: 0/3 nodes",
        "NO  pod g2rpo-rollout-0 (rollout): Pending, ImagePullBackOff: no such image",
        "??  event of raycluster g2rpo-abcde: FailedToCreatePod: exceeded quota: small",
    ]
    assert status == 1


STATES = [
    (None, "NO  rayjob g2rpo: not there: kubectl apply -k"),
    ({"spec": {}}, "??  rayjob g2rpo: not looked at by the operator yet"),
    ({"spec": {"suspend": True}, "status": {"jobDeploymentStatus": "Suspended"}}, "??  rayjob g2rpo: Suspended; suspe"),
    (job_status(jobDeploymentStatus="Running", jobStatus="RUNNING"), "ok  rayjob g2rpo: Running; run RUNNING"),
    (job_status(jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message="error: x"),
     "NO  rayjob g2rpo: Failed; run FAILED; AppFailed: error: x"),
    (job_status(jobDeploymentStatus="ValidationFailed", reason="ValidationFailed", message="no"),
     "NO  rayjob g2rpo: ValidationFailed; ValidationFailed: no"),
]  # fmt: skip


def test_a_job_s_state_is_said(check):
    for job, told in STATES:
        assert check({**STARTS, JOB: job}, "--running")[1][0].startswith(told)
