"""The plan of a run as text: evaluations, units, memory, and the balance of learner and rollout."""

from collections.abc import Sequence
from typing import Literal

from g2rpo_ray.algo.completion import Choice
from g2rpo_ray.algo.tree import Tree
from g2rpo_ray.config import Config, SamplerConfig
from g2rpo_ray.rehearsal.published import with_shapes
from g2rpo_ray.rollout.cost import object_store_bytes, prompt_cost
from g2rpo_ray.rollout.plan import branch_part, branch_units, possible_trees
from g2rpo_ray.types import TrunkUnit


def describe_plan(config: Config) -> str:
    """The plan as lines `name: text`: evaluations, units and memory; `auto` has its costliest choice."""
    prompts, sampler = config.data.prompts_per_iteration, config.sampler
    trees, probes = possible_trees(config, sampler.costliest), possible_trees(config, sampler.costliest, probing=True)
    cost = config.velocity_cost
    mean = prompt_cost(config, trees)
    trunk = TrunkUnit(0, 0, "")
    units = list(branch_units(config, trees[0], trunk))
    members = max(unit.members for unit in units)
    parts = (branch_part(t, unit) for t in {*trees, *probes} for unit in branch_units(config, t, trunk))
    largest = cost * max(part.evaluations for part in parts)
    about = "" if len({t.evaluations for t in trees}) == 1 else "about "
    an_iteration, updated = prompts * mean.evaluations, prompts * mean.update
    stored = prompts * mean.images * config.model.pixels * 3
    ranks = config.rollout.max_actors * updated / an_iteration
    steps, strides = _list(sampler, "branch_steps"), _list(sampler, "strides")
    return "\n".join(
        [
            f"method:        {config.method}: {sampler.roots} roots, branch steps {steps} "
            f"({sampler.branch_schedule}), {sampler.group_size} children, "
            f"{'no' if sampler.kernel == 'ode' else sampler.stochastic_edges} stochastic edges, "
            f"granularities {strides}",
            *_auto(config),
            *_declines(config),
            f"a prompt:      {about}{mean.evaluations:g} velocity evaluations, {mean.images:g} images to score, "
            f"{mean.states:g} learner states" + (", with guidance counted twice" if cost > 1 else ""),
            f"an iteration:  {prompts} prompts, {prompts} trunk units, {prompts * len(units)} branch units of "
            f"{members} members, {an_iteration:g} evaluations; update: {prompts * mean.states:g} states forward and "
            f"backward, as much as {updated:g} evaluations",
            *_completions(config, trees),
            f"the run:       {config.iterations} iterations, {config.iterations * an_iteration:g} evaluations and "
            f"{config.iterations * updated:g} of updates",
            f"balance:       {ranks:.2g} learner ranks keep up with {config.rollout.max_actors} rollout actors of the "
            f"same device; the update is {updated / (an_iteration + updated):.0%} of the work",
            f"largest unit:  {largest} evaluations, in batches of at most {config.rollout.micro_batch}",
            f"rollout actor: {_memory(config)}",
            *_devices(config),
            f"object store:  {stored / 2**20:.1f} MiB of images an iteration, freed as they are scored; at most "
            f"{config.rollout.max_unscored_units} units wait; with latents, weights and embeddings at most about "
            f"{object_store_bytes(config) / 1e9:.1f} GB, the size in a private cluster",
        ]
    )


def _list(sampler: SamplerConfig, key: Literal["branch_steps", "strides"]) -> str:
    numbers = "{" + ", ".join(map(str, getattr(sampler, f"all_{key}"))) + "}"
    return f"auto of {numbers}" if getattr(sampler, key) == "auto" else numbers


def _auto(config: Config) -> list[str]:
    """The range of the cost of `auto`, and its probes."""
    sampler, auto = config.sampler, config.sampler.auto
    if not sampler.is_auto:
        return []

    def evaluations(choice: Choice, probing: bool = False) -> float:
        trees = possible_trees(config, choice, probing)
        return config.velocity_cost * sum(tree.evaluations for tree in trees) / len(trees)

    prompts, often = min(auto.prompts, config.data.prompts_per_iteration), -(-config.iterations // auto.every)
    least, most = (evaluations(choice) for choice in (sampler.cheapest, sampler.costliest))
    probe = evaluations(sampler.costliest, probing=True)
    all_prompts = config.iterations * config.data.prompts_per_iteration
    low, high = ((all_prompts - often * prompts) * each + often * prompts * probe for each in (least, most))
    return [
        f"auto:          {least:g} to {most:g} evaluations per prompt, {probe:g} per probe; {prompts} probes every "
        f"{auto.every} iterations; the run: {low:g} to {high:g}. Below: the costliest choice, without probes"
    ]


def _declines(config: Config) -> list[str]:
    """What a prompt costs after declines, by `evaluation.on_decline`."""
    answer, sampler = config.evaluation.on_decline, config.sampler
    if answer == "continue":
        return []
    costs = []
    stride = sampler.all_strides[0] // 2
    while stride:
        trees = possible_trees(config, Choice((stride,), sampler.all_branch_steps))
        costs.append(f"λ={stride} {config.velocity_cost * sum(tree.evaluations for tree in trees) / len(trees):g}")
        stride //= 2
    return [
        f"on_decline:    {answer}: each decline halves the stride, for evaluations per prompt of {', '.join(costs)}. "
        "Below: without a decline"
    ]


def _completions(config: Config, trees: Sequence[Tree]) -> list[str]:
    """The share of a rollout that `rollout.completions` computes."""
    given = config.rollout.completions
    if not given.differ:
        return []
    below = sum(tree.completions for tree in trees) / sum(tree.evaluations for tree in trees)
    kind = {"none": "in full precision"}.get(given.quantization, f"in {given.quantization}")
    lines = [
        f"completions:   {below:.1%} of the velocities, {kind}; log-probabilities depend only on the others. "
        f"Exact probes, not counted here: {given.probe_prompts} prompts every {given.probe_every} iterations"
    ]
    if given.apart:
        lines.append(
            f"               by {given.max_actors} actors of their own, each: {_memory(config, 'completions')}"
        )
    return lines


def _devices(config: Config) -> list[str]:
    """The largest micro-batches on devices of common sizes."""
    if (shaped := with_shapes(config)) is None:
        return []
    from g2rpo_ray.rehearsal.full_size import fits

    lines = []
    try:
        found = fits(shaped)
    except ValueError as error:  # a user's own code may need data, and run all the same
        return [f"memory:        of learner ranks unknown: {error}"]
    for fit in found:
        learner = "learner does not fit; use more learner.ranks, or smaller images"
        if fit.states:
            checkpointing = "with" if fit.checkpointed else "without"
            learner = f"learner {fit.states}, {checkpointing} gradient checkpointing, zero_stage {fit.zero_stage}"
        rollout = f"rollout {fit.latents}" if fit.latents else "rollout does not fit"
        lines.append(f"{'on ' + str(fit.gigabytes) + ' GB:':<15}largest micro-batch: {rollout}; {learner}")
    return lines


def _memory(config: Config, units: str = "all") -> str:
    """What a rollout actor needs that computes these units: see `Sampler`."""
    if (shaped := with_shapes(config)) is None:
        return "memory unknown: the model's files are not on this machine"
    from g2rpo_ray.models.estimate import rollout_memory

    needed = {part: size / 2**30 for part, size in rollout_memory(shaped, units).items()}
    work = needed["velocity"] + needed["decode"]  # the VAE decodes beside the last velocities
    rollout = config.rollout
    batch = f"in batches of {rollout.completions_batch if units == 'completions' else rollout.micro_batch}"
    return f"{needed['weights']:.2g} GiB of weights and {work:.2g} GiB of tensors {batch}, without libraries"
