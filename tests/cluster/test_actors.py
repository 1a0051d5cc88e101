"""Actors on Ray: what Ray does with those that die, stop, find no place; rewards, weights and fetched results.

tests/unit/test_pool.py and tests/unit/test_scorer.py have the logic of pools and scores, without Ray.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import ray
import torch

from g2rpo_ray.actors.pool import limits, priority, supervision
from g2rpo_ray.actors.pool.actor import RayActor, here
from g2rpo_ray.actors.pool.cuda import check_cuda
from g2rpo_ray.actors.pool.device_faults import DeviceFault, device_faults, with_memory
from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.actors.pool.failures import is_lost_object
from g2rpo_ray.actors.pool.priority import make_room
from g2rpo_ray.actors.pool.supervision import PoolStopped
from g2rpo_ray.actors.system import _rollout_pool
from g2rpo_ray.actors.workers.encoder import Embeddings
from g2rpo_ray.actors.workers.fetch import fetch_models
from g2rpo_ray.actors.workers.keeper import Keeper
from g2rpo_ray.actors.workers.learner import LearnerGroup, LearnerLost
from g2rpo_ray.actors.workers.reward import RewardActor, Scorer, make_scorers
from g2rpo_ray.actors.workers.rollout import RolloutActor
from g2rpo_ray.actors.workers.weights import PublishedWeights
from g2rpo_ray.config import RewardConfig, load_config
from g2rpo_ray.models import FlowModel, add_lora, lora_state, manifest_of
from g2rpo_ray.types import BranchUnit
from g2rpo_ray.version import code_version
from tests.support import virtual
from tests.support.faulty import build_breaking
from tests.support.hub import serve_hub
from tests.support.judge_server import chat_server
from tests.support.runs import PATIENCE

pytestmark = pytest.mark.core

IMAGES = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    store = 100_000_000
    # Ray believes in the GPU, torch does not; one actor can have it
    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=store, log_to_driver=False
    )
    yield
    ray.shutdown()


@ray.remote(num_cpus=0, max_restarts=0)
class Worker:
    def __init__(self, at_start=None):
        self.at_start = at_start

    def where(self, code):
        return here()

    def parent(self):
        return os.getppid()

    def ready(self):
        if self.at_start:
            self.at_start()
        return here()

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def die_once(self, marker):
        """Kills its process the first time that any worker is asked."""
        if not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(1)
        return "alive"


use = partial(virtual.use, loop_factory=None)  # in the clock's time


def workers(size=1, worker=Worker, at_start=None, **options):
    spawn = lambda name: RayActor(worker.remote(at_start))  # noqa: E731
    return Pool("worker", spawn, size, **{"minimum": size, "max_restarts": 3} | options)


def test_workers_fork_from_the_process_that_has_loaded_torch():
    parent = ray.get(Worker.remote().parent.remote())
    assert "serve" in psutil.Process(parent).cmdline()


def test_a_dead_actor_is_replaced_and_its_call_sent_again(tmp_path):
    pool = workers()
    assert use(pool, lambda: pool.call("die_once", str(tmp_path / "marker"), priority=(0,)))[1] == "alive"
    assert (pool.actors.restarts.total, pool.retried.total) == (1, 1)


def test_a_stopped_process_is_found_by_what_its_peers_take(monkeypatch):
    monkeypatch.setattr(limits, "MIN_TIMEOUT_S", 2.0)
    pool = workers(size=2)

    async def body():
        await pool.actors.wait_ready()
        await asyncio.gather(*(pool.call("sleep", 0.1, priority=(0,)) for _ in range(6)))
        os.kill(pool.actors.places["worker-0"].pid, signal.SIGSTOP)
        start = time.monotonic()
        await asyncio.gather(*(pool.call("sleep", 0.1, priority=(0,)) for _ in range(6)))
        return time.monotonic() - start

    assert use(pool, body) < 30
    assert pool.actors.hung.total == 1


def test_a_node_with_another_version_of_the_code_is_refused(monkeypatch):
    """An upgrade of the image on a standing cluster leaves pods with the older one."""
    monkeypatch.setattr(supervision, "code_version", lambda: "0.0.9, sources 0123456789ab")
    pool = Pool("reward", lambda name: RayActor(RewardActor.remote(name, load_config().rewards["preference"])), 1)
    told = f"g2rpo_ray {code_version()}, the run has 0.0.9, sources 0123456789ab: give all nodes one image"
    with pytest.raises(PoolStopped, match=re.escape(told)) as caught:
        use(pool, pool.actors.wait_ready)
    assert "\n" not in str(caught.value)


def test_a_process_that_ends_itself_in_its_start_stops_the_pool_soon():
    pool = workers(max_restarts=100, at_start=partial(sys.exit, 3))
    with pytest.raises(PoolStopped, match="worker-1 failed to start, 2 times in a row: .* exit code 3"):
        use(pool, pool.actors.wait_ready)


def test_an_actor_that_finds_no_place_is_named_in_time():
    nowhere = Worker.options(resources={"nowhere": 1})
    pool = workers(worker=nowhere, patience_s=0.5, resources={"nowhere": 1, "CPU": 1})
    told = r"0 of 1 .* after 1 s, .*startup_timeout_s; each needs 1 nowhere \(0 free of 0\), 1 CPU \(2 free of 2\)"
    with pytest.raises(PoolStopped, match=told):
        use(pool, pool.actors.wait_ready)


def test_an_actor_above_the_minimum_gives_its_place_to_what_the_run_needs(monkeypatch):
    """On two CPUs."""
    monkeypatch.setattr(priority, "GIVE_WAY_AFTER_S", 1.0)
    options = {"worker": Worker.options(num_cpus=1), "minimum": 1, "resources": {"CPU": 1}}
    pool, server = workers(2, **options), workers(1, **options)

    async def body():
        while len(pool.actors.places) < 2:
            await asyncio.sleep(0.1)
        async with asyncio.TaskGroup() as group:
            server.start(group)
            room = group.create_task(make_room([server.actors], [pool.actors]))
            await server.actors.wait_ready()
            room.cancel()
            server.stop()
        return len(pool.actors.places)

    assert use(pool, lambda: asyncio.wait_for(body(), 120)) == 1


@ray.remote(num_cpus=0)
class Owner:
    def put(self, value):
        return [ray.put(value)]

    def pid(self):
        return os.getpid()


def test_an_object_lost_with_its_owner_is_told_and_not_taken_for_a_failed_score():
    """What made the object can make it again: nobody must count its scores as missing."""
    config = RewardConfig(kind="tests.support.faulty:build")
    pool = Pool("reward", lambda name: RayActor(RewardActor.remote(name, config)), 1)
    owner, subject = Owner.remote(), Scorer("reward", config, pool, [], {})
    (images,) = ray.get(owner.put.remote(IMAGES))
    pid = ray.get(owner.pid.remote())
    ray.kill(owner)
    while psutil.pid_exists(pid):
        time.sleep(0.05)
    with pytest.raises(ray.exceptions.RayError) as lost:
        use(pool, lambda: subject.score([images], 10, "x"))
    assert is_lost_object(lost.value)
    assert subject.missing.total == 0

    async def keep(keeper):
        there = ray.put(IMAGES)
        return await asyncio.gather(*map(keeper.keep, [there, images, there]), return_exceptions=True)

    first, gone, last = with_keeper(keep)
    assert (first, is_lost_object(gone), last) == (None, True, None)


def with_keeper(body):
    async def main():
        keeper = Keeper(ray.get_runtime_context().get_node_id(), 60)
        try:
            return await body(keeper)
        finally:
            keeper.stop()

    return asyncio.run(main())


def test_a_fetching_process_that_stands_still_starts_again(monkeypatch):
    monkeypatch.setattr(limits, "MIN_TIMEOUT_S", 1.0)

    async def body(keeper: Keeper):
        await keeper.keep(ray.put(1))
        pid = ray.get(keeper._fetcher.pid.remote())
        os.kill(pid, signal.SIGSTOP)
        await keeper.keep(ray.put(2))  # given up: the update fetches it
        await keeper.keep(ray.put(3))
        return pid, ray.get(keeper._fetcher.pid.remote())

    before, after = with_keeper(body)
    assert before != after


def test_parts_of_one_answer_come_from_one_request():
    """Three rewards of UnifiedReward 2.0, one actor, and one request for each picture."""
    with chat_server(module="tests.unit.test_judges") as url:
        parts = ("alignment", "coherence", "style")
        options = {"base_urls": url, "timeout": 20.0}
        rewards = {
            part: {"kind": "unified_reward_2", "resources": {}, "options": {**options, "part": part}} for part in parts
        }
        config = load_config(None, [f"rewards={json.dumps(rewards)}", "eval_rewards={}", "rewards.preference=null"])
        scorers = make_scorers(config, [], {})
        assert len({id(subject.pool) for subject in scorers.values()}) == 1
        images = np.zeros((3, 4, 4, 3), np.uint8)
        images[..., 1] = 51

        async def scores():
            ref = ray.put(images)
            return await asyncio.gather(*(subject.score([ref], 3, "a lawn") for subject in scorers.values()))

        found = use(scorers["style"].pool, scores)
        with urlopen(f"{url}/log") as answer:
            assert len(json.load(answer)["requests"]) == 3
    np.testing.assert_allclose(found, [[1] * 3, [1.8] * 3, [1] * 3], rtol=1e-6)


@pytest.mark.parametrize(("environment", "reason"), [("conda: none", "conda"), ("image_uri: localhost/none", "podman")])
def test_an_environment_that_can_not_be_made_ends_the_start(environment, reason):
    """There is neither conda nor podman on the machines that test this."""
    if shutil.which(reason):
        pytest.skip(f"{reason} is here")
    config = load_config(None, [f"rewards.preference.runtime_env={{{environment}}}"])
    pool = make_scorers(config, [], {})["preference"].pool
    said = rf"reward preference-\d failed to start, 2 times in a row: its runtime_env could not be created: .*{reason}"
    with pytest.raises(PoolStopped, match=said) as caught:
        use(pool, pool.actors.wait_ready)
    assert "\n" not in str(caught.value)


def test_every_actor_that_computes_has_the_environment_of_its_section():
    """Shown by one that cannot be made; that of the rewards is above."""
    if shutil.which("conda"):
        pytest.skip("conda is here")
    config = load_config(None, [f"{section}.runtime_env={{conda: none}}" for section in ("rollout", "learner")])
    cannot, pool = "its runtime_env could not be created: .*conda", _rollout_pool(config)
    with pytest.raises(PoolStopped, match=rf"rollout-\d failed to start, 2 times in a row: {cannot}"):
        use(pool, pool.actors.wait_ready)
    with pytest.raises(ray.exceptions.RuntimeEnvSetupError, match="conda"):
        asyncio.run(Embeddings(config, "unused").encode(["a red circle"]))

    with pytest.raises(LearnerLost, match=cannot):
        asyncio.run(LearnerGroup(config).start(60))


def test_models_are_fetched_where_actors_will_need_them_with_their_environment(tmp_path):
    """And not on nodes that have not what the actors reserve."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "HPS.pt").write_bytes(b"weights")
    home, said = tmp_path / "home", []
    with serve_hub({"tiny/hps": tmp_path / "repo"}) as hub:
        environment = {"env_vars": {"HF_HOME": str(home), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}}

        def rewards(checkpoint, resources):
            options = {"checkpoint": checkpoint, "architecture": "embedded:preference.json"}
            reward = {"kind": "hpsv2", "options": options, "resources": resources, "runtime_env": environment}
            return load_config(None, [f"rewards.preference={json.dumps(reward)}"])

        asyncio.run(fetch_models(rewards("tiny/hps:HPS.pt", {"CPU": 99}), said.append))
        assert not home.exists()
        asyncio.run(fetch_models(rewards("tiny/hps:HPS.pt", {"CPU": 1}), said.append))
        assert [path.read_bytes() for path in home.rglob("HPS.pt")] == [b"weights"]
        assert said[-2] == "fetching tiny/hps:HPS.pt, where not in the cache, on 1 nodes"
        with pytest.raises(
            ValueError, match=r"^rewards.preference.options.checkpoint: cannot download tiny/hps:none.pt"
        ):
            asyncio.run(fetch_models(rewards("tiny/hps:none.pt", {"CPU": 1}), said.append))


@pytest.mark.parametrize("error", ["AcceleratorError", "OutOfMemoryError", "DistBackendError"])
def test_an_error_that_sticks_to_its_process_is_a_fault(error):
    reward = build_breaking(error, after=2)
    assert with_memory(lambda: reward.score(IMAGES, [])).tolist() == list(range(10))
    with pytest.raises(DeviceFault, match=error):
        with_memory(lambda: reward.score(IMAGES, []))


def test_memory_that_was_too_small_is_tried_once_more_and_at_a_start_the_settings_fault():
    reward = build_breaking("OutOfMemoryError", after=1, times=1)
    assert with_memory(lambda: reward.score(IMAGES, [])).tolist() == list(range(10))
    with pytest.raises(torch.OutOfMemoryError), device_faults(memory=False):
        build_breaking("OutOfMemoryError", after=1).score(IMAGES, [])


def test_a_device_that_failed_twice_is_kept_from_other_actors_until_the_end(tmp_path, caplog):
    """Once in a start, once in a call."""
    options = {"error": "AcceleratorError", "after": 1, "at_start": str(tmp_path / "failed")}
    config = {"kind": "tests.support.faulty:build_breaking", "options": options, "resources": {"GPU": 1}}
    sets = [f"rewards={{x: {json.dumps(config)}}}", "rewards.preference=null", "eval_rewards={}"]
    subject = make_scorers(load_config(None, sets), [], {})["x"]
    actors = subject.pool.actors
    free = lambda: ray.available_resources().get("GPU", 0)  # noqa: E731

    async def twice():
        scores = asyncio.ensure_future(subject.score([ray.put(IMAGES)], 10, "x"))
        while actors.restarts.total < 2:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)  # long enough for Ray to give a device that is free to the third
        scores.cancel()
        return free(), len(actors.places), subject.pool.retried.total

    assert use(subject.pool, twice) == (0, 0, 1)
    assert re.search(r"GPU 0 of node \w+ failed 2 times and is not used again", caplog.text)
    while not free():
        time.sleep(0.1)


def test_a_node_whose_gpus_torch_cannot_use_is_named():
    if torch.cuda.device_count():
        pytest.skip("there is a GPU here")
    assert check_cuda(load_config()) == []  # no actor needs one
    with pytest.raises(ValueError, match=r"^CUDA does not work on [\d.]+: torch finds no GPU, although Ray"):
        check_cuda(load_config(None, ["rollout.resources={GPU: 1}"]))


@pytest.mark.parametrize(("deterministic", "score"), [("true", 3), ("false", 1)])
def test_a_reward_computes_in_float32_and_by_default_deterministically(deterministic, score):
    rewards = "rewards={x: {kind: 'tests.support.faulty:build_arithmetic', resources: {}}}"
    sets = [rewards, "rewards.preference=null", "eval_rewards={}", f"deterministic={deterministic}"]
    subject = make_scorers(load_config(None, sets), [], {})["x"]
    assert use(subject.pool, lambda: subject.score([ray.put(IMAGES)], 10, "x")).tolist() == [score] * 10


def test_weights_that_are_not_what_was_published_are_refused():
    config = load_config()
    transformer = FlowModel.load(config.model, "cpu", transformer=True).transformer
    add_lora(transformer, config.lora, seed=0)
    state = lora_state(transformer)
    good = manifest_of(state, version=3)
    actor = RolloutActor.options(num_cpus=0).remote("rollout-0", config)
    ray.get([actor.where.remote(code_version()), actor.ready.remote()])
    unit = BranchUnit(0, 0, "a red circle", 0, 0, 8)

    def compute(manifest, tensors):
        weights = PublishedWeights(manifest, ray.put(tensors))
        return ray.get(actor.compute.remote(unit, weights, None, None))

    fewer = dict(list(state.items())[1:])
    other = {**state, min(state): state[min(state)] + 1}
    for tensors in (fewer, other):
        with pytest.raises(ray.exceptions.RayTaskError, match="LoRA version 3: received"):
            compute(good, tensors)
    with pytest.raises(ray.exceptions.RayTaskError, match="checksum"):
        compute(replace(good, checksum="0" * 64), state)


def test_a_ray_that_starts_too_slowly_is_started_again():
    """Ray's first start leaves a process, and says what it says on a busy machine."""
    program = (
        "import subprocess, sys, ray\n"
        "from g2rpo_ray.actors import cluster\n"
        "real, left = ray.init, []\n"
        "def slow(**options):\n"
        "    if not left:\n"
        "        left.append(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']))\n"
        "        raise Exception('The current node timed out during startup. This could happen because')\n"
        "    return real(**options)\n"
        "ray.init = slow\n"
        "with cluster.cluster(None) as private: print(private, left[0].wait(60), ray.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "True -9 True\n"
