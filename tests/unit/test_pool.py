"""Dispatch, supervision and time limits of a pool: no Ray, in virtual time. On Ray: tests/cluster/test_actors.py."""

import asyncio
import math

import pytest
from ray.exceptions import RayActorError, RuntimeEnvSetupError

from g2rpo_ray.actors.pool import limits
from g2rpo_ray.actors.pool.device_faults import DeviceFault
from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.actors.pool.limits import Hung, Patience, Starts, now, within
from g2rpo_ray.actors.pool.priority import make_room
from g2rpo_ray.actors.pool.supervision import MAX_STARTING, PoolStopped
from tests.support.virtual import FakeActor, no_news, use


class Worker(FakeActor):
    slow = 1.0

    def __init__(self, name):
        super().__init__(name)
        self.done = []

    async def work(self, value):
        self.done.append(value)
        return value

    async def history(self):
        return self.done

    async def sleep(self, seconds):
        await asyncio.sleep(seconds * self.slow)
        return self.name

    async def die(self, *_):
        await asyncio.sleep(2)
        self.end()
        await asyncio.sleep(0)

    async def fail(self):
        raise KeyError("a mistake in the call")


class Mortal(Worker):
    sleep = work = Worker.die


class Stuck(Worker):
    async def sleep(self, seconds):
        await asyncio.sleep(math.inf)

    work = sleep


class Nowhere(Worker):
    async def where(self, code):
        await asyncio.sleep(math.inf)


def pool_of(size=1, kinds=None, spawn=None, **options):
    """Workers; `kinds` are others, by name."""
    given = {"minimum": size, "max_restarts": 20, "wanted": no_news} | options
    return Pool("worker", spawn or (lambda name: (kinds or {}).get(name, Worker)(name)), size, **given)


def call(pool, method, *args, priority=(0,), **options):
    return asyncio.ensure_future(pool.call(method, *args, priority=priority, **options))


async def values(*calls):
    return [value for _, value in await asyncio.gather(*calls)]


def counted(pool):
    return pool.actors.hung.total, pool.actors.restarts.total, pool.retried.total


def test_the_most_urgent_call_goes_first_and_the_oldest_of_equals():
    pool = pool_of()

    async def body():
        await pool.actors.wait_ready()
        calls = [call(pool, "work", n, priority=p) for n, p in enumerate([(2,), (1,), (0, 5), (1,), (0, 3)])]
        await asyncio.gather(*calls)
        return (await call(pool, "history", priority=(9,)))[1]

    assert use(pool, body) == [0, 4, 2, 1, 3]  # the idle actor took the first call when it was alone


def test_an_actor_has_one_call_and_an_urgent_one_overtakes_those_that_wait():
    pool = pool_of()

    async def body():
        await pool.actors.wait_ready()
        calls = [call(pool, "sleep", 1.0, priority=(1,)) for _ in range(50)]
        await asyncio.sleep(0.5)
        await pool.call("sleep", 1.0, priority=(0,))
        return now(), sum(call.done() for call in calls)

    assert use(pool, body) == (3.0, 1)  # a second of start, the call under way, and its own


def test_idle_actors_work_side_by_side():
    pool = pool_of(size=2)

    async def body():
        await values(call(pool, "sleep", 1.0), call(pool, "sleep", 1.0))
        return now()

    assert use(pool, body) == 2.0


def test_a_dead_actor_is_replaced_and_its_call_sent_again():
    pool = pool_of(kinds={"worker-0": Mortal})
    assert use(pool, lambda: pool.call("sleep", 1.0, priority=(0,))) == ([], "worker-1")
    assert counted(pool) == (0, 1, 1)
    assert pool.lost_seconds.total == 2.0
    assert (pool.actors.restarts.take(), pool.actors.restarts.take()) == (1, 0)


def test_too_many_deaths_stop_the_pool():
    pool = pool_of(max_restarts=1)
    with pytest.raises(PoolStopped, match="more deaths than max_restarts=1"):
        use(pool, lambda: pool.call("die", priority=(0,)))


def test_a_mistake_in_a_call_reaches_who_made_it_and_the_actor_lives_on():
    pool = pool_of()

    async def body():
        with pytest.raises(KeyError, match="a mistake"):
            await pool.call("fail", priority=(0,))
        return await pool.call("sleep", 1.0, priority=(0,))

    assert use(pool, body) == ([], "worker-0")
    assert counted(pool) == (0, 0, 0)


def test_calls_wait_while_too_much_is_unused():
    pool = pool_of(max_unused=3)

    async def body():
        calls = [call(pool, "work", n, priority=(n,)) for n in range(5)]
        await asyncio.sleep(10)
        before = [call.done() for call in calls]
        pool.used()
        await asyncio.sleep(10)
        return before, [call.done() for call in calls]

    assert use(pool, body) == ([True] * 3 + [False] * 2, [True] * 4 + [False])


def test_calls_that_nobody_waits_for_any_more_use_up_no_room():
    """As when the learner is lost in mid-iteration, again and again."""
    pool = pool_of(size=2, max_unused=2)

    async def body():
        await pool.actors.wait_ready()
        for _ in range(3):
            calls = [call(pool, "sleep", 1.0) for _ in range(5)]
            await asyncio.sleep(0.5)
            for one in calls:
                one.cancel()
            await asyncio.wait(calls)
        await asyncio.sleep(1)
        return pool._unused, await values(*(call(pool, "sleep", 1.0) for _ in range(2)))

    assert use(pool, body) == (0, ["worker-0", "worker-1"])


def test_a_call_that_is_cancelled_as_it_is_done_uses_up_no_room():
    pool = pool_of(max_unused=1)

    async def body():
        await pool.actors.wait_ready()
        one = call(pool, "sleep", 1.0)
        await asyncio.sleep(0.5)
        (answer,) = pool.actors.members[0].actor.waiting
        answer.add_done_callback(lambda _: one.cancel())  # after the pool's own: the caller does not know yet
        await asyncio.wait([one])
        return one.cancelled(), pool._unused

    assert use(pool, body) == (True, 0)


def test_a_pool_grows_and_shrinks_while_it_works():
    pool = pool_of(max_unused=2)

    async def body():
        await pool.actors.wait_ready()
        pool.actors.resize(3)
        await asyncio.sleep(2)
        busy = [call(pool, "sleep", 1.0) for _ in range(3)]
        await asyncio.sleep(0.5)
        pool.actors.resize(1)  # all are busy: two leave when they are done
        there = len(pool.actors.places)
        answers = await values(*busy)  # none idle, though they are more than max_unused
        for _ in busy:
            pool.used()
        await asyncio.sleep(0.5)
        return there, len(pool.actors.places), answers, await values(call(pool, "work", 1))

    assert use(pool, body) == (3, 1, ["worker-0", "worker-1", "worker-2"], [1])
    assert counted(pool) == (0, 0, 0)


def test_idle_actors_and_those_without_a_place_leave_first():
    pool = pool_of(size=4, minimum=1, kinds={"worker-1": Nowhere})

    async def body():
        await asyncio.sleep(2)
        busy = call(pool, "sleep", 9.0)
        await asyncio.sleep(1)
        pool.actors.resize(2)
        first = set(pool.actors.places)
        pool.actors.resize(1)
        return first, set(pool.actors.places), await values(busy)

    first, second, (busy,) = use(pool, body)
    assert len(first) == 2
    assert second == {busy} < first


def test_an_actor_that_dies_over_its_last_call_is_not_replaced():
    pool = pool_of(size=2, kinds={"worker-0": Mortal, "worker-1": Mortal})

    async def body():
        await pool.actors.wait_ready()
        calls = [call(pool, "sleep", 1.0) for _ in range(2)]
        await asyncio.sleep(1)
        pool.actors.resize(0)
        await asyncio.sleep(10)
        counts = counted(pool)
        pool.actors.resize(1)
        return counts, await values(*calls)

    assert use(pool, body) == ((0, 0, 2), ["worker-2"] * 2)


def test_missing_actors_are_asked_for_some_at_a_time():
    asked = []

    def spawn(name):
        asked.append(name)
        return Nowhere(name)

    pool = pool_of(4096, spawn=spawn, minimum=1, patience_s=10)
    with pytest.raises(PoolStopped, match="0 of 1 actors ready after 11 s, longer than startup_timeout_s; nothing is"):
        use(pool, pool.actors.wait_ready)
    assert len(asked) == MAX_STARTING
    many = pool_of(100)

    async def body():
        await many.actors.wait_ready()
        return now(), len(many.actors.places)

    assert use(many, body) == (4.0, 100)


def test_actors_on_a_node_that_is_about_to_go_move_at_once():
    class There(Worker):
        node = "there"

    class Starting(There):
        start_s = 50.0

    pool = pool_of(size=3, minimum=2, kinds={"worker-1": There, "worker-2": Starting})

    async def body():
        await pool.actors.wait_ready()
        calls = [call(pool, "sleep", 5.0) for _ in range(2)]
        await asyncio.sleep(1)
        pool.actors.leave({"there"})
        return await values(*calls), sorted(pool.actors.places)

    assert use(pool, body) == (["worker-0", "worker-3"], ["worker-0", "worker-3", "worker-4"])
    assert counted(pool) == (0, 0, 1)
    assert pool.lost_seconds.total == 1.0


def test_an_idle_actor_that_ended_gets_no_call():
    class There(Worker):
        node = "there"

    pool = pool_of(kinds={"worker-0": There})

    async def body():
        await asyncio.sleep(2)
        pool.actors.leave({"there"})
        return await values(call(pool, "sleep", 1.0))

    assert use(pool, body) == ["worker-1"]
    assert counted(pool) == (0, 0, 0)


# starts


def failing(error, times=math.inf):
    """Spawns workers whose first starts fail."""
    count = iter(range(1000))

    class Fails(Worker):
        async def ready(self):
            self.end(error()) if callable(error) else None
            await asyncio.sleep(0)
            raise error

    return lambda name: (Fails if next(count) < times else Worker)(name)


def test_a_start_that_fails_twice_for_one_reason_stops_the_pool():
    pool = pool_of(spawn=failing(ValueError("no model here")))
    with pytest.raises(PoolStopped, match="worker-1 failed to start, 2 times in a row: no model here"):
        use(pool, pool.actors.wait_ready)


def test_a_start_that_fails_once_is_made_again():
    pool = pool_of(spawn=failing(OSError("the hub does not answer"), times=1))
    assert use(pool, lambda: pool.call("work", 7, priority=(0,))) == ([], 7)
    assert pool.actors.restarts.total == 1


def test_starts_that_fail_for_one_reason_stop_the_pool_only_in_a_row():
    kinds = iter([1, 0, 1, 0])
    fails = failing(OSError("the hub does not answer"))
    pool = pool_of(spawn=lambda name: fails(name) if next(kinds) else (Mortal if name == "worker-1" else Worker)(name))
    assert use(pool, lambda: pool.call("sleep", 1.0, priority=(0,))) == ([], "worker-3")
    assert pool.actors.restarts.total == 3


def died(detail):
    return lambda: RayActorError(error_msg=f"The actor died.\nWorker exit detail: {detail}")


@pytest.mark.parametrize(
    ("error", "starts"),
    [
        (died("The worker ended with exit code 3."), 2),
        (lambda: RuntimeEnvSetupError("Error: no conda"), 2),
        (lambda: RayActorError(error_msg="ValueError: no", actor_init_failed=True), 2),
        (died("The connection was lost."), 5),
    ],
    ids=["exit", "environment", "constructor", "crash"],
)
def test_processes_that_end_in_their_start_stop_the_pool_soon(error, starts):
    pool = pool_of(spawn=failing(error))
    with pytest.raises(PoolStopped, match=f"failed to start, {starts} times in a row"):
        use(pool, pool.actors.wait_ready)
    assert pool.actors.restarts.total == starts - 1


@pytest.mark.parametrize(
    "error",
    [lambda: RayActorError(error_msg="its node has died"), lambda: RayActorError(preempted=True)],
    ids=["killed", "preempted"],
)
def test_a_start_whose_node_goes_says_nothing_of_the_next_one(error):
    pool = pool_of(spawn=failing(error, times=10))
    use(pool, pool.actors.wait_ready)
    assert pool.actors.restarts.total == 10


def test_a_start_that_hangs_is_replaced_and_one_that_waits_for_a_place_is_not():
    """Ten times what others took; the resources may be those of a machine to come."""

    class Usual(Worker):
        start_s = 12.0

    class Hangs(Worker):
        start_s = math.inf

    class Slow(Worker):
        start_s = 110.0

    kinds = {"worker-1": Hangs, "worker-2": Nowhere, "worker-3": Slow}
    pool = pool_of(size=6, minimum=1, spawn=lambda name: kinds.get(name, Usual)(name), patience_s=200)

    async def body():
        await asyncio.sleep(119)
        before = {member.name for member in pool.actors.members}
        await asyncio.sleep(15)
        return before, {member.name for member in pool.actors.members}, sorted(pool.actors.places)

    before, after, ready = use(pool, body)
    assert before == {f"worker-{number}" for number in range(6)}
    assert before - after == {"worker-1"}
    assert after - before == {"worker-6"}
    assert set(ready) == after - {"worker-2"}
    assert counted(pool) == (1, 1, 0)


def test_no_start_is_hung_before_one_is_over_or_half_the_limit():
    starts = Starts(600)
    assert starts.hung(1e6) is None
    starts.took(2)
    assert starts.hung(299) is None
    assert starts.hung(301)

    class Slow(Worker):
        start_s = 550.0

    pool = pool_of(size=2, kinds={"worker-0": Slow, "worker-1": Slow}, patience_s=600)
    use(pool, pool.actors.wait_ready)
    assert counted(pool) == (0, 0, 0)


# calls that hang


def test_a_call_that_hangs_costs_its_actor_and_is_retried(caplog):
    pool = pool_of(kinds={"worker-0": Stuck}, hung_after_s=100)
    assert use(pool, lambda: pool.call("sleep", 1.0, priority=(0,)))[1] == "worker-1"
    assert counted(pool) == (1, 1, 1)
    assert 100 < pool.lost_seconds.total < 102
    told, replaced = (r.message for r in caplog.records if "sleep" in r.message and "retried" not in r.message)
    assert "limit 100 s" in told
    assert "hung: no answer" in replaced


@pytest.mark.parametrize(("peers", "after"), [(True, limits.MIN_TIMEOUT_S), (False, 1800.0)])
def test_an_actor_is_hung_by_what_its_peers_take_once_it_has_answered(peers, after):
    class Hangs(Worker):
        async def hang(self):
            await asyncio.sleep(math.inf if self.name == "worker-0" else 1)
            return self.name

    pool = pool_of(spawn=Hangs, peers=peers)

    async def body():
        for _ in range(3):
            await pool.call("sleep", 1.0, priority=(0,))
        began = now()
        return await values(call(pool, "hang")), now() - began

    answer, seconds = use(pool, body)
    assert answer == ["worker-1"]
    assert after < seconds < after + 5
    assert counted(pool) == (1, 1, 1)


def test_the_first_call_of_an_actor_and_one_that_may_wait_have_their_time():
    class Compiles(Worker):
        slow = 900.0

    pool = pool_of(size=2, kinds={"worker-1": Compiles})

    async def body():
        await values(*(call(pool, "sleep", 1.0) for _ in range(9)))
        return await values(call(pool, "sleep", 300.0, min_timeout_s=400.0))

    assert use(pool, body) == ["worker-0"]
    assert counted(pool) == (0, 0, 0)


def test_a_call_that_hangs_everywhere_is_given_up_and_has_twice_the_time_each_time():
    pool = pool_of(spawn=Stuck, hung_after_s=10)

    async def body():
        with pytest.raises(Hung, match="sleep: 3 actors"):
            await pool.call("sleep", 1.0, priority=(0,))
        return now()

    assert 10 + 20 + 40 < use(pool, body) < 10 + 20 + 40 + 9
    assert counted(pool) == (3, 3, 2)
    assert pool._unused == 0


def test_patience_is_the_set_time_until_peers_are_known():
    patience = Patience(1800)
    assert (patience.limit(5), patience.usual(5), patience.ending(5)) == (1800, None, limits.GRACE_S)
    for seconds in (9, 10, 11):
        patience.took(seconds, 2)
    assert patience.usual(4) == 20
    assert patience.limit(4) == 200
    assert patience.limit(0.1) == limits.MIN_TIMEOUT_S
    assert patience.limit(1000) == 1800
    assert patience.ending(4) == 60


# copies


def test_an_idle_actor_repeats_a_late_call_and_the_first_answer_counts():
    class Slow(Worker):
        slow = 10.0

    pool = pool_of(size=2, kinds={"worker-0": Slow}, copies=True, max_unused=4)

    async def body():
        await values(*(call(pool, "sleep", 1.0) for _ in range(4)))
        for _ in range(4):
            pool.used()
        await asyncio.sleep(20)
        pool.copied.take()
        began = now()
        found = await values(*(call(pool, "sleep", 1.0) for _ in range(2)))
        seconds = now() - began
        await asyncio.sleep(20)  # the slow answer comes, too
        return found, seconds

    assert use(pool, body) == (["worker-1", "worker-1"], 2.0)  # 10 without the copy
    assert pool.copied.take() == 1
    assert counted(pool) == (0, 0, 0)
    assert pool._unused == 2  # a copy counts once


def test_a_call_is_not_repeated_where_that_gains_little_or_others_wait():
    pool = pool_of(size=2, copies=True)

    async def body():
        await values(*(call(pool, "sleep", 10.0, cost=10) for _ in range(4)))
        await values(call(pool, "sleep", 15.0, cost=10))  # late by half: it would be done before its copy
        before = pool.copied.total
        await values(call(pool, "sleep", 100.0, cost=10))  # at 20 s it is late, and its copy is no faster
        return before

    assert use(pool, body) == 0
    assert pool.copied.total == 1


def test_the_fastest_idle_actor_repeats_a_late_call_once():
    speeds = {"worker-0": 10.0, "worker-1": 8.0, "worker-2": 1.0, "worker-3": 1.1}

    class Paced(Worker):
        def __init__(self, name):
            super().__init__(name)
            self.slow = speeds[name]

    pool = pool_of(size=4, spawn=Paced, copies=True)

    async def body():
        await values(*(call(pool, "sleep", 1.0) for _ in range(4)))
        await asyncio.sleep(20)
        pool.copied.take()
        began, costs = now(), (20, 10, 1, 10)
        return await values(*(call(pool, "sleep", cost, priority=(0,), cost=cost) for cost in costs)), now() - began

    # worker-3 is idle at 11 s, before worker-2 is at 20 s; worker-1, since 8 s, would take 80
    assert use(pool, body) == (["worker-2", "worker-3", "worker-1", "worker-3"], 22.0)
    assert pool.copied.take() == 1


def test_a_copy_survives_the_death_of_the_other_holder():
    class Dies(Worker):
        async def sleep(self, seconds):
            await asyncio.sleep(seconds)
            if self.name == "worker-0" and now() > 10:
                await asyncio.sleep(3)
                await self.die()
            return self.name

    pool = pool_of(size=2, spawn=Dies, copies=True)

    async def body():
        await values(*(call(pool, "sleep", 1.0) for _ in range(4)))
        await asyncio.sleep(10)
        first = await values(call(pool, "sleep", 4.0, cost=4))
        return first, pool._unused

    assert use(pool, body)[0] == ["worker-1"]
    assert (pool.copied.total, pool.retried.total) == (1, 0)


# devices


def broken(device, *, calls=math.inf, starts=0):
    """Spawns workers on a device; their calls, or their starts, fail with it."""
    left = {"calls": calls, "starts": starts}

    class OnDevice(Worker):
        def _use(self, kind):
            left[kind] -= 1
            if left[kind] >= 0:
                raise DeviceFault("a CUDA error", "node", device(self.name) if callable(device) else device)

        async def ready(self):
            self._use("starts")
            return await super().ready()

        async def work(self, value):
            self._use("calls")
            return value

    return OnDevice


def test_a_device_that_fails_costs_its_actor_and_three_over_one_call_are_its_failure():
    pool = pool_of(spawn=broken("", calls=2))
    assert use(pool, lambda: pool.call("work", 7, priority=(0,))) == ([], 7)
    assert counted(pool) == (0, 2, 2)
    pool = pool_of(spawn=broken(""))
    with pytest.raises(DeviceFault):
        use(pool, lambda: pool.call("work", 7, priority=(0,)))
    assert counted(pool) == (0, 3, 2)
    assert pool._unused == 0


def test_a_start_on_a_bad_device_is_made_again_and_the_same_fault_on_two_devices_stops_the_pool():
    pool = pool_of(spawn=broken("GPU 0", calls=0, starts=2))
    use(pool, pool.actors.wait_ready)
    assert pool.actors.restarts.total == 2
    pool = pool_of(spawn=broken(lambda name: f"GPU {name}", calls=0, starts=2))
    with pytest.raises(PoolStopped, match="worker-1 failed to start, 2 times in a row: a CUDA error"):
        use(pool, pool.actors.wait_ready)


@pytest.mark.parametrize("leaves", [False, True])
def test_an_actor_on_a_device_that_failed_twice_lives_on_until_the_end_or_its_node_goes(leaves):
    made, OnDevice = [], broken("GPU 0", calls=2)

    def spawn(name):
        made.append(OnDevice(name))
        return made[-1]

    pool = pool_of(spawn=spawn)

    async def body():
        await pool.call("work", 7, priority=(0,))
        before = [actor.ended for actor in made]
        if leaves:
            pool.actors.leave({"node"})
        return before, made[1].ended

    assert use(pool, body) == ([True, False, False], leaves)
    assert all(actor.ended for actor in made)


# places


def test_actors_above_the_minimum_give_their_place_to_what_the_run_needs_and_come_back():
    """On two CPUs: three are asked for, two of them are there, and a server that is needed comes late."""

    class Placed(Worker):
        free = None
        placed = False

        async def where(self, code):
            await self.free.acquire()
            self.placed = True
            return await super().where(code)

        def end(self, error=None):
            if self.placed and not self.ended:
                self.free.release()
            super().end(error)

    async def nodes(needs):
        return {"node": {"CPU": 2.0}} if Placed.free.locked() else {}

    options = {"minimum": 1, "resources": {"CPU": 1}, "spawn": Placed}
    pool, server = pool_of(3, **options), pool_of(1, **options)
    pool.actors.name, server.actors.name = "workers", "server"
    Placed.free = asyncio.Semaphore(2)

    async def body():
        await asyncio.sleep(2)
        calls = [call(pool, "sleep", 40.0) for _ in range(2)]  # none is lost
        async with asyncio.TaskGroup() as group:
            server.start(group)
            room = group.create_task(make_room([server.actors, pool.actors], [pool.actors, server.actors], nodes))
            await server.actors.wait_ready()
            found = [now(), len(pool.actors.places)]
            await asyncio.sleep(10)
            found += [len(pool.actors.members)]  # all are asked for again
            room.cancel()
            server.stop()
            await asyncio.sleep(10)
        return [*found, len(pool.actors.places), len(await values(*calls))]

    ready_at, there, asked, later, answers = use(pool, body)
    assert 42 <= ready_at <= 44  # its actor ends with its call
    assert (there, asked, later, answers) == (1, 3, 2, 2)
    assert counted(pool) == counted(server) == (0, 0, 0)


def test_no_actor_that_the_run_needs_gives_way():
    pool = pool_of(5, minimum=3, kinds={"worker-4": Nowhere}, resources={"CPU": 1})

    async def body():
        await asyncio.sleep(2)
        end = [pool.actors.give_way(9, {"node": {"CPU": cpus}}, "x") for cpus in (0.0, 4.0)]
        pool.actors.resize(7)
        await asyncio.sleep(2)
        there = len(pool.actors.members)
        pool.actors.resume()
        return end, there, len(pool.actors.members)

    # one of the two that can be done without had no place, and is withdrawn
    assert use(pool, body) == ([0, 1], 3, 7)


def test_a_cancellation_that_comes_with_the_result_is_not_lost():
    """Else what follows the cluster would go on for ever, and a run that is told to end would wait for it."""

    async def cancelled() -> bool:
        found = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(within(10, "an answer", found))
        await asyncio.sleep(0)
        found.set_result(1)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled())
