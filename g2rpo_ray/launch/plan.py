"""The plan of a run in words: what it evaluates, in how many units, what it takes, and who keeps up with whom."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from g2rpo_ray.algo import Choice, Tree
from g2rpo_ray.config import Config, SamplerConfig
from g2rpo_ray.data import iteration_prompts
from g2rpo_ray.files import resolve
from g2rpo_ray.rollout.plan import BACKWARD, branch_part, branch_units, possible_trees, prompt_tree
from g2rpo_ray.types import TrunkUnit

MOST_ITERATIONS = 1_000_000


def learner_states(config: Config, tree: Tree) -> int:
    """Velocities that the learner evaluates, forward and backward, for the tree of a prompt."""
    if config.learner.forward:
        return len(tree.trained_images) * config.learner.draws
    return len(tree.states) * (1 + sum(parts - 1 for parts in config.learner.subpaths))


def state_cost(config: Config) -> float:
    """Evaluations that a state of the learner counts: forward and backward, and one for each other policy there."""
    learner = config.learner
    old = 1 - 1 / learner.updates_per_rollout if learner.forward else 0.0  # at its first step it is the one updated
    if learner.average_samples or (learner.forward and config.rollout.max_staleness):
        old = 1.0
    others = (learner.kl_beta > 0) + (learner.old_kl > 0) + old
    return config.velocity_cost * (BACKWARD + learner.gradient_checkpointing + others)


def iteration_cost(config: Config, train: Sequence[str], iteration: int, choice: Choice | None = None) -> float:
    """What an iteration will cost: evaluations of rollouts, and what the states of the learner count in these.

    Of `auto` with this choice; None: the dearest. Of all others exactly.
    """
    sampler, size = config.sampler, config.data.prompts_per_iteration
    drawn: Sequence[str] = [""] * size  # whose trees do not depend on the prompt
    if sampler.branch_schedule == "draw" or sampler.trained_share < 1:
        drawn = iteration_prompts(train, size, config.seed, iteration)
    chosen = choice or sampler.dearest
    trees = [prompt_tree(config, iteration, slot, prompt, chosen) for slot, prompt in enumerate(drawn)]
    return sum(config.velocity_cost * t.evaluations + state_cost(config) * learner_states(config, t) for t in trees)


def affordable(
    config: Config, train: Sequence[str], budget: float, first: int = 0, choice: Choice | None = None
) -> int:
    """How many iterations, from the first, a budget has; see `iteration_cost`."""
    for iteration in range(first, MOST_ITERATIONS):
        budget -= iteration_cost(config, train, iteration, choice)
        if budget < 0:
            return iteration - first
    return MOST_ITERATIONS - first


def describe_plan(config: Config) -> str:
    """What an iteration evaluates, in how many units, and what it leaves in memory; of `auto`, at its dearest."""
    prompts, sampler = config.data.prompts_per_iteration, config.sampler
    trees, probes = possible_trees(config, sampler.dearest), possible_trees(config, sampler.dearest, probing=True)
    cost = config.velocity_cost
    evaluations, states, images = (
        sum(counts) / len(trees)
        for counts in zip(
            *((cost * t.evaluations, learner_states(config, t), len(t.images)) for t in trees), strict=True
        )
    )
    trunk = TrunkUnit(0, 0, "")
    units = list(branch_units(config, trees[0], trunk))
    members = max(unit.members for unit in units)
    parts = (branch_part(t, unit) for t in {*trees, *probes} for unit in branch_units(config, t, trunk))
    largest = cost * max(part.evaluations for part in parts)
    about = "" if len({t.evaluations for t in trees}) == 1 else "about "
    an_iteration, updated = prompts * evaluations, prompts * states * state_cost(config)
    stored = prompts * images * config.model.height * config.model.width * 3
    ranks = config.rollout.max_actors * updated / an_iteration
    steps, strides = _list(sampler, "branch_steps"), _list(sampler, "strides")
    return "\n".join(
        [
            f"method:        {config.method}: {sampler.roots} roots, branch steps {steps} "
            f"({sampler.branch_schedule}), {sampler.group_size} children, "
            f"{'no' if sampler.kernel == 'ode' else sampler.stochastic_edges} stochastic edges, "
            f"granularities {strides}",
            *_auto(config),
            f"a prompt:      {about}{evaluations:g} velocity evaluations, {images:g} images to score, "
            f"{states:g} learner states" + (", with guidance, which counts twice" if cost > 1 else ""),
            f"an iteration:  {prompts} prompts, {prompts} trunk units, {prompts * len(units)} branch units of "
            f"{members} members, {an_iteration:g} evaluations; update: {prompts * states:g} states forward and "
            f"backward, as much as {updated:g} evaluations",
            f"the run:       {config.iterations} iterations, {config.iterations * an_iteration:g} evaluations and "
            f"{config.iterations * updated:g} of updates",
            f"balance:       {ranks:.2g} learner ranks keep up with {config.rollout.max_actors} rollout actors of the "
            f"same device; the update is {updated / (an_iteration + updated):.0%} of the work",
            f"largest unit:  {largest} evaluations, in batches of at most {config.rollout.micro_batch}",
            f"rollout actor: {_memory(config)}",
            *_devices(config),
            f"object store:  {stored / 2**20:.1f} MiB of images an iteration, freed as they are scored; at most "
            f"{config.rollout.max_unscored_units} units wait",
        ]
    )


def _list(sampler: SamplerConfig, key: Literal["branch_steps", "strides"]) -> str:
    numbers = "{" + ", ".join(map(str, getattr(sampler, f"all_{key}"))) + "}"
    return f"auto of {numbers}" if getattr(sampler, key) == "auto" else numbers


def _auto(config: Config) -> list[str]:
    """The range of what `auto` may take, and its probes."""
    sampler, auto = config.sampler, config.sampler.auto
    if not sampler.is_auto:
        return []

    def evaluations(choice: Choice, probing: bool = False) -> float:
        trees = possible_trees(config, choice, probing)
        return config.velocity_cost * sum(tree.evaluations for tree in trees) / len(trees)

    prompts, often = min(auto.prompts, config.data.prompts_per_iteration), -(-config.iterations // auto.every)
    least, most = (evaluations(choice) for choice in (sampler.cheapest, sampler.dearest))
    probe = evaluations(sampler.dearest, probing=True)
    all_prompts = config.iterations * config.data.prompts_per_iteration
    low, high = ((all_prompts - often * prompts) * each + often * prompts * probe for each in (least, most))
    return [
        f"auto:          a prompt takes {least:g} to {most:g} evaluations, and {probe:g} where it probes: {prompts} "
        f"prompts each {auto.every} iterations; the run: {low:g} to {high:g}. Below: at its dearest, without probes"
    ]


def _devices(config: Config) -> list[str]:
    """What the model's micro-batches may be on devices of the usual sizes."""
    if not Path(resolve(config.model.path)).is_dir():
        return []
    from g2rpo_ray.models.estimate import fits

    lines = []
    for fit in fits(config):
        learner = "learner does not fit: more learner.ranks, or smaller images"
        if fit.states:
            checkpointing = "with" if fit.checkpointed else "without"
            learner = f"learner {fit.states}, {checkpointing} gradient checkpointing, zero_stage {fit.zero_stage}"
        rollout = f"rollout {fit.latents}" if fit.latents else "rollout does not fit"
        lines.append(f"{'on ' + str(fit.gigabytes) + ' GB:':<15}largest micro-batch: {rollout}; {learner}")
    return lines


def _memory(config: Config) -> str:
    if not Path(resolve(config.model.path)).is_dir():
        return "its memory is known when the model's files are on this machine"
    from g2rpo_ray.models.estimate import rollout_memory

    needed = {part: size / 2**30 for part, size in rollout_memory(config).items()}
    work = needed["velocity"] + needed["decode"]  # the VAE decodes beside the last velocities
    batch = f"in batches of {config.rollout.micro_batch}"
    return f"{needed['weights']:.2g} GiB of weights and {work:.2g} GiB to work {batch}, beside what libraries take"
