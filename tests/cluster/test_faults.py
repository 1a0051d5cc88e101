"""Faults done for real to a small run, which ends with the LoRA of an undisturbed one, bit for bit."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.support.runs import (
    REWARD_BACK,
    ROLLOUT_BACK,
    actors_of,
    descendants,
    finish,
    kill_all,
    kill_at_work,
    lora,
    metrics,
    raylet_of,
    recovery,
    run,
    same_lora,
    start,
    title_of,
    verified,
    wait_for,
    wait_for_iteration,
)

THIRD = r"rollout-[2-9] on .* (is ready|in [\d.]+ s)"  # an actor beyond the first two; see ROLLOUT_BACK

RECOVERED_S = 120  # on cores that are busy; docs/reliability.md has what it took on idle ones

PINNED = {
    "rollout__resources": "{rollout: 1}", "rollout__max_actors": 2, "learner__resources": "{head: 0.1}",
    "rewards__preference__resources": "{head: 0.1}", "data__encoder_resources": "{head: 0.1}",
}  # fmt: skip


@pytest.mark.core
def test_killed_actors_of_each_kind_change_no_bit(bits, tmp_path):
    process = start(tmp_path, "faulty")
    wait_for_iteration(process, tmp_path, "faulty", 1)
    kill_at_work(process, "RolloutActor.compute")
    for title in ("RewardActor", "LearnerRank"):
        actors_of(process, title)[0].kill()
    finish(process)
    assert recovery(tmp_path, "faulty", " died: ", ROLLOUT_BACK) < RECOVERED_S
    assert recovery(tmp_path, "faulty", "learner lost", "the learner is ready again") < RECOVERED_S
    assert recovery(tmp_path, "faulty", " died: ", REWARD_BACK) < RECOVERED_S
    assert sum(line.get("learner/restarts", 0) for line in metrics(tmp_path, "faulty")) == 1
    same_lora(lora(tmp_path, "faulty"), bits)
    assert [line["iteration"] for line in metrics(tmp_path, "faulty")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_stale_rollouts_depend_on_no_timing_and_survive_a_dead_driver(tmp_path):
    whole = start(tmp_path, "stale", rollout__max_staleness=1, rollout__max_actors=2)
    process = start(tmp_path, "killed", rollout__max_staleness=1)
    wait_for(process, lambda: (tmp_path / "killed" / "checkpoints" / "LATEST").exists())
    kill_all(process)
    finish(whole)
    lines = metrics(tmp_path, "stale")[1:]
    assert [line["rollout/weights_version"] for line in lines] == [0, 0, 1]
    assert lines[0]["learner/ratio_initial_max_dev"] == 0 < lines[1]["learner/ratio_initial_max_dev"]
    assert all(line["mismatch/velocity"] < 1e-5 for line in lines)  # rescored by the weights that sampled
    run(tmp_path, "killed", rollout__max_staleness=1)
    same_lora(lora(tmp_path, "killed"), lora(tmp_path, "stale"))
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    from_start, resumed = verified((tmp_path / "killed", 3), (tmp_path / "stale", 3))
    assert from_start == (0, "iteration 1: the same\niteration 2: the same\niteration 3: the same\n")
    assert resumed == (0, "iteration 3: the same\n")


@pytest.fixture
def cluster():
    """A head without room for actors and two nodes for rollout, the second to be killed."""
    system = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3,
              "health_check_initial_delay_ms": 0}  # fmt: skip
    nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000, "_system_config": system,
                        "resources": {"head": 1}, "include_dashboard": False},
    )  # fmt: skip
    yield nodes
    nodes.shutdown()


def add_node(cluster, **resources):
    return cluster.add_node(num_cpus=1, object_store_memory=100_000_000, resources=resources)


@pytest.mark.slow
def test_a_killed_node_and_a_new_size_change_no_bit(cluster, long_bits, tmp_path):
    """Actors on two nodes; one goes, with its actor and what it left in memory; then a third is asked for."""
    nodes = [add_node(cluster, rollout=1) for _ in range(2)]
    process = start(tmp_path, "nodes", "--address", cluster.address, **PINNED, iterations=20)
    log = tmp_path / "nodes" / "run.log"
    wait_for(process, lambda: log.exists() and log.read_text().count("is ready") == 3)  # with the reward server
    wait_for_iteration(process, tmp_path, "nodes", 1)
    (learner,) = [child for child in descendants() if "LearnerRank" in title_of(child)]
    learner.suspend()  # the run must not end before there is an actor in the lost one's place
    cluster.remove_node(nodes[1], allow_graceful=False)
    add_node(cluster, rollout=2)
    scale = [
        sys.executable,
        "-m",
        "g2rpo_ray.scale",
        "--address",
        cluster.address,
        "--name",
        "nodes",
        "--rollout",
        "3",
    ]
    asked = subprocess.run(scale, capture_output=True, text=True, timeout=120, check=False)
    assert "rollout: 3 actors requested" in asked.stdout, asked.stderr
    wait_for(process, lambda: re.search(THIRD, log.read_text()))
    learner.resume()
    finish(process)
    assert recovery(tmp_path, "nodes", " died: ", THIRD) < RECOVERED_S
    same_lora(lora(tmp_path, "nodes"), long_bits.result().lora)


@pytest.mark.slow
def test_a_node_that_is_about_to_go_is_left_at_once(cluster, long_bits, tmp_path):
    """Preemptions told 300 s ahead, of a rollout node and the learner's: all is elsewhere, and at work, long before."""
    nodes = [add_node(cluster, learner=1), add_node(cluster, rollout=1), add_node(cluster, rollout=1)]
    pinned = PINNED | {"learner__resources": "{learner: 1}", "learner__max_restarts": 0}  # a move is no restart
    process = start(tmp_path, "drained", "--address", cluster.address, **pinned, iterations=20)
    log = tmp_path / "drained" / "run.log"
    wait_for(process, lambda: log.exists() and log.read_text().count("is ready") == 3)  # with the reward server
    add_node(cluster, learner=1)
    add_node(cluster, rollout=1)
    wait_for_iteration(process, tmp_path, "drained", 1)
    told = [announce(cluster, node) for node in nodes[:2]]
    assert [notice.wait(60) for notice in told] == [0, 0]
    wait_for(process, lambda: re.search(THIRD, log.read_text()))
    wait_for(process, lambda: "the learner is ready again" in log.read_text())
    for node in nodes[:2]:
        cluster.remove_node(node, allow_graceful=False)
    finish(process)
    assert recovery(tmp_path, "drained", "moves: its node is being drained", THIRD) < RECOVERED_S
    assert recovery(tmp_path, "drained", r"learner lost \(its node is being drained\)", "is ready again") < RECOVERED_S
    for kind in ("rollout", "learner"):
        assert sum(line.get(f"{kind}/restarts", 0) for line in metrics(tmp_path, "drained")) == 0
    same_lora(lora(tmp_path, "drained"), long_bits.result().lora)


def announce(cluster, node):
    """Tell the cluster that a node will go, as an autoscaler or a cloud's notice does."""
    ray = str(Path(sys.executable).parent / "ray")
    which = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "300"]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    return subprocess.Popen([ray, "drain-node", *which, *why], stdout=subprocess.DEVNULL)


WAYS = ["in order", pytest.param("stopped", marks=pytest.mark.slow)]  # killed: in test_chaos


@pytest.mark.parametrize("how", WAYS)
def test_nodes_that_go_change_no_bit(how, cluster, long_bits, tmp_path):
    """With the learner's go the optimizer, the published weights and all that was kept for the update.

    No node is free for the learner then: a rollout actor gives its place, though another one waits for a place, too.
    In order: its raylet gets SIGTERM, as from `ray stop` or at a pod's end. Other errors come of that than of a crash.
    Stopped: the raylet stands still, until the head gives the node up.
    """
    nodes = [add_node(cluster, work=1) for _ in range(3)]
    shared = {"rollout__resources": "{work: 1}", "learner__resources": "{work: 1}", "rollout__max_actors": 3}
    process = start(tmp_path, "moved", "--address", cluster.address, **PINNED | shared, iterations=20)
    wait_for_iteration(process, tmp_path, "moved", 1)
    gone = [node_of_learner(nodes)]
    go(cluster, gone[0], how)
    wait_for(process, lambda: "the learner is ready again" in (tmp_path / "moved" / "run.log").read_text())
    add_node(cluster, work=1)
    gone.append(next(node for node in nodes if node not in (*gone, node_of_learner(nodes))))
    go(cluster, gone[1], how)
    finish(process)
    if how == "stopped":
        for node in gone:
            cluster.remove_node(node, allow_graceful=False)
    assert recovery(tmp_path, "moved", "learner lost", "to make room for the learner") < RECOVERED_S
    assert recovery(tmp_path, "moved", "to make room for the learner", "the learner is ready again") < RECOVERED_S
    same_lora(lora(tmp_path, "moved"), long_bits.result().lora)
    assert sum(line.get("learner/restarts", 0) for line in metrics(tmp_path, "moved")) == 1
    assert sum(line.get("perf/lost_s", 0) for line in metrics(tmp_path, "moved")) > 0


def node_of_learner(nodes):
    """Of the youngest: one whose node stands still is not ended."""
    found = [child for child in descendants() if "ray::LearnerRank" in title_of(child)]
    learner = max(found, key=lambda child: child.create_time())
    raylets = {raylet.process.pid: node for node in nodes for raylet in node.all_processes.get("raylet", ())}
    return raylets[raylet_of(learner)]


def go(cluster, node, how):
    if how == "stopped":
        (raylet,) = node.all_processes["raylet"]
        raylet.process.send_signal(signal.SIGSTOP)
    else:
        cluster.remove_node(node, allow_graceful=how == "in order")


SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "terminated": signal.SIGTERM}

WHO = ("RolloutActor", "RewardActor", "LearnerRank")

HARM = [(how, title) for how in SIGNALS for title in WHO] + [("removed", "rollout"), ("removed", "learner")]

HARM += [("killed", "driver")]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_chaos(cluster, alone, tmp_path):
    """Actors of each kind are killed, stopped and terminated, nodes leave and die, the driver dies.

    In a drawn order, at drawn moments, each after one iteration more.
    """
    settings = dict.fromkeys(
        ["rollout__max_restarts", "rewards__preference__max_restarts", "learner__max_restarts"], 1000
    )
    settings |= {"rollout__max_actors": 2, "iterations": 16, "data__prompts_per_iteration": 6, "sampler__group_size": 8}
    calm = alone(**settings)
    settings |= PINNED | {"learner__resources": "{learner: 1}", "hung_after_s": 15}
    nodes = {kind: [add_node(cluster, **{kind: 2})] for kind in ("rollout", "learner")}
    chaos = partial(start, tmp_path, "chaos", "--address", cluster.address, **settings)
    process, dice = chaos(), random.Random(0)
    for number, (how, who) in enumerate(dice.sample(HARM, len(HARM)), 1):
        wait_for_iteration(process, tmp_path, "chaos", number)
        time.sleep(dice.uniform(0, 1))
        wait_for(process, partial(hurt, process, cluster, nodes, how, who, tmp_path / "chaos" / "run.log"))
        print(f"{who} {how} after iteration {metrics(tmp_path, 'chaos')[-1]['iteration']}")
        if who == "driver":
            process = chaos()
    finish(process)
    same_lora(lora(tmp_path, "chaos"), calm.result().lora)


def learner_is_there(log) -> bool:
    """Whether it has started since it was last lost, by the run's log: what is found before that is starting."""
    text = log.read_text()
    lost, ready = ("learner lost", "starting the actors"), ("the learner is ready again", "actors are ready")
    return max(map(text.rfind, lost)) < max(map(text.rfind, ready))


def hurt(process, cluster, nodes, how, who, log) -> bool:
    """Do it to the driver, to a node, or to an actor; whether there was one."""
    if who == "driver":
        kill_all(process)
        return True
    if how == "removed":
        nodes[who].append(add_node(cluster, **{who: 2}))
        cluster.remove_node(nodes[who].pop(0), allow_graceful=who == "rollout")  # the learner's at once
        return True
    if who == "LearnerRank" and not learner_is_there(log):
        return False  # a rank that is stopped in its start stands still for half of startup_timeout_s, 300 s
    found = [child for child in descendants() if f"ray::{who}" in title_of(child)]
    with suppress(psutil.NoSuchProcess):
        if found:
            found[0].send_signal(SIGNALS[how])
            return True
    return False
