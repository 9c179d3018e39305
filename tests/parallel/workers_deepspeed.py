"""What each rank does in test_convert_deepspeed.py: real DeepSpeed trains, saves and loads our model."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM

import chiar_megatron.huggingface  # noqa: F401 (registers the model)
from chiar_megatron.runtime.launch import free_port

FROZEN = "model.layers.1.mlp.up_proj.weight"
LONE = "model.layers.0.meta_router.gate_proj.bias"  # a group of one value: all but one rank get padding


def run_worlds(folder: str, worlds: list[tuple[int, str, list[dict[str, Any]]]]) -> list[Any]:
    """For every (ranks, function, cases) call the function, `save` or `load`, on so many ranks, forked from
    this process, which has imported everything once. Returns what rank 0 answers to each."""
    answers = []
    for size, function, cases in worlds:
        answer = Path(folder) / "answer.pt"
        arguments = (function, size, free_port(), folder, cases, answer)
        # Raises naming the rank that failed, with its traceback, and ends the others.
        start_processes(_rank, arguments, nprocs=size, start_method="fork")
        answers.append(torch.load(answer))
    return answers


def _rank(
    rank: int, function: str, size: int, port: int, folder: str, cases: list[dict[str, Any]], answer: Path
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False  # nothing is compiled
    deepspeed.init_distributed("gloo", verbose=False)
    found = {"save": save, "load": load}[function](Path(folder), cases)
    dist.barrier()
    if rank == 0:
        torch.save(found, answer)


def save(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Train each case two steps and save it as `NAME` (`universal`: also by DeepSpeed's own converter).

    Returns, by case, every float32 parameter as the engine has it, and the buffers.
    """
    truths = []
    for case in cases:
        engine = _engine(folder, case)
        for _ in range(2):
            _step(engine)
        root = folder / case["name"]
        engine.save_checkpoint(str(root), client_state={"universal_checkpoint_info": {}})
        truths.append(_weights(engine))
        dist.barrier()
        if case.get("universal") and dist.get_rank() == 0:
            tag = (root / "latest").read_text()
            (root / "universal").mkdir()
            arguments = Namespace(
                input_folder=str(root / tag),
                output_folder=str(root / "universal" / f"{tag}_universal"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
            ds_to_universal(arguments)
    return truths


def load(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Load what was converted to `case["source"]` into a model of other weights, and train one step on.

    Returns, by case, what the engine held before that step.
    """
    answers = []
    for case in cases:
        engine = _engine(folder, case, seed=5)
        kind = {} if case["universal"] else {"load_module_only": True}
        path, _ = engine.load_checkpoint(str(folder / case["source"]), **kind)
        assert path is not None
        answers.append(_weights(engine))
        loss = float(_step(engine))
        assert 0.0 < loss < 50.0, loss
    return answers


def _engine(folder: Path, case: dict[str, Any], seed: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / f"{case['model']}.hf", dtype=torch.float32)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    if case.get("frozen"):
        model.get_parameter(FROZEN).requires_grad_(False)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in own.items() if p.dim() > 1]
    # A rank without a value of some group cannot load a universal checkpoint (DeepSpeed 0.19.8).
    lone = [p for name, p in own.items() if name == LONE and seed is None]
    rest = [p for name, p in own.items() if p.dim() <= 1 and not (lone and p is lone[0])]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest}, {"params": lone, "lr": 1e-4}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": case["stage"]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bool(case.get("bf16"))},
    }
    if "source" in case and case["universal"]:
        config["checkpoint"] = {"load_universal": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _step(engine: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(2, 60, (2, 12), generator=generator)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    found = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter) if engine.zero_optimization() else None
        if whole is None:  # frozen, or no ZeRO
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach()
                found[name] = whole.float().clone()
        else:
            found[name] = whole.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    return found
