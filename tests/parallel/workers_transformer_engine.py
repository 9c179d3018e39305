"""What each rank does in test_convert_transformer_engine.py."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
from chiar_megatron.conversion.megatron_args import args_of
from chiar_megatron.runtime.distributed import initialize, shutdown
from chiar_megatron.runtime.env import read_process_env
from tests.parallel import te_modules
from tests.parallel.workers_megatron import _config, plain_gpt

SIZE, STAGES, LAYERS = 2, 2, 4


def load_and_save(folder: str, kinds: list[str]) -> list[str]:
    """Load what was converted, `KIND.torch_dist` and `KIND.torch`, strictly into TransformerEngine's layers.

    Saves them as Megatron-LM would: `KIND.te_dist`, and `KIND.te1` and `KIND.te2` in the older form."""
    root, checked = Path(folder), []
    parallel = ParallelConfig(
        tensor_model_parallel_size=SIZE, pipeline_model_parallel_size=STAGES, layout="even"
    )
    world = initialize(parallel, RuntimeConfig(device="cpu"), read_process_env())
    rank = f"mp_rank_{world.tensor_parallel_rank:02}_{world.pipeline_rank:03}"
    for kind in kinds:
        config = _config(root / f"{kind}.native")
        rows = -(-config.model.vocab_size // (128 * SIZE)) * 128 * SIZE
        spec = te_modules.transformer_engine_spec(config.model.normalization, LAYERS // STAGES)
        te_modules.VERSION = 2
        model = plain_gpt(config.model, parallel, rows, world, spec=spec)
        source = root / f"{kind}.torch/iter_0000007" / rank / "model_optim_rng.pt"
        model.load_state_dict(torch.load(source, weights_only=False)["model"])
        older = {name: tensor.clone() for name, tensor in model.named_parameters()}
        sharded = {"model": model.sharded_state_dict()}
        loaded = dist_checkpointing.load(sharded, str(root / f"{kind}.torch_dist/iter_0000007"))
        model.load_state_dict(loaded["model"])
        assert all(torch.equal(tensor, older[name]) for name, tensor in model.named_parameters())
        common = _common(args_of(config, SIZE, STAGES, rows))
        target = root / f"{kind}.te_dist/iter_0000007"
        if world.rank == 0:
            target.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(model.sharded_state_dict() | common, str(target))
        for version in (1, 2):
            te_modules.VERSION = version
            target = root / f"{kind}.te{version}/iter_0000007" / rank
            target.mkdir(parents=True)
            state = {"model": model.state_dict_for_save_checkpoint()}
            torch.save(common | state, target / "model_optim_rng.pt")
        checked.append(kind)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    shutdown()
    return checked


def _common(args: Any) -> dict[str, Any]:
    """What else Megatron-LM keeps: random states with numpy's arrays, enums among the arguments."""
    import signal

    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    args.transformer_impl, args.params_dtype = "transformer_engine", torch.bfloat16
    args.attention_backend, args.model_type = AttnBackend.auto, ModelType.encoder_or_decoder
    args.exit_signal = signal.SIGTERM
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    return {"args": args, "checkpoint_version": 3.0, "iteration": 7, "rng_state": [states]}
