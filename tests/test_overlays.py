"""The overlays beside each other, with their components, on a laptop, and as `deploy/check.py` sees a cluster."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from deploy.check import STATUS_TIMEOUT, Amounts, asked, requests, show
from tests.kuberay.render import Manifest, render
from tests.kuberay.rules import complaints, groups
from tests.test_deploy import (
    DEPLOY,
    KUSTOMIZATIONS,
    OVERLAYS,
    ROOT,
    cluster_of,
    insecure,
    only,
    overlay,
    pods,
    ray_manifest,
    references,
    schema_errors,
)

README = (DEPLOY / "README.md").read_text()
KUBECTL = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")


# --------------------------------------------------------------------------------------------------- names, namespaces


def test_a_job_and_a_standing_cluster_never_have_a_service_of_one_name():
    """The operator names the service of a head after its RayCluster, and one more after the RayJob."""
    for name in OVERLAYS:
        job, standing = (ray_manifest(one)["metadata"]["name"] for one in (name, f"{name}/cluster"))
        assert job != standing
        assert f"service/{standing}-head-svc" in README
        assert f"rayjob {job}" in README
        assert f"raycluster/{standing}" in README


def test_overlays_do_not_meet():
    """Volumes can't be changed after they are made: no two overlays have one of the same name in the same namespace."""
    owner: dict[tuple[str, ...], str] = {}
    for name in OVERLAYS:
        for manifest in overlay(name):
            if manifest["kind"] == "PriorityClass":  # of the whole cluster: all overlays have the same
                assert manifest in overlay("gpu-20")
                continue
            space = manifest["metadata"]["namespace"]
            assert owner.setdefault((manifest["kind"], space, manifest["metadata"]["name"]), name) == name
            assert space == f"g2rpo-{name}"
        assert {manifest["metadata"].get("namespace") for manifest in overlay(f"{name}/cluster")} <= {None, space}


def test_priorities_can_be_left_out(tmp_path):
    """By taking the component out of the overlay's cluster/."""
    folder = copy_of_deploy(tmp_path) / "overlays" / "gpu-20" / "cluster" / "kustomization.yaml"
    text = folder.read_text()
    folder.write_text(text.replace("components:\n  - ../../../priority\n", ""))
    assert folder.read_text() != text
    manifests = render(folder.parents[1])
    assert "PriorityClass" not in [manifest["kind"] for manifest in manifests]
    assert "priorityClassName" not in json.dumps(manifests)


def copy_of_deploy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEPLOY, tmp_path / "deploy"))


# ---------------------------------------------------------------------------------------------------------- components


def with_component(tmp_path: Path, name: str, component: str) -> list[Manifest]:
    """An overlay to whose cluster/ a user has added a component, as its file says."""
    folder = copy_of_deploy(tmp_path)
    cluster = folder / "overlays" / name / "cluster" / "kustomization.yaml"
    config = yaml.safe_load(cluster.read_text())
    config["components"] = [*config.get("components", []), f"../../../{component}"]
    cluster.write_text(yaml.safe_dump(config))
    assert f"components: [../../../{component}]" in (folder / component / "kustomization.yaml").read_text()
    mine = render(folder / "overlays" / name)
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", folder / "overlays" / name]
        real = yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        by_name = partial(sorted, key=lambda manifest: (manifest["kind"], manifest["metadata"]["name"]))
        assert by_name(mine) == by_name(real)
    return mine


@pytest.mark.parametrize("component", ["redis", "tls"])
@pytest.mark.parametrize("name", OVERLAYS)
def test_a_component_fits_each_overlay(tmp_path, name, component):
    manifests = with_component(tmp_path, name, component)
    for manifest in manifests:
        assert not schema_errors(manifest), manifest["kind"]
        assert insecure(manifest) == []
    assert complaints(only(manifests, "RayJob")) == []
    for secret in references(manifests, "secretKeyRef", "name"):
        assert f"create secret generic {secret}" in README


def test_redis_is_reached_by_the_head_and_outlives_it(tmp_path):
    manifests = with_component(tmp_path, "gpu-20", "redis")
    options = cluster_of(only(manifests, "RayJob"))["gcsFaultToleranceOptions"]
    service, redis = only(manifests, "Service"), only(manifests, "Deployment")["spec"]["template"]
    (port,) = service["spec"]["ports"]
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:{port['port']}"
    assert service["spec"]["selector"].items() <= redis["metadata"]["labels"].items()
    (container,) = redis["spec"]["containers"]
    assert port["port"] in [own["containerPort"] for own in container["ports"]]
    secrets = {json.dumps(part["valueFrom"]) for part in (options["redisPassword"], container["env"][0])}
    assert len(secrets) == 1
    (claim,) = references(redis, "persistentVolumeClaim", "claimName")
    assert claim in [one["metadata"]["name"] for one in manifests if one["kind"] == "PersistentVolumeClaim"]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_lost_machine_is_given_up_after_a_minute(name):
    for pod in pods(cluster_of(ray_manifest(name))):
        waits = {one["key"]: one.get("tolerationSeconds") for one in pod["tolerations"] if one["effect"] == "NoExecute"}
        assert waits == {"node.kubernetes.io/not-ready": 60, "node.kubernetes.io/unreachable": 60}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_processes_are_reaped_and_the_driver_is_no_shells_child(name):
    manifest = ray_manifest(name)
    assert all(pod["shareProcessNamespace"] for pod in pods(cluster_of(manifest)))
    if manifest["kind"] == "RayJob":
        assert manifest["spec"]["entrypoint"].startswith("exec python ")
    everywhere = README + (ROOT / "README.md").read_text()
    submitted = re.findall(r"^ray job submit .* -- \\\n +(.*)", everywhere, re.MULTILINE)
    assert len(submitted) == 2
    assert all(entry.startswith("exec python ") for entry in submitted)


# ------------------------------------------------------------------------------------------------------------- network


def test_only_the_cluster_the_operator_and_prometheus_connect():
    policy = only(overlay("gpu-20"), "NetworkPolicy")["spec"]
    cluster = cluster_of(ray_manifest("gpu-20"))
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    templates.append(ray_manifest("gpu-20")["spec"]["submitterPodTemplate"])
    for template in templates:
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    among, operator, prometheus = policy["ingress"]
    assert among == {"from": [{"podSelector": policy["podSelector"]}]}
    ports = {port["name"]: port["containerPort"] for port in templates[0]["spec"]["containers"][0]["ports"]}
    assert [port["port"] for port in operator["ports"]] == [ports["dashboard"]]
    assert [port["port"] for port in prometheus["ports"]] == [
        ports[name] for name in ("metrics", "as-metrics", "dash-metrics")
    ]


# -------------------------------------------------------------------------------------------------------------- laptop

OPERATOR = Amounts(cpu=0.1, memory=512 * 2**20)  # KubeRay's chart: its limits, which are what it asks for
SYSTEM = Amounts(cpu=0.95, memory=290 * 2**20)  # a kind node: API server, etcd, controllers, DNS, network
LAPTOP = Amounts(cpu=4, memory=7.75 * 2**30)  # 8 GiB, less what the kernel keeps


def test_the_quickstart_fits_a_laptop_whole():
    """With both rollout pods, by what the scheduler adds up."""
    wanted = asked(overlay("cpu-quickstart"), "maxReplicas") + OPERATOR + SYSTEM
    print(show(wanted))
    assert wanted <= LAPTOP, show(wanted)
    assert "4 CPUs and 8 GiB" in README
    for name, group in groups(cluster_of(ray_manifest("cpu-quickstart"))).items():
        pod = requests(group["template"]["spec"])
        assert pod["memory"] >= 256 * 2**20, name  # that of the container that the operator has wait for the GCS


@pytest.mark.parametrize("name, cpus, gibibytes", [("one-node-8gpu", 52, 520)])
def test_a_machine_is_as_large_as_the_overlay_says(name, cpus, gibibytes):
    wanted = asked(overlay(name), "maxReplicas")
    assert wanted["nvidia.com/gpu"] == 8
    assert cpus - 2 <= wanted["cpu"] <= cpus
    assert gibibytes * 0.95 <= wanted["memory"] / 2**30 <= gibibytes


# --------------------------------------------------------------------------------------------------------------- check


def allocatable(**amounts: str) -> Manifest:
    kinds = {"gpu": "nvidia.com/gpu"}
    return {"spec": {}, "status": {"allocatable": {kinds.get(kind, kind): text for kind, text in amounts.items()}}}


def good_cluster() -> dict[str, Manifest]:
    """What an API server answers, by path: enough for gpu-20."""
    space = "/api/v1/namespaces/g2rpo-gpu-20"
    container = {
        "image": "quay.io/kuberay/operator:v1.7.0",
        "env": [{"name": "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "value": "1800"}],
    }
    operator = {
        "metadata": {"name": "kuberay-operator", "namespace": "kuberay-system"},
        "spec": {"template": {"spec": {"containers": [container]}}}, "status": {"availableReplicas": 1},
    }  # fmt: skip
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    nfs = {"metadata": {"name": "nfs", "annotations": default}, "provisioner": "nfs.csi.k8s.io"}
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    return {
        "/version": {"major": "1", "minor": "32+"},
        "/apis/apps/v1/deployments": {"items": [operator]},
        **{f"{crds}/{kind}.ray.io": {"spec": {"versions": [{"name": "v1", "served": True}]}}
           for kind in ("rayjobs", "rayclusters")},
        space: {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
        f"{space}/secrets/g2rpo-ray-token": {"data": {"auth_token": "eA=="}},
        "/apis/storage.k8s.io/v1/storageclasses": {"items": [nfs]},
        "/api/v1/nodes": {"items": [allocatable(cpu="64", memory="512Gi", gpu="8") for _ in range(3)]},
        f"{space}/resourcequotas": {"items": []},
        f"{space}/pods": {"phase": "Succeeded"},
    }  # fmt: skip


class Api(BaseHTTPRequestHandler):
    """Answers by path; a pod that is made has the status that `.../pods` holds."""

    def do_GET(self):
        if "/pods/" in self.path:
            self.answer({"status": self.server.answers[self.path.rpartition("/")[0]]})
        else:
            self.answer(self.server.answers.get(self.path))

    def do_POST(self):
        assert self.headers["Transfer-Encoding"] == "chunked"
        text = b""
        while size := int(self.rfile.readline(), 16):
            text += self.rfile.read(size)
            self.rfile.readline()
        pod = json.loads(text)
        self.server.pods[pod["metadata"]["name"]] = pod
        self.answer(pod)

    def do_DELETE(self):
        self.answer(self.server.pods.pop(self.path.rpartition("/")[2]))

    def answer(self, what):
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        self.send_response(200 if what is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(missing if what is None else what).encode())

    def log_message(self, *_):
        pass


def check(tmp_path: Path, answers: dict[str, Manifest], name: str = "gpu-20") -> tuple[int, list[str]]:
    """Exit status and lines of `deploy/check.py`, by the real kubectl."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.answers, server.pods = answers, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    command = [sys.executable, DEPLOY / "check.py", DEPLOY / "overlays" / name]
    environment = {**os.environ, "HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "kubeconfig")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    server.shutdown()
    assert not server.pods  # the one that pulls the image is taken away
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


@KUBECTL
def test_a_cluster_that_has_everything_is_told_so(tmp_path):
    status, lines = check(tmp_path, good_cluster())
    assert status == 0
    assert all(line.startswith("ok  ") for line in lines), lines


SPACE = "/api/v1/namespaces/g2rpo-gpu-20"
CRDS, CLASSES = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "/apis/storage.k8s.io/v1/storageclasses"
LITTLE = {
    "/version": ({"major": "1", "minor": "24"}, "NO  Kubernetes 1.24"),
    "/apis/apps/v1/deployments": ({"items": []}, "NO  operator: none is installed"),
    f"{CRDS}/rayjobs.ray.io": (None, "NO  rayjobs.ray.io: no such resource"),
    SPACE: (None, "NO  namespace g2rpo-gpu-20: missing"),
    f"{SPACE}/secrets/g2rpo-ray-token": (None, "NO  secret g2rpo-ray-token: missing"),
    CLASSES: ({"items": []}, "NO  volume g2rpo-models: no storage class is the default"),
    f"{SPACE}/persistentvolumeclaims/g2rpo-runs": (
        {"spec": {"accessModes": ["ReadWriteOnce"]}}, "NO  volume g2rpo-runs: is ReadWriteOnce, ReadWriteMany"),
    "/api/v1/nodes": (
        {"items": [allocatable(cpu="64", memory="512Gi", gpu="1")]}, "??  no node is large enough for a pod of learn"),
    f"{SPACE}/resourcequotas": (
        {"items": [{"metadata": {"name": "small"}, "status": {"hard": {"requests.memory": "64Gi"}, "used": {}}}]},
        "NO  quota small: requests.memory 64Gi, 0 used; asked for 122 CPUs"),
    f"{SPACE}/pods": (
        {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]},
        "NO  image g2rpo-ray:0.1.0-gpu: ErrImagePull"),
}  # fmt: skip


@KUBECTL
def test_each_thing_that_a_cluster_lacks_is_a_line(tmp_path):
    answers = good_cluster() | {path: answer for path, (answer, _) in LITTLE.items()}
    status, lines = check(tmp_path, {path: answer for path, answer in answers.items() if answer is not None})
    assert status == 1
    for _, line in LITTLE.values():
        assert [one for one in lines if one.startswith(line)], lines


@KUBECTL
def test_a_cluster_as_it_comes_is_told_what_to_change(tmp_path):
    """KubeRay with its defaults, block storage, and fewer GPUs than the overlay may grow to."""
    answers = good_cluster()
    (operator,), (storage,) = (answers[path]["items"] for path in ("/apis/apps/v1/deployments", CLASSES))
    operator["spec"]["template"]["spec"]["containers"][0]["env"] = None
    storage["provisioner"] = "ebs.csi.aws.com"
    answers["/api/v1/nodes"]["items"] = answers["/api/v1/nodes"]["items"][:1]
    status, lines = check(tmp_path, answers)
    assert status == 1
    bad = [line for line in lines if not line.startswith("ok")]
    assert [line for line in bad if "may be away for 300 s; then the job fails for good" in line]
    assert len([line for line in bad if "(ebs.csi.aws.com) has no ReadWriteMany" in line]) == 3
    assert [line for line in bad if line.startswith("??  at most 122 CPUs")]
    assert len(bad) == 5, bad


# -------------------------------------------------------------------------------------------------------------- README


def test_removing_everything_leaves_the_token_for_last():
    """Without the token the operator can't ask Ray, and keeps the job's finalizer."""
    section = README.partition("Remove everything")[2]
    jobs, space = section.index("kubectl delete rayjob,raycluster --all"), section.index("kubectl delete namespace")
    assert jobs < section.index("&&", jobs) < space
    assert space < section.index("kubectl delete priorityclass")
    assert "--wait=false" not in section


def test_the_readme_installs_the_operator_as_the_check_wants_it():
    for tool in ("helm install kuberay-operator", "kubectl set env deployment/kuberay-operator"):
        assert STATUS_TIMEOUT in README[README.index(tool) :].partition("\n```")[0]
