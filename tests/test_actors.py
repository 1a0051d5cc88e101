"""Pools, reward servers and rollout actors on Ray: priorities, deaths, retries, refused weights."""

import asyncio
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import ray

from actors.crew import PoolStopped
from actors.failures import is_lost_object
from actors.keeper import PAUSE_S, Keeper
from actors.members import AHEAD, here
from actors.pool import Pool
from actors.reward import RewardActor, Scorer, make_scorers
from actors.rollout import RolloutActor
from actors.weights import PublishedWeights
from g2rpo_ray.config import RewardConfig, load_config
from g2rpo_ray.models import FlowModel, add_lora, describe, lora_state
from g2rpo_ray.rewards import NotScores
from g2rpo_ray.types import BranchUnit
from tests.test_unified_reward import chat_server

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0, max_restarts=0)
class Worker:
    def __init__(self, fails=False, marker=None, how=None):
        if fails:
            raise ValueError("no model here")
        if marker and not os.path.exists(marker):
            open(marker, "w").close()
            raise OSError("the hub does not answer")
        if how:
            how()
        self.done = []

    def ready(self):
        return here()

    def work(self, value):
        self.done.append(value)
        return value

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def history(self):
        return list(self.done)

    def die_once(self, marker):
        """Kills its process the first time that any worker is asked."""
        if not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(1)
        return "alive"

    def die(self):
        os._exit(1)

    def fail(self):
        raise KeyError("a mistake in the call")


def use(pool, body):
    """Run `body` while the pool serves; an exception group of one is raised as what it holds."""

    async def main():
        async with asyncio.TaskGroup() as group:
            pool.start(group)
            try:
                return await body()
            finally:
                pool.stop()

    try:
        return asyncio.run(main())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def workers(size=1, max_restarts=3, **options):
    return Pool("worker", lambda name: Worker.remote(**options), size, minimum=size, max_restarts=max_restarts)


def test_the_most_urgent_call_goes_first_and_the_oldest_of_equals():
    pool = workers()

    async def body():
        await pool.wait_ready()
        calls = [pool.call("work", n, priority=p) for n, p in enumerate([(2,), (1,), (0, 5), (1,), (0, 3)])]
        await asyncio.gather(*calls)
        return (await pool.call("history", priority=(9,)))[1]

    assert use(pool, body) == [0, 4, 2, 1, 3]  # the idle actor took the first call when it was alone


def test_an_actor_gets_a_second_call_ahead_while_many_are_waiting():
    pool = workers()

    async def body():
        await pool.wait_ready()
        calls = [asyncio.ensure_future(pool.call("sleep", 0.5, priority=(-n,))) for n in range(AHEAD + 4)]
        await asyncio.sleep(0.1)
        late = pool.call("work", 1, priority=(-100,))
        await asyncio.wait_for(late, 30)
        return sum(call.done() for call in calls)

    assert use(pool, body) == 2  # the one under way, and the one in hand


def test_a_dead_actor_is_replaced_and_its_call_sent_again(tmp_path):
    pool = workers()

    async def body():
        return await pool.call("die_once", str(tmp_path / "marker"), priority=(0,))

    assert use(pool, body)[1] == "alive"
    assert (pool.restarts.total, pool.retried.total) == (1, 1)
    assert (pool.restarts.take(), pool.restarts.take()) == (1, 0)


def test_nothing_waits_behind_another_call_when_there_are_few(tmp_path):
    pool = workers(size=2)

    async def body():
        await pool.wait_ready()
        start = time.monotonic()
        await asyncio.gather(*(pool.call("sleep", 1.0, priority=(0,)) for _ in range(2)))
        return time.monotonic() - start

    assert use(pool, body) < 1.9


def test_calls_wait_while_too_much_is_unused():
    pool = Pool("worker", lambda name: Worker.remote(), 2, max_unused=3)

    async def body():
        calls = [asyncio.ensure_future(pool.call("work", n, priority=(n,))) for n in range(5)]
        await asyncio.wait(calls[:3])
        await asyncio.sleep(0.3)
        before = [call.done() for call in calls]
        pool.used()
        await asyncio.wait_for(calls[3], 30)
        return before, calls[4].done()

    assert use(pool, body) == ([True, True, True, False, False], False)


def test_a_pool_grows_and_shrinks_while_it_works():
    pool = workers(size=1)

    async def body():
        await pool.wait_ready()
        pool.resize(3)
        while len(pool.pids) < 3:
            await asyncio.sleep(0.05)
        busy = [asyncio.ensure_future(pool.call("sleep", 1.0, priority=(0,))) for _ in range(3)]
        await asyncio.sleep(0.2)
        pool.resize(1)  # all are busy: two leave when they are done
        answers = await asyncio.gather(*busy)
        await asyncio.sleep(0.1)
        return len(pool.pids), [answer for _, answer in answers], (await pool.call("work", 1, priority=(0,)))[1]

    left, answers, later = use(pool, body)
    assert (left, answers, later) == (1, [1.0] * 3, 1)
    assert pool.restarts.total == pool.retried.total == 0


def test_too_many_deaths_stop_the_pool():
    pool = workers(max_restarts=1)
    with pytest.raises(PoolStopped, match="more deaths than max_restarts=1"):
        use(pool, lambda: pool.call("die", priority=(0,)))


def test_an_actor_that_cannot_start_stops_the_pool_with_its_reason():
    pool = workers(max_restarts=100, fails=True)
    with pytest.raises(PoolStopped, match="worker-1 failed to start, 2 times in a row: ValueError: no model here"):
        use(pool, lambda: pool.wait_ready())


def test_an_actor_that_fails_to_start_once_is_started_again(tmp_path):
    pool = workers(max_restarts=100, marker=str(tmp_path / "marker"))

    async def body():
        await pool.wait_ready()
        return (await pool.call("work", 7, priority=(0,)))[1]

    assert use(pool, body) == 7
    assert pool.restarts.total == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (partial(sys.exit, 3), "worker-1 failed to start, 2 times in a row: .* exit code 3"),
        (partial(os._exit, 3), "worker-4 failed to start, 5 times in a row: .* connection error"),
    ],
    ids=["an exit", "a crash"],
)
def test_an_actor_whose_process_ends_at_start_stops_the_pool_soon(how, reason):
    pool = workers(max_restarts=100, how=how)
    with pytest.raises(PoolStopped, match=reason):
        use(pool, lambda: pool.wait_ready())


def test_an_actor_that_finds_no_place_is_named_in_time():
    nowhere = Worker.options(resources={"nowhere": 1})
    pool = Pool("worker", lambda name: nowhere.remote(), 1, patience_s=0.5, resources={"nowhere": 1, "CPU": 1})
    told = r"0 of 1 .* after 1 s, .*startup_timeout_s; each needs 1 nowhere \(0 free of 0\), 1 CPU \(2 free of 2\)"
    with pytest.raises(PoolStopped, match=told):
        use(pool, lambda: pool.wait_ready())


def test_a_mistake_in_a_call_reaches_who_made_it_and_the_actor_lives_on():
    pool = workers()

    async def body():
        with pytest.raises(KeyError, match="a mistake"):
            await pool.call("fail", priority=(0,))
        return (await pool.call("work", 7, priority=(0,)))[1]

    assert use(pool, body) == 7
    assert pool.restarts.total == 0


@ray.remote(num_cpus=0)
class Owner:
    def put(self, value):
        return [ray.put(value)]

    def pid(self):
        return os.getpid()


def test_an_object_lost_with_its_owner_is_told_and_not_taken_for_a_failed_score():
    """What made the object can make it again: nobody must count its scores as missing."""
    owner, subject = Owner.remote(), scorer()
    (images,) = ray.get(owner.put.remote(IMAGES))
    pid = ray.get(owner.pid.remote())
    ray.kill(owner)
    while psutil.pid_exists(pid):
        time.sleep(0.05)
    with pytest.raises(ray.exceptions.RayError) as lost:
        use(subject.pool, lambda: subject.score([images], 10, "x"))
    assert is_lost_object(lost.value)
    assert subject.missing.total == 0

    async def keep(keeper):
        there = ray.put(IMAGES)
        return await asyncio.gather(*map(keeper.keep, [there, images, there]), return_exceptions=True)

    first, gone, last = with_keeper(keep)
    assert (first, is_lost_object(gone), last) == (None, True, None)


def test_results_are_kept_a_second_s_worth_at_a_time_but_the_last_at_once():
    async def keep(keeper):
        result = ray.put(IMAGES)
        await keeper.keep(result, at_once=True)  # it has started
        start = time.monotonic()
        first = asyncio.ensure_future(keeper.keep(result))
        await asyncio.sleep(PAUSE_S / 4)
        await asyncio.gather(first, keeper.keep(result, at_once=True))
        between = time.monotonic()
        await asyncio.gather(keeper.keep(result), keeper.keep(result))
        return between - start, time.monotonic() - between

    together, alone = with_keeper(keep)
    assert PAUSE_S / 4 < together < PAUSE_S <= alone


def with_keeper(body):
    async def main():
        async with asyncio.TaskGroup() as group:
            keeper = Keeper(ray.get_runtime_context().get_node_id(), group, 60)
            try:
                return await body(keeper)
            finally:
                keeper.stop()

    return asyncio.run(main())


def scorer(retries=2, **options):
    config = RewardConfig(kind="tests.faulty:build", options=options, retries=retries, batch_size=4)
    return Scorer("faulty", config, Pool("reward faulty", lambda name: RewardActor.remote(name, config), 1), [], {})


IMAGES = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


def test_scores_come_in_the_order_of_the_images_whatever_the_chunks():
    subject = scorer()
    scores = use(subject.pool, lambda: subject.score([ray.put(IMAGES)], 10, "x"))
    assert np.array_equal(scores, np.arange(10))


def test_metadata_of_a_prompt_reaches_a_reward_that_asks_for_it_whatever_the_chunks():
    config = RewardConfig(kind="tests.faulty:build_told", batch_size=4)
    pool = Pool("reward told", lambda name: RewardActor.remote(name, config), 2)
    subject = Scorer("told", config, pool, [], {"three": {"count": 3}, "five": {"count": 5}})

    async def scores():
        return await asyncio.gather(
            *(subject.score([ray.put(IMAGES)], 10, prompt) for prompt in ("three", "five", "x"))
        )

    three, five, without = use(pool, scores)
    assert three.tolist() == [3] * 10
    assert five.tolist() == [5] * 10
    assert np.isnan(without).all()


def test_a_reward_of_groups_gets_the_picked_images_of_all_units_at_once():
    config = RewardConfig(kind="tests.faulty:build_rank", batch_size=2)
    pool = Pool("reward rank", lambda name: RewardActor.remote(name, config), 1)
    subject = Scorer("rank", config, pool, [], {})
    picks = [(1, 0), (0, 3), (1, 2), (0, 1)]

    async def scores():
        await subject.wait_ready()
        return await subject.score([ray.put(IMAGES[:5]), ray.put(IMAGES[5:])], 4, "x", "group/0/0/0", picks)

    assert use(pool, scores).tolist() == [402, 401, 403, 400]
    assert subject.takes_groups


def test_parts_of_one_answer_come_from_one_request():
    """Three rewards of UnifiedReward 2.0, one actor, and one request for each picture."""
    with chat_server(module="tests.test_judges") as url:
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
    said = f"reward preference-1 failed to start, 2 times in a row: its runtime_env can't be made: .*{reason}"
    with pytest.raises(PoolStopped, match=said) as caught:
        use(pool, pool.wait_ready)
    assert "\n" not in str(caught.value)


def test_a_failed_score_is_asked_for_again():
    subject = scorer(errors=2)
    assert np.isfinite(use(subject.pool, lambda: subject.score([ray.put(IMAGES)], 10, "x"))).all()
    assert subject.missing.total == 0


def test_what_stays_failed_is_missing_and_counted_and_never_0():
    subject = scorer(missing=1)
    scores = use(subject.pool, lambda: subject.score([ray.put(IMAGES)], 10, "x"))
    assert np.isnan(scores[[1, 5, 9]]).all()
    assert np.isfinite(scores).sum() == 7
    assert subject.missing.total == 3
    subject = scorer(errors=100, retries=1)
    assert np.isnan(use(subject.pool, lambda: subject.score([ray.put(IMAGES)], 10, "x"))).all()
    assert subject.missing.total == 10


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ("[1.0] * 4", "a list"),
        ("None", "a NoneType"),
        ("1.0", "a float"),
        ("np.zeros(3, np.float32)", r"an array of float32 and shape \(3,\)"),
        ("np.zeros(4)", r"an array of float64 and shape \(4,\)"),
    ],
)
def test_a_reward_that_returns_no_scores_is_told_what_was_expected(value, given):
    subject = scorer(returns=value)
    with pytest.raises(NotScores, match=f"reward faulty: score.. returned {given}; expected a numpy array of float32"):
        use(subject.pool, lambda: subject.score([ray.put(IMAGES)], 10, "x"))


def test_weights_that_are_not_what_was_published_are_refused():
    config = load_config()
    transformer = FlowModel.load(config.model, "cpu", transformer=True).transformer
    add_lora(transformer, config.lora, seed=0)
    state = lora_state(transformer)
    good = describe(state, version=3)
    actor = RolloutActor.options(num_cpus=0).remote("rollout-0", config)
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
