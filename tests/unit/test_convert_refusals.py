"""Import of the authors' checkpoints: what is refused, in which words, and that nothing is left behind."""

import argparse
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chiar_megatron.conversion import verify
from chiar_megatron.conversion.convert import convert, summary
from chiar_megatron.conversion.formats import ConvertOptions
from chiar_megatron.errors import CheckpointError, ChiarError, ConfigError, DataError
from chiar_megatron.inference.load import load_model
from tests.unit.reference_files import FIXTURES, REPOSITORY, converted


class Malicious:
    """Would make a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def refusal(tmp_path: Path, source: Path, kind: type[ChiarError] = CheckpointError, **options) -> str:
    """The message with which a source is refused; nothing may be left behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind) as caught:
        converted(source, tmp_path / "native", **options)
    assert sorted(tmp_path.iterdir()) == before
    message = str(caught.value)
    assert len(message.splitlines()) <= 12
    return message


def changed_file(tmp_path: Path, name: str = "chiar_tiny", **changes: Tensor | None) -> Path:
    """A fixture with tensors set, or removed by None; `__` stands for a dot."""
    content = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    for key, tensor in changes.items():
        key = key.replace("__", ".")
        content["model"].pop(key, None)
        if tensor is not None:
            content["model"][key] = tensor
    torch.save(content, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_a_pickle_that_needs_more_is_refused_and_not_run(tmp_path):
    source, trap = tmp_path / "a.pt", tmp_path / "trap"
    torch.save({"model": {}, "cfg": Malicious(trap)}, source)
    message = refusal(tmp_path, source)
    assert "refused" in message and "mkdir" in message and len(message.splitlines()) == 1
    torch.save({"model": {}, "cfg": argparse.Namespace(lr=1)}, source)
    assert "argparse.Namespace" in refusal(tmp_path, source)
    source.write_bytes(pickle.dumps(Malicious(trap)))
    refusal(tmp_path, source)
    assert not trap.exists()


def test_torn_and_wrong_files_are_refused(tmp_path):
    source = tmp_path / "a.pt"
    whole = (FIXTURES / "chiar_tiny.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint\n", whole[:200]):
        source.write_bytes(content)
        assert "torn" in refusal(tmp_path, source)
    torch.save([1, 2], source)
    assert "list" in refusal(tmp_path, source)
    torch.save({"model": {"weight": torch.ones(2, 2)}}, source)
    assert "token_emb.weight" in refusal(tmp_path, source)
    torch.save({"model": {"token_emb.weight": [1.0]}}, source)
    assert "no plain tensor" in refusal(tmp_path, source)
    assert "no 'model'" in refusal(tmp_path, FIXTURES / "chiar_tiny.expected.pt")
    assert "nearest: a.pt" in refusal(tmp_path, tmp_path / "b.pt")
    assert "folder" in refusal(tmp_path, tmp_path)


def test_damaged_files_are_refused_by_their_checksums(tmp_path):
    source, content = tmp_path / "a.pt", bytearray((FIXTURES / "chiar_tiny.pt").read_bytes())
    reader = torch._C.PyTorchFileReader(str(FIXTURES / "chiar_tiny.pt"))
    for name, part in (("data/0", "data/0 is not what was written"), ("data.pkl", "data.pkl")):
        place = reader.get_record_offset(name) + 600
        content[place] ^= 1
        source.write_bytes(content)
        message = refusal(tmp_path, source)
        assert part in message and "copy it again" in message and len(message.splitlines()) == 1
        content[place] ^= 1
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(FIXTURES / "chiar_tiny.pt", weights_only=True), source)
    finally:
        torch.serialization.set_crc32_options(before)
    converted(source, tmp_path / "native")  # without checksums it is read as before


_FULL = """
import resource, sys
from chiar_megatron.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
native, *places = sys.argv[1:]
for place, format, *more in (
    (places[0], "deepspeed"), (places[1], "megatron", "--checkpoint-format", "torch"),
    (places[2], "megatron"), (places[3], "reference"),
):
    print(main(["convert", "--from", "native", "--to", format, native, place, *more]), file=sys.stderr)
"""


def test_a_full_disk_is_one_line(tmp_path):
    converted(FIXTURES / "chiar_tiny.pt", tmp_path / "native")
    places = [str(tmp_path / name) for name in "abcd"]
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "native"), *places],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and lines[1::2] == ["2"] * 4, done.stderr
    for place, line in zip(places, lines[::2], strict=True):
        assert line.startswith(f"chiar: {place} cannot be written") and "free space" in line
        assert not Path(place).exists()


def test_tensors_that_do_not_fit_are_named(tmp_path):
    weight = torch.zeros(96, 32)
    source = changed_file(tmp_path, layers__1__attn__qkv__weight=None)
    assert "missing layers.1.attn.qkv.weight [96, 32]" in refusal(tmp_path, source)
    source = changed_file(tmp_path, layers__1__attn__qkv__weight=None, layers__1__attn__kqv__weight=weight)
    message = refusal(tmp_path, source)
    assert "missing layers.1.attn.qkv.weight [96, 32]; nearest: layers.1.attn.kqv.weight [96, 32]" in message
    assert "surplus layers.1.attn.kqv.weight [96, 32]; nearest: layers.1.attn.qkv.weight [96, 32]" in message
    source = changed_file(tmp_path, extra__weight=weight)
    assert "surplus extra.weight [96, 32]" in refusal(tmp_path, source)
    source = changed_file(tmp_path, layers__2__ffn__3__weight=torch.zeros(32, 64))
    assert "layers.2.ffn.3.weight has shape [32, 64], expected [32, 128]" in refusal(tmp_path, source)
    source = changed_file(tmp_path, lm_head__weight=None)
    assert "missing lm_head.weight [97, 32]" in refusal(tmp_path, source)
    source = changed_file(tmp_path, meta_router__gate_proj__bias=None)
    assert "missing meta_router.gate_proj.bias [1]" in refusal(tmp_path, source)
    source = changed_file(tmp_path, "baseline_tiny", ffn_norms__2__weight=None)
    assert "missing ffn_norms.2.weight [32]" in refusal(tmp_path, source)
    source = changed_file(tmp_path, norm__weight=torch.ones(32, dtype=torch.int64))
    assert "norm.weight has dtype torch.int64" in refusal(tmp_path, source)
    source = changed_file(tmp_path, norm__weight=torch.full((32,), math.nan))
    assert "norm.weight has values that are not finite" in refusal(tmp_path, source)


def test_missing_layers_are_named(tmp_path):
    state = torch.load(FIXTURES / "chiar_tiny.pt", weights_only=True)["model"]
    source = tmp_path / "a.pt"
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith("layers.2.")}}, source)
    assert "layer 2 is missing" in refusal(tmp_path, source)
    only_ffn = {n: t for n, t in state.items() if not n.startswith(("layers.2.attn", "layers.2.dct"))}
    torch.save({"model": only_ffn}, source)
    assert "layers.2 has tensors of neither" in refusal(tmp_path, source)
    no_layers = {n: t for n, t in state.items() if not n.startswith("layers")}
    torch.save({"model": no_layers}, source)
    assert "layer 0 is missing" in refusal(tmp_path, source)


def test_options_that_contradict_the_file(tmp_path):
    soft, threshold = FIXTURES / "chiar_soft_tiny.pt", FIXTURES / "chiar_tiny.pt"
    assert "--num-heads 5" in refusal(tmp_path, threshold, ConfigError, num_heads=5)
    assert "--tau-low" in refusal(tmp_path, threshold, ConfigError, tau_low=0.9, tau_high=0.8)
    assert "router tensors" in refusal(tmp_path, threshold, ConfigError, routing_mode="soft")
    assert "router tensors" in refusal(tmp_path, soft, ConfigError, routing_mode="threshold")
    baseline = FIXTURES / "baseline_tiny.pt"
    assert "no routed layers" in refusal(tmp_path, baseline, ConfigError, routing_mode="hard")
    assert "tokenizer" in refusal(tmp_path, threshold, DataError, tokenizer=str(tmp_path / "t.model"))
    source = tmp_path / "a.pt"
    content = torch.load(soft, weights_only=True)
    torch.save({**content, "cfg": {"routing_mode": "sotf"}}, source)
    assert "'sotf' is unknown" in refusal(tmp_path, source)
    del content["cfg"]
    torch.save(content, source)
    assert "give --routing-mode soft or hard" in refusal(tmp_path, source, ConfigError)
    assert converted(source, tmp_path / "native", routing_mode="hard").config.model.router.kind == "hard"


def test_other_formats_and_taken_destinations(tmp_path):
    source = FIXTURES / "chiar_tiny.pt"
    with pytest.raises(ConfigError, match="convert to native first"):
        convert("reference", "huggingface", source, tmp_path / "a", ConvertOptions())
    with pytest.raises(ConfigError, match="--to onnx is unknown"):
        convert("reference", "onnx", source, tmp_path / "a", ConvertOptions())
    kept = tmp_path / "a"
    kept.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert("reference", "native", source, kept, ConvertOptions())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert("reference", "native", source, file / "a", ConvertOptions())
    assert sorted(tmp_path.iterdir()) == [kept, file] and not list(kept.iterdir())


def test_nothing_is_kept_of_a_model_that_disagrees(tmp_path, monkeypatch):
    source = FIXTURES / "chiar_tiny.pt"
    monkeypatch.setattr(verify, "LOGIT_TOLERANCE", 1e-12)  # no float32 model agrees with another so well
    message = refusal(tmp_path, source)
    assert "does not answer as the source does" in message and "--no-verify" in message
    options = ConvertOptions(verify=False)
    report = convert("reference", "native", source, tmp_path / "native", options)
    assert report["verification"] is None and summary(report)[-1] == "not verified"


def test_the_command_and_its_exit_codes(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/convert_checkpoint.py", "--from", "reference", "--to", "native"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(
            [*command, *arguments],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    source, destination = str(FIXTURES / "chiar_tiny.pt"), str(tmp_path / "out" / "native")
    done = run(source, destination, "--num-heads", "2", "--tau-low", "0.7", "--tau-high", "0.8")
    assert done.returncode == 0, done.stderr
    assert "tensors read back equal, logits within" in done.stdout and "Warning" not in done.stderr
    assert load_model(destination, device="cpu").config.model.router.threshold == pytest.approx(0.75)
    again = run(source, destination)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
