"""DeepSpeed, wrapped: recipe + ZeRO strategy -> one engine, and the training state that this rank owns by name.

Owns every DeepSpeed quirk; nothing else in the project needs to know one. Does not know data, steps or files.

    engine = Engine(config, phase, optim, precision="float32", device=device)
    engine.write_weights(lambda name, shape: initial_value(config, name, shape, seed))
    loss_sum, count = engine.forward(batch)
    engine.backward(loss_sum, num_targets_of_the_step)
    result = engine.step(lr=3e-4)

The state of training is float32 `Fragment`s (name, start, values): each rank holds those that ZeRO gave it, so
saving needs no communication and any layout can load any other (checkpoint.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from slm import operators, parallel
from slm.data.batches import Batch
from slm.errors import UserError
from slm.layout import data_parallel, gradient_accumulation
from slm.losses import Distillation
from slm.memory import reduce_bucket_elements
from slm.model.config import ModelConfig
from slm.model.llama import Block, Objective, SLMForCausalLM, Visit
from slm.optim import parameter_groups
from slm.recipe import Optim, Phase
from slm.strategy import read_deepspeed

log = logging.getLogger("slm")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler


@dataclass(frozen=True)
class Fragment:
    """Elements start.. of a flattened parameter that this rank owns: live float32 1-D views, by STATE_KINDS."""

    name: str
    start: int
    values: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        return self.values["master"].numel()


@dataclass(frozen=True)
class StepResult:
    """grad_norm: of the mean gradient before clipping (inf if not finite). skipped: weights were left untouched."""

    grad_norm: float
    skipped: bool


def resolve_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """(precision, why). Raises UserError for float16 on a CPU."""
    if asked != "auto":
        if asked == "float16" and device.type == "cpu":
            raise UserError(
                "precision is float16, which DeepSpeed does not train on a CPU", fix="use precision: float32 (or auto)"
            )
        return asked, "the recipe says so"
    if device.type == "cpu":
        return "float32", "a CPU computes it fastest and exactly"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "this GPU has it"
    return "float16", "this GPU has no bfloat16; the loss is scaled dynamically"


def deepspeed_config(
    phase: Phase, optim: Optim, precision: str, world_size: int, device_type: str = "cpu"
) -> dict[str, Any]:
    """The ZeRO strategy's JSON joined with what the recipe owns. Raises UserError for combinations that train wrongly."""
    strategy = read_deepspeed(phase.deepspeed)
    strategy.pop("_about", None)
    stage = strategy["zero_optimization"].get("stage", 0)
    if stage == 0 and precision != "float32":
        raise UserError(
            f"phases.{phase.name}.deepspeed is ZeRO stage 0 with {precision}: DeepSpeed's optimiser for it starts Adam "
            "at its second step and would train wrongly",
            fix="use ds_configs/zero1.json, which on one device is the same without the error",
        )
    for part in ("offload_optimizer", "offload_param"):
        if strategy["zero_optimization"].get(part, {}).get("device") == "nvme":
            raise UserError(
                f"phases.{phase.name}.deepspeed offloads to NVMe, where checkpoints by parameter name cannot reach it",
                fix="use ds_configs/zero3_offload.json (host memory)",
            )
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if strategy["zero_optimization"].get(name) and device_type != "cuda":
            raise UserError(
                f"phases.{phase.name}.deepspeed sets {name} (ZeRO++), whose kernels DeepSpeed has for GPUs only",
                fix="use ds_configs/zero3.json on a CPU",
            )
    if phase.sequence_parallel > 1 and strategy["zero_optimization"].get("zero_quantized_gradients"):
        raise UserError(
            f"phases.{phase.name}.deepspeed sets zero_quantized_gradients (ZeRO++), and sequence_parallel is "
            f"{phase.sequence_parallel}: how DeepSpeed scales gradients then has not been tried",
            fix="leave one of them out",
        )
    accumulation = gradient_accumulation(phase, world_size)
    return {
        **strategy,
        "train_micro_batch_size_per_gpu": phase.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": phase.micro_batch * accumulation * data_parallel(phase, world_size),
        "gradient_clipping": optim.grad_clip,  # DeepSpeed's own default changed from 0 to 1: always say it
        # At stage 1 this would select another optimiser class of DeepSpeed's, whose state is laid out differently.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if precision != "float32" and stage > 1 else {}),
        "bf16": {"enabled": precision == "bfloat16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "float16", "loss_scale": 0, "initial_scale_power": 16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def import_muon() -> None:
    """DeepSpeed 0.19.8 imports its Muon to compare the optimiser's class with it, and hands Muon's functions to torch.compile
    as it does, which imports all of the compiler: a third of a small run's start. None of them is called here. Of a version
    that has it otherwise, nothing is changed."""
    from deepspeed.runtime import compiler

    compile_functions = compiler.compile
    try:
        with suppress(ImportError, AttributeError, TypeError):
            compiler.compile = lambda: compiler.dummy_decorator
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_functions


def _gradient_divisor(ds_config: dict[str, Any], phase: Phase) -> int:
    """By what DeepSpeed 0.19.8 divides the sum of the ranks' gradients: by the data ranks; but stage 3, where it scatters
    gradients in buckets (reduce_scatter, the default), also by the ranks that share a sequence."""
    zero = ds_config["zero_optimization"]
    world = parallel.world_size()
    scattered = zero.get("stage", 0) == 3 and zero.get("reduce_scatter", True)
    return world if scattered else data_parallel(phase, world)


class Engine:
    """One phase's model, optimiser and DeepSpeed engine on this rank. Weights are zero until write_weights."""

    def __init__(
        self,
        config: ModelConfig,
        phase: Phase,
        optim: Optim,
        *,
        precision: str,
        device: torch.device,
        compile_blocks: bool = False,
        objective: Objective | None = None,
    ) -> None:
        """`objective` replaces cross-entropy (see SLMForCausalLM.objective)."""
        import deepspeed

        self.device, self.precision, self.z_loss = device, precision, phase.loss.z_loss
        ds_config = deepspeed_config(phase, optim, precision, parallel.world_size(), device.type)
        ds_config["zero_optimization"]["reduce_bucket_size"] = reduce_bucket_elements(
            ds_config["zero_optimization"], config.num_parameters()
        )
        self.stage: int = ds_config["zero_optimization"].get("stage", 0)
        self._gradient_divisor = _gradient_divisor(ds_config, phase)
        groups_of_ranks = parallel.sequence_groups(phase.sequence_parallel) if phase.sequence_parallel > 1 else None
        deepspeed.utils.groups.mpu = groups_of_ranks  # an earlier phase's stays otherwise
        offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        build_operators(ds_config["zero_optimization"])
        import_muon()
        module = self.module = self._build_model(config, ds_config, groups_of_ranks)
        self._set_recomputation(phase)
        module.objective = objective
        module.share_sequences(phase.sequence_parallel)
        if compile_blocks:
            # Each phase compiles for its own shapes: next to those of the phase before, they would be made dynamic.
            torch._dynamo.reset()
            module.compile_blocks()
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters()}
        groups = parameter_groups(module, optim)
        settings: dict[str, Any] = dict(lr=0.0, betas=optim.betas, eps=optim.eps)
        if offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            self._client_optimizer = DeepSpeedCPUAdam(groups, **settings)
        else:
            self._client_optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self._client_optimizer,
                config=ds_config,
                dist_init_required=False,
                mpu=groups_of_ranks,
            )
        except ValidationError as error:
            named = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(
                f"{phase.deepspeed}: DeepSpeed does not accept it ({named})", fix="see ds_configs/"
            ) from None
        self._parameters: dict[str, Any] = dict(self.module.named_parameters())  # ZeRO-3 adds attributes to them
        self._zero_moments()

    def _build_model(
        self, config: ModelConfig, ds_config: dict[str, Any], groups_of_ranks: parallel.SequenceGroups | None
    ) -> SLMForCausalLM:
        import deepspeed

        if self.stage == 3:
            # Each module's parameters are partitioned as soon as they are made: no rank holds the whole model. The dtype
            # comes from ds_config: DeepSpeed 0.19.8 takes bfloat16 for any dtype= where float16 is not supported.
            with deepspeed.zero.Init(config_dict_or_path=ds_config, mpu=groups_of_ranks):
                return SLMForCausalLM(config, seed=None)
        with torch.device(self.device):
            model = SLMForCausalLM(config, seed=None).to(DTYPES[self.precision])
        return model

    def _set_recomputation(self, phase: Phase) -> None:
        import deepspeed

        self.module.recompute = phase.activation_checkpointing
        self.module.offload_activations = phase.offload_activations and self.device.type == "cuda"
        if phase.offload_activations and self.device.type != "cuda":
            log.info(
                "phases.%s.offload_activations does nothing here: on a CPU activations are in host memory", phase.name
            )
        blocks: Any = self.module.model.layers
        for block in blocks:
            block.mlp_tile_tokens = phase.mlp_tile_tokens
        if phase.mlp_tile_tokens is not None and self.stage == 3:
            # Tiles use the weights of several modules without calling these, so they are gathered for the block: once,
            # not once a tile, and their gradients arrive whole.
            deepspeed.utils.set_z3_leaf_modules(self.module, [Block])

    # --- one step ------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, distillation: Distillation | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (sum, count) of one micro-batch, with distillation (sum, parts of linear_distillation); builds the graph
        that `backward` consumes."""
        return self._engine(
            batch.tokens_BT,
            batch.positions_BT,
            batch.piece_bounds,
            batch.labels_BT,
            z_loss=self.z_loss,
            distillation=distillation,
        )

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> torch.Tensor:
        """-log p of every label, float32 [B, T]. Under ZeRO-3 all ranks must call it equally often."""
        self._engine.eval()
        losses_BT = self._engine(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, batch.labels_BT, each=True)
        self._engine.train()
        return losses_BT

    @torch.no_grad()
    def visit_logits(self, batch: Batch, visit: Visit) -> None:
        """Calls visit(first token, logits [C, V]) for all tokens. Under ZeRO-3 all ranks must call it equally often."""
        self._engine.eval()
        self._engine(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, visit=visit)
        self._engine.train()

    def backward(self, loss_sum: torch.Tensor, num_targets: float) -> None:
        """Adds this micro-batch's share of the gradient of the mean over the step's num_targets (of all ranks).

        DeepSpeed averages gradients over ranks (_gradient_divisor) and would divide by the accumulation steps too: the first
        is undone by the factor, the second by scale_wrt_gas.
        """
        self._engine.backward(loss_sum * (self._gradient_divisor / num_targets), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def step(self, lr: float) -> StepResult:
        """Clips, updates, clears the gradients. A gradient that is not finite skips the update on every rank alike."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        if self.stage > 0:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            return StepResult(norm, bool(self._optimizer.overflow))
        # Stage 0 knows neither the norm nor an overflow check.
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if norm == float("inf") or norm != norm:
            self._engine.zero_grad()
            self._engine.micro_steps += 1
            return StepResult(float("inf"), True)
        self._engine.step()
        return StepResult(norm, False)

    # --- state by parameter name ---------------------------------------------------------------------------

    @property
    def _inner(self) -> Any:
        """The torch optimizer (or CPUAdam) that holds lr and moments."""
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _flats(self) -> list[torch.Tensor]:
        """The tensors that the inner optimizer updates."""
        if self.stage == 0:
            return list(self._parameters.values())
        if self.stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        return self._optimizer.single_partition_of_fp32_groups

    def _zero_moments(self) -> None:
        """Creates the moments now, so that fragments exist before the first step; a step count for each flat."""
        for flat in self._flats():
            moments = {kind: torch.zeros_like(flat.data) for kind in STATE_KINDS[1:]}
            self._inner.state[flat] = {"step": self._step_value(0), **moments}

    def _step_value(self, step: int) -> Any:
        if isinstance(self._client_optimizer, torch.optim.AdamW):
            on_cpu = self.device.type == "cpu"
            return torch.tensor(float(step), device="cpu" if on_cpu else self.device)
        return step

    @property
    def optimizer_steps(self) -> int:
        """Updates that Adam has counted; its bias correction depends on it."""
        return int(next(iter(self._inner.state.values()))["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, step: int) -> None:
        for state in self._inner.state.values():
            state["step"] = self._step_value(step)
        if not isinstance(self._client_optimizer, torch.optim.AdamW):
            self._replay_cpu_adam(step)

    def _replay_cpu_adam(self, step: int) -> None:
        """CPU Adam keeps its own powers of the betas, as running float32 products: only counting up to `step` in its
        own way makes a resumed run bit-exact (jumping there takes pow(), which rounds differently)."""
        group = self._client_optimizer.param_groups[0]
        dummy = [torch.zeros(1) for _ in range(4)]
        for count in range(1, step + 1):
            self._client_optimizer.ds_opt_adam.adam_update(
                self._client_optimizer.opt_id, count, 0.0, *group["betas"], group["eps"], 0.0, True, *dummy
            )

    @property
    def is_scaling_down(self) -> bool:
        """Whether an overflow may be float16's own, whose loss scale can still be lowered."""
        return self.precision == "float16" and self._optimizer.loss_scaler.cur_scale > 1

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The state of float16's dynamic loss scale, else None."""
        if self.precision != "float16":
            return None
        return {name: getattr(self._optimizer.loss_scaler, name) for name in _SCALER_STATE}

    @loss_scale.setter
    def loss_scale(self, state: dict[str, float] | None) -> None:
        if self.precision == "float16" and state:
            for name in _SCALER_STATE:
                setattr(self._optimizer.loss_scaler, name, state[name])

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that every rank holds a copy of: the weights, at stage 0 their moments too; none at stage 3."""
        if self.stage < 3:
            yield from self._parameters.items()
        if self.stage == 0:
            for name, parameter in self._parameters.items():
                yield from ((f"{kind} of {name}", self._inner.state[parameter][kind]) for kind in STATE_KINDS[1:])

    def fragments(self) -> Iterator[Fragment]:
        """The state that this rank is responsible for, as live views. Together the ranks hold every element once."""
        if self.stage > 0 or parallel.rank() == 0:
            yield from self._owned()

    def _owned(self) -> Iterator[Fragment]:
        for name, parameter in self._parameters.items():
            if self.stage == 0:
                flat, start, offset, length = parameter, 0, 0, parameter.numel()
            elif self.stage == 3:
                group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                start = dist.get_rank() * padded
                length = min(padded, parameter.ds_numel - start)
                flat = self._optimizer.fp32_partitioned_groups_flat[group]
            else:
                mapping = getattr(parameter, "_hp_mapping", None)
                if mapping is None:
                    continue  # another rank owns all of it
                flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                offset = mapping.hp_fragment_address.start
            if length <= 0:
                continue
            state = self._inner.state[flat]
            tensors = {"master": flat.data, **{kind: state[kind] for kind in STATE_KINDS[1:]}}
            yield Fragment(name, start, {k: t.view(-1)[offset : offset + length] for k, t in tensors.items()})

    def write_state(self, read: Callable[[str, str, int, int], torch.Tensor | None]) -> None:
        """Fills what this rank holds: read(kind, name, start, length) -> 1-D tensor, or None to leave it. By all ranks: what
        one of them cannot read is raised on all, before they wait for each other's weights."""
        if self.stage == 3:
            self._optimizer._partition_all_parameters()
        parallel.together(self._fill, read)
        self._push_weights()

    def _fill(self, read: Callable[[str, str, int, int], torch.Tensor | None]) -> None:
        for fragment in self._owned():
            for kind, target in fragment.values.items():
                value = read(kind, fragment.name, fragment.start, fragment.length)
                if value is not None:
                    target.copy_(value)

    def write_weights(self, value: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
        """Sets the weights from value(name, shape) -> whole tensor; one parameter exists at a time."""

        def read(kind: str, name: str, start: int, length: int) -> torch.Tensor | None:
            if kind != "master":
                return None
            return value(name, self.shapes[name]).reshape(-1)[start : start + length].float()

        self.write_state(read)

    def _push_weights(self) -> None:
        """Makes the weights that the model computes with those of the float32 masters."""
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for parameter in self._parameters.values():
                group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                flat = self._optimizer.fp32_partitioned_groups_flat[group]
                parameter.ds_tensor.data.copy_(flat.data[offset : offset + padded])
            self._optimizer.invalidate_secondary_tensor()  # ZeRO++'s copy of the weights within a node
            kept = self._optimizer.persistent_parameters
            if kept:
                kept[0].all_gather(kept)

    def close(self) -> None:
        """Frees the engine's hooks and memory, so that the next phase can build its own."""
        self._engine.destroy()


# --- a model that is only computed with -----------------------------------------------------------------------


class PartitionedModel:
    """A model whose weights ZeRO-3 splits over all ranks, without optimiser or gradients: a teacher that no device holds.

    Every rank must call it equally often. weight(name, shape): whole tensors, of which each rank keeps its part.
    """

    def __init__(self, config: ModelConfig, weight: Callable[[str, tuple[int, ...]], torch.Tensor], dtype: torch.dtype):
        import deepspeed

        ds_config = {
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": 2**31,
        }
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            self.module = SLMForCausalLM(config, seed=None)
        self._engine, *_ = deepspeed.initialize(model=self.module, config=ds_config, dist_init_required=False)
        parameters: dict[str, Any] = dict(self.module.named_parameters())  # ZeRO-3 adds attributes to them
        for name, parameter in parameters.items():
            whole = weight(name, tuple(parameter.ds_shape)).flatten()
            part = parameter.ds_tensor
            mine = whole[parallel.rank() * part.numel() :][: part.numel()]
            part.data[: mine.numel()].copy_(mine)
        self._engine.eval()

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor, **options: Any) -> Any:
        return self._engine(*inputs, **options)


# --- DeepSpeed's compiled operators --------------------------------------------------------------------------


def build_operators(zero: dict[str, Any]) -> None:
    """Loads those that the "zero_optimization" section of a DeepSpeed JSON needs; see operators.py."""
    from deepspeed.ops.op_builder import CPUAdamBuilder, QuantizerBuilder

    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        operators.load(CPUAdamBuilder(), "CPU Adam")
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
        operators.load(QuantizerBuilder(), "quantiser")


def build_cpu_adam() -> None:
    """Before anything needs it: it takes minutes."""
    build_operators({"offload_optimizer": {"device": "cpu"}})
