"""What deploy/ would put on Kubernetes: valid for its API, for the operator, and for the settings that come with it.

KubeRay's rules are checked in Python because a schema can't say them; each has a manifest that breaks it.
"""

import ast
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from g2rpo_ray.actors.cluster import demands
from g2rpo_ray.commands import fetch
from g2rpo_ray.config import Config, load_config
from g2rpo_ray.hub import all_files
from tests.support.kuberay.packages import canonical, needed, without_their_pins
from tests.support.kuberay.render import Manifest, read, render
from tests.support.kuberay.rules import complaints, groups
from tests.support.manifests import (
    DEPLOY,
    KUSTOMIZATIONS,
    OVERLAYS,
    ROOT,
    cluster_of,
    head,
    insecure,
    only,
    overlay,
    pods,
    ray_manifest,
    references,
    schema_errors,
    schemas,
)

IN_IMAGE = "/opt/g2rpo_ray"  # where the Dockerfile puts configs/

Resources = dict[str, float]


def all_manifests() -> list[Manifest]:
    """Everything that a command of README.md applies, queues.yaml aside: that is the administrator's."""
    tools = [document for path in sorted((DEPLOY / "tools").glob("*.yaml")) for document in read(path)]
    return [*tools, *render(DEPLOY / "grafana"), *(manifest for name in KUSTOMIZATIONS for manifest in overlay(name))]


# ---------------------------------------------------------------------------------------------------------- rendering


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["grafana", "base", *(f"overlays/{name}" for name in KUSTOMIZATIONS)])
def test_the_renderer_is_kustomize(folder):
    done = subprocess.run(["kubectl", "kustomize", DEPLOY / folder], capture_output=True, text=True, check=True)

    def by_name(manifests: list[Manifest]) -> list[Manifest]:
        return sorted(manifests, key=lambda manifest: (manifest["kind"], manifest["metadata"]["name"]))

    assert by_name(render(DEPLOY / folder)) == by_name(list(yaml.safe_load_all(done.stdout)))


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_job_makes_the_cluster_that_its_overlay_describes(name):
    job, standing = ray_manifest(name), ray_manifest(f"{name}/cluster")
    assert cluster_of(job) == cluster_of(standing)
    assert not [manifest for manifest in overlay(name) if manifest["kind"] == "RayCluster"]  # or there would be two
    (submitter,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["image"] == standing["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]


def test_every_manifest_fits_its_schema():
    for manifest in all_manifests():
        assert not schema_errors(manifest), manifest["kind"]


def test_the_schema_is_of_the_version_that_is_installed():
    version = schemas("schema.json")["kuberay"]
    assert f"kuberay-operator --version {version}" in (DEPLOY / "README.md").read_text()


BROKEN_SCHEMA: dict[str, Callable[[Manifest], Any]] = {
    "unknown field of a job": lambda job: job["spec"].update(retries=3),
    "unknown field of a cluster": lambda job: cluster_of(job).update(autoscaling=True),
    "unknown field of a group": lambda job: cluster_of(job)["workerGroupSpecs"][0].update(maxReplica=1),
    "unknown field of a pod": lambda job: head(job)["template"]["spec"].update(seccontext={}),
    "unknown field of a container": lambda job: first_container(job).update(cpu=1),
    "number for a text": lambda job: cluster_of(job)["workerGroupSpecs"][0]["resources"].update(GPU=1),
    "text for a number": lambda job: cluster_of(job)["workerGroupSpecs"][0].update(maxReplicas="1"),
    "no such mode": lambda job: cluster_of(job)["authOptions"].update(mode="tokens"),
    "older API": lambda job: job.update(apiVersion="ray.io/v1alpha1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_SCHEMA)
def test_the_schema_refuses(case):
    job = ray_manifest("gpu-20")
    BROKEN_SCHEMA[case](job)
    assert schema_errors(job)


# --------------------------------------------------------------------------------------------------- operator's rules


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_operator_takes_it(name):
    assert complaints(ray_manifest(name)) == []


def learner(job: Manifest) -> Manifest:
    return groups(cluster_of(job))["learner"]


def rollout(job: Manifest) -> Manifest:
    return groups(cluster_of(job))["rollout"]


def deletion_rule(policy: str) -> Manifest:
    return {"deletionRules": [{"policy": policy, "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}}]}


def drain(group: Manifest, seconds: str | None) -> None:
    container = group["template"]["spec"]["containers"][0]
    others = [env for env in container["env"] if not env["name"].startswith("RAY_GRACEFUL")]
    own = [] if seconds is None else [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": seconds}]
    container["env"] = others + own


def queued(job: Manifest, **spec: Any) -> None:
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "g2rpo"
    job["spec"].update(spec)


BROKEN_RULES: dict[str, tuple[str, Callable[[Manifest], Any]]] = {
    "resources at both places": ("resources", lambda job: rollout(job)["rayStartParams"].update(resources='"{}"')),
    "CPUs at both places": ("resources", lambda job: rollout(job)["rayStartParams"].update({"num-cpus": "6"})),
    "head's resources too": ("resources", lambda job: head(job).update(resources={"CPU": "0"})),
    "labels as a start parameter": ("labels", lambda job: rollout(job)["rayStartParams"].update(labels="spot=yes")),
    "v1": ("autoscaler", lambda job: cluster_of(job)["autoscalerOptions"].update(version="v1")),
    "version left out": ("autoscaler", lambda job: cluster_of(job)["autoscalerOptions"].pop("version")),
    "idle timeout without v2": ("idle", lambda job: cluster_of(job)["autoscalerOptions"].pop("version")),
    "head restarts": ("restart", lambda job: head(job)["template"]["spec"].update(restartPolicy="Always")),
    "worker restarts": ("restart", lambda job: rollout(job)["template"]["spec"].update(restartPolicy="OnFailure")),
    "head works": ("head", lambda job: head(job)["rayStartParams"].pop("num-cpus")),
    "learner grows": ("learner", lambda job: learner(job).update(maxReplicas=2)),
    "replicas out of range": ("replicas", lambda job: rollout(job).update(replicas=17)),
    "long name": ("name", lambda job: job["metadata"].update(name="g" * 48)),
    "odd name": ("name", lambda job: job["metadata"].update(name="2rpo")),
    "rules and shutdown": ("deletion", lambda job: job["spec"].update(deletionStrategy=deletion_rule("DeleteSelf"))),
    "workers deleted": ("deletion", lambda job: job["spec"].update(
        shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0, deletionStrategy=deletion_rule("DeleteWorkers"))),
    "workers deleted on success": ("deletion", lambda job: job["spec"].update(
        deletionStrategy={"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": {"policy": "DeleteCluster"}})),
    "suspended for good": ("suspend", lambda job: job["spec"].update(
        suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0)),
    "time to live without shutdown": ("ttl", lambda job: job["spec"].update(shutdownAfterJobFinishes=False)),
    "sidecar with a template": ("sidecar", lambda job: job["spec"].update(submissionMode="SidecarMode")),
    "interactive with retries": ("interactive", lambda job: job["spec"].update(submissionMode="InteractiveMode")),
    "retries start anew": ("retry", lambda job: job["spec"].update(
        entrypoint=job["spec"]["entrypoint"].replace("auto", "never"))),
    "driver on the head": ("driver", lambda job: job["spec"].pop("entrypointResources")),
    "driver on a preemptible pod": ("driver", lambda job: job["spec"].update(entrypointResources='{"rollout": 1}')),
    "grace as long as the drain": ("grace", lambda job: drain(rollout(job), "60")),
    "grace of Kubernetes, drain of Ray": ("grace", lambda job: (
        drain(rollout(job), None), rollout(job)["template"]["spec"].pop("terminationGracePeriodSeconds"))),
    "more CPUs than the pod": ("sizes", lambda job: rollout(job)["resources"].update(CPU="64")),
    "a GPU that Ray is not told of": ("sizes", lambda job: rollout(job)["resources"].pop("GPU")),
    "no token": ("auth", lambda job: cluster_of(job)["authOptions"].update(mode="disabled")),
    "token unknown to this Ray": ("auth", lambda job: cluster_of(job).pop("rayVersion")),
    "queued and autoscaled": ("kueue", lambda job: queued(job, suspend=True)),
    "queued and not suspended": ("kueue", lambda job: queued(job)),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_RULES)
def test_a_broken_rule_is_named(case):
    rule, breaks = BROKEN_RULES[case]
    job = ray_manifest("gpu-20")
    breaks(job)
    assert any(complaint.startswith(f"{rule}: ") for complaint in complaints(job)), complaints(job)


def test_a_retry_goes_on_from_a_volume():
    for name in OVERLAYS:
        job = ray_manifest(name)
        assert job["spec"]["backoffLimit"] > 0
        assert "--resume auto" in job["spec"]["entrypoint"]
        assert "--set output=/runs" in job["spec"]["entrypoint"]
        for group in [head(job), *groups(cluster_of(job)).values()]:
            pod = group["template"]["spec"]
            mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert volumes[mounts["/runs"]]["persistentVolumeClaim"] == {"claimName": "g2rpo-runs"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_lost_submitter_costs_no_cluster(name):
    """It only follows the log: it stays where the head stays, and may be lost often."""
    job = ray_manifest(name)
    submitter, first = job["spec"]["submitterPodTemplate"], head(job)["template"]
    assert submitter["metadata"]["annotations"] == first["metadata"]["annotations"] != {}
    for key in ("affinity", "priorityClassName"):
        assert submitter["spec"][key] == first["spec"][key]
    assert job["spec"]["submitterConfig"]["backoffLimit"] == 20
    assert "20 such losses" in (DEPLOY / "README.md").read_text()


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_new_driver_waits_for_the_old_one(name):
    """Which lives as long as its pod needs to know that the head is gone."""
    job, learner_pod = ray_manifest(name), groups(cluster_of(ray_manifest(name)))["learner"]["template"]["spec"]
    env = {one["name"]: one.get("value") for one in learner_pod["containers"][0]["env"]}
    (waits,) = re.findall(r"--wait (\d+)", job["spec"]["entrypoint"])
    lives = float(env["RAY_gcs_rpc_server_reconnect_timeout_s"]) + learner_pod["terminationGracePeriodSeconds"]
    assert lives < float(waits)
    if "preRunningDeadlineSeconds" in job["spec"]:  # a queue decides for itself
        hours = (job["spec"]["backoffLimit"] + 1) * job["spec"]["preRunningDeadlineSeconds"] / 3600
        assert f"{hours:.0f}\nhours in all" in (DEPLOY / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "kueue"])
def test_bounds_that_a_user_scales_are_in_one_file(name):
    """So that an apply does not undo what was scaled."""
    changes = yaml.safe_load((DEPLOY / "overlays" / name / "cluster" / "groups.yaml").read_text())
    most = [change["value"] for change in changes if change["path"] == "/spec/workerGroupSpecs/1/maxReplicas"]
    assert most == [groups(cluster_of(ray_manifest(name)))["rollout"]["maxReplicas"]]


# ---------------------------------------------------------------------------------------------- settings and the groups


@pytest.fixture
def settings(tmp_path) -> Callable[..., Config]:
    """The settings of an overlay, as the driver would read them in the image; of another configuration if named."""

    def load(name: str, extended: str = "flux_hps") -> Config:
        text = only(overlay(name), "ConfigMap")["data"]["settings.yaml"].replace(IN_IMAGE, str(ROOT))
        text = text.replace("configs/flux_hps.yaml\n", f"configs/{extended}.yaml\n")
        (tmp_path / "settings.yaml").write_text(text)
        return load_config(str(tmp_path / "settings.yaml"))

    return load


def node_types(cluster: Manifest) -> dict[str, Manifest]:
    """What Ray's own autoscaler makes of the groups."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    return _generate_available_node_types_from_ray_cr_spec(cluster)


def group_of(key: str) -> str:
    """The group that is meant for a demand, by its key in the settings."""
    return {"rollout": "rollout", "learner": "learner", "data": "learner", "driver": "learner"}.get(
        key.partition(".")[0], "reward"
    )


def hosts(asked: Resources, types: dict[str, Manifest]) -> list[str]:
    """The groups on a pod of which there is room."""
    return [
        name
        for name, node in types.items()
        if all(node["resources"].get(kind, 0) >= amount for kind, amount in asked.items())
    ]


def left_over(asked: list[tuple[str, int, Resources]], types: dict[str, Manifest], pods: dict[str, int]) -> list[str]:
    """Keys of what finds no place on so many pods of each group, largest first."""
    room = {name: [dict(types[name]["resources"]) for _ in range(number)] for name, number in pods.items()}
    homeless = []
    for key, number, resources in sorted(asked, key=lambda one: -sum(one[2].values())):
        for _ in range(number):
            for pod in room[group_of(key)]:
                if all(pod.get(kind, 0) >= amount for kind, amount in resources.items()):
                    for kind, amount in resources.items():
                        pod[kind] -= amount
                    break
            else:
                homeless.append(key)
    return homeless


def asked_at_start(config: Config, job: Manifest) -> list[tuple[str, int, Resources]]:
    spec = job["spec"]
    driver = {"CPU": spec["entrypointNumCpus"], **json.loads(spec["entrypointResources"])}
    return [("driver", 1, driver), *demands(config)]


def asked_in_all(config: Config, job: Manifest) -> list[tuple[str, int, Resources]]:
    """With as many rollout actors as the run will ever ask for by itself."""
    wanted = {"rollout.resources": config.rollout.max_actors}
    return [(key, wanted.get(key, number), resources) for key, number, resources in asked_at_start(config, job)]


@pytest.mark.parametrize("name", OVERLAYS)
def test_actors_can_be_placed_on_their_group_and_nowhere_else(name, settings):
    config, job = settings(name), ray_manifest(name)
    types = node_types(cluster_of(job))
    encoder = ("data.encoder_resources", 1, config.data.encoder_resources)
    for key, _, resources in [*asked_in_all(config, job), encoder]:
        assert hosts(resources, types) == [group_of(key)], key
        group = "driver" if key == "driver" else group_of(key)
        assert resources.get(group, 0) > 0, f"{key} does not ask for its group's resource"
    assert types["headgroup"]["resources"]["CPU"] == 0


OF_HPSV2 = ("flux2_klein_g2rpo", "qwen_image_g2rpo", "sd3_flow_grpo", "sd3_g2rpo", "z_image_g2rpo")


@pytest.mark.parametrize("extended", OF_HPSV2)
@pytest.mark.parametrize("name", ["gpu-20", "one-node-8gpu"])
def test_an_overlay_places_every_configuration_with_hpsv2(name, extended, settings):
    assert settings(name, extended).name == extended
    everything_finds_room(settings(name, extended), name)


@pytest.mark.parametrize("name", OVERLAYS)
def test_all_that_the_settings_ask_for_finds_room(name, settings):
    everything_finds_room(settings(name), name)


def everything_finds_room(config: Config, name: str) -> None:
    job = ray_manifest(name)
    cluster = cluster_of(job)
    types = node_types(cluster)
    most = {name: group["maxReplicas"] for name, group in groups(cluster).items()}
    first = {name: group["replicas"] for name, group in groups(cluster).items()}
    encoder = ("data.encoder_resources", 1, config.data.encoder_resources)
    assert left_over(asked_in_all(config, job), types, most) == []
    assert left_over(asked_at_start(config, job), types, first) == []  # the run refuses to start on less
    assert left_over([asked_at_start(config, job)[0], encoder], types, first) == []
    assert most["rollout"] == config.rollout.max_actors  # neither idle nor homeless


def test_what_is_not_pinned_is_found(settings):
    config, job = settings("gpu-20"), ray_manifest("gpu-20")
    types = node_types(cluster_of(job))
    assert hosts({"GPU": 1}, types) == ["learner", "rollout", "reward"]
    assert hosts({"GPU": 8, "rollout": 1}, types) == []
    smaller = {name: group["maxReplicas"] - (name == "rollout") for name, group in groups(cluster_of(job)).items()}
    assert left_over(asked_in_all(config, job), types, smaller) == ["rollout.resources"]


@pytest.mark.parametrize("name, rollouts, rewards, ranks", [("gpu-20", 16, 2, 2), ("one-node-8gpu", 6, 1, 1)])
def test_gpus_are_what_the_overlay_says(name, rollouts, rewards, ranks, settings):
    config, cluster = settings(name), cluster_of(ray_manifest(name))
    gpus = {
        name: group["maxReplicas"]
        * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for name, group in groups(cluster).items()
    }
    assert gpus == {"rollout": rollouts, "reward": rewards, "learner": ranks}
    assert (config.rollout.max_actors, config.learner.ranks) == (rollouts, ranks)
    assert config.rewards["hpsv2"].replicas == rewards


@pytest.mark.parametrize("name", OVERLAYS)
def test_settings_name_files_of_the_image(name, settings):
    config = settings(name)
    for path in (config.data.train_prompts, config.data.heldout_prompts):
        assert path.startswith("embedded:") or Path(path).is_file()
    assert "COPY configs configs" in (DEPLOY / "Dockerfile").read_text()
    assert f"WORKDIR {IN_IMAGE}" in (DEPLOY / "Dockerfile").read_text()


@pytest.mark.parametrize("name", ["gpu-20", "one-node-8gpu"])
def test_the_models_that_the_settings_name_are_fetched(name, settings):
    assert {files.name for files in all_files(settings(name))} == {
        "black-forest-labs/FLUX.1-dev",
        "xswu/HPSv2:HPS_v2.1_compressed.pt",
    }
    (pod,) = pods(list(yaml.safe_load_all((DEPLOY / "tools" / "fetch-models.yaml").read_text())))
    (container,) = pod["containers"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "settings")
    assert {"name": "settings", "configMap": {"name": "g2rpo-settings"}} in pod["volumes"]
    module, option, file = container["command"][2:]
    assert (container["command"][:2], module) == (["python", "-m"], "g2rpo_ray.fetch")
    assert fetch.make_parser().parse_args([option, file]).config == f"{mount['mountPath']}/settings.yaml"
    # README.md applies it with the volumes, before this job
    of_settings, *of_volumes = (
        manifest["metadata"]["labels"]
        for kind in ("ConfigMap", "PersistentVolumeClaim")
        for manifest in overlay(name)
        if manifest["kind"] == kind
    )
    assert of_volumes == [of_settings] * 3


def test_every_container_is_locked_down():
    checked = 0
    for manifest in all_manifests():
        assert insecure(manifest) == [], manifest["metadata"]["name"]
        checked += len(list(pods(manifest)))
    assert checked == 2 + 2 * 4 * len(OVERLAYS) + len(OVERLAYS)  # tools; groups of jobs and clusters; submitters


def first_container(job: Manifest) -> Manifest:
    return rollout(job)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "opened, named",
    [
        (lambda job: rollout(job)["template"]["spec"].update(securityContext={}), "pod may run as root"),
        (lambda job: first_container(job).pop("securityContext"), "readOnlyRootFilesystem"),
        (lambda job: first_container(job)["securityContext"].update(privileged=True), "privileged"),
        (lambda job: first_container(job)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]), "capabilities"),
        (lambda job: first_container(job)["volumeMounts"].pop(0), "/tmp can't be written"),
        (lambda job: first_container(job)["env"].append({"name": "HF_TOKEN", "value": "x"}), "HF_TOKEN in plain text"),
        (lambda job: cluster_of(job)["autoscalerOptions"].pop("securityContext"), "runAsNonRoot"),
    ],
)
def test_an_open_container_is_found(opened, named):
    job = ray_manifest("gpu-20")
    opened(job)
    assert named in insecure(job)


SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{32,}\b"
)


def test_no_secret_is_in_git():
    for path in DEPLOY.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert not SECRET.search(path.read_text()), path
    assert not [manifest for manifest in all_manifests() if manifest["kind"] == "Secret"]
    assert SECRET.search("token: " + "0123456789abcdef" * 2)
    assert SECRET.search("hf_" + "a" * 30)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_what_is_referred_to_is_there(name):
    manifests = overlay(name)
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    for claim in references(manifests, "persistentVolumeClaim", "claimName"):
        assert ("PersistentVolumeClaim", claim) in names
    for config_map in references(manifests, "configMap", "name"):
        assert ("ConfigMap", config_map) in names
    for pod in pods(cluster_of(ray_manifest(name))):
        assert ("PriorityClass", pod["priorityClassName"]) in names
    readme = (DEPLOY / "README.md").read_text()
    secrets = {cluster_of(ray_manifest(name))["authOptions"]["secretName"]}
    for secret in secrets | references(all_manifests(), "secretKeyRef", "name"):
        assert f"create secret generic {secret}" in readme
    for pod in pods(all_manifests()):
        for secret in pod.get("imagePullSecrets", []):
            assert f"create secret docker-registry {secret['name']}" in readme


# ----------------------------------------------------------------------------------------------------------- dashboard


def written_metrics() -> list[str]:
    """Patterns of the metrics that the code writes, read off its text: `section/name`, `{}` standing for any word."""
    files = [
        path
        for room in ("g2rpo_ray/runs", "g2rpo_ray/rollout", "actors", "learner")
        for path in (ROOT / room).rglob("*.py")
    ]
    patterns = {"iteration"}
    parts = set()  # names that are written below `learner/` and `timing_s/`
    for path in [*files, ROOT / "g2rpo_ray" / "algo" / "objectives.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                parts |= {text} if re.fullmatch(r"[a-z_]+", text) else set()
            elif isinstance(node, ast.JoinedStr):
                text = "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            else:
                continue
            rooms = "advantage|eval|heldout|learner|perf|pool|reward|rollout|signal|timing_s"
            if re.fullmatch(rf"({rooms})/[\w/{{}}]+", text):
                patterns.add(text)
    for open_ended in ("learner/{}", "timing_s/{}"):
        patterns.discard(open_ended)
        patterns |= {open_ended.format(part) for part in parts}
    return [re.sub(r"\W", "_", pattern.replace("{}", "NAME")).replace("NAME", r"\w+") for pattern in patterns]


def queried(dashboard: Manifest) -> Iterator[str]:
    """Names of metrics, or patterns of names, in the queries."""
    texts = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    texts += [str(variable.get("definition", "")) for variable in dashboard["templating"]["list"]]
    for text in texts:
        yield from re.findall(r"\bray_\w+(?=[{,])", text)
        yield from re.findall(r'__name__=~"([^"]+)"', text)


def unknown(dashboard: Manifest) -> list[str]:
    from ray.dashboard.modules.reporter import reporter_agent

    of_ray = Path(reporter_agent.__file__).read_text()
    own = written_metrics()
    samples = ["ray_g2rpo_" + pattern.replace(r"\w+", "hpsv2") for pattern in own]
    found = []
    for name in queried(dashboard):
        if name.startswith("ray_g2rpo_"):
            known = any(re.fullmatch(name, sample) for sample in samples)
        else:
            known = f'"{name.removeprefix("ray_")}"' in of_ray
        found += [] if known else [name]
    return found


@pytest.fixture
def dashboard() -> Manifest:
    return json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())


def test_the_dashboard_asks_for_metrics_that_are_written(dashboard):
    assert unknown(dashboard) == []
    shown = set(queried(dashboard))
    for name in (
        "reward_.+_mean", "heldout_.+_mean", "learner_ratio_mean", "learner_clip_fraction", "timing_s_rollout",
        "perf_rollout_utilisation", "pool_restarts", "rollout_units_retried", "rollout_weights_version",
    ):  # fmt: skip
        assert f"ray_g2rpo_{name}" in shown


@pytest.mark.parametrize("name", ["ray_g2rpo_reward_loss", "ray_node_gpu_use", "ray_g2rpo_rollout_retries"])
def test_an_unwritten_metric_is_found(dashboard, name):
    dashboard["panels"][0]["targets"][0]["expr"] = f'{name}{{run="x"}}'
    assert unknown(dashboard) == [name]


def test_panels_are_apart(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_prometheus_finds_the_pods():
    (endpoints, selected) = [only(render(DEPLOY / "grafana"), "PodMonitor")["spec"][key] for key in (
        "podMetricsEndpoints", "selector")]  # fmt: skip
    cluster = cluster_of(ray_manifest("gpu-20"))
    ours = {key: value for key, value in selected["matchLabels"].items() if not key.startswith("ray.io/")}
    ports = set()
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert ours.items() <= group["template"]["metadata"]["labels"].items()
        named = {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert "metrics" in named
        ports |= named
    assert {endpoint["port"] for endpoint in endpoints} <= ports


# --------------------------------------------------------------------------------------------------------------- image


def stages() -> dict[str, list[list[str]]]:
    """The Dockerfile's instructions by stage, as words."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE))
    found: dict[str, list[list[str]]] = {"": []}
    stage = ""
    for words in (line.split() for line in text.splitlines() if line.strip()):
        if words[0] == "FROM":
            stage = words[3]
            found[stage] = []
        found[stage].append(words)
    return found


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_image_runs_as_the_user_that_the_pods_name(target):
    chain, users = target, []
    while chain in stages():
        users = [words[1] for words in stages()[chain] if words[0] == "USER"] + users
        chain = stages()[chain][0][1]
    (user, group) = users[-1].split(":")
    context = only(overlay("gpu-20/cluster"), "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"][
        "securityContext"
    ]
    assert (int(user), int(group)) == (context["runAsUser"], context["runAsGroup"])
    assert int(user) > 0


def test_the_image_is_pinned():
    arguments = [words[1] for words in stages()[""] if words[0] == "ARG"]
    (base,) = [value for name, _, value in (text.partition("=") for text in arguments) if name == "PYTHON_IMAGE"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    bases = {words[1] for stage in stages().values() for words in stage if words[0] == "FROM"}
    assert bases <= {"${PYTHON_IMAGE}", *stages()}
    # where packages come from is the builder's business; torch has its CPU wheels at one place alone
    addresses = re.findall(r"\S+://\S+", (DEPLOY / "Dockerfile").read_text())
    assert addresses == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu"]


def copied(stage: str) -> list[tuple[str, ...]]:
    """What a stage's COPY instructions take, in order: (stage it is from, or nothing; sources)."""
    copies = [words[1:-1] for words in stages()[stage] if words[0] == "COPY"]
    return [tuple(word.removeprefix("--from=") for word in words) for words in copies]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_changed_line_leaves_the_layer_of_packages_as_it_is(target):
    assert copied(f"packages-{target}") == [("deploy/constraints.txt",)]
    assert copied("tools") == copied("runtime") == []  # what both come from has nothing of the repository
    packages, *later = copied(target)
    assert packages == (f"packages-{target}", "/usr/local")
    assert later == [("LICENSE",), ("configs",)]
    (install,) = [" ".join(words) for words in stages()[target] if "/wheel/*" in words]
    assert "--mount=type=bind,from=project" in install  # no layer keeps the wheel
    (build,) = [" ".join(words) for words in stages()["project"] if words[0] == "RUN"]
    assert "^setuptools==" in build
    assert "--no-build-isolation" in build  # else a setuptools that nobody pinned
    rooms = {name for (name,) in copied("project")[1:]} - {"deploy/constraints.txt"}
    assert rooms == {"configs", "g2rpo_ray", "actors", "learner"}
    size = sum(
        path.stat().st_size
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    )  # which Dockerfile.dockerignore leaves out
    assert size < 30_000_000


def test_the_cpu_image_is_the_small_one_unless_it_can_not_be():
    (command,) = [" ".join(words) for words in stages()["packages-cpu"] if words[0] == "RUN"]
    small, _, other = command.partition("; else ")
    pattern = re.search(r"sed -i -E '/(.*)/d'", small)
    assert pattern
    pinned = pins()
    left_out = {name for name in pinned if re.match(pattern[1], name)}
    of_torch = {name for name in pinned if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert left_out == of_torch != set()
    assert "WARNING" in other


def pins() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line[0] != "#")}


def test_constraints_are_what_the_image_needs_and_nothing_else():
    assert set(pins()) == set(needed())
    for name in without_their_pins():
        assert canonical(name) in pins()


def test_constraints_are_within_what_the_project_allows():
    pinned = pins()
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[canonical(wanted.name)]), text
    for name in KUSTOMIZATIONS:
        assert cluster_of(ray_manifest(name))["rayVersion"] == pinned["ray"]


# -------------------------------------------------------------------------------------------------------------- README


def test_the_readme_names_files_that_exist():
    readme = (DEPLOY / "README.md").read_text()
    named = set(re.findall(r"\bdeploy/[\w./-]*\w", readme))
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path
    for name in OVERLAYS:
        assert f"deploy/overlays/{name}" in readme
    for module in set(re.findall(r"-m (g2rpo_ray\.\w+)", readme)):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
