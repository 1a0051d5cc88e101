"""One DeepSpeed rank: losses of its states, backward, optimizer steps, checkpoint. No Ray.

    shard of prompts ─► states of each optimizer step ─► losses (learner/loss.py) ─► backward ─► AdamW under ZeRO

DeepSpeed runs in its float32 mode on a module of mixed dtypes: the base model is frozen in its own dtype, and the LoRA
is float32, so that it is its own master copy and a learning rate of 1e-6 is not lost in rounding.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import distributed_c10d

from g2rpo_ray.config import Config, LearnerConfig
from g2rpo_ray.learner.agreement import Agreement
from g2rpo_ray.learner.batch import BatchShape, RankMetrics, StepShape, micro_batches
from g2rpo_ray.learner.copies import EMA, KINDS, Copies
from g2rpo_ray.learner.forward import ForwardLoss
from g2rpo_ray.learner.gradients import ReachedModules, observe_eps
from g2rpo_ray.learner.loss import EdgeLoss, states_of
from g2rpo_ray.learner.probes import Probes, rule
from g2rpo_ray.learner.rate import learning_rate
from g2rpo_ray.models import (
    FlowModel,
    LoraDistance,
    add_lora,
    compile_blocks,
    export_lora,
    fold_lora,
    idle_modules,
    load_lora,
    lora_parameters,
    read_lora,
)
from g2rpo_ray.numerics import set_up_torch
from g2rpo_ray.paths import resolve
from g2rpo_ray.rollout.sigmas import sigma_grid
from g2rpo_ray.types import FloatArray, PromptRollout

CHECKPOINT = "learner.safetensors"
FORMAT = "g2rpo_ray.learner/1"
MOMENTS = ("exp_avg", "exp_avg_sq")
PROBES = "probes"
LARGEST_BUCKET = 50_000_000  # gradient elements reduced at once; DeepSpeed's own default reserves 2 GB for them


class LearnerEngine:
    """The LoRA, its optimizer, and one rank's part of an update.

    Every rank makes the same calls in the same order: each of them may be a collective.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        world_size: int,
        checkpoint: str | Path | None = None,
        model: FlowModel | None = None,
    ) -> None:
        """The environment is that of `learner.rendezvous.set_environment` already.

        Args:
            checkpoint: directory of a checkpoint to go on from; else the LoRA starts from `lora.initial`, or anew.
            model: one that is loaded already, without LoRA.

        Raises:
            ValueError: the model cannot be loaded, or there is no checkpoint or adapter of this LoRA.
        """
        set_up_torch(config.deterministic, config.learner.threads, backward=True)
        self._config, self._learner, self._rank, self._ranks = config, config.learner, rank, world_size
        self._device = config.learner.device
        _join_process_group(self._device, rank, world_size, max(config.startup_timeout_s, config.hung_after_s))
        weights_on = "cpu" if self._learner.zero_stage == 3 else None  # the whole base may be more than a device holds
        self._model = model or FlowModel.load(config.model, self._device, transformer=True, weights_on=weights_on)
        transformer = self._model.transformer
        add_lora(transformer, config.lora, config.seed)
        fold_lora(transformer)
        if self._learner.compile:
            compile_blocks(transformer)
        if self._learner.gradient_checkpointing:
            self._model.enable_gradient_checkpointing()
        self._lora = lora_parameters(transformer)
        # the LoRA is put in before ZeRO takes the parameters apart, the moments into what ZeRO has made
        saved = None if checkpoint is None else _read_checkpoint(Path(checkpoint) / CHECKPOINT, self._lora)
        initial, pipeline = config.lora.initial, self._model.pipeline_class
        start = None if initial is None else read_lora(resolve(initial), config.lora, pipeline)
        if saved is not None:
            load_lora(transformer, {name: tensor.numpy() for name, tensor in saved["lora"].items()})
        elif start is not None:
            load_lora(transformer, start)
        began = {name: torch.from_numpy(array) for name, array in start.items()} if start else None
        self._distance = LoraDistance(transformer, config.lora.alpha / config.lora.rank, began)
        self._engine = _initialize(transformer, list(self._lora.values()), self._learner)
        self._model.transformer, self._model.collective = self._engine, self._learner.zero_stage == 3
        self.optimizer_steps: int = 0 if saved is None else saved["optimizer_steps"]
        self._create_moments()
        if saved is not None:
            for key in MOMENTS:
                self._set_moments(key, saved[key])
        copies, version = ({}, None) if saved is None else (saved["copies"], saved.get("behaviour"))
        self.copies = Copies.of(self._learner, rank, self.lora_state, copies, version)
        sigmas = sigma_grid(config.sampler, self._model)
        loss: Any = ForwardLoss if self._learner.forward else EdgeLoss
        idle = idle_modules(transformer)
        trained = {name: p for name, p in self._lora.items() if name.split(".lora_")[0] not in idle}
        self._reached = ReachedModules(trained, self._device)
        self._agreement = Agreement(config, self._model, transformer, sigmas, self.copies)
        self._loss: Any = loss(config, self._model, transformer, sigmas, self.copies)
        remembered = saved["probes"] if saved is not None and saved.get("probed_by") == rule(config) else None
        probing = config.sampler.is_auto and isinstance(self._loss, EdgeLoss)
        self._probes = Probes(config, self._loss, self._lora, remembered) if probing else None

    def update(self, shard: Sequence[PromptRollout], batch: BatchShape) -> RankMetrics:
        """One iteration's update from this rank's prompts, their embedding, trunk and branches being arrays.

        Raises:
            RuntimeError: before the next optimizer step, and on all ranks together, if the learner's velocities are not
                those of the rollout; or if a gradient is not finite.
        """
        metrics = RankMetrics()
        if not batch.steps:
            raise RuntimeError("learner: no edge of any tree has all its scores; is a reward failing?")
        self.copies.begin(self.lora_state, batch.on_policy)
        alignment = self._probes.observe(shard, batch) if self._probes else None
        self._reached.forget()
        states = self._loss.prepare(states_of(self._config, shard, batch, metrics), batch, metrics)
        if self.optimizer_steps:
            self._agreement.observe_delivery(shard[0], metrics)
        lr = learning_rate(self._learner, batch.iteration, self._config.iterations)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        for number, step in enumerate(batch.steps):
            deviation = self._backward(states[step.key], step, metrics, share=1 / len(batch.steps))
            if deviation is not None:
                metrics.largest(f"learner/ratio_max_dev_step/{number}", deviation)
                metrics.largest("learner/ratio_max_dev", deviation)
                if number == 0:
                    metrics.largest("learner/ratio_initial_max_dev", deviation)
            self._require_agreement(metrics)
            self._step(metrics)
        self.copies.end(self.lora_state, self.optimizer_steps)
        self._reached.take(metrics)
        moments = self._engine.optimizer.optimizer.state
        observe_eps(moments, self._learner.eps, self._learner.betas[1], metrics)
        metrics.largest("learner/lr", lr)
        with self._whole_lora():
            metrics.largest("lora/distance", self._distance(self._lora))
        return replace(metrics, alignment=alignment)

    def lora_state(self) -> dict[str, FloatArray]:
        """The whole LoRA on every rank, float32 copies on the CPU."""
        with self._whole_lora():
            return {name: p.detach().float().cpu().numpy().copy() for name, p in self._lora.items()}

    def _whole_lora(self) -> Any:
        """A context in which every rank has all of the LoRA: under ZeRO-3 it holds a piece."""
        return deepspeed.zero.GatheredParameters(list(self._lora.values()))

    def publish(self, version: int, kind: str = "rollouts") -> dict[str, FloatArray]:
        """A policy as `lora_state` has one: what samples from now on, or by its kind the trained `lora`, or `ema`."""
        if kind == "rollouts":
            return self.copies.publish(version, self.lora_state)
        return self.copies.averages.get(kind) or self.lora_state()

    def save(self, directory: str | Path) -> None:
        """Write LoRA, copies, Adam's moments and its step count, whole: for any number of ranks and any ZeRO stage.

        Beside them, in `lora/`, the adapter in diffusers' format, and in `lora_ema/` its average where there is one.
        """
        lora, (copies, version) = self.lora_state(), self.copies.to_save()
        states = {"lora": lora, **copies}
        tensors = {f"{kind}.{name}": torch.tensor(a) for kind, state in states.items() for name, a in state.items()}
        for key in MOMENTS:
            for name, parameter in self._lora.items():
                tensors[f"{key}.{name}"] = safe_get_full_optimizer_state(parameter, key).cpu().contiguous()
        if self._probes:
            tensors[PROBES] = torch.tensor(self._probes.gradients)
        if self._rank == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            about = {"format": FORMAT, "optimizer_steps": self.optimizer_steps, "behaviour": version}
            header = json.dumps(about | ({"probed_by": rule(self._config)} if self._probes else {}))
            # under one key: safetensors writes several in any order, and equal states should be equal files
            save_file(tensors, Path(directory) / CHECKPOINT, {"learner": header})
            for name, state in (("lora", lora), ("lora_ema", copies.get(EMA))):
                if state is not None:
                    export_lora(Path(directory) / name, state, self._config.lora, self._model.pipeline_class)

    def _backward(self, states: Sequence[Any], step: StepShape, metrics: RankMetrics, share: float) -> float | None:
        """Accumulate the gradient of one optimizer step; this rank's largest |ratio − 1|, if the objective has one."""
        deviation: float | None = None
        for some in micro_batches(states, self._learner.micro_batch, step):
            losses, parts = zip(*self._loss(some, step, metrics), strict=True)
            # DeepSpeed takes the mean over the ranks, of parts that add up
            self._engine.backward(torch.stack(losses).sum() * self._ranks, scale_wrt_gas=False)
            for part in parts:
                if "ratio_max_dev" in part:
                    deviation = max(deviation or 0.0, _infinite_if_nan(float(part.pop("ratio_max_dev"))))
                for name, value in part.items():
                    metrics.add(f"learner/{name}", float(value) * share)
        return deviation

    def _require_agreement(self, metrics: RankMetrics) -> None:
        """Stop all ranks together if any of them found velocities that are not the rollout's."""
        largest = torch.tensor(metrics.velocity_error, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        tolerance = self._config.velocity_tolerance
        if float(largest) > tolerance:
            raise RuntimeError(
                f"learner: the relative error of its velocity against the rollout's is {float(largest):.3g} at the "
                f"same state, above learner.velocity_tolerance={tolerance:.3g}: they have other weights, noise levels, "
                "dtype, attention backend or hardware; raise the tolerance if rounding explains it"
            )

    def _step(self, metrics: RankMetrics) -> None:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if not self._engine.was_step_applied() or norm is None or not math.isfinite(norm):
            raise RuntimeError("learner: the gradient is not finite, no optimizer step was taken")
        self.optimizer_steps += 1
        self.copies.stepped(self.lora_state, self.optimizer_steps)
        metrics.largest("learner/grad_norm", float(norm))

    def _create_moments(self) -> None:
        """Give AdamW its state now, not at its first step: a checkpoint can be read into it and written from it."""
        zero = self._engine.optimizer
        stage3 = self._learner.zero_stage == 3
        partitions = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
        for number, partition in enumerate(partitions):
            zero.optimizer.state[partition] = {
                "step": torch.tensor(float(self.optimizer_steps)),
                **{key: torch.zeros_like(partition) for key in MOMENTS},
            }
            if not stage3:
                lazy_init_hp_params_optimizer_state(zero.bit16_groups[number], partition, zero.optimizer.state)

    def _set_moments(self, key: str, moments: Mapping[str, Tensor]) -> None:
        for name, parameter in self._lora.items():
            if self._learner.zero_stage == 3:  # safe_set_full_... fails where the ranks do not divide the parameter
                safe_set_local_optimizer_state(parameter, self._partition(moments[name], parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, moments[name].to(self._device), key)

    def _partition(self, value: Tensor, parameter: Any) -> Tensor:
        """This rank's piece of a whole tensor, zeros past its end, as ZeRO-3 cuts it."""
        size = parameter.partition_numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self._ranks - value.numel()))
        return padded.narrow(0, size * self._rank, size).to(self._device)


def _join_process_group(device: str, rank: int, world_size: int, timeout_s: float) -> None:
    if device == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce (50 s, a compiler needed) that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_SIZE", "1")  # else DeepSpeed asks numactl, and raises where it may not
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 warns of, at every call
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    backend = "gloo" if device == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_s)
    # NCCL's default of 10 minutes would end ranks that LearnerGroup still waits for. DeepSpeed makes a group of its own
    # from the first one, and torch gives it the default, not the first one's timeout.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, rank=rank, world_size=world_size)


def _initialize(transformer: torch.nn.Module, lora: list[torch.nn.Parameter], learner: LearnerConfig) -> Any:
    """The DeepSpeed engine: AdamW over the LoRA, its state (ZeRO-1), gradients (2) and all weights (3) partitioned.

    Under ZeRO-3 each parameter is partitioned on its own, from the CPU: `deepspeed.initialize` alone would first move
    the whole module to every device.
    """
    optimizer = torch.optim.AdamW(
        lora, lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=learner.weight_decay
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # required, and without effect: the loss carries its own denominators
        "managed_gradient_accumulation": False,  # step() is the boundary, however many backward passes came before
        "gradient_clipping": learner.grad_clip,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(LARGEST_BUCKET, sum(parameter.numel() for parameter in lora)),
            "memory_efficient_linear": False,  # it replaces F.linear by one that rounds otherwise in bfloat16
        },
    }
    if learner.zero_stage == 3:
        deepspeed.zero.Init(module=transformer, config_dict_or_path=settings)
        for buffer in transformer.buffers():
            buffer.data = buffer.data.to(learner.device)
    engine, *_ = deepspeed.initialize(
        model=transformer, optimizer=optimizer, model_parameters=lora, config=settings, dist_init_required=False
    )
    return engine


def _read_checkpoint(file: Path, lora: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"optimizer_steps": int, "lora" and each of MOMENTS: {name: tensor}, "copies" by kind, "probes": array or None}.

    Raises:
        ValueError: there is no such file, or it is of another LoRA.
    """
    try:
        with safe_open(file, framework="pt") as content:
            header = json.loads((content.metadata() or {}).get("learner", "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"checkpoint {file}: cannot be read ({error})") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"checkpoint {file}: not a learner checkpoint of format {FORMAT}")
    copies = [kind for kind in KINDS if any(name.startswith(f"{kind}.") for name in tensors)]
    probes = tensors.pop(PROBES, None)
    expected = {f"{kind}.{name}": p.shape for kind in ("lora", *MOMENTS, *copies) for name, p in lora.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise ValueError(f"checkpoint {file}: of another model or of another lora.rank or lora.targets")
    parts = {kind: {name: tensors[f"{kind}.{name}"] for name in lora} for kind in ("lora", *MOMENTS, *copies)}
    states = {kind: {name: tensor.numpy() for name, tensor in parts.pop(kind).items()} for kind in copies}
    return {**header, **parts, "copies": states, "probes": None if probes is None else probes.numpy()}


def _infinite_if_nan(value: float) -> float:
    """max() and an all-reduce of maxima may lose a NaN; infinity they keep."""
    return math.inf if math.isnan(value) else value
