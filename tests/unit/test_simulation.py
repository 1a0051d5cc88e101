"""The simulation of a run: small cases by hand, and the real pools and collector in virtual time. No Ray."""

import asyncio
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from g2rpo_ray.actors.collector import Collector
from g2rpo_ray.actors.pool.dispatch import Pool
from g2rpo_ray.actors.pool.limits import now
from g2rpo_ray.actors.pool.order import PREFETCH_S
from g2rpo_ray.actors.workers.reward import Scorer
from g2rpo_ray.config import load_config
from g2rpo_ray.rehearsal.simulation import heldout_s, simulate, update_s
from g2rpo_ray.rehearsal.times import Times, of_batch, pieces
from g2rpo_ray.rollout.plan import branch_part, prompt_tree, trunk_part
from g2rpo_ray.types import Span, TrunkUnit, UnitReport, WeightsManifest
from tests.support.virtual import FakeActor, VirtualLoop

THREE_UNITS = {  # a trunk of 4 evaluations, and units of 6 and 4: two children of 3 each, and two of 2 each
    "data.prompts_per_iteration": 1, "sampler.steps": 4, "sampler.branch_steps": [0, 1], "sampler.strides": [1],
    "sampler.group_size": 2, "rollout.micro_batch": 1, "eval_rewards": {},
}  # fmt: skip
A_SECOND = Times({1: 1.0}, {1: 0.0}, {1: 5.0}, step=0.5, publish=0.25)


def three_units(**settings):
    return load_config(None, **THREE_UNITS | {key.replace("__", "."): value for key, value in settings.items()})


def test_three_units_on_two_actors_by_hand():
    found = simulate(three_units(rollout__max_actors=2), A_SECOND)
    rollout = 4 + 6 + PREFETCH_S
    assert found.rollout_s == pytest.approx(rollout)
    assert found.update_s == pytest.approx(2 * (5 + 0.5))  # a state each, at two schedule indices
    assert found.iteration_s == pytest.approx(rollout + 11 + 0.25)
    assert found.work_s == 14
    time = 2 * found.iteration_s
    assert found.busy["rollout"] == pytest.approx(14 / time)
    assert found.busy["learner"] == pytest.approx(11.25 / found.iteration_s)
    waits = {"the update": 2 * 11.25, "trunks": 4, "the last units": 2, "scores": 2 * PREFETCH_S}
    assert found.waits == pytest.approx({reason: seconds / time for reason, seconds in waits.items()})
    assert sum(found.waits.values()) + found.busy["rollout"] == pytest.approx(1)


def test_one_actor_does_them_one_after_the_other():
    assert simulate(three_units(rollout__max_actors=1), A_SECOND).rollout_s == pytest.approx(14 + PREFETCH_S)


def test_actors_that_share_a_core_are_half_as_fast():
    found = simulate(three_units(rollout__max_actors=2), replace(A_SECOND, cores=1))
    assert found.rollout_s == pytest.approx(4 + 2 * 4 + 2 + PREFETCH_S)  # both, then the longer one alone


def test_the_driver_takes_one_result_at_a_time():
    """Two children of 3 and two of 2 on four actors: each result is taken in .5 s, and frees its actor then."""
    settings = {"rollout__max_actors": 4, "rollout__members_per_unit": 1, "rewards__preference__resources": {}}
    found = simulate(three_units(**settings), replace(A_SECOND, call=0.5))
    taken = [4 + 0.5, 4.5 + 2 + 0.5, 4.5 + 2 + 1.0, 4.5 + 3 + 0.5, 4.5 + 3 + 1.0]
    assert found.rollout_s == pytest.approx(taken[-1] + PREFETCH_S)
    assert found.update_s == pytest.approx(11 + 0.5)
    assert found.iteration_s == pytest.approx(taken[-1] + PREFETCH_S + 11.5 + 0.25 + 0.5)


def test_batches_decoding_and_what_a_unit_takes_besides():
    """Batches of 2: each child's path beside the other's. Five images, at most two in a pass of the VAE."""
    times = Times({1: 1.0, 2: 1.5}, {1: 0.1, 2: 0.16}, {1: 0.0}, unit=0.01, receive=0.02)
    found = simulate(three_units(rollout__micro_batch=2, rollout__decode_batch=2), times)
    units = (4 + 0.1, 3 * 1.5 + 0.16, 2 * 1.5 + 0.16)
    assert found.work_s == pytest.approx(sum(units) + 3 * 0.01)
    assert simulate(three_units(rollout__micro_batch=2, rollout__decode_batch=2), times.scaled(2)).work_s == (
        pytest.approx(2 * found.work_s)
    )


def test_batches_between_known_sizes_are_interpolated():
    table = {2: 1.0, 4: 1.5}
    assert [of_batch(table, size) for size in (1, 2, 3, 4, 8)] == [0.5, 1.0, 1.25, 1.5, 3.0]
    assert pieces(7, 3) == [3, 3, 1]


def test_slow_reward_servers_hold_the_rollout_up():
    """A server takes 10 s an image; with two results unused, the third unit begins when the first one is scored."""
    config = three_units(rollout__max_actors=1, rollout__max_unscored_units=1)
    found = simulate(config, replace(A_SECOND, scores={"preference": 10.0}))
    # trunk 0-4, scored 14; the first branch unit 4-10, its images scored 14-34; the second one from 14 to 18, 34-54
    assert found.rollout_s == pytest.approx(54)
    assert found.waits["scores"] == pytest.approx((4 + 36) / found.iteration_s)
    assert found.busy["preference"] == pytest.approx(50 / found.iteration_s)


def test_a_rollout_that_is_a_version_behind_is_sampled_during_the_update():
    config = three_units(rollout__max_actors=1, rollout__max_staleness=1)
    found = simulate(config, A_SECOND)
    assert found.iteration_s == pytest.approx(14 + PREFETCH_S, abs=2 * PREFETCH_S)  # the actor is always busy
    assert found.busy["rollout"] > 0.98
    slow = simulate(config, replace(A_SECOND, states={1: 50.0}))
    assert slow.iteration_s == pytest.approx(2 * 50.5 + 0.25)  # the learner is


def test_the_store_holds_images_until_they_are_scored_and_latents_until_the_update():
    config = three_units(rollout__max_actors=1)
    tree, pixels = prompt_tree(config, 0, 0, ""), 32 * 32
    latents = 2 * 2 + sum(  # a trunk leaves latents and velocities at its branch points
        len(branch_part(tree, SimpleNamespace(branch_step=step, first_member=0, members=2)).touched) for step in (0, 1)
    )
    weights = 3 * 8 * 2**20 * config.lora.rank
    assert simulate(config, A_SECOND).peak_bytes - weights == pixels * (2 * latents + 3 * 2)
    never = replace(A_SECOND, scores={"preference": 1e4})
    assert simulate(config, never).peak_bytes - weights == pixels * (2 * latents + 3 * 5)


def test_ranks_share_prompts_and_wait_for_the_one_with_most():
    config = three_units(data__prompts_per_iteration=5, learner__micro_batch=2)
    trees, times = [prompt_tree(config, 0, 0, "")] * 5, replace(A_SECOND, states={1: 5.0, 2: 6.0})
    assert update_s(config, times, trees) == 2 * (0.5 + 6 + 6 + 5)
    split = load_config(
        None, **THREE_UNITS | {"data.prompts_per_iteration": 5, "learner.ranks": 2, "learner.micro_batch": 2}
    )
    assert update_s(split, times, trees) == 2 * (0.5 + 6 + 5)


def test_held_out_prompts_by_hand():
    config = three_units(rollout__max_actors=2, evaluation__seeds=3, rollout__micro_batch=2)
    assert heldout_s(config, A_SECOND, 3) == 2 * 4 * 3  # three units of 4 steps of 2 and 1 latents, on two actors


class Images:
    """In place of a reference to so many."""

    def __init__(self, count):
        self.count = count


class Device(FakeActor):
    """Takes a second for an evaluation of a unit, and two to score an image. All prompts have the same tree."""

    start_s = 0.0

    def __init__(self, config, name):
        super().__init__(name)
        self.config, self.tree = config, prompt_tree(config, 0, 0, "")

    def call(self, method, *args):
        (answer,) = super().call(method, *args)
        return [object(), Images(len(self.part(args[0]).images)), answer] if method == "compute" else [answer]

    def part(self, unit):
        return trunk_part(self.tree) if isinstance(unit, TrunkUnit) else branch_part(self.tree, unit)

    async def compute(self, unit, weights, embedding, trunk=None):
        part = self.part(unit)
        await asyncio.sleep(part.evaluations)
        return UnitReport(unit.name, self.name, self._place, 0.0, 1, part.evaluations, len(part.images), 0.0, 0.0)

    async def score(self, prompt, known, picks, images):
        await asyncio.sleep(2 * images.count)
        return {"": np.zeros(images.count)}, Span(self.name, "", "", 0.0, 0.0)


async def measured(config):
    """Seconds of a rollout by the real collector and pools over such devices."""
    weights, actors = SimpleNamespace(manifest=WeightsManifest(1, 0, 0, "")), config.rollout.max_actors
    pool = Pool(
        "rollout", partial(Device, config), actors, minimum=actors, max_unused=config.rollout.max_unscored_units
    )
    completing, given = pool, config.rollout.completions
    if given.apart:
        completing = Pool(
            "completions", partial(Device, config), given.max_actors, minimum=given.max_actors,
            max_unused=config.rollout.max_unscored_units,
        )  # fmt: skip
    scorers = {
        name: Scorer(name, reward, Pool(f"reward {name}", partial(Device, config), reward.replicas), [], {})
        for name, reward in config.all_rewards.items()
    }

    async def refs(prompts):
        return [object()] * len(prompts)

    async def keep(result):
        await asyncio.sleep(PREFETCH_S)

    collector = Collector(config, SimpleNamespace(refs=refs), pool, completing, scorers, keep, [])
    pools = [*{pool, completing}, *(scorer.pool for scorer in scorers.values())]
    async with asyncio.TaskGroup() as group:
        for one in pools:
            one.start(group)
        await asyncio.gather(*(one.actors.wait_ready() for one in pools))
        began = now()
        await collector.rollout(0, ["x"] * config.data.prompts_per_iteration, weights)
        taken = now() - began
        for one in pools:
            one.stop()
    return taken


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout.max_actors": 3},
        {"rollout.max_actors": 2, "rollout.completions.max_actors": 3, "rollout.completions.probe_prompts": 0},
        {"rollout.max_actors": 5, "rollout.members_per_unit": 3, "data.prompts_per_iteration": 3},
        {"rollout.max_actors": 2, "rollout.max_unscored_units": 1, "rewards.preference.replicas": 2},
        {"rollout.max_actors": 4, "method": "flow_grpo", "data.prompts_per_iteration": 6},
    ],
    ids=str,
)
def test_a_rollout_takes_as_long_as_the_real_collector_and_pools_take_in_virtual_time(settings):
    config = load_config(None, **{"eval_rewards": {}, "data.prompts_per_iteration": 8, **settings})
    found = simulate(config, Times({1: 1.0}, {1: 0.0}, {1: 1.0}, scores={"preference": 2.0}))
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert found.rollout_s == pytest.approx(runner.run(measured(config)), rel=1e-9)
