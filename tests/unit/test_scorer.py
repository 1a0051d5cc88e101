"""Scores of reward servers: chunks, groups, retries, missing ones. The servers' own code, without Ray's processes."""

import asyncio
import pickle
from functools import cache, partial

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.actors.workers.reward import RewardActor, Scorer
from g2rpo_ray.config import RewardConfig
from g2rpo_ray.data.pictures import with_content, with_sources
from g2rpo_ray.rewards import NotScores
from tests.support.sources import WIDE, write_pictures
from tests.support.virtual import FakeActor, use

IMAGES = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)


class Ref:
    """In place of a reference to an object."""

    def __init__(self, value):
        self.value = value


class Server(FakeActor):
    """A reward actor in this process: its errors come as Ray's, its arguments are resolved."""

    def __init__(self, config, name):
        super().__init__(name)
        self.actor = RewardActor.__ray_metadata__.modified_class(name, config)
        self.actor._place = self._place

    async def ready(self):
        return self.actor.ready()

    async def score(self, *args):
        try:
            return self.actor.score(*(arg.value if isinstance(arg, Ref) else arg for arg in args))
        except Exception as error:
            raise RayTaskError("score", str(error), error).as_instanceof_cause() from None


def scorer(build="", size=1, metadata=None, server=Server, **section):
    config = RewardConfig(kind=f"tests.support.faulty:build{build}", **{"batch_size": 4, "retries": 2} | section)
    pool = Pool("reward faulty", partial(server, config), size, max_restarts=9)
    return Scorer("faulty", config, pool, [], metadata or {})


def scores(subject, images=IMAGES):
    return use(subject.pool, lambda: subject.score([Ref(images)], len(images), "x"))


def test_scores_come_in_the_order_of_the_images_whatever_the_chunks():
    assert np.array_equal(scores(scorer()), np.arange(10))


def test_metadata_of_a_prompt_reaches_a_reward_that_asks_for_it_whatever_the_chunks():
    subject = scorer("_told", 2, {"three": {"count": 3}, "five": {"count": 5}})

    async def body():
        return await asyncio.gather(*(subject.score([Ref(IMAGES)], 10, prompt) for prompt in ("three", "five", "x")))

    three, five, without = use(subject.pool, body)
    assert three.tolist() == [3] * 10
    assert five.tolist() == [5] * 10
    assert np.isnan(without).all()


def test_pictures_of_a_prompt_are_stored_once_with_their_bytes_and_reach_the_reward(tmp_path):
    file, stored = write_pictures(tmp_path)["wide"], []
    prompt = with_sources("x", [file])
    metadata = {prompt: {"source": (file,)}}

    def store(name):
        stored.append(pickle.dumps(with_content(metadata[name])))
        (tmp_path / "pictures" / "wide.png").unlink()  # a server does not see the driver's files
        return Ref(pickle.loads(stored[-1]))

    config, images = RewardConfig(kind="preservation", batch_size=4), np.stack([np.asarray(WIDE)] * 6)
    pool = Pool("reward kept", partial(Server, config), 1, max_restarts=9)
    subject = Scorer("kept", config, pool, [], metadata, pictures=cache(store))

    async def body():
        return [await subject.score([Ref(images)], 6, prompt, what) for what in ("one", "two")]

    assert np.array_equal(use(pool, body, asyncio.new_event_loop), np.ones((2, 6)))  # a thread reads the files
    assert len(stored) == 1


def test_a_reward_of_groups_gets_the_picked_images_of_all_units_at_once():
    subject = scorer("_rank", batch_size=2)
    picks = [(1, 0), (0, 3), (1, 2), (0, 1)]

    async def body():
        await subject.wait_ready()
        return await subject.score([Ref(IMAGES[:5]), Ref(IMAGES[5:])], 4, "x", "group/0/0/0", picks)

    assert use(subject.pool, body).tolist() == [402, 401, 403, 400]
    assert subject.takes_groups


def test_a_failed_score_is_asked_for_again():
    subject = scorer(options={"errors": 2})
    assert np.isfinite(scores(subject)).all()
    assert subject.missing.total == 0


def test_what_stays_failed_is_missing_and_counted_and_never_0():
    subject = scorer(options={"missing": 1})
    found = scores(subject)
    assert np.isnan(found[[1, 5, 9]]).all()
    assert np.isfinite(found).sum() == 7
    assert subject.missing.total == 3
    subject = scorer(options={"errors": 100}, retries=1)
    assert np.isnan(scores(subject)).all()
    assert subject.missing.total == 10


@pytest.mark.parametrize(
    ("value", "given"),
    [("[1.0] * 3", r"\[1.0, 1.0, 1.0\]"), ("None", "None"), ("np.zeros((4, 1))", r"array\(.*\)")],
)
def test_a_reward_that_returns_no_scores_is_told_what_was_expected(value, given):
    subject = scorer(options={"returns": value})
    with pytest.raises(NotScores, match=f"reward faulty: score.. returned {given}; expected 4 numbers, one per image"):
        scores(subject)


class Hangs(Server):
    async def score(self, *args):
        await asyncio.sleep(1e9)


def test_a_score_over_which_every_server_hangs_is_missing():
    subject = scorer(server=Hangs, retries=0)
    assert np.isnan(scores(subject)).all()
    assert (subject.missing.total, subject.pool.actors.hung.total) == (10, 3)


class Waits(Server):
    calls = 0

    async def score(self, *args):
        self.calls += 1
        await asyncio.sleep(390 * (self.calls == 4))
        return await super().score(*args)


@pytest.mark.parametrize(("build", "hung"), [("_waiting", 0), ("", 1)])
def test_a_reward_that_waits_for_somebody_gets_the_time_that_it_says_it_may_need(build, hung):
    """Two questions of 200 s, whatever its peers took."""
    subject = scorer(build, server=Waits)

    async def body():
        await subject.wait_ready()
        images = np.full((2, 4, 4, 3), 7, np.uint8)
        return [(await subject.score([Ref(images)], 2, "x")).tolist() for _ in range(4)]

    assert use(subject.pool, body) == [[7, 7]] * 4
    assert subject.pool.actors.hung.total == hung
