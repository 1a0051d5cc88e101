"""Rollout of a prompt: this system against the plain structure, which does one branch at a time and shares nothing.

python benchmarks/rollout.py             the embedded model on the CPU, at the paper's setting
python benchmarks/rollout.py --flux      FLUX.1-dev's shape at 720 px, random weights, on a GPU; needs no Ray
python benchmarks/rollout.py --lora      what an unmerged LoRA costs an evaluation, by batch; with --flux too
python benchmarks/rollout.py --count     operations and bytes of one evaluation of FLUX, counted without a device
"""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from common import Row, alternate, median, parser, report
from flux_shape import count_flux, flux_model

import torch  # isort: skip  # common makes the packages importable
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from g2rpo_ray.algo.completion import completion_path
from g2rpo_ray.algo.growth import Velocity, grow
from g2rpo_ray.algo.kernels import ode_step, transition
from g2rpo_ray.config import Config, SamplerConfig, load_config
from g2rpo_ray.models import FlowModel, lora_disabled, one_prompt
from g2rpo_ray.models.estimate import one_velocity, operations
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import branch_part, branch_units, edge_key, prompt_tree, trunk_part
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import BranchUnit, TrunkUnit

PAPER = ["steps=16", "branch_steps=[0, 1, 2, 3, 4, 5, 6, 7]", "strides=[1, 2, 3]", "group_size=12", "layout=paper"]
PROMPT = "a red circle"
TRUNK = TrunkUnit(0, 0, PROMPT)


class Done(NamedTuple):
    """What was computed, counted as it was."""

    evaluations: int
    images: int


class Bench:
    """One model with its LoRA; the same rollout done in different ways, with the same noise."""

    def __init__(self, config: Config, model: FlowModel):
        self.config, self.model = config, model
        self.sampler = Sampler(config, model)
        self.tree = prompt_tree(config, 0, 0, PROMPT)
        self.device = config.rollout.device
        self.embedding = model.random_embedding(PROMPT, torch.Generator().manual_seed(0))
        self._folded = {module: module.forward for module in self._lora()}

    def fold(self, on: bool) -> None:
        """Switch between our way to add the LoRA and PEFT's own."""
        for module in self._lora():
            module.__dict__.pop("forward", None)
            if on:
                module.forward = self._folded[module]

    def system(self) -> Done:
        """What rollout actors do: a trunk unit, and the branch units that follow it."""
        before = self.sampler.evaluations
        trunk, pictures = self.sampler.trunk(TRUNK, self.embedding)
        units = branch_units(self.config, self.tree, TRUNK)
        images = len(pictures) + sum(len(self.sampler.branch(unit, self.embedding, trunk)[1]) for unit in units)
        return Done(self.sampler.evaluations - before, images)

    @torch.inference_mode()
    def plain(self, members: int) -> Done:
        """The plain structure: one branch at a time, batch 1, nothing shared; written out without the tree."""
        sampler, sigmas, velocity = self.config.sampler, self.sampler._sigmas.to(self.device), self._velocity()
        trunk = [self._root()]
        for now, then in itertools.pairwise(range(sampler.steps + 1)):
            trunk.append(ode_step(trunk[now], velocity(trunk[now], sigmas[now][None]), sigmas[now], sigmas[then]))
        images = self._decode(trunk[-1])
        for index, member in itertools.product(sampler.branch_steps, range(members)):
            v = velocity(trunk[index], sigmas[index][None])
            noise = self._noise([self.tree.members(index, member, 1)[0].edges.start])
            step = transition(sampler.kernel, trunk[index], v, sigmas, index, sampler.eta, noise=noise)
            for path in paths(sampler, index):
                x = step.next_x
                for now, then in itertools.pairwise(path):
                    x = ode_step(x, velocity(x, sigmas[now][None]), sigmas[now], sigmas[then])
                images += self._decode(x)
        return Done(velocity.evaluations, images)

    @torch.inference_mode()
    def one_by_one(self, members: int, once: bool) -> Done:
        """One branch at a time over the tree, batch 1: each velocity once; `once`: the prompt's parts, too."""
        sampler, tree, velocity = self.config.sampler, self.tree, self._velocity()
        with one_prompt(self.model.transformer) if once else nullcontext():
            part = trunk_part(tree)
            trunk = grow(velocity, tree, part.nodes, [0], self._root(), self.sampler._sigmas, keep=part.touched)
            images = self._decode(trunk.ends)
            for (place, step), member in itertools.product(enumerate(sampler.branch_steps), range(members)):
                part, here = branch_part(tree, BranchUnit(0, 0, PROMPT, step, member, 1)), slice(place, place + 1)
                branch = grow(
                    velocity, tree, part.nodes, tree.branch_points[here].tolist(), trunk.latents[here],
                    self.sampler._sigmas, v=trunk.velocities[here], kernel=sampler.kernel, eta=sampler.eta,
                    noise=self._noise,
                )  # fmt: skip
                images += self._decode(branch.ends)
        return Done(velocity.evaluations, images)

    def _velocity(self) -> "CountedVelocity":
        conditioning = self.model.condition([self.embedding])
        return CountedVelocity(lambda x, sigma: self.model.velocity(x, sigma, conditioning))

    def _decode(self, latents: Tensor) -> int:
        for latent in latents.split(1):
            self.model.decode(latent).cpu()
        return len(latents)

    def _root(self) -> Tensor:
        return self._drawn("root", self.config.seed, 0, 0, PROMPT, 0)[None]

    def _noise(self, edges: Sequence[int]) -> Tensor:
        return torch.stack([self._drawn(*edge_key(self.config, TRUNK, self.tree, edge)) for edge in edges])

    def _drawn(self, *key: Any) -> Tensor:
        return self.model.initial_noise(generator(*key)).to(self.device)

    def _lora(self) -> list[Any]:
        """The LoRA layers with their A and B."""
        layers = [module for module in self.model.transformer.modules() if isinstance(module, LoraLinear)]
        return [*layers, *(part for layer in layers for ab in (layer.lora_A, layer.lora_B) for part in ab.values())]


class CountedVelocity:
    """A velocity, and how many latents it was evaluated for."""

    def __init__(self, velocity: Velocity):
        self._velocity, self.evaluations = velocity, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.evaluations += len(x)
        return self._velocity(x, sigma)


def paths(sampler: SamplerConfig, branch_step: int) -> list[list[int]]:
    """The schedule indices that a branch visits, for each granularity."""
    return [completion_path(branch_step, sampler.steps, stride, sampler.layout) for stride in sampler.strides]


def plain_evaluations(sampler: SamplerConfig) -> int:
    """Evaluations of a prompt by the plain structure: T + G Σ over branch steps of (Σ of the paths' lengths + 1)."""
    lengths = [1 + sum(len(path) - 1 for path in paths(sampler, step)) for step in sampler.branch_steps]
    return sampler.steps + sampler.group_size * sum(lengths)


@torch.inference_mode()
def lora_cost(bench: Bench, given: Any) -> list[Row]:
    """Milliseconds of an evaluation: no LoRA (merged would take as long), PEFT's way, ours, ours within a unit."""
    rows, conditioning, transformer = [], bench.model.condition([bench.embedding]), bench.model.transformer
    ways: dict[str, tuple[bool, bool, bool]] = {  # folded, LoRA, once a unit
        "none": (False, False, False), "PEFT": (False, True, False),
        "folded": (True, True, False), "folded, within a unit": (True, True, True),
    }  # fmt: skip
    for n in (1, 4, 12) if given.flux else (1, 4) if given.quick else (1, 4, 12, 16, 24, 36):
        x, sigma = bench._drawn("x").expand(n, -1, -1), torch.full((n,), 0.5, device=bench.device)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(2 if given.quick else 5 * given.repeats):
            for name, (folded, lora, once) in ways.items():
                bench.fold(folded)
                reference = nullcontext() if lora else lora_disabled(transformer)
                with reference, one_prompt(transformer) if once else nullcontext():
                    for measured in (False, True, True, True):
                        start = time.perf_counter()
                        bench.model.velocity(x, sigma, conditioning)
                        _wait(bench.device)
                        if measured:
                            found[name].append(1e3 / n * (time.perf_counter() - start))
        rows.append({"batch": n} | {name: median(values) for name, values in found.items()})
    return rows


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: what the device can do at best."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        _wait(device)

    return 2 * size**3 / median(alternate({"": product}, 20)[""][5:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--flux", action="store_true", help="FLUX.1-dev's shape on a GPU, not the embedded model")
    options.add_argument("--count", action="store_true", help="count operations and bytes of FLUX, run nothing")
    options.add_argument("--lora", action="store_true", help="milliseconds of an evaluation without LoRA, and with it")
    options.add_argument("--steps", action="store_true", help="also the steps from the plain structure to this system")
    options.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: fastest for the tiny model)")
    options.add_argument("--micro-batch", type=int, help="default 36 embedded, 12 FLUX")
    options.add_argument("--members-per-unit", type=int, default=12)
    options.add_argument("--compile", action="store_true", help="rollout.compile")
    options.add_argument("--dtype", help="default float32 embedded, bfloat16 FLUX")
    given = options.parse_args()
    if given.count:
        report("Operations and bytes", count_flux(), given.json)
        return
    torch.set_num_threads(given.threads)
    bench = _bench(given)
    if given.lora:
        rows, note = lora_cost(bench, given), f"{bench.config.model.dtype}, rank {bench.config.lora.rank}"
        report("LoRA, milliseconds an evaluation", rows, given.json, [note])
        return
    members = 1 if given.flux else bench.config.sampler.group_size
    cases: dict[str, Callable[[], Done]] = {"plain structure": lambda: bench.plain(members)}
    if given.steps:
        cases["+ each velocity once"] = lambda: bench.one_by_one(members, once=False)
        cases["+ what the prompt decides once"] = lambda: bench.one_by_one(members, once=True)
        cases["+ batches (LoRA by PEFT)"] = bench.system
    cases["this system"] = bench.system
    _warm_up(bench, given)
    device, dtype = bench.device, getattr(torch, bench.config.model.dtype)
    rate, flops = matmul_rate(device, dtype), _flops(bench, given.flux)
    done, memory, cpu = dict[str, Done](), dict[str, float](), {name: list[float]() for name in cases}

    def timed(name: str) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        bench.fold(name == "this system")
        start = time.process_time()
        done[name] = cases[name]()
        _wait(device)
        cpu[name].append(time.process_time() - start)
        memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")

    repeats = 1 if given.quick else given.repeats
    seconds = alternate({name: (lambda name=name: timed(name)) for name in cases}, repeats)  # type: ignore[misc]
    rows = []
    for name, times in seconds.items():
        evaluations, images = done[name]
        of_prompt = plain_evaluations(bench.config.sampler) if name == "plain structure" else bench.tree.evaluations
        a_second = evaluations / median(times)
        rows.append(
            {
                "way": name, "evaluations run": evaluations, "evaluations a prompt": of_prompt,
                "evaluations/s": a_second, "images/s": images / median(times), "s a prompt": of_prompt / a_second,
                "CPU s a prompt": of_prompt / evaluations * median(cpu[name]), "times faster": 0.0, "in CPU time": 0.0,
                "share of matmul rate": a_second * flops / rate, "peak GB": memory[name],
            }
        )  # fmt: skip
    for row in rows:
        row["times faster"] = rows[0]["s a prompt"] / row["s a prompt"]
        row["in CPU time"] = rows[0]["CPU s a prompt"] / row["CPU s a prompt"]
    notes = [f"{dtype}, matmul {rate / 1e12:.3g} TFLOP/s, an evaluation {flops / 1e12:.4g} TFLOP, repeats {repeats}."]
    report(f"Rollout, {'FLUX.1-dev shape, 720 px' if given.flux else 'embedded model'}", rows, given.json, notes)


def _bench(given: Any) -> Bench:
    sampler = PAPER
    if given.quick:
        sampler = ["steps=4", "branch_steps=[0, 1]", "strides=[1, 2]", "group_size=4", "layout=paper"]
    elif given.flux:  # a whole unit, not a whole prompt: the rate is the same
        sampler = [*PAPER, "branch_steps=[0]"]
    settings = [f"sampler.{setting}" for setting in sampler]
    settings += [f"rollout.compile={given.compile}", f"rollout.members_per_unit={given.members_per_unit}"]
    settings += [f"rollout.micro_batch={given.micro_batch or (12 if given.flux else 36)}"]
    settings += [f"model.dtype={given.dtype or ('bfloat16' if given.flux else 'float32')}"]
    if given.flux:
        settings += ["model.height=720", "model.width=720", "model.max_sequence_length=512"]
        settings += ["lora.targets=[attn.to_q, attn.to_k, attn.to_v, attn.to_out.0]", "lora.rank=64"]
        settings += ["rollout.decode_batch=4", "rollout.resources={GPU: 1}"]
    config = load_config(None, settings)
    random = flux_model(config.model, config.rollout.device) if given.flux else None
    return Bench(config, random or FlowModel.load(config.model, config.rollout.device, transformer=True, vae=True))


def _warm_up(bench: Bench, given: Any) -> None:
    bench.fold(False)
    bench.one_by_one(1, once=False)
    if given.compile or given.flux:  # every batch size is met once
        bench.fold(True)
        bench.system()


def _flops(bench: Bench, flux: bool) -> float:
    """Of one evaluation, without the LoRA."""
    settings = bench.config.model
    model = flux_model(settings, "meta") if flux else FlowModel.skeleton(settings)
    with torch.device("meta"), torch.inference_mode():
        return 1e12 * operations(one_velocity(model, 1))


if __name__ == "__main__":
    main()
