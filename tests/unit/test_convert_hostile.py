"""Conversion of what is hostile, damaged or odd: nothing is executed, one clear message, exit code 2."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from chiar_megatron.checkpoint.files import file_digest
from chiar_megatron.checkpoint.store import CheckpointStore, load_state, make_info
from chiar_megatron.checkpoint.torch_dist import read_metadata
from chiar_megatron.cli import main
from chiar_megatron.config.load import to_dict
from chiar_megatron.config.schema import CheckpointConfig, MetaRouterConfig
from chiar_megatron.conversion.convert import convert, inspect
from chiar_megatron.conversion.formats import ConvertOptions, MegatronOptions
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.errors import CheckpointError, ChiarError
from chiar_megatron.inference.load import load_model
from chiar_megatron.model.build import SHARDING_METADATA
from tests.unit.reference_files import FIXTURES, converted
from tests.unit.tiny_models import save_model, tiny_config, tiny_model


class Malicious:
    """Would make a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The same model as `native`, `hf` and `ds`."""
    root = tmp_path_factory.mktemp("hostile")
    save_model(tiny_model(tiny_config({"kind": "learned", "target": 0.5})), root / "native")
    convert("native", "huggingface", root / "native", root / "hf", ConvertOptions())
    convert("native", "deepspeed", root / "native", root / "ds", ConvertOptions())
    convert("native", "megatron", root / "native", root / "megatron", ConvertOptions())
    return root


def changed(made: Path, name: str, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    shutil.copytree(made / name, tmp_path / name)
    return tmp_path / name


def step_of(run: Path) -> Path:
    return next((run / "checkpoints").glob("step_*"))


def sign(step: Path, name: str) -> None:
    """Have the manifest agree with a changed file, as an attacker would."""
    manifest = json.loads((step / "manifest.json").read_text())
    manifest[name] = file_digest(step / name)
    (step / "manifest.json").write_text(json.dumps(manifest))


def refused(capsys, *arguments: object) -> str:
    """What `chiar convert` says of a source, in one line or a list, with exit code 2."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("chiar: ") and "Traceback" not in message and len(message.splitlines()) <= 12
    return message


def test_a_malicious_metadata_is_refused_everywhere(made, tmp_path, capsys):
    run, trap = changed(made, "native", tmp_path), tmp_path / "trap"
    step = step_of(run)
    (step / ".metadata").write_bytes(pickle.dumps(Malicious(trap)))
    sign(step, ".metadata")
    for arguments in (
        ("--inspect", run),
        ("--inspect", run, "--from", "native"),
        ("--from", "native", "--to", "huggingface", run, tmp_path / "hf"),
    ):
        message = refused(capsys, *arguments)
        assert "mkdir" in message and len(message.splitlines()) == 1
    with pytest.raises(CheckpointError, match="mkdir"):
        load_model(run, device="cpu")
    assert not trap.exists() and not (tmp_path / "hf").exists()


def test_metadata_may_not_name_files_elsewhere(made, tmp_path, capsys):
    run = changed(made, "native", tmp_path)
    step = step_of(run)
    metadata = read_metadata(step)
    for place in metadata.storage_data.values():
        place.relative_path = "../../../secret"
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(step, ".metadata")
    assert "outside its folder" in refused(capsys, "--inspect", run)


def test_a_malicious_object_in_a_native_checkpoint_is_not_run(tmp_path):
    """`load_model` and resuming go through megatron-core, which would call what such objects say."""
    model = tiny_model(tiny_config({"kind": "learned"}))
    state = {"model": model.module.sharded_state_dict(metadata=dict(SHARDING_METADATA))}
    trap, objects = tmp_path / "trap", [t for t in state["model"].values() if not hasattr(t, "dtype")]
    assert objects and all(entry.key.endswith("_extra_state") for entry in objects)
    objects[0].data = Malicious(trap)
    store = CheckpointStore(tmp_path / "run" / "checkpoints", CheckpointConfig())
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 1}
    store.save(state, make_info(1, 0, False, layout, to_dict(model.config)))
    before = FileSystemReader.read_metadata
    with pytest.raises(CheckpointError, match="mkdir"):
        load_model(tmp_path / "run", device="cpu")
    assert FileSystemReader.read_metadata is before and not trap.exists()


def test_mixed_training_both_ways(tmp_path):
    """The authors' "mixed" file: imported without its classifiers, exported as the language model it is."""
    source = torch.load(FIXTURES / "chiar_mixed_tiny.pt", weights_only=True)
    converted(FIXTURES / "chiar_mixed_tiny.pt", tmp_path / "native", tau_low=0.7, tau_high=0.9)
    report = convert("native", "reference", tmp_path / "native", tmp_path / "mixed.pt", ConvertOptions())
    back = torch.load(tmp_path / "mixed.pt", weights_only=True)
    language = {name: t for name, t in source["model"].items() if not name.startswith("_cls_head_")}
    assert "cfg" not in source and len(language) < len(source["model"])
    assert {n for n in back["model"] if "rope" not in n} == {n for n in language if "rope" not in n}
    assert all(torch.equal(back["model"][name], t) for name, t in language.items() if "rope" not in name)
    assert back["step"] == source["step"] == report["step"]
    assert (back["cfg"]["tau_low"] + back["cfg"]["tau_high"]) / 2 == pytest.approx(0.8, abs=1e-7)
    again = converted(tmp_path / "mixed.pt", tmp_path / "again")  # its threshold is told now
    ids = torch.arange(20)[None] % again.vocab_size
    first = load_model(tmp_path / "native", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids), first(ids))


def test_a_wrong_format_is_told_which_is_right(made, tmp_path, capsys):
    places = {"native": made / "native", "huggingface": made / "hf", "deepspeed": made / "ds"}
    places |= {"megatron": made / "megatron", "reference": FIXTURES / "chiar_tiny.pt"}
    for own, source in places.items():
        assert inspect(source, ConvertOptions())["format"] == own
        for told in places.keys() - {own}:
            message = refused(capsys, "--inspect", source, "--from", told)
            assert f"is no {told} checkpoint but {own}" in message
    (tmp_path / "empty").mkdir()
    for told in places:
        refused(capsys, "--inspect", tmp_path / "empty", "--from", told)
        refused(capsys, "--inspect", tmp_path / "nothing", "--from", told)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("hidden_size", "abc", "hidden_size is 'abc'"),
        ("router", [1], "router is [1]"),
        ("router", {"kind": "foo"}, "model.router.kind: 'foo'"),
        ("router", {"kinds": "learned"}, "kinds"),
        ("norm", "mid", "model.norm: 'mid'"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("rotary_scaling", {"rope_type": "yarn"}, "'yarn'"),
        ("pretraining", 7, "pretraining is 7"),
        ("pretraining", {"step": "x"}, "pretraining.step is 'x'"),
        ("schedule", "D R*2 Q", "unexpected 'Q'"),
        ("use_bias", 1, "use_bias is 1"),
        ("eos_token_id", 500, "data.eod_token: 500"),
        ("num_attention_heads", 5, "num_attention_heads: 5"),
    ],
)
def test_configs_that_describe_no_model(made, tmp_path, capsys, field, value, part):
    folder = changed(made, "hf", tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, field: value}))
    message = refused(capsys, "--from", "huggingface", "--to", "native", folder, tmp_path / "out")
    assert part in message and "converting" not in message and not (tmp_path / "out").exists()
    assert part in refused(capsys, "--inspect", folder)


@pytest.mark.parametrize("eos", [[1, 5], []])
def test_several_tokens_may_end_a_text(tmp_path, eos):
    config = tiny_config({"kind": "learned"}, mask_documents=True, data={"eod_token": 1})
    save_model(tiny_model(config), tmp_path / "native")
    convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions())
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**content, "eos_token_id": eos}))
    if eos:  # the first of them ends documents, and both sides agree on it
        convert("huggingface", "native", tmp_path / "hf", tmp_path / "back", ConvertOptions())
        assert load_model(tmp_path / "back", device="cpu").config.data.eod_token == 1
        return
    with pytest.raises(ChiarError, match="eod"):
        convert("huggingface", "native", tmp_path / "hf", tmp_path / "back", ConvertOptions())


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("manifest.json", {"checkpoint.json": 3}, "manifest.json is torn"),
        ("manifest.json", [], "manifest.json is torn"),
        ("checkpoint.json", {"config": 3}, "its config is no dict"),
        ("checkpoint.json", {"config": {}}, "not resolved"),
        ("checkpoint.json", {"step": "x"}, "its step is no int"),
    ],
)
def test_native_files_of_another_kind(made, tmp_path, capsys, name, content, part):
    run = changed(made, "native", tmp_path)
    step = step_of(run)
    if name == "checkpoint.json":
        content = {**json.loads((step / name).read_text()), **content}
    (step / name).write_text(json.dumps(content))
    if name == "checkpoint.json":
        sign(step, name)
    assert part in refused(capsys, "--from", "native", "--to", "huggingface", run, tmp_path / "out")


def test_other_torn_files(made, tmp_path, capsys):
    folder = changed(made, "megatron", tmp_path)
    (folder / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    assert "torn" in refused(capsys, "--inspect", folder, "--from", "megatron")
    folder = changed(made, "hf", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "torn" in refused(capsys, "--inspect", folder)
    folder = changed(made, "ds", tmp_path)
    part = next((folder / "global_step7" / "zero").glob("*/fp32.pt"))
    part.write_bytes(part.read_bytes()[:300])
    assert f"{part.parent.name}/fp32.pt is no PyTorch checkpoint" in refused(capsys, "--inspect", folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iteration", "x"), ("rotary_base", "x"), ("vocab_size", []), ("kv_channels", "x"),
        ("hidden_dropout", "x"), ("eod_token", []), ("rotary_seq_len_interpolation_factor", []),
        ("virtual_pipeline_model_parallel_size", "x"), ("virtual_pipeline_model_parallel_size", 2**40),
        ("model", "x"),
    ],
)  # fmt: skip
def test_arguments_of_megatrons_of_another_kind(plain_gpt, tmp_path, capsys, field, value):
    folder = changed(plain_gpt, "torch", tmp_path)
    path = next(folder.rglob("model_optim_rng.pt"))
    content = torch.load(path, weights_only=False)
    if field in ("iteration", "model"):
        content[field] = value
    else:
        setattr(content["args"], field, value)
    torch.save(content, path)
    message = refused(capsys, "--inspect", folder)
    assert field in message.replace("-", "_") and len(message.splitlines()) == 1


@pytest.fixture(scope="module")
def plain_gpt(tmp_path_factory) -> Path:
    """A model that Megatron-LM's arguments describe, as mp_rank files."""
    root = tmp_path_factory.mktemp("gpt")
    config = tiny_config(schedule="A*2", norm="pre")
    config = replace(config, model=replace(config.model, meta_router=MetaRouterConfig(enabled=False)))
    save_model(tiny_model(config), root / "native")
    options = ConvertOptions(megatron=MegatronOptions("torch"))
    convert("native", "megatron", root / "native", root / "torch", options)
    return root


@pytest.mark.parametrize(("key", "value"), [("buffer_names", 1), ("shared_params", [1]), ("step", 10**400)])
def test_headers_of_another_kind(made, tmp_path, capsys, key, value):
    if key == "step":  # of the authors': said to be none
        torch.save({**wrapped(), key: value}, tmp_path / "a.pt")
        assert "step 0 assumed" in " ".join(inspect(tmp_path / "a.pt", ConvertOptions())["notes"])
        return
    folder = changed(made, "ds", tmp_path)
    path = next(folder.rglob("mp_rank_00_model_states.pt"))
    torch.save({**torch.load(path, weights_only=False), key: value}, path)
    message = refused(capsys, "--inspect", folder)
    assert f"{key} is no " in message and len(message.splitlines()) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("name", ["native", "hf", "ds", "megatron", "native/inside", "hf/model.safetensors"])
def test_what_may_not_be_read_is_named(made, tmp_path, capsys, monkeypatch, name):
    """As another user, for root may read everything."""
    place = changed(made, name.split("/")[0], tmp_path)
    (tmp_path / name if "." in name else place).chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # folders above may be closed too
    source = name if "inside" in name else place.name
    target = "huggingface" if "native" in name else "native"
    kind = {"hf": "huggingface", "ds": "deepspeed"}.get(place.name, place.name)
    os.seteuid(65534)
    try:
        said = [refused(capsys, "--inspect", source)]
        said += [refused(capsys, "--from", kind, "--to", target, source, "out")]
    finally:
        os.seteuid(0)
    assert all(place.name in line and "ermission denied" in line and line.count("\n") == 1 for line in said)


def wrapped(**prefixes: str) -> dict[str, Any]:
    """A file of the authors' whose names have a prefix."""
    content = torch.load(FIXTURES / "chiar_tiny.pt", weights_only=True)
    state = {prefixes.get("prefix", "") + name: tensor for name, tensor in content["model"].items()}
    return {**content, "model": state}


def test_the_authors_files_in_other_wrappings(tmp_path):
    plain = converted(FIXTURES / "chiar_tiny.pt", tmp_path / "plain").module.state_dict()
    whole = wrapped()
    inner = {name.replace("layers.1.", "layers.1._orig_mod."): t for name, t in whole["model"].items()}
    optimizer = {
        "state": {0: {"exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}],
    }
    cases = {
        "both": wrapped(prefix="module._orig_mod."),
        "layers compiled": {**whole, "model": inner},
        "optimizer": {**whole, "optimizer": optimizer, "step": torch.tensor(123)},
        "state_dict": {"state_dict": whole["model"], "step": 123},
        "bare": whole["model"],
        "transposed": {**whole, "model": {n: _strided(t) for n, t in whole["model"].items()}},
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / "a.pt")
        options = ConvertOptions()
        report = convert("reference", "native", tmp_path / "a.pt", tmp_path / name, options)
        assert report["step"] == (0 if name == "bare" else 123)
        found = load_model(tmp_path / name, device="cpu").module.state_dict()
        assert all(torch.equal(t, plain[key]) for key, t in found.items() if t is not None), name
    torch.save({**whole, "step": "12"}, tmp_path / "a.pt")
    assert "step 0 assumed" in " ".join(inspect(tmp_path / "a.pt", ConvertOptions())["notes"])


def test_two_conversions_do_not_share_a_destination(made, tmp_path):
    journal = Journal(tmp_path / "hf", {})
    with pytest.raises(CheckpointError, match="another conversion"):
        convert("native", "huggingface", made / "native", tmp_path / "hf", ConvertOptions())
    journal.discard()
    convert("native", "huggingface", made / "native", tmp_path / "hf", ConvertOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def test_loading_in_megatron_core_accepts_what_runs_save(made):
    """The list of what native files may name is long enough: weights load, and the reader is as before."""
    model = load_model(made / "native", device="cpu")
    state = {"model": model.module.sharded_state_dict(metadata=dict(SHARDING_METADATA))}
    loaded = load_state(step_of(made / "native"), state)
    assert any(isinstance(value, io.BytesIO) or value is None for value in loaded["model"].values())
