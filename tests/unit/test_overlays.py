"""The overlays beside each other, with their components, and on a laptop."""

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from deploy.check.cluster import STATUS_TIMEOUT
from deploy.check.overlay import Amounts, asked, resources, show
from tests.support.kuberay.render import Manifest, render
from tests.support.kuberay.rules import complaints, groups
from tests.support.manifests import (
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
    job = folder.parents[1] / "kustomization.yaml"
    job.write_text(job.read_text().replace("  - ../../priority/submitter\n", ""))
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


@pytest.mark.parametrize("component", ["redis", "tls", "completions"])
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


def test_the_group_for_completions_is_one_of_rollout_with_a_resource_of_its_own(tmp_path):
    of = groups(cluster_of(only(with_component(tmp_path, "gpu-20", "completions"), "RayJob")))
    assert list(of) == ["learner", "rollout", "reward", "completions"]
    assert of["completions"]["resources"] == {"CPU": "6", "GPU": "1", "completions": "1"}
    assert of["completions"]["template"] == of["rollout"]["template"]
    assert of["completions"]["minReplicas"] < of["completions"]["maxReplicas"]


def test_with_redis_the_pods_wait_for_a_new_head(tmp_path):
    cluster = cluster_of(only(with_component(tmp_path, "gpu-20", "redis"), "RayJob"))
    env = groups(cluster)["learner"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"} in env


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
        pod = resources(group["template"]["spec"])
        assert pod["memory"] >= 256 * 2**20, name  # that of the container that the operator has wait for the GCS


@pytest.mark.parametrize("name, cpus, gibibytes", [("one-node-8gpu", 52, 520)])
def test_a_machine_is_as_large_as_the_overlay_says(name, cpus, gibibytes):
    wanted = asked(overlay(name), "maxReplicas")
    assert wanted["nvidia.com/gpu"] == 8
    assert cpus - 2 <= wanted["cpu"] <= cpus
    assert gibibytes * 0.95 <= wanted["memory"] / 2**30 <= gibibytes


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
