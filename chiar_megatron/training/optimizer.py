"""AdamW by megatron-core and the learning-rate schedule, with torch's AdamW mended for checkpoints.

Without apex or TransformerEngine megatron-core takes torch's AdamW, whose per-parameter `step` tensor it
does not create ahead of a load, misses in the load of a distributed optimizer, and shares among all
parameters after one: training would then diverge silently (each update would advance the one counter).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from chiar_megatron.config.mcore import optimizer_config
from chiar_megatron.config.schema import OptimizerConfig, RunConfig
from chiar_megatron.runtime.cpu import name_parameters_as_cuda

_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


def build_optimizer(config: RunConfig, model: DistributedDataParallel) -> ChainedOptimizer:
    """AdamW over a stage's parameters; norms, biases and filters (all that is one-dimensional) undecayed."""
    name_parameters_as_cuda(model.parameters())
    one_dimensional = ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=_is_one_dimensional))
    settings = optimizer_config(
        config.optimizer, config.training.precision, config.parallel.distributed_optimizer
    )
    optimizer = get_megatron_optimizer(
        settings,
        [model],
        config_overrides={one_dimensional: {"wd_mult": 0.0}},
        use_gloo_process_groups=False,
    )
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, torch.optim.AdamW):
            inner.init_state_fn = _init_state
            _init_state(inner.optimizer)
        if isinstance(inner, DistributedOptimizer) and isinstance(inner.optimizer, torch.optim.AdamW):
            _leave_step_alone(inner)
    return optimizer


def _is_one_dimensional(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 1


def _init_state(adam: torch.optim.AdamW, config: Any = None) -> None:
    """Moments of zero and a step of its own for every parameter that has none yet."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
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
        if isinstance(inner.optimizer, torch.optim.AdamW):
            for state in inner.optimizer.state.values():
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).detach().clone().cpu()


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
            group["max_lr"], group["min_lr"] = self.config.lr, self.config.min_lr
            group["betas"] = (self.config.beta1, self.config.beta2)
            group["eps"] = self.config.eps
        self.scheduler.num_steps = step + 1
        self.scheduler.step(0)
        return float(self.scheduler.get_lr({}))
