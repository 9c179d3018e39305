"""Hugging Face both ways, by the real transformers and safetensors; the authors' format on the way back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chiar_megatron.conversion.convert import convert, inspect
from chiar_megatron.conversion.formats import ConvertOptions, ReferenceOptions
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.errors import CheckpointError
from chiar_megatron.huggingface import ChiarConfig, ChiarForCausalLM  # registers the model
from chiar_megatron.inference.generate import generate
from chiar_megatron.inference.load import load_model
from chiar_megatron.model.tensors import tensor_specs
from tests.unit.reference_files import FIXTURES, REPOSITORY, converted, random_file
from tests.unit.tiny_models import sample_text, save_model, tiny_config, tiny_model, tiny_tokenizer

PRE = {"norm": "pre", "normalization": "RMSNorm", "activation": "swiglu", "add_bias": False}
MODELS = {
    "entropy": dict(router={"kind": "entropy"}, pooling="running"),
    "learned": dict(router={"kind": "learned", "target": 0.5}, pooling="causal", **PRE, num_query_groups=2),
    "routed keys": dict(router={"kind": "learned", "keys_values": "routed"}, tie_embeddings=False),
    "gated": dict(router={"kind": "entropy_gated"}, schedule="A R R D", add_bias=False, add_qkv_bias=True),
    "documents": dict(
        router={"kind": "random"},
        pooling="causal",
        mask_documents=True,
        data={"eod_token": 1},
        schedule="R D A",
    ),
    "soft": dict(router={"kind": "soft"}, kv_channels=6, hidden_size=36),
    "hard, three operators": dict(router={"kind": "hard", "operators": "spectral_attention_rbf"}, norm="pre"),
    "batch": dict(router={"kind": "entropy"}, pooling="batch"),
}


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    """A native model, the folder it was converted to, and that folder's model by transformers."""
    folder = tmp_path_factory.mktemp("hf")
    native = tiny_model(tiny_config(**MODELS[request.param]))
    save_model(native, folder / "native")
    convert("native", "huggingface", folder / "native", folder / "hf", ConvertOptions(shard_bytes=30_000))
    return request.param, native, folder, AutoModelForCausalLM.from_pretrained(folder / "hf").eval()


def ids_of(native, rows: int = 3, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, native.vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def test_transformers_answers_as_native_and_back(pair, tmp_path):
    name, native, folder, model = pair
    ids = ids_of(native)
    documents = None
    if name == "documents":
        ids[:, ::7] = 1
        documents = (ids == 1).long().cumsum(1) - (ids == 1).long()
    expected = native(ids, documents)
    assert (model(ids).logits - expected).abs().max() < 1e-4
    assert (load_model(folder / "hf", device="cpu")(ids, documents) - expected).abs().max() < 1e-6
    index = json.loads((folder / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    convert("huggingface", "native", folder / "hf", tmp_path / "back", ConvertOptions())
    back = load_model(tmp_path / "back", device="cpu").module.state_dict()
    for key, tensor in native.module.state_dict().items():
        if tensor is not None:
            rows = (
                native.vocab_size if tensor.dim() > 1 and len(tensor) == 64 else None
            )  # the rest is padding
            assert torch.equal(tensor[:rows] if rows else tensor, back[key][:rows] if rows else back[key]), (
                key
            )
    # What transformers writes itself is read as well.
    model.save_pretrained(tmp_path / "saved")
    assert (load_model(tmp_path / "saved", device="cpu")(ids, documents) - expected).abs().max() < 1e-6


@torch.no_grad()
def test_generation_with_the_cache_is_generation_without(pair):
    name, native, _, model = pair
    ids = ids_of(native, 2, 7)
    if name == "documents":
        ids[:, 3] = 1
    settings = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = generate(native, ids, 9, temperature=0.0, use_cache=name != "batch")
    mask = torch.ones_like(ids)
    if name in ("batch", "hard, three operators"):
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, use_cache=True)
        if name == "batch":
            return
    found = model.generate(ids, attention_mask=mask, **settings)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(found, uncached)
    if name != "documents":  # ours stops at the end of a document
        assert torch.equal(found, expected)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **settings)
    assert torch.equal(
        beams, model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **settings)
    )


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(pair):
    name, native, _, model = pair
    ids = ids_of(native, 1, 8)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(11) >= 3).long()[None]
    alone = model(ids, use_cache=False).logits
    assert (model(padded, attention_mask=mask, use_cache=False).logits[:, 3:] - alone).abs().max() < 1e-4


def test_it_trains_and_checkpointing_gives_the_same_gradients(pair):
    _, native, folder, _ = pair
    ids = ids_of(native)
    losses, gradients = [], []
    for checkpointed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder / "hf").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    logits = model(ids).logits[:, :-1]
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert losses[0] == pytest.approx(by_hand.item(), abs=1e-5) and losses[0] == pytest.approx(
        losses[1], abs=1e-6
    )
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-5) for n in gradients[0])


def test_the_folder_needs_this_package_not(pair, tmp_path):
    name, native, folder, model = pair
    if name not in ("learned", "hard, three operators"):
        pytest.skip("two models take every path of the code")
    ids = ids_of(native)
    torch.save((ids, model(ids, use_cache=False).logits), tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.modules["chiar_megatron"] = sys.modules["megatron"] = None
from transformers import AutoModelForCausalLM
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(folder / "hf")!r}, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
assert (model(ids, use_cache=False).logits - expected).abs().max() < 1e-5
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def test_half_precision_keeps_thresholds_exact(tmp_path):
    native = tiny_model(tiny_config({"kind": "entropy"}))
    save_model(native, tmp_path / "native")
    report = convert(
        "native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions(dtype="bf16")
    )
    assert report["verification"]["logits"] < 1e-4 and "bf16" in " ".join(report["notes"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    layer = model.model.layers[1].router
    assert layer.threshold.dtype == torch.float32
    assert torch.equal(layer.threshold, native.module.chiar_layers[1].router.threshold)
    model.save_pretrained(tmp_path / "saved")
    assert inspect(tmp_path / "saved", ConvertOptions())["format"] == "huggingface"


def test_a_head_of_its_own_is_not_dropped(tmp_path):
    """transformers loads such a folder untied, whatever its config says."""
    save_model(tiny_model(tiny_config()), tmp_path / "native")
    convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions())
    weights = load_file(tmp_path / "hf/model.safetensors")
    table = weights["model.embed_tokens.weight"]
    for head, is_same in ((table.clone(), True), (table.flip(0), False)):
        save_file({**weights, "lm_head.weight": head}, tmp_path / "hf/model.safetensors")
        if is_same:
            convert("huggingface", "native", tmp_path / "hf", tmp_path / "tied", ConvertOptions())
            continue
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from .*; set it to false"):
            convert("huggingface", "native", tmp_path / "hf", tmp_path / "no", ConvertOptions())
        config = json.loads((tmp_path / "hf/config.json").read_text())
        (tmp_path / "hf/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        convert("huggingface", "native", tmp_path / "hf", tmp_path / "untied", ConvertOptions())
        own = load_model(tmp_path / "untied", device="cpu").module.state_dict()["output_layer.weight"]
        assert torch.equal(own[: len(head)], head)


def test_a_model_made_in_transformers_needs_no_end_token(tmp_path):
    config = ChiarConfig(schedule="D R A", vocab_size=61, hidden_size=32, max_position_embeddings=32)
    ChiarForCausalLM(config).save_pretrained(tmp_path / "hf")
    convert("huggingface", "native", tmp_path / "hf", tmp_path / "native", ConvertOptions())
    assert load_model(tmp_path / "native", device="cpu").config.data.eod_token is None


@pytest.mark.parametrize("target", ["huggingface", "deepspeed"])
def test_every_field_of_the_model_comes_back(tmp_path, target):
    router = {
        "kind": "random", "random_fraction": 0.3, "target": 0.4, "controller_gain": 0.1, "slack": 0.2,
        "capacity": "none", "dispatch": "dense", "collapse_weight": 0.01,
    }  # fmt: skip
    config = tiny_config(router, mup_base_hidden_size=16, tie_embeddings=False, init_std=0.05)
    save_model(tiny_model(config), tmp_path / "native")
    convert("native", target, tmp_path / "native", tmp_path / "there", ConvertOptions())
    convert(target, "native", tmp_path / "there", tmp_path / "back", ConvertOptions())
    assert load_model(tmp_path / "back", device="cpu").config.model == config.model


def test_tokenizers_cut_text_alike(tmp_path):
    path = tiny_tokenizer(tmp_path)
    native = tiny_model(tiny_config(vocab_size=320, data={"tokenizer": str(path), "eod_token": 1}))
    save_model(native, tmp_path / "native")
    convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions())
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(path)
    for seed in range(20):
        text = sample_text(30, seed) + " 東京 😀  x"
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == 1
    convert("huggingface", "native", tmp_path / "hf", tmp_path / "back", ConvertOptions())
    config = load_model(tmp_path / "back", device="cpu").config
    assert load_tokenizer(config.data.tokenizer).encode("ba de") == ours.encode("ba de")


def test_broken_folders_are_refused(pair, tmp_path):
    name, _, folder, _ = pair
    if name != "learned":
        pytest.skip("one is enough")

    def refusal(change) -> str:
        broken = tmp_path / "broken"
        subprocess.run(["rm", "-rf", broken], check=True)
        subprocess.run(["cp", "-r", folder / "hf", broken], check=True)
        change(broken)
        with pytest.raises(CheckpointError) as caught:
            convert("huggingface", "native", broken, tmp_path / "native", ConvertOptions())
        assert not (tmp_path / "native").exists()
        return str(caught.value)

    first = "model-00001-of-"

    def shard(path: Path) -> Path:
        return next(path.glob(f"{first}*"))

    def rename(path: Path) -> None:
        tensors = load_file(shard(path))
        tensors["model.embed_token.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, shard(path))
        index = json.loads((path / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.embed_token.weight"] = index["weight_map"].pop("model.embed_tokens.weight")
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    assert "nearest: model.embed_token.weight" in refusal(rename)
    assert "is missing" in refusal(lambda path: shard(path).unlink())
    assert "torn" in refusal(lambda path: shard(path).write_bytes(shard(path).read_bytes()[:100]))
    assert "no JSON" in refusal(lambda path: (path / "config.json").write_text("{"))
    gpt2 = json.dumps({"model_type": "gpt2"})
    assert "gpt2" in refusal(lambda path: (path / "config.json").write_text(gpt2))


@pytest.mark.parametrize("name", ["chiar_tiny", "chiar_soft_tiny", "chiar_hard_tiny", "baseline_tiny"])
def test_the_authors_files_come_back_as_they_were(tmp_path, name):
    expected = torch.load(FIXTURES / f"{name}.expected.pt", weights_only=True)
    options = {} if name == "baseline_tiny" else {key: expected[key] for key in ("tau_low", "tau_high")}
    converted(FIXTURES / f"{name}.pt", tmp_path / "native", **options)
    convert("native", "reference", tmp_path / "native", tmp_path / "back.pt", ConvertOptions())
    source = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["model"].keys() == source["model"].keys() and back["step"] == source["step"]
    for key, tensor in source["model"].items():
        if "_cache" in key:  # of 256 positions, as trained: the fixture's are of 24
            assert torch.allclose(back["model"][key][: len(tensor)], tensor, atol=1e-5), key
        else:
            assert torch.allclose(back["model"][key], tensor, rtol=1e-6), key
            assert "rope" in key or torch.equal(back["model"][key], tensor), key
    assert (tmp_path / "back.pt.conversion.json").is_file()
    if name == "chiar_tiny":  # the file now tells its threshold
        middle = (options["tau_low"] + options["tau_high"]) / 2
        assert back["cfg"]["tau_low"] == pytest.approx(middle, abs=1e-7)


def test_odd_sizes_come_back_and_what_the_authors_cannot_compute_is_refused(tmp_path):
    source = random_file(tmp_path / "a.pt", 34, 1, "DRRA", "hard", vocab=51)
    converted(source, tmp_path / "native")
    convert("native", "reference", tmp_path / "native", tmp_path / "b.pt", ConvertOptions())
    content = [torch.load(path, weights_only=True)["model"] for path in (source, tmp_path / "b.pt")]
    assert all(torch.equal(content[0][key], content[1][key]) for key in content[0] if "rope" not in key)
    native = tiny_model(tiny_config({"kind": "learned"}, **PRE))
    save_model(native, tmp_path / "other")
    with pytest.raises(CheckpointError) as caught:
        convert("native", "reference", tmp_path / "other", tmp_path / "c.pt", ConvertOptions())
    for field in (
        "norm is pre",
        "RMSNorm",
        "swiglu",
        "add_bias",
        "pooling is running",
        "dc_power_weight is 1.0",
    ):
        assert field in str(caught.value)
    assert not list(tmp_path.glob("*c.pt*"))


def test_a_killed_conversion_is_taken_up(tmp_path, monkeypatch):
    from chiar_megatron.conversion import huggingface_format

    native = tiny_model(tiny_config({"kind": "learned"}))
    save_model(native, tmp_path / "native")
    options = ConvertOptions(shard_bytes=20_000)
    whole, written = huggingface_format._save, []

    def save(shard, model, journal, path):
        if len(written) == 3:
            raise KeyboardInterrupt  # as a kill: nothing is tidied up
        written.append(path)
        whole(shard, model, journal, path)

    monkeypatch.setattr(huggingface_format, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", options)
    assert not (tmp_path / "hf").exists()
    monkeypatch.setattr(huggingface_format, "_save", whole)
    report = convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", options)
    assert "3 files taken from a conversion that was interrupted" in " ".join(report["notes"])
    assert not list(tmp_path.glob(".hf*"))
    # Another source under the same name is not mixed with what lies there.
    assert report["verification"]["tensors"] == len(tensor_specs(native.config.model))


def test_inspect_reads_headers_only(tmp_path, monkeypatch):
    converted(FIXTURES / "chiar_tiny.pt", tmp_path / "native")
    convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions())
    command = [sys.executable, "-m", "chiar_megatron.cli", "convert", "--json", "--inspect"]
    for path, kind in ((tmp_path / "native", "native"), (tmp_path / "hf", "huggingface")):
        done = subprocess.run([*command, path], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["format"], found["step"], found["dtype"], found["tokens_seen"]) == (
            kind,
            123,
            "float32",
            0,
        )
        assert found["sizes"]["hidden"] == 32 and found["parameters"] > 0
    reference = inspect(FIXTURES / "chiar_soft_tiny.pt", ConvertOptions(ReferenceOptions()))
    assert reference["format"] == "reference" and reference["routing_mode"] == "soft"
    with pytest.raises(CheckpointError, match="no known format"):
        inspect(REPOSITORY / "README.md", ConvertOptions())
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.pretraining == {"step": 123, "tokens_seen": 0}
