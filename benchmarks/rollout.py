"""Rollout of a prompt: this system against the plain structure, which does one branch at a time and shares nothing.

python benchmarks/rollout.py             the embedded model on the CPU, at the paper's setting
python benchmarks/rollout.py --flux      FLUX.1-dev's shape at 720 px, random weights, on a GPU; needs no Ray
python benchmarks/rollout.py --lora      what an unmerged LoRA costs an evaluation, by batch; with --flux too
python benchmarks/rollout.py --count     operations and bytes of one evaluation of FLUX, counted without a device
"""

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from common import Row, alternate, median, parser, report

import torch  # isort: skip  # common makes the packages importable
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from g2rpo_ray.algo import complete, ode_step, run_anchor, transition
from g2rpo_ray.config import Config, LoraConfig, ModelConfig, load_config
from g2rpo_ray.models import FluxModel, add_lora, lora_disabled, one_prompt
from g2rpo_ray.models.estimate import peak_bytes, velocity_inputs
from g2rpo_ray.rollout.noise import generator
from g2rpo_ray.rollout.plan import branch_plan
from g2rpo_ray.rollout.sampler import Sampler
from g2rpo_ray.types import AnchorUnit, BranchUnit, PromptEmbedding

PAPER = ["steps=16", "branch_steps=[0, 1, 2, 3, 4, 5, 6, 7]", "strides=[1, 2, 3]", "group_size=12", "layout=paper"]
PROMPT = "a red circle"


class Bench:
    """One model with its LoRA; the same rollout done in different ways. Each returns its evaluations."""

    def __init__(self, config: Config, model: FluxModel):
        self.config, self.model = config, model
        self.sampler = Sampler(config, model)
        self.plan = branch_plan(config.sampler)
        self.device = config.rollout.device
        text, network = config.model.max_sequence_length, model.transformer.config
        draw = np.random.default_rng(0)
        pooled = draw.standard_normal(network.pooled_projection_dim, dtype=np.float32)
        sequence = draw.standard_normal((text, network.joint_attention_dim), dtype=np.float32)
        self.embedding = PromptEmbedding(PROMPT, pooled, sequence, "float32")
        self._folded = {layer: layer.forward for layer in self._lora()}

    def fold(self, on: bool) -> None:
        """Switch between our way to add the LoRA and PEFT's own."""
        for layer in self._lora():
            layer.__dict__.pop("forward", None)
            if on:
                layer.forward = self._folded[layer]

    def system(self) -> int:
        """What a rollout actor does: an anchor, and a branch unit for each branch step and slice of members."""
        before = self.sampler.evaluations
        anchor, _ = self.sampler.anchor(AnchorUnit(0, 0, PROMPT), self.embedding)
        group = self.config.sampler.group_size
        size = min(self.config.rollout.members_per_unit or group, group)
        for step, first in itertools.product(self.plan.branch_steps, range(0, group, size)):
            unit = BranchUnit(0, 0, PROMPT, step, first, min(size, group - first))
            self.sampler.branch(unit, self.embedding, anchor)
        return self.sampler.evaluations - before

    @torch.inference_mode()
    def one_by_one(self, share: bool, members: int, once: bool = False) -> int:
        """One branch at a time, batch 1. `share`: each needed velocity once; `once`: the prompt's parts too."""
        sampler, sigmas = self.config.sampler, self.sampler._sigmas.to(self.device)
        conditioning, count = self.model.condition([self.embedding]), 0

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal count
            count += len(x)
            return self.model.velocity(x, sigma, conditioning)

        with one_prompt(self.model.transformer) if once else nullcontext():
            x = self._noise("anchor")[None]
            anchor = run_anchor(velocity, x, sigmas, sampler.branch_steps)
            self.model.decode(anchor.final).cpu()
            for place, member in itertools.product(range(len(sampler.branch_steps)), range(members)):
                index, start = sampler.branch_steps[place], anchor.latents[place]
                v = anchor.velocities[place] if share else velocity(start, sigmas[index][None])
                noise = self._noise("branch", index, member)[None]
                step = transition(sampler.kernel, start, v, sigmas, index, sampler.eta, noise=noise)
                for latent in self._complete(velocity, step.next_x, self.plan.paths(index), sigmas, share):
                    self.model.decode(latent).cpu()
        return count

    def _complete(
        self, velocity: Callable[..., Tensor], x: Tensor, paths: list[list[int]], sigmas: Tensor, share: bool
    ) -> list[Tensor]:
        if share:
            return list(complete(velocity, x, paths, sigmas, micro_batch=1))
        finals = []
        for path in paths:
            state = x
            for now, then in itertools.pairwise(path):
                state = ode_step(state, velocity(state, sigmas[now][None]), sigmas[now], sigmas[then])
            finals.append(state)
        return finals

    def _noise(self, *key: Any) -> Tensor:
        return self.model.initial_noise(generator(*key)).to(self.device)

    def _lora(self) -> list[Any]:
        return [module for module in self.model.transformer.modules() if isinstance(module, LoraLinear)]


def flux_model(config: ModelConfig, device: str) -> FluxModel:
    """FLUX.1-dev's shape, random weights."""
    torch.set_default_dtype(getattr(torch, config.dtype))
    with torch.device(device):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        vae = flux_vae()
    torch.set_default_dtype(torch.float32)
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    transformer.requires_grad_(False).eval()
    vae.requires_grad_(False).eval()
    return FluxModel(config, device, pipeline, 64, 8)


def flux_vae() -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def operations(transformer: Any, n: int, image_tokens: int, text_tokens: int, dtype: torch.dtype) -> tuple[float, int]:
    """Floating-point operations of one evaluation of n latents (PyTorch counts), and the peak of its tensors."""
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        inputs = velocity_inputs(transformer, n, image_tokens, text_tokens, dtype)
        transformer(**inputs)
    with torch.device("meta"), torch.inference_mode():
        return float(counter.get_total_flops()), peak_bytes(lambda: transformer(**inputs))


@torch.inference_mode()
def lora_cost(bench: Bench, given: Any) -> list[Row]:
    """Milliseconds of an evaluation: no LoRA (merged would take as long), PEFT's way, ours, ours within a unit."""
    rows, conditioning, transformer = [], bench.model.condition([bench.embedding]), bench.model.transformer
    ways: dict[str, tuple[bool, bool, bool]] = {  # folded, LoRA, once a unit
        "none": (False, False, False),
        "PEFT": (False, True, False),
        "folded": (True, True, False),
        "folded, within a unit": (True, True, True),
    }
    for n in (1, 4, 12) if given.flux else (1, 4) if given.quick else (1, 4, 12, 16, 24, 36):
        x, sigma = bench._noise("x").expand(n, -1, -1), torch.full((n,), 0.5, device=bench.device)
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


def count_flux() -> list[Row]:
    rows, tokens, bf16 = [], (2025, 512), torch.bfloat16
    torch.set_default_dtype(bf16)
    with torch.device("meta"):
        transformer, vae = FluxTransformer2DModel(guidance_embeds=True), flux_vae()
        latent = torch.empty(1, 16, 90, 90)
    weights = 2 * sum(parameter.numel() for parameter in transformer.parameters())
    rows.append(_counted("velocity, batch 1", *operations(transformer, 1, *tokens, bf16), weights))
    rows.append(_counted("velocity, batch 12", *operations(transformer, 12, *tokens, bf16), weights))
    add_lora(transformer, LoraConfig(), 0)
    lora = weights + sum(4 * p.numel() for p in transformer.parameters() if p.requires_grad)
    rows.append(_counted("velocity, batch 12, LoRA 64", *operations(transformer, 12, *tokens, bf16), lora))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        vae.decode(latent)
    with torch.inference_mode():
        peak = peak_bytes(lambda: vae.decode(latent))
    parameters = 2 * sum(parameter.numel() for parameter in vae.decoder.parameters())
    rows.append(_counted("decode, one image", float(counter.get_total_flops()), peak, parameters))
    torch.set_default_dtype(torch.float32)
    return rows


def _counted(what: str, flops: float, peak: int, weights: int) -> Row:
    return {
        "FLUX, 720 px, bfloat16": what,
        "TFLOP": flops / 1e12,
        "weights GB": weights / 1e9,
        "tensors GB": peak / 1e9,
    }


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: what the device can do at best."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = alternate({"": lambda: (torch.mm(a, b), _wait(device))}, 20)[""]
    return 2 * size**3 / median(times[5:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--flux", action="store_true", help="FLUX.1-dev's shape on a GPU instead of the embedded model"
    )
    options.add_argument("--count", action="store_true", help="count operations and bytes of FLUX, run nothing")
    options.add_argument("--lora", action="store_true", help="milliseconds of an evaluation without LoRA, and with it")
    options.add_argument(
        "--steps", action="store_true", help="also what each step from the plain structure to ours gives"
    )
    options.add_argument(
        "--threads", type=int, default=1, help="CPU threads (default 1: the fastest for the tiny model)"
    )
    options.add_argument("--micro-batch", type=int, default=None, help="default 36 embedded, 12 FLUX")
    options.add_argument("--members-per-unit", type=int, default=12)
    options.add_argument("--compile", action="store_true", help="rollout.compile")
    options.add_argument("--dtype", default=None, help="default float32 embedded, bfloat16 FLUX")
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
    cases: dict[str, Callable[[], int]] = {"plain structure": lambda: _plain(bench, members, False)}
    if given.steps:
        cases["+ each velocity once"] = lambda: _plain(bench, members, True)
        cases["+ what the prompt decides once"] = lambda: bench.one_by_one(True, members, once=True)
        cases["+ batches (LoRA by PEFT)"] = lambda: _system(bench, False)
    cases["this system"] = lambda: _system(bench, True)
    _warm_up(bench, given)
    device, dtype = bench.device, getattr(torch, bench.config.model.dtype)
    rate = matmul_rate(device, dtype)
    evaluations, cpu = dict.fromkeys(cases, 0), {name: list[float]() for name in cases}
    memory: dict[str, float] = {}

    def timed(name: str) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.process_time()
        evaluations[name] = cases[name]()
        _wait(device)
        cpu[name].append(time.process_time() - start)
        memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")

    repeats = 1 if given.quick else given.repeats
    seconds = alternate({name: (lambda name=name: timed(name)) for name in cases}, repeats)
    flops = _flops(bench)
    rows = []
    plan, strides = bench.plan, len(bench.plan.strides)
    for name, times in seconds.items():
        done = evaluations[name]
        plain = name == "plain structure"
        images = (members if name in list(cases)[:3] and name != "this system" else plan.group_size) * strides
        a_second, of_prompt = done / median(times), plan.naive_evaluations if plain else plan.evaluations
        rows.append(
            {
                "way": name,
                "evaluations run": done,
                "evaluations a prompt": of_prompt,
                "evaluations/s": a_second,
                "images/s": (images * len(plan.branch_steps) + 1) / median(times),
                "s a prompt": of_prompt / a_second,
                "CPU s a prompt": of_prompt / done * median(cpu[name]),
                "times faster": 0.0,
                "in CPU time": 0.0,
                "share of matmul rate": a_second * flops / rate,
                "peak GB": memory[name],
            }
        )
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
    if given.flux:
        settings += ["model.height=720", "model.width=720", "model.max_sequence_length=512", "rollout.device=cuda"]
        settings += [f"model.dtype={given.dtype or 'bfloat16'}", "rollout.decode_batch=4", "lora.rank=64"]
        settings += ["lora.targets=[attn.to_q, attn.to_k, attn.to_v, attn.to_out.0]"]
    elif given.dtype:
        settings += [f"model.dtype={given.dtype}"]
    config = load_config(None, settings)
    device = config.rollout.device
    load = flux_model(config.model, device) if given.flux else None
    return Bench(config, load or FluxModel.load(config.model, device, transformer=True, vae=True))


def _warm_up(bench: Bench, given: Any) -> None:
    _plain(bench, 1, True)
    if given.compile or given.flux:  # every batch size is met once
        _system(bench, True)


def _plain(bench: Bench, members: int, share: bool) -> int:
    bench.fold(False)
    return bench.one_by_one(share, members)


def _system(bench: Bench, folded: bool) -> int:
    bench.fold(folded)
    return bench.system()


def _flops(bench: Bench) -> float:
    """Of one evaluation, without the LoRA."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(bench.model.transformer.config)
    text = bench.config.model.max_sequence_length
    return operations(transformer, 1, bench.model.image_tokens, text, torch.float32)[0]


if __name__ == "__main__":
    main()
