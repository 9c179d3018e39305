"""DeepSpeed's checkpoints both ways: written and loaded by the real DeepSpeed, on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from chiar_megatron.cli import main
from chiar_megatron.conversion.convert import convert, inspect, inspection
from chiar_megatron.conversion.formats import ConvertOptions
from chiar_megatron.errors import CheckpointError, ConfigError
from chiar_megatron.huggingface.folder import native_config, native_tensors, read_chiar_config
from chiar_megatron.inference.load import load_model
from chiar_megatron.model.tensors import LazyTensor
from tests.parallel.harness import run_ranks
from tests.unit.tiny_models import save_model, tiny_config, tiny_model

# Only the ranks import it: it changes torch for whoever does.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

MODELS = {
    "tied": dict(
        router={"kind": "learned", "target": 0.5}, norm="pre", normalization="RMSNorm", activation="swiglu",
        add_bias=False, num_query_groups=2,
    ),
    "untied": dict(router={"kind": "entropy"}, tie_embeddings=False, hidden_size=36, kv_channels=6),
}  # fmt: skip
SAVED = {
    1: [dict(name="w1s1", model="tied", stage=1), dict(name="w1s3", model="untied", stage=3)],
    2: [
        dict(name="s1", model="tied", stage=1, universal=True),
        dict(name="s2frozen", model="tied", stage=2, frozen=True),
        dict(name="s3frozen", model="tied", stage=3, frozen=True),
        dict(name="s3", model="untied", stage=3, universal=True),
        dict(name="s1frozen", model="untied", stage=1, frozen=True),
        dict(name="bf16s1", model="tied", stage=1, bf16=True),
        dict(name="bf16s3", model="tied", stage=3, bf16=True),
        dict(name="s0", model="tied", stage=0),
    ],
    4: [dict(name="w4s2", model="untied", stage=2), dict(name="w4s3", model="tied", stage=3)],
}
CASES = {case["name"]: {**case, "world_size": size} for size, cases in SAVED.items() for case in cases}


LOADED = [
    dict(model="tied", stage=0, universal=False),
    dict(model="tied", stage=2, universal=False),
    dict(model="untied", stage=1, universal=True),
    dict(model="tied", stage=3, universal=True),
    dict(model="untied", stage=2, universal=False, bf16=True),
]


@dataclass
class Saved:
    """A folder with DeepSpeed's checkpoints of all cases, and what its engines held: of those that it saved
    by name, of those that it loaded in the order of LOADED."""

    root: Path
    truths: dict[str, dict[str, torch.Tensor]]
    loaded: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    root = tmp_path_factory.mktemp("deepspeed")
    for model, fields in MODELS.items():
        native = root / f"{model}.native"
        save_model(tiny_model(tiny_config(**fields)), native)
        convert("native", "huggingface", native, root / f"{model}.hf", ConvertOptions())
        convert("native", "deepspeed", native, root / f"{model}.ds", ConvertOptions())
    worlds = [(size, "save", cases) for size, cases in SAVED.items()]
    worlds.append((2, "load", [{**case, "source": f"{case['model']}.ds"} for case in LOADED]))
    args = {"folder": str(root), "worlds": worlds}
    answers = run_ranks("tests.parallel.workers_deepspeed:run_worlds", 1, args, timeout=280)[0]
    truths = {
        case["name"]: truth
        for (_, _, cases), found in zip(worlds[:-1], answers[:-1], strict=True)
        for case, truth in zip(cases, found, strict=True)
    }
    return Saved(root, truths, answers[-1])


def expected(root: Path, model: str, truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A truth by native names."""
    config = native_config(read_chiar_config(root / f"{model}.hf"), root)
    stored = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in truth.items()}
    return {name: tensor.load() for name, tensor in native_tensors(config.model, stored, root).items()}


def assert_same(native: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = load_model(native, device="cpu").module.state_dict()
    assert wanted.keys() == {name for name, tensor in found.items() if tensor is not None}
    for name, tensor in wanted.items():
        rows = tensor.shape[0] if tensor.dim() else None
        assert torch.equal(found[name][:rows] if rows else found[name], tensor.float()), name


@pytest.mark.parametrize("name", list(CASES))
def test_shards_become_the_engines_float32_weights(saved, tmp_path, name):
    root, truths = saved.root, saved.truths
    case = CASES[name]
    options = ConvertOptions(config=str(root / f"{case['model']}.hf" / "config.json"))
    report = convert("deepspeed", "native", root / name, tmp_path / "native", options)
    assert report["step"] == 2 and report["zero_stage"] == case["stage"]
    wanted = expected(root, case["model"], truths[name])
    assert_same(tmp_path / "native", wanted)
    before = load_model(root / f"{case['model']}.native", device="cpu").module.state_dict()
    assert not torch.equal(before["decoder.final_layernorm.weight"], wanted["decoder.final_layernorm.weight"])
    found = inspect(root / name, options)
    form = f"ZeRO-{case['stage']} shards" if case["stage"] else "model states"
    assert (found["format"], found["form"], found["data_parallel_size"]) == (
        "deepspeed",
        form,
        case["world_size"],
    )
    assert found["dtype"] == "float32" and found["version"] and found["has_optimizer"]


@pytest.mark.parametrize("name", ["s1", "s3"])
def test_universal_checkpoints_of_deepspeeds_own_converter(saved, tmp_path, name):
    root, truths = saved.root, saved.truths
    options = ConvertOptions(config=str(root / f"{CASES[name]['model']}.hf"))
    report = convert("deepspeed", "native", root / name / "universal", tmp_path / "native", options)
    assert report["form"] == "universal" and report["step"] == 2
    assert_same(tmp_path / "native", expected(root, CASES[name]["model"], truths[name]))


def test_deepspeed_loads_what_was_converted(saved):
    for case, found in zip(LOADED, saved.loaded, strict=True):
        wanted = weights(saved.root / f"{case['model']}.native")
        for name, tensor in expected(saved.root, case["model"], found).items():
            if case["universal"] and name.split(".")[-1] in ("threshold", "place", "spread", "started"):
                continue  # DeepSpeed leaves buffers as they are
            # bfloat16 model states make bfloat16 masters.
            assert (tensor - wanted[name]).abs().max() <= (0.01 if case.get("bf16") else 0.0), (case, name)


@pytest.mark.parametrize("model", list(MODELS))
def test_what_was_converted_is_converted_back(saved, tmp_path, model):
    convert("deepspeed", "native", saved.root / f"{model}.ds", tmp_path / "back", ConvertOptions())
    assert_same(tmp_path / "back", weights(saved.root / f"{model}.native"))
    found = inspect(saved.root / f"{model}.ds", ConvertOptions())
    assert (found["format"], found["form"], found["step"]) == ("deepspeed", "universal", 7)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A native model's tensors, the vocabulary without padding."""
    native = load_model(folder, device="cpu")
    state = {name: tensor for name, tensor in native.module.state_dict().items() if tensor is not None}
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & state.keys():
        state[name] = state[name][: native.vocab_size]
    return state


def refusal(source: Path, destination: Path, options: ConvertOptions, kind=CheckpointError) -> str:
    """The message with which a source is refused, broken ones by `--inspect` too; nothing may be left
    behind."""
    with pytest.raises(kind) as caught:
        convert("deepspeed", "native", source, destination, options)
    if kind is CheckpointError:
        with pytest.raises(kind):
            inspect(source, options, "deepspeed")
    assert not list(destination.parent.glob(f"*{destination.name}*"))
    message = str(caught.value)
    assert len(message.splitlines()) <= 12
    return message


def copied(saved: Saved, name: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint, its config beside it as transformers' Trainer leaves it; returns the tag's
    folder."""
    shutil.copytree(saved.root / name, tmp_path / name)
    shutil.copy(saved.root / f"{CASES[name]['model']}.hf" / "config.json", tmp_path / name)
    return tmp_path / name / "global_step2"


def test_files_that_do_not_fit_together_are_refused(saved, tmp_path):
    tag, options = copied(saved, "s3frozen", tmp_path), ConvertOptions()
    source, no = tag.parent, tmp_path / "no"
    convert("deepspeed", "native", tag, tmp_path / "whole", options)  # the tag's folder itself
    shard, states = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"
    shard.rename(tmp_path / "shard")
    assert f"{shard.name} missing of 2 ranks'" in refusal(source, no, options)
    older = saved.root / "w4s3" / "global_step2"
    shutil.copy(older / shard.name, shard)
    assert "different saves" in refusal(source, no, options)
    shutil.copy(tmp_path / "shard", shard)
    for rank in (2, 3):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        shutil.copy(older / name, tag / name)
    assert "of an older save" in refusal(source, no, options)
    for rank in (2, 3):
        (tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    shard.write_bytes((tmp_path / "shard").read_bytes()[:9000])
    assert "torn" in refusal(source, no, options)
    shutil.copy(tmp_path / "shard", shard)
    (tag / f"zero_pp_rank_1_{states}").rename(tmp_path / "states")
    assert f"zero_pp_rank_1_{states} is missing" in refusal(source, no, options)  # frozen parts lie in it
    (tmp_path / "states").rename(tag / f"zero_pp_rank_1_{states}")
    (tag / f"zero_pp_rank_0_mp_rank_01_{states.removeprefix('mp_rank_00_')}").write_bytes(b"")
    assert "ds_to_universal" in refusal(source, no, options)
    (tag / "zero_pp_rank_0_mp_rank_01_model_states.pt").unlink()
    (tag / "layer_00-model_00-model_states.pt").write_bytes(b"")
    assert "pipeline" in refusal(source, no, options)
    (source / "latest").write_text("global_step9")
    assert "'global_step9'" in refusal(source, no, options)
    (source / "latest").write_text("../s3")
    assert "'../s3'" in refusal(source, no, options)


def test_configs_and_names(saved, tmp_path):
    tag = copied(saved, "s2frozen", tmp_path)
    source, no, options = tag.parent, tmp_path / "no", ConvertOptions()
    config = source / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "schedule": "D R*3 A"}))
    assert "missing model.layers.4" in refusal(source, no, options)
    config.unlink()
    assert "--config" in refusal(source, no, options, ConfigError)
    found = inspect(source, options)
    assert (found["zero_stage"], found["data_parallel_size"], found["step"]) == (2, 2, 2)
    assert "--config" in "\n".join(inspection(found))
    assert "--config" in refusal(source, no, ConvertOptions(config=str(tmp_path / "x.json")), ConfigError)
    states = tag / "mp_rank_00_model_states.pt"
    found = torch.load(states, weights_only=False)
    for name in ("module", "frozen_param_shapes", "frozen_param_fragments"):  # as of a Lightning module
        found[name] = {f"model._orig_mod.{key}": value for key, value in found[name].items()}
    found["param_shapes"] = [
        {f"model._orig_mod.{key}": value for key, value in group.items()} for group in found["param_shapes"]
    ]
    found["buffer_names"] = [f"model._orig_mod.{name}" for name in found["buffer_names"]]
    found["shared_params"] = {}
    torch.save(found, states)
    options = ConvertOptions(config=str(saved.root / "tied.hf"))
    report = convert("deepspeed", "native", source, tmp_path / "native", options)
    assert "prefix 'model._orig_mod.'" in " ".join(report["notes"])
    assert_same(tmp_path / "native", expected(saved.root, "tied", saved.truths["s2frozen"]))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed_and_deepspeed_need_not_be_there(saved, tmp_path, monkeypatch, capsys):
    tag = copied(saved, "s1", tmp_path)
    source, trap = tag.parent, tmp_path / "trap"
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it fails
    arguments = ["convert", "--from", "deepspeed", "--to", "native", str(source), str(tmp_path / "native")]
    assert main(arguments) == 0
    assert_same(tmp_path / "native", expected(saved.root, "tied", saved.truths["s1"]))
    shard = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {}, "ds_config": Malicious(trap)}, shard)
    capsys.readouterr()
    assert main(["convert", "--inspect", str(source)]) == 2
    message = capsys.readouterr().err
    assert "mkdir" in message and len(message.splitlines()) == 1
    shard.write_bytes(pickle.dumps(Malicious(trap)))
    assert "torn" in refusal(source, tmp_path / "no", ConvertOptions())
    assert not trap.exists()
