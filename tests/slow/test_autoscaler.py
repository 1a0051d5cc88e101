"""Ray's own autoscaler with the groups of deploy/: it brings nodes up for a real run, and takes them down again.

Ray makes its settings of the RayCluster by the function that it uses on Kubernetes; the nodes are raylets here.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from g2rpo_ray.runs.tracking import read_lines
from tests.support.kuberay.render import render
from tests.support.runs import actors_of, finish, head_command, kill_all, lora, metrics, same_lora, start, wait_for

pytestmark = pytest.mark.cluster

OVERLAY = Path(__file__).parents[2] / "deploy" / "overlays" / "cpu-quickstart" / "cluster"

GROUP_OF = {"RolloutActor": "rollout", "RewardActor": "reward", "LearnerRank": "learner"}

PORT = 6397

IDLE_S = 3  # after which a rollout node goes

TICK_S = 1  # between two looks of the autoscaler

STORE = 100_000_000  # bytes of a node's object store

# A process of its own: Ray reads its token once a process, and the tests' process may have read another.
WATCH = """
import json, sys, time
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions

state = GlobalState()
state._initialize_global_state(
    GcsClientOptions.create(sys.argv[1], None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False))
while True:
    actors = [(actor["ActorClassName"], actor["Address"]["NodeID"])
              for actor in state.actor_table(None, None, "ALIVE").values()]
    nodes = {node["NodeID"]: list(node["Resources"]) for node in state.node_table() if node["Alive"]}
    print(json.dumps({"nodes": nodes, "actors": actors}), flush=True)
    time.sleep(0.5)
"""


@pytest.fixture
def manifests():
    return {manifest["kind"]: manifest for manifest in render(OVERLAY)}


@pytest.fixture
def scaling(manifests):
    """The autoscaler's settings, as on Kubernetes but for who makes the nodes, their memory, and a shorter patience."""
    manifests["RayCluster"]["metadata"]["namespace"] = "default"
    settings = _derive_autoscaling_config_from_ray_cr(manifests["RayCluster"])
    types = settings["available_node_types"]
    types[FAKE_HEAD_NODE_TYPE] = types.pop(settings["head_node_type"])
    settings["head_node_type"] = FAKE_HEAD_NODE_TYPE
    for node in types.values():
        del node["resources"]["memory"]  # a container's; FakeMultiNodeProvider can't hand it on
        node["resources"]["object_store_memory"] = STORE
    types["rollout"]["idle_timeout_s"] = IDLE_S
    settings["provider"] |= {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"{get_node_ip_address()}:{PORT}",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
    }
    return settings


class Cluster:
    """A head with an autoscaler, and a process that writes down what is on the cluster, twice a second."""

    def __init__(self, settings, folder):
        self.address = settings["provider"]["gcs_address"]
        self._log, scaling = folder / "cluster.jsonl", folder / "scaling.json"
        scaling.write_text(json.dumps(settings))
        variables = {
            "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": str(TICK_S),
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }  # fmt: skip
        # not ray.cluster_utils.AutoscalingCluster: it reads a file that Ray's wheel lacks, and runs `ray stop --force`
        self.head = subprocess.Popen(
            head_command(PORT, "--num-cpus=0", "--include-dashboard=false", f"--object-store-memory={STORE}",
                         f"--autoscaling-config={scaling}"),
            env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with self._log.open("w") as log:
            self._watcher = subprocess.Popen([sys.executable, "-c", WATCH, self.address], stdout=log)

    def history(self):
        """Since the start: nodes of each group, and actors by class and group of the node that they are on."""
        for line in read_lines(self._log):
            group_of = {
                node: next((group for group in GROUP_OF.values() if group in resources), "head")
                for node, resources in line["nodes"].items()
            }
            yield Counter(group_of.values()), Counter((name, group_of.get(node)) for name, node in line["actors"])

    def now(self):
        return [(Counter(), Counter()), *self.history()][-1]

    def sizes(self):
        return self.now()[0]

    def actors(self):
        return self.now()[1]

    def end(self):
        self._watcher.kill()
        self._watcher.wait()
        kill_all(self.head)


@pytest.fixture
def cluster(scaling, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as the manifest has it
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    found = Cluster(scaling, tmp_path)
    yield found
    found.end()


def test_rollout_nodes_come_up_for_a_run_and_go_down_after_it(manifests, cluster, bits, tmp_path):
    """The actors keep to their groups, a group to its bounds, and the LoRA to its bits."""
    (rollout,) = [
        group for group in manifests["RayCluster"]["spec"]["workerGroupSpecs"] if group["groupName"] == "rollout"
    ]
    least, most = rollout["minReplicas"], rollout["maxReplicas"]
    assert least < most
    idle = {"head": 1, "learner": 1, "reward": 1, "rollout": least}
    wait_for(cluster.head, lambda: cluster.sizes() == idle)

    settings = tmp_path / "settings.yaml"
    settings.write_text(manifests["ConfigMap"]["data"]["settings.yaml"])
    arguments = ["--address", cluster.address, "--config", str(settings)]
    process = start(tmp_path, "scaled", *arguments, rollout__max_actors=most)
    wait_for(process, lambda: actors_of(cluster.head, "LearnerRank"))
    (learner,) = actors_of(cluster.head, "LearnerRank")
    learner.suspend()  # so that the run does not end before the nodes are there
    wait_for(process, lambda: cluster.actors()["RolloutActor", "rollout"] == most)

    scale = [sys.executable, "-m", "g2rpo_ray.scale", "--address", cluster.address, "--name", "scaled"]
    asked = subprocess.run([*scale, "--rollout", str(most + 1)], capture_output=True, text=True, check=False)
    assert f"rollout: {most + 1} actors requested" in asked.stdout, asked.stderr
    time.sleep(5 * TICK_S)  # more than the group has: one actor waits
    learner.resume()
    finish(process)
    same_lora(lora(tmp_path, "scaled"), bits)
    assert [line["rollout/actors"] for line in metrics(tmp_path, "scaled")[1:]] == [most] * 3

    wait_for(cluster.head, lambda: cluster.sizes() == idle)
    assert max(sizes["rollout"] for sizes, _ in cluster.history()) == most
    places = {place for _, actors in cluster.history() for place in actors if place[0] in GROUP_OF}
    assert places == set(GROUP_OF.items())
