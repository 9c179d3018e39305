"""What each rank does in test_convert_megatron.py: megatron-core's GPT, stock or of our layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from chiar_megatron.checkpoint.store import CheckpointStore, make_info
from chiar_megatron.config.load import to_dict
from chiar_megatron.config.mcore import transformer_config
from chiar_megatron.config.schema import CheckpointConfig, ParallelConfig, RuntimeConfig
from chiar_megatron.conversion.megatron_args import args_of, is_plain_gpt
from chiar_megatron.model.build import SHARDING_METADATA, build_model
from chiar_megatron.runtime.distributed import World, initialize, seed_random_streams, shutdown
from chiar_megatron.runtime.env import ProcessEnv, read_process_env


def write_and_load(folder: str, kinds: list[str], grid: list[tuple[int, int]]) -> list[str]:
    """For every kind and layout: load `KIND.torch_dist`, which was converted, strictly into this rank's
    model; save its state in Megatron-LM's envelope as `KIND.TPxPP`; and load what was converted to
    `KIND.TPxPP.converted` strictly, finding the same. Returns what was checked."""
    checked = []
    root, env = Path(folder), read_process_env()
    configs = {kind: _config(root / f"{kind}.native") for kind in kinds}
    for size, stages in grid:
        # Megatron-LM's files have as many layers in every stage.
        parallel = ParallelConfig(
            tensor_model_parallel_size=size, pipeline_model_parallel_size=stages, layout="even"
        )
        world = initialize(parallel, RuntimeConfig(device="cpu"), env)
        for kind in kinds:
            config = configs[kind]
            rows = -(-config.model.vocab_size // (128 * size)) * 128 * size
            model = _model(config, parallel, world, rows)
            metadata = None if is_plain_gpt(config.model) else dict(SHARDING_METADATA)
            sharded = {"model": model.sharded_state_dict(metadata=metadata)}
            source = root / f"{kind}.torch_dist/iter_0000007"
            model.load_state_dict(dist_checkpointing.load(sharded, str(source))["model"])
            name = f"mp_rank_{world.tensor_parallel_rank:02}"
            name += "" if stages == 1 else f"_{world.pipeline_rank:03}"
            state = model.state_dict_for_save_checkpoint()
            if world.data_parallel_rank == 0:
                target = root / f"{kind}.{size}x{stages}/iter_0000007" / name
                target.mkdir(parents=True, exist_ok=True)
                args = args_of(config, size, stages, rows)
                content = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": state}
                torch.save(
                    content | {"rng_state": [{"random_rng_state": (1, 2)}]}, target / "model_optim_rng.pt"
                )
            source = root / f"{kind}.{size}x{stages}.converted/iter_0000007" / name / "model_optim_rng.pt"
            found = torch.load(source, weights_only=False)["model"]
            own = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            assert own.keys() == found.keys(), own.keys() ^ found.keys()
            wrong = [key for key in own if not torch.equal(own[key], found[key])]
            assert not wrong, (kind, size, stages, wrong)
            checked.append(f"{kind} {size}x{stages}")
        dist.barrier()
        parallel_state.destroy_model_parallel()
    checked += _interleaved(root, configs, env)
    shutdown()
    return checked


def _interleaved(root: Path, configs: dict[str, Any], env: ProcessEnv) -> list[str]:
    """Two stages of two chunks each: of every kind `KIND.vpp`, mp_rank files, and `KIND.vpp_dist`, torch_dist
    as Megatron-LM saves it; of CHIAR also `KIND.vpp_native`."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        layout="even",
    )
    world = initialize(parallel, RuntimeConfig(device="cpu"), env)
    for kind, config in configs.items():
        rows = -(-config.model.vocab_size // 256) * 256
        args = args_of(config, 2, 2, rows)
        args.virtual_pipeline_model_parallel_size = 2
        chunks = {f"model{chunk}": _model(config, parallel, world, rows, chunk) for chunk in (0, 1)}
        metadata = None if is_plain_gpt(config.model) else dict(SHARDING_METADATA)

        def sharded(chunks: dict[str, Any] = chunks, metadata: Any = metadata) -> dict[str, Any]:
            return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in chunks.items()}

        loaded = dist_checkpointing.load(sharded(), str(root / f"{kind}.torch_dist/iter_0000007"))
        for name, chunk in chunks.items():
            chunk.load_state_dict(loaded[name])
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
        target = root / f"{kind}.vpp/iter_0000007"
        target /= f"mp_rank_{world.tensor_parallel_rank:02}_{world.pipeline_rank:03}"
        if world.data_parallel_rank == 0:
            target.mkdir(parents=True)
            states = {name: chunk.state_dict_for_save_checkpoint() for name, chunk in chunks.items()}
            torch.save(common | states, target / "model_optim_rng.pt")
        target = root / f"{kind}.vpp_dist/iter_0000007"
        if world.rank == 0:
            target.mkdir(parents=True)
        dist.barrier()
        if is_plain_gpt(config.model):
            dist_checkpointing.save(sharded() | common, str(target))
        else:
            store = CheckpointStore(root / f"{kind}.vpp_native" / "checkpoints", CheckpointConfig())
            layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
            store.save(sharded(), make_info(7, 0, False, layout, to_dict(config)))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    return [f"{kind} interleaved" for kind in configs]


def _config(folder: Path) -> Any:
    from chiar_megatron.checkpoint.files import resolve_checkpoint
    from chiar_megatron.inference.load import checkpoint_config

    return checkpoint_config(resolve_checkpoint(folder), ParallelConfig(), None)


def _model(config: Any, parallel: ParallelConfig, world: Any, rows: int, chunk: int | None = None) -> Any:
    model = config.model
    if is_plain_gpt(model):
        return plain_gpt(model, parallel, rows, world, chunk)
    return build_model(
        replace(config, parallel=parallel, model=replace(model, vocab_size=rows)), world, chunk
    )


def plain_gpt(
    model: Any, parallel: ParallelConfig, rows: int, world: World, chunk: int | None = None, spec: Any = None
) -> GPTModel:
    """This rank's stage of Megatron-LM's own GPT, or one chunk of it. spec: of its layers; None: local."""
    seed_random_streams(1, 0, world)
    return GPTModel(
        transformer_config(model, parallel),
        spec or get_gpt_layer_local_spec(normalization=model.normalization),
        vocab_size=rows,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rotary_base),
    ).eval()
