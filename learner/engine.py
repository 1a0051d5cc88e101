"""One DeepSpeed rank: losses of its states, backward, optimizer steps, checkpoint. No Ray.

    shard of prompts ─► states of each optimizer step ─► losses (learner/loss.py) ─► backward ─► AdamW under ZeRO

DeepSpeed runs in its float32 mode on a module of mixed dtypes. The base model is frozen in its own dtype. The LoRA
is float32, so it is its own master copy, and a learning rate of 1e-6 is not lost in rounding.
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
from g2rpo_ray.rollout.sigmas import check_trained, sigma_grid
from g2rpo_ray.types import FloatArray, PromptRollout

CHECKPOINT = "learner.safetensors"
FORMAT = "g2rpo_ray.learner/1"
MOMENTS = ("exp_avg", "exp_avg_sq")
PROBES = "probes"
MAX_BUCKET = 50_000_000  # gradient elements per reduction; DeepSpeed's default reserves 2 GB


class LearnerEngine:
    """One rank: the LoRA, its optimizer, and the rank's part of an update.

    All ranks must make the same calls in the same order, since each call may be a collective.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        world_size: int,
        checkpoint: str | Path | None = None,
        model: FlowModel | None = None,
    ) -> None:
        """Call `learner.rendezvous.set_environment` first.

        Args:
            config: all settings.
            rank, world_size: of this process.
            checkpoint: directory of a checkpoint to resume from. Default: start from `lora.initial` or a new LoRA.
            model: a loaded one without LoRA. Default: load the configuration's.

        Raises:
            ValueError: the model cannot be loaded, or the checkpoint or adapter is missing or of another LoRA.
        """
        set_up_torch(config.deterministic, config.learner.threads, backward=True)
        self._config, self._learner, self._rank, self._ranks = config, config.learner, rank, world_size
        self._device = config.learner.device
        _join_process_group(self._device, rank, world_size, max(config.startup_timeout_s, config.hung_after_s))
        self._model = self._with_lora(model)
        transformer = self._model.transformer
        self._lora = lora_parameters(transformer)
        # the LoRA is loaded before ZeRO partitions the parameters, the moments afterwards
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
        self.copies = Copies.of(self._learner, self._device, rank, self.lora_state, copies, version)
        sigmas = sigma_grid(config.sampler, self._model)
        check_trained(config, sigmas, self._model.lora_from)
        loss: Any = ForwardLoss if self._learner.forward else EdgeLoss
        idle = idle_modules(transformer)
        trained = {name: p for name, p in self._lora.items() if name.split(".lora_")[0] not in idle}
        self._reached = ReachedModules(trained, self._device)
        self._agreement = Agreement(config, self._model, transformer, sigmas, self.copies)
        self._loss: Any = loss(config, self._model, transformer, sigmas, self.copies)
        remembered = saved["probes"] if saved is not None and saved.get("probed_by") == rule(config) else None
        probing = config.sampler.is_auto and isinstance(self._loss, EdgeLoss)
        self._probes = Probes(config, self._loss, self._lora, remembered) if probing else None

    def _with_lora(self, model: FlowModel | None) -> FlowModel:
        """The model, by default the configuration's, with a new LoRA."""
        config = self._config
        weights_on = "cpu" if self._learner.zero_stage == 3 else None  # the whole base may not fit one device
        model = model or FlowModel.load(
            config.model, self._device, transformer=True, low_noise=False, weights_on=weights_on
        )
        add_lora(model.transformer, config.lora, config.seed)
        fold_lora(model.transformer)
        if self._learner.compile:
            compile_blocks(model.transformer)
        if self._learner.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def update(self, shard: Sequence[PromptRollout], batch: BatchShape) -> RankMetrics:
        """One iteration's update.

        Args:
            shard: this rank's prompts, with arrays instead of object references.
            batch: numbers of the whole batch.

        Returns:
            This rank's part of the metrics: see `reduce_metrics`.

        Raises:
            RuntimeError: the learner's velocities differ from the rollout's beyond the tolerance, on all ranks before
                the next optimizer step; a gradient is not finite; or no edge has its scores.
        """
        metrics = RankMetrics()
        if not batch.steps:
            raise RuntimeError("learner: no edge has all of its scores; see why rewards fail (reward/*/missing)")
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
        """The whole LoRA on every rank, as float32 arrays by name."""
        with self._whole_lora():
            return {name: p.detach().float().cpu().numpy().copy() for name, p in self._lora.items()}

    def _whole_lora(self) -> Any:
        """A context in which every rank has the whole LoRA, which ZeRO-3 partitions."""
        return deepspeed.zero.GatheredParameters(list(self._lora.values()))

    def publish(self, version: int, kind: str = "rollouts") -> dict[str, FloatArray]:
        """A policy's arrays by name: the next sampling policy ("rollouts"), the trained "lora", or the "ema"."""
        if kind == "rollouts":
            return self.copies.publish(version, self.lora_state)
        return self.copies.averages.get(kind) or self.lora_state()

    def save(self, directory: str | Path) -> None:
        """Writes a checkpoint: whole LoRA, copies, Adam's moments and steps, for any number of ranks and ZeRO stage.

        It also writes the adapter in diffusers' format to `lora/`, and its average, if there is one, to `lora_ema/`.
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
            # one key, because safetensors writes several in any order, and equal states must give equal files
            save_file(tensors, Path(directory) / CHECKPOINT, {"learner": header})
            for name, state in (("lora", lora), ("lora_ema", copies.get(EMA))):
                if state is not None:
                    export_lora(Path(directory) / name, state, self._config.lora, self._model.pipeline_class)

    def _backward(self, states: Sequence[Any], step: StepShape, metrics: RankMetrics, share: float) -> float | None:
        """Accumulates the gradient of one optimizer step; returns this rank's largest |ratio − 1|, if it has ratios."""
        deviation: float | None = None
        for some in micro_batches(states, self._learner.micro_batch, step):
            losses, parts = zip(*self._loss(some, step, metrics), strict=True)
            # DeepSpeed averages over ranks, but the parts must be summed
            self._engine.backward(torch.stack(losses).sum() * self._ranks, scale_wrt_gas=False)
            for part in parts:
                if "ratio_max_dev" in part:
                    deviation = max(deviation or 0.0, _infinite_if_nan(float(part.pop("ratio_max_dev"))))
                for name, value in part.items():
                    metrics.add(f"learner/{name}", float(value) * share)
        return deviation

    def _require_agreement(self, metrics: RankMetrics) -> None:
        """Raises on all ranks if any of them has velocities that differ from the rollout's beyond the tolerance."""
        largest = torch.tensor(metrics.velocity_error, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        tolerance = self._config.velocity_tolerance
        if float(largest) > tolerance:
            raise RuntimeError(
                f"learner: the relative error of its velocity against the rollout's is {float(largest):.3g} at the "
                f"same state, above learner.velocity_tolerance={tolerance:.3g}; weights, noise levels, dtype, "
                "attention backend or hardware differ; raise the tolerance if rounding explains it"
            )

    def _step(self, metrics: RankMetrics) -> None:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if not self._engine.was_step_applied() or norm is None or not math.isfinite(norm):
            raise RuntimeError("learner: the gradient is not finite, no optimizer step was taken; lower learner.lr")
        self.optimizer_steps += 1
        self.copies.stepped(self.lora_state, self.optimizer_steps)
        metrics.largest("learner/grad_norm", float(norm))

    def _create_moments(self) -> None:
        """Creates AdamW's state before its first step, so that checkpoints can be read and written."""
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
            if self._learner.zero_stage == 3:  # safe_set_full_... fails if the ranks do not divide the parameter
                safe_set_local_optimizer_state(parameter, self._partition(moments[name], parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, moments[name].to(self._device), key)

    def _partition(self, value: Tensor, parameter: Any) -> Tensor:
        """This rank's partition of a whole tensor, padded with zeros as by ZeRO-3."""
        size = parameter.partition_numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self._ranks - value.numel()))
        return padded.narrow(0, size * self._rank, size).to(self._device)


def _join_process_group(device: str, rank: int, world_size: int, timeout_s: float) -> None:
    if device == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce (50 s, with a compiler), which only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_SIZE", "1")  # else DeepSpeed calls numactl, and raises if it is not permitted
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 deprecates
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    backend = "gloo" if device == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_s)
    # NCCL's default of 10 minutes would end ranks that LearnerGroup still waits for. DeepSpeed creates another group,
    # and torch gives it the default timeout instead of the first group's.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, rank=rank, world_size=world_size)


def _initialize(transformer: torch.nn.Module, lora: list[torch.nn.Parameter], learner: LearnerConfig) -> Any:
    """The DeepSpeed engine: AdamW over the LoRA; its state (ZeRO-1), gradients (2), all weights (3) are partitioned.

    With ZeRO-3 each parameter is partitioned from the CPU, since `deepspeed.initialize` would first move the whole
    module to every device.
    """
    optimizer = torch.optim.AdamW(
        lora, lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=learner.weight_decay
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # required, without effect: the loss has its own denominators
        "managed_gradient_accumulation": False,  # step() ends the accumulation after any number of backward passes
        "gradient_clipping": learner.grad_clip,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(MAX_BUCKET, sum(parameter.numel() for parameter in lora)),
            "memory_efficient_linear": False,  # its F.linear rounds differently in bfloat16
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
        ValueError: the file is missing, damaged, or of another LoRA.
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
        raise ValueError(f"checkpoint {file}: has another model, lora.rank or lora.targets; give its settings")
    parts = {kind: {name: tensors[f"{kind}.{name}"] for name in lora} for kind in ("lora", *MOMENTS, *copies)}
    states = {kind: {name: tensor.numpy() for name, tensor in parts.pop(kind).items()} for kind in copies}
    return {**header, **parts, "copies": states, "probes": None if probes is None else probes.numpy()}


def _infinite_if_nan(value: float) -> float:
    """Infinity for NaN, which max() and an all-reduce of maxima may lose."""
    return math.inf if math.isnan(value) else value
