"""Files of Megatron-LM with TransformerEngine's layers, its default, both ways.

TransformerEngine is not installed. The files are made by megatron-core from `te_modules.py`, stand-ins that
keep what TransformerEngine's modules keep, under their names, and that load as strictly.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chiar_megatron.checkpoint.torch_dist import read_metadata
from chiar_megatron.conversion.convert import convert, inspect
from chiar_megatron.conversion.formats import ConvertOptions, MegatronOptions
from chiar_megatron.errors import CheckpointError
from chiar_megatron.inference.load import load_model
from tests.parallel.harness import run_ranks
from tests.parallel.test_convert_megatron import KINDS, assert_same
from tests.parallel.workers_transformer_engine import SIZE, STAGES
from tests.unit.tiny_models import save_model, tiny_config, tiny_model

PLAIN = ("gpt", "llama", "qwen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Native models, their conversions, and what TransformerEngine's layers made of these."""
    root = tmp_path_factory.mktemp("te")
    options = ConvertOptions(megatron=MegatronOptions("torch", SIZE, STAGES))
    for kind in PLAIN:
        config = tiny_config(**KINDS[kind])
        gate = replace(config.model.meta_router, enabled=False)
        save_model(
            tiny_model(replace(config, model=replace(config.model, meta_router=gate))),
            root / f"{kind}.native",
        )
        convert("native", "megatron", root / f"{kind}.native", root / f"{kind}.torch_dist", ConvertOptions())
        convert("native", "megatron", root / f"{kind}.native", root / f"{kind}.torch", options)
    args = {"folder": str(root), "kinds": list(PLAIN)}
    answers = run_ranks(
        "tests.parallel.workers_transformer_engine:load_and_save", SIZE * STAGES, args, timeout=200
    )
    assert answers == [list(PLAIN)] * len(answers)  # both forms loaded strictly
    return root


@pytest.mark.parametrize("kind", PLAIN)
def test_they_are_read(folder, tmp_path, kind):
    native = load_model(folder / f"{kind}.native", device="cpu")
    names = torch.load(
        folder / f"{kind}.te1/iter_0000007/mp_rank_00_000/model_optim_rng.pt", weights_only=False
    )["model"]
    assert isinstance(names["decoder.layers.0.self_attention.linear_qkv._extra_state"], io.BytesIO)
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    assert not any("input_layernorm" in name for name in names)
    for form in ("te_dist", "te1", "te2"):
        source = folder / f"{kind}.{form}" / "iter_0000007"
        report = convert("megatron", "native", source, tmp_path / form, ConvertOptions())
        assert_same(load_model(tmp_path / form, device="cpu"), native)
        assert ("extra states" in " ".join(report["notes"])) == (form == "te1")
        described = inspect(source, ConvertOptions())
        assert described["sizes"]["vocab"] == native.vocab_size and described["step"] == 7


def test_extra_states_are_never_unpickled(folder, tmp_path):
    """A pickle within a BytesIO, or within an object of a distributed checkpoint, is left alone."""

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    stream = io.BytesIO()
    torch.save(Malicious(), stream)
    shutil.copytree(folder / "gpt.te1", tmp_path / "bytes")
    path = tmp_path / "bytes/iter_0000007/mp_rank_00_000/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = stream
    torch.save(content, path)
    convert("megatron", "native", tmp_path / "bytes/iter_0000007", tmp_path / "a", ConvertOptions())
    content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = Malicious()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="mkdir"):
        convert("megatron", "native", tmp_path / "bytes/iter_0000007", tmp_path / "b", ConvertOptions())
    # In a distributed checkpoint they are objects, which are not even read: here they are destroyed.
    shutil.copytree(folder / "gpt.te_dist", tmp_path / "dist")
    places = read_metadata(tmp_path / "dist/iter_0000007").storage_data
    objects = [place for index, place in places.items() if "_extra_state/shard_" in index.fqn]
    assert len(objects) == 4 * 5 + 1  # of linear layers and attention, and the last norm's
    for place in objects:
        with (tmp_path / "dist/iter_0000007" / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(b"x" * place.length)
    convert("megatron", "native", tmp_path / "dist/iter_0000007", tmp_path / "c", ConvertOptions())
    assert not (tmp_path / "trap").exists()


def test_files_of_numpy_1_are_read(folder, tmp_path):
    """numpy 2 moved the maker of its arrays, which Megatron-LM's random states name."""
    old, new = b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy._core.multiarray\n_reconstruct\n"
    shutil.copytree(folder / "llama.te2", tmp_path / "old")
    for path in (tmp_path / "old").rglob("*.pt"):
        reader = torch._C.PyTorchFileReader(str(path))
        records = {name: reader.get_record(name) for name in reader.get_all_records()}
        assert (old in records["data.pkl"]) != (new in records["data.pkl"])
        for name in (
            old,
            new,
        ):  # numpy 1's in one file, numpy 2's in the next: whichever runs, one is foreign
            records["data.pkl"] = records["data.pkl"].replace(name, old if "rank_00" in str(path) else new)
        writer = torch._C.PyTorchFileWriter(str(path))
        for name, content in records.items():
            if name != "version" and not name.startswith(".data/"):
                writer.write_record(name, content, len(content))
        writer.write_end_of_file()
    convert("megatron", "native", tmp_path / "old/iter_0000007", tmp_path / "native", ConvertOptions())


def test_a_file_packed_anew_by_another_program_is_refused(folder, tmp_path):
    """torch reckons where tensors lie instead of looking: there it would find other numbers."""
    shutil.copytree(folder / "gpt.te2", tmp_path / "zip")
    path = tmp_path / "zip/iter_0000007/mp_rank_00_000/model_optim_rng.pt"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="packed by another program"):
        convert("megatron", "native", tmp_path / "zip/iter_0000007", tmp_path / "native", ConvertOptions())


def test_arguments_without_tensors_of_their_own_are_refused(folder, tmp_path):
    shutil.copytree(folder / "llama.te_dist", tmp_path / "args")
    path = tmp_path / "args/iter_0000007/common.pt"
    content = torch.load(path, weights_only=False)
    for name, value in (("qk_l2_norm", True), ("softmax_scale", 0.5), ("glu_linear_offset", 1.0)):
        torch.save({**content, "args": Namespace(**{**vars(content["args"]), name: value})}, path)
        with pytest.raises(CheckpointError, match=f"--{name.replace('_', '-')} is {value}"):
            convert("megatron", "native", tmp_path / "args/iter_0000007", tmp_path / "no", ConvertOptions())
    torch.save({**content, "args": Namespace(**{**vars(content["args"]), "fp8": "hybrid"})}, path)
    report = convert("megatron", "native", tmp_path / "args/iter_0000007", tmp_path / "fp8", ConvertOptions())
    assert "fp8" in " ".join(report["notes"])
