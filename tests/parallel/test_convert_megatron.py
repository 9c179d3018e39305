"""Megatron-LM's files both ways, over tensor × pipeline × kinds.

Only `megatron.training`, which is not installed, writes `mp_rank_XX` files. Here they are made of the state
dicts that megatron-core's models give on every rank, in the envelope that is documented for them: args,
checkpoint_version, iteration, model. `torch_dist` is read by megatron-core itself.
"""

from __future__ import annotations

import json
import os
import pickle
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from chiar_megatron.conversion.convert import convert, inspect
from chiar_megatron.conversion.formats import ConvertOptions, MegatronOptions
from chiar_megatron.errors import CheckpointError
from chiar_megatron.inference.load import InferenceModel, load_model
from chiar_megatron.runtime.distributed import single_process_world
from tests.parallel.harness import run_ranks
from tests.parallel.workers_megatron import plain_gpt
from tests.unit.tiny_models import save_model, tiny_config, tiny_model

GRID = [(size, stages) for size in (1, 2, 4) for stages in (1, 2)]
LLAMA = {
    "norm": "pre",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias": False,
    "num_attention_heads": 8,
}
KINDS = {
    "gpt": dict(schedule="A*4", norm="pre"),
    "llama": dict(schedule="A*4", **LLAMA, tie_embeddings=False, num_query_groups=4, vocab_size=300),
    "qwen": dict(schedule="A*4", **LLAMA, add_qkv_bias=True, num_query_groups=4, rotary_base=1e6),
    "chiar": dict(router={"kind": "learned", "target": 0.5}, activation="swiglu", tie_embeddings=False),
    "paper": dict(router={"kind": "entropy"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Native models, and their conversions to every form."""
    root = tmp_path_factory.mktemp("megatron")
    for kind, fields in KINDS.items():
        config = tiny_config(**fields)
        if set(config.model.schedule) == set("A*4"):
            gate = replace(config.model.meta_router, enabled=False)
            config = replace(config, model=replace(config.model, meta_router=gate))
        save_model(tiny_model(config), root / f"{kind}.native")
        convert("native", "megatron", root / f"{kind}.native", root / f"{kind}.torch_dist", ConvertOptions())
        for size, stages in GRID:
            options = ConvertOptions(megatron=MegatronOptions("torch", size, stages, "local"))
            target = root / f"{kind}.{size}x{stages}.converted"
            convert("native", "megatron", root / f"{kind}.native", target, options)
    return root


def test_every_layout_loads_what_was_converted_and_is_converted_back(folder, tmp_path):
    args = {"folder": str(folder), "kinds": list(KINDS), "grid": GRID}
    answers = run_ranks("tests.parallel.workers_megatron:write_and_load", 8, args, timeout=280)
    assert all(len(checked) == len(KINDS) * (len(GRID) + 1) for checked in answers)
    for kind in KINDS:
        native = load_model(folder / f"{kind}.native", device="cpu")
        for layout in [*(f"{size}x{stages}" for size, stages in GRID), "vpp"]:
            target = tmp_path / f"{kind}.{layout}"
            convert("megatron", "native", folder / target.name / "iter_0000007", target, ConvertOptions())
            assert_same(load_model(target, device="cpu"), native)
    # Interleaved stages in distributed checkpoints: Megatron-LM's, and a run's of our own.
    native = load_model(folder / "llama.native", device="cpu")
    convert("megatron", "native", folder / "llama.vpp_dist/iter_0000007", tmp_path / "dist", ConvertOptions())
    assert_same(load_model(tmp_path / "dist", device="cpu"), native)
    native = load_model(folder / "chiar.native", device="cpu")
    convert("native", "huggingface", folder / "chiar.vpp_native", tmp_path / "hf", ConvertOptions())
    assert_same(load_model(tmp_path / "hf", device="cpu"), native)


def assert_same(found: InferenceModel, native: InferenceModel) -> None:
    """All tensors, but for the vocabulary's padding."""
    wanted = native.module.state_dict()
    for name, tensor in found.module.state_dict().items():
        if tensor is not None:
            rows = found.vocab_size if "word_embeddings" in name or "output_layer" in name else None
            assert torch.equal(
                tensor[:rows] if rows else tensor, wanted[name][:rows] if rows else wanted[name]
            )


@pytest.mark.parametrize("kind", ["gpt", "llama", "qwen"])
def test_megatrons_own_model_answers_as_ours(folder, kind):
    world = single_process_world("cpu")
    ours = load_model(folder / f"{kind}.native", device="cpu")
    config = ours.config.model
    model = plain_gpt(config, ours.config.parallel, -(-config.vocab_size // 128) * 128, world)
    sharded = {"model": model.sharded_state_dict()}
    source = folder / f"{kind}.torch_dist/iter_0000007"
    model.load_state_dict(dist_checkpointing.load(sharded, str(source))["model"])
    ids = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(20, 20, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = model(ids, torch.arange(20).expand(2, -1), mask)
        assert (logits[..., : config.vocab_size] - ours(ids)).abs().max() < 1e-4


def test_what_the_arguments_say(folder, tmp_path):
    """TransformerEngine's names, padding that the arguments do not tell, and other models' refusals."""
    options = ConvertOptions(megatron=MegatronOptions("torch", 2, 1))
    convert("native", "megatron", folder / "llama.native", tmp_path / "te", options)
    path = tmp_path / "te/iter_0000007/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    names = content["model"]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names and content["iteration"] == 7
    assert names["embedding.word_embeddings.weight"].shape[0] == 256  # 300 padded to 512, halved
    convert("megatron", "native", tmp_path / "te", tmp_path / "back", ConvertOptions())
    described = inspect(tmp_path / "te", ConvertOptions())
    assert described["layout"]["tensor_model_parallel_size"] == 2 and described["sizes"]["vocab"] == 300
    del content["args"].vocab_size
    torch.save(content, path)
    found = convert("megatron", "native", tmp_path / "te", tmp_path / "padded", ConvertOptions())
    assert found["sizes"]["vocab"] == 512 and "padding" in " ".join(found["notes"])

    def refusal(**changes) -> str:
        args = Namespace(**{**vars(content["args"]), **changes})
        torch.save({**content, "args": args}, path)
        with pytest.raises(CheckpointError) as caught:
            convert("megatron", "native", tmp_path / "te", tmp_path / "no", ConvertOptions())
        assert not (tmp_path / "no").exists()
        return str(caught.value)

    assert "--num-experts is 8" in refusal(num_experts=8)
    assert "--apply-layernorm-1p is True" in refusal(apply_layernorm_1p=True)
    assert "learned_absolute" in refusal(position_embedding_type="learned_absolute")
    assert "missing" in refusal(num_layers=5) and "surplus" in refusal(num_layers=3)
    assert "json.encoder.JSONEncoder" in refusal(odd=json.JSONEncoder())
    torch.save(content, path)
    path.parent.with_name("mp_rank_01").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="2 tensor-parallel ranks"):
        convert("megatron", "native", tmp_path / "te", tmp_path / "no", ConvertOptions())


def test_what_megatron_cannot_hold_is_refused(folder, tmp_path):
    config = tiny_config(schedule="A*4")
    config = replace(
        config, model=replace(config.model, meta_router=replace(config.model.meta_router, enabled=False))
    )
    save_model(tiny_model(config), tmp_path / "post")
    with pytest.raises(CheckpointError, match="norm: post"):
        convert("native", "megatron", tmp_path / "post", tmp_path / "no", ConvertOptions())
    options = ConvertOptions(megatron=MegatronOptions("torch", 3, 1))
    with pytest.raises(CheckpointError, match="not divisible by --tensor-parallel 3"):
        convert("native", "megatron", folder / "gpt.native", tmp_path / "no", options)
    (folder / "gpt.torch_dist" / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(CheckpointError, match="iter_0000009"):
        convert("megatron", "native", folder / "gpt.torch_dist", tmp_path / "no", ConvertOptions())
    (folder / "gpt.torch_dist" / "latest_checkpointed_iteration.txt").write_text("7")
    metadata = folder / "gpt.torch_dist/iter_0000007/.metadata"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    metadata.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="mkdir"):
        convert("megatron", "native", folder / "gpt.torch_dist", tmp_path / "no", ConvertOptions())
    assert not (tmp_path / "trap").exists()
