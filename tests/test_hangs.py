"""Actors that stand still, are slow, or never start: told, replaced, and nothing lost; a pool alone, over real Ray."""

import asyncio
import os
import re
import signal
import time

import numpy as np
import pytest
import ray

from actors import failures
from actors.crew import STARTING, PoolStopped
from actors.failures import Hung, Patience
from actors.keeper import Keeper
from actors.members import here
from actors.pool import Pool
from actors.reward import RewardActor, Scorer
from g2rpo_ray.config import RewardConfig
from tests.test_actors import cluster, use, with_keeper  # noqa: F401

pytestmark = pytest.mark.cluster


@ray.remote(num_cpus=0, max_restarts=0)
class Worker:
    def __init__(self, slow=1.0):
        self.slow = slow

    def ready(self):
        return here()

    def sleep(self, seconds):
        time.sleep(seconds * self.slow)
        return os.getpid(), os.getpid()

    def hang_once(self, marker):
        if not os.path.exists(marker):
            open(marker, "w").close()
            time.sleep(1000)
        return "back"

    def hang(self):
        time.sleep(1000)


@ray.remote(num_cpus=0, max_restarts=0)
class Stuck(Worker.__ray_metadata__.modified_class):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGSTOP)


def pool(size=1, spawn=lambda name: Worker.remote(), **options):
    return Pool("worker", spawn, size, minimum=size, max_restarts=20, **options)


def test_a_call_that_hangs_costs_its_actor_and_is_sent_again(tmp_path, caplog):
    workers = pool(hung_after_s=2)
    assert use(workers, lambda: workers.call("hang_once", str(tmp_path / "marker"), priority=(0,)))[1] == "back"
    assert (workers.hung.total, workers.restarts.total, workers.retried.total) == (1, 1, 1)
    told, replaced = (r.message for r in caplog.records if "hang_once" in r.message and "sent" not in r.message)
    assert "nobody has done one yet; hung after 2 s" in told
    assert "taken for hung: no answer" in replaced


def test_a_stopped_process_is_found_by_what_its_peers_take(monkeypatch):
    monkeypatch.setattr(failures, "FLOOR_S", 2.0)
    workers = pool(size=2)

    async def body():
        await workers.wait_ready()
        await asyncio.gather(*(workers.call("sleep", 0.1, priority=(0,)) for _ in range(6)))
        os.kill(next(iter(workers.pids.values())), signal.SIGSTOP)
        start = time.monotonic()
        await asyncio.gather(*(workers.call("sleep", 0.1, priority=(0,)) for _ in range(6)))
        return time.monotonic() - start

    assert use(workers, body) < 30
    assert workers.hung.total == 1


def test_an_actor_that_stands_still_in_its_start_is_replaced(tmp_path, caplog):
    """The first of all had time; what waits for resources has, too: they may be those of a machine to come."""
    kinds = {"worker-1": Stuck, "worker-2": Worker.options(resources={"nowhere": 1})}
    workers = pool(size=3, spawn=lambda name: kinds.get(name, Worker).remote(), patience_s=20)
    workers._minimum = 1

    async def body():
        while "worker-3" not in workers.pids:
            await asyncio.sleep(0.5)
        return {member.name for member in workers._members}

    assert use(workers, body) == {"worker-0", "worker-2", "worker-3"}
    assert (workers.hung.total, workers.restarts.total) == (1, 1)
    (line,) = [record.message for record in caplog.records if "hung" in record.message]
    late = r"not ready (\d+) s after its process was there; others took (\d+) s"
    (told,) = re.findall(f"^worker-1 is taken for hung: {late}$", line)
    assert int(told[0]) >= 20 >= int(told[1]) >= 5


def test_what_hangs_everywhere_ends_in_a_line_and_a_score_in_a_missing_one():
    workers = pool(hung_after_s=0.5)
    with pytest.raises(Hung, match="hang: 3 actors hung over it"):
        use(workers, lambda: workers.call("hang", priority=(0,)))
    config = RewardConfig(kind="tests.faulty:build_sleeper", batch_size=4, retries=0)
    servers = Pool("reward", lambda name: RewardActor.remote(name, config), 1, max_restarts=9, hung_after_s=0.5)
    scorer = Scorer("sleeper", config, servers, [], {})
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert np.isnan(use(servers, lambda: scorer.score([ray.put(images)], 2, "x"))).all()
    assert scorer.missing.total == 2


def test_an_idle_actor_does_what_a_slow_one_has_in_hand_and_the_first_answer_counts():
    slow = lambda name: Worker.remote(slow=10.0 if name == "worker-0" else 1.0)  # noqa: E731
    workers = pool(size=2, spawn=slow, copies=True, max_unused=4)

    async def body():
        await workers.wait_ready()
        await asyncio.gather(*(workers.call("sleep", 0.2, priority=(0,)) for _ in range(4)))
        for _ in range(4):
            workers.used()
        start = time.monotonic()
        await asyncio.gather(*(workers.call("sleep", 1.0, priority=(0,)) for _ in range(2)))
        return time.monotonic() - start

    assert use(workers, body) < 6  # 10 without the copy
    assert workers.copied.total >= 1
    assert workers.hung.total == workers.restarts.total == workers.retried.total == 0
    assert workers._unused == 2  # copies count once


def test_calls_that_nobody_waits_for_any_more_use_up_no_room():
    """As when the learner is lost in mid-iteration, again and again."""
    workers = pool(size=2, max_unused=2)

    async def body():
        await workers.wait_ready()
        for _ in range(3):
            calls = [asyncio.ensure_future(workers.call("sleep", 0.2, priority=(0,))) for _ in range(3)]
            await asyncio.sleep(0.1)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
        return await asyncio.wait_for(workers.call("sleep", 0.1, priority=(0,)), 20)

    assert use(workers, body)


def test_missing_actors_are_asked_for_some_at_a_time():
    asked = []

    def spawn(name):
        asked.append(name)
        return Worker.options(resources={"nowhere": 1}).remote()

    workers = Pool("worker", spawn, 4096, patience_s=1)
    with pytest.raises(PoolStopped, match="0 of 1 actors ready"):
        use(workers, workers.wait_ready)
    assert len(asked) == STARTING


def test_a_fetching_process_that_stands_still_starts_again(monkeypatch):
    monkeypatch.setattr(failures, "FLOOR_S", 1.0)

    async def body(keeper: Keeper):
        await keeper.keep(ray.put(1), at_once=True)
        pid = ray.get(keeper._fetcher.pid.remote())
        os.kill(pid, signal.SIGSTOP)
        await keeper.keep(ray.put(2), at_once=True)  # given up: the update fetches it
        await keeper.keep(ray.put(3), at_once=True)
        return pid, ray.get(keeper._fetcher.pid.remote())

    before, after = with_keeper(body)
    assert before != after


def test_patience_is_the_set_time_until_peers_are_known():
    patience = Patience(1800)
    assert (patience.limit(5), patience.usual(5), patience.ending(5)) == (1800, None, failures.ENDING_S)
    for seconds in (9, 10, 11):
        patience.took(seconds, 2)
    assert patience.usual(4) == 20
    assert patience.limit(4) == 200
    assert patience.limit(0.1) == failures.FLOOR_S
    assert patience.limit(1000) == 1800
    assert patience.ending(4) == 60
