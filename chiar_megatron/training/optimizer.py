"""AdamW by megatron-core and the learning-rate schedule, with torch's AdamW mended for checkpoints.

Without apex or TransformerEngine megatron-core takes torch's AdamW, whose per-parameter `step` tensor it
does not create ahead of a load, misses in the load of a distributed optimizer, and shares among all
parameters after one: training would then diverge silently (each update would advance the one counter).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from chiar_megatron.config.mcore import optimizer_config
from chiar_megatron.config.schema import OptimizerConfig, RunConfig
from chiar_megatron.model.initialize import follows_width, width_scale
from chiar_megatron.runtime.cpu import name_parameters_as_cuda
from chiar_megatron.runtime.device import current_device

_FOLLOWS_WIDTH = "follows_width"  # attribute of a parameter that µP scales
_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> ChainedOptimizer:
    """AdamW over a stage's parameters; norms, biases and filters (all that is one-dimensional) undecayed."""
    for chunk in chunks:
        name_parameters_as_cuda(chunk.parameters())
    one_dimensional = ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=_is_one_dimensional))
    overrides: dict[ParamKey, dict[str, float]] = {one_dimensional: {"wd_mult": 0.0}}
    scale = width_scale(config.model)
    if scale != 1.0:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                setattr(parameter, _FOLLOWS_WIDTH, follows_width(name, parameter))
        wide = ParamKey(predicate=ParamPredicate("follows_width", _follows_width))
        overrides[wide] = {"lr_mult": scale}
    settings = optimizer_config(config.optimizer, config.training.precision, config.parallel)
    optimizer = get_megatron_optimizer(
        settings,
        chunks,
        config_overrides=overrides,
        use_gloo_process_groups=False,
    )
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, torch.optim.AdamW):
            inner.init_state_fn = _init_state
            _fuse(inner.optimizer)
            _init_state(inner.optimizer)
        if isinstance(inner, Float16OptimizerWithFloat16Params):
            inner._copy_main_params_to_model_params = partial(_copy_at_once, inner)
        if isinstance(inner, DistributedOptimizer) and isinstance(inner.optimizer, torch.optim.AdamW):
            _leave_step_alone(inner)
    return optimizer


def _copy_at_once(inner: Float16OptimizerWithFloat16Params) -> None:
    """Master weights to the model's, in few launches: without apex megatron-core copies one by one."""
    model_data, main_data = inner._get_model_and_main_params_data_float16()
    torch._foreach_copy_(model_data, main_data)


def _follows_width(parameter: torch.Tensor) -> bool:
    return bool(getattr(parameter, _FOLLOWS_WIDTH, False))


def _is_one_dimensional(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 1


def _fuse(adam: torch.optim.AdamW) -> None:
    """On CUDA: torch's fused kernel, which also scales gradients and can leave a step out, unasked by the
    host. megatron-core builds its AdamW without it, and a load brings the flag of the checkpoint."""
    for group in adam.param_groups:
        group["fused"] = any(parameter.device.type == "cuda" for parameter in group["params"])


def _init_state(adam: torch.optim.AdamW, config: Any = None) -> None:
    """Moments of zero and a step of its own for every parameter that has none yet."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": _step_count(0.0, group["fused"], parameter),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }


def _leave_step_alone(inner: DistributedOptimizer) -> None:
    """megatron-core looks for each parameter's `step` among loaded tensors, but keeps it with the groups."""
    set_states = inner._set_main_param_and_optimizer_states

    def set_states_but_step(model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, place = inner.model_param_group_index_map[model_parameter]
        parameter = inner.optimizer.param_groups[group]["params"][place]
        set_states(model_parameter, {**tensors, "step": inner.optimizer.state[parameter]["step"]})

    inner._set_main_param_and_optimizer_states = set_states_but_step


def give_each_parameter_its_step(optimizer: ChainedOptimizer) -> None:
    """After a load: undo megatron-core's sharing of one `step` tensor among all parameters."""
    for inner in optimizer.chained_optimizers:
        adam = inner.optimizer
        if isinstance(adam, torch.optim.AdamW):
            _fuse(adam)
            for group in adam.param_groups:
                for parameter in group["params"]:
                    state = adam.state[parameter]
                    state["step"] = _step_count(float(state["step"]), group["fused"], parameter)


def _step_count(value: float, fused: bool, parameter: torch.Tensor) -> torch.Tensor:
    """The fused kernel wants it beside the parameter, the others on the host."""
    return torch.tensor(value, dtype=torch.float32, device=parameter.device if fused else "cpu")


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> torch.Tensor:
    """Global norm of all gradients as they lie, float32 `[]` on the device; every rank gets the same.

    megatron-core's own waits for the host.
    """
    gradients = [g for inner in optimizer.chained_optimizers for g in inner.get_main_grads_for_grad_norm()]
    if gradients:
        square = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
    else:
        square = torch.zeros((), device=current_device())
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square.sqrt()


@torch.no_grad()
def apply_update(optimizer: ChainedOptimizer, factor: torch.Tensor, taken: torch.Tensor) -> None:
    """One step of AdamW with gradients times `factor` (float32 `[]`), or none at all unless `taken` (bool
    `[]`). The fused kernel takes both from the device."""
    for inner in optimizer.chained_optimizers:
        adam = inner.optimizer
        parameters = inner.get_parameters()
        if not parameters:
            continue
        if adam.param_groups[0].get("fused"):
            adam.grad_scale, adam.found_inf = 1.0 / factor, (~taken).float()
        elif not bool(taken):
            return
        else:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
    optimizer.step_with_ready_grads()


class LearningRate:
    """The schedule as a pure function of the step: nothing of it needs saving."""

    def __init__(self, config: OptimizerConfig, optimizer: ChainedOptimizer) -> None:
        assert config.decay_steps is not None, "the config must be resolved"
        self.config = config
        self.optimizer = optimizer
        self.scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=max(config.decay_steps, config.warmup_steps + 1),
            lr_decay_style=_STYLES[config.schedule],
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            wsd_decay_steps=config.wsd_decay_steps,
            lr_wsd_decay_style="linear",
        )

    def set(self, step: int) -> float:
        """Set every group's rate for the update that makes `step` into `step + 1`; returns the rate.

        The first update of a warmup of n steps takes 1/n of the peak, the n-th all of it.
        """
        for group in self.optimizer.param_groups:
            # A loaded checkpoint brings its own: the recipe's count.
            scale = group["lr_mult"]  # µP's
            group["max_lr"], group["min_lr"] = self.config.lr * scale, self.config.min_lr * scale
            group["betas"] = (self.config.beta1, self.config.beta2)
            group["eps"] = self.config.eps
        self.scheduler.num_steps = step + 1
        self.scheduler.step(0)
        return float(self.scheduler.get_lr({}))
