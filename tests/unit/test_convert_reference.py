"""Import of the authors' checkpoints: their own answers on their files, other sizes, and every refusal."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chiar_megatron.checkpoint.store import CheckpointStore
from chiar_megatron.conversion import verify
from chiar_megatron.conversion.convert import convert, summary
from chiar_megatron.conversion.formats import Answer, ConvertOptions, ReferenceOptions
from chiar_megatron.conversion.keymap import group_heads
from chiar_megatron.conversion.reference import read_reference
from chiar_megatron.conversion.reference_format import Reference
from chiar_megatron.conversion.reference_forward import reference_forward
from chiar_megatron.conversion.verify import compare
from chiar_megatron.errors import ConfigError
from chiar_megatron.inference.load import InferenceModel, load_model
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine
from chiar_megatron.training.restore import restore
from tests.unit.reference_files import FIXTURES, converted, random_file
from tests.unit.tiny_models import tiny_tokenizer

CHIAR = ("chiar_tiny", "chiar_soft_tiny", "chiar_hard_tiny", "chiar_mixed_tiny")
FILES = (*CHIAR, "baseline_tiny")


def taus(expected: dict) -> dict[str, float]:
    return {name: expected[name] for name in ("tau_low", "tau_high")}


@torch.no_grad()
def recorded(model: InferenceModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and entropies and decisions as `[routed layers, b, s]`."""
    light: dict[int, Tensor] = {}
    entropy: dict[int, Tensor] = {}
    context = ForwardContext(tokens_BS=ids, recorded_light_SB=light, recorded_entropy_SB=entropy)
    logits = model(ids, context=context)
    stack = [torch.stack([d[n].T for n in sorted(d)]) if d else torch.empty(0) for d in (entropy, light)]
    return logits, stack[0], stack[1].long()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[InferenceModel, dict, Path]]:
    folder = tmp_path_factory.mktemp("converted")
    made = {}
    for name in FILES:
        expected = torch.load(FIXTURES / f"{name}.expected.pt", weights_only=True)
        destination = folder / name
        made[name] = (
            converted(FIXTURES / f"{name}.pt", destination, **taus(expected)),
            expected,
            destination,
        )
    return made


@pytest.mark.parametrize("name", FILES)
def test_answers_as_the_authors_code(models, name):
    model, expected, _ = models[name]
    logits, entropy, light = recorded(model, expected["input_ids"])
    assert logits.dtype == torch.float32 and logits.shape == expected["logits"].shape
    assert (logits - expected["logits"]).abs().max() < 1e-4
    if name in CHIAR:
        assert (entropy - expected["H"]).abs().max() < 1e-5
        assert torch.equal(light, expected["op_idx"]) and 0 < light.float().mean() < 1
        gate = model.module.chiar_layers[0].meta_router.last_gate
        assert float(gate) == pytest.approx(float(expected["meta_gate"]), abs=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_the_verifier_knows_the_authors_answers(name):
    expected = torch.load(FIXTURES / f"{name}.expected.pt", weights_only=True)
    checkpoint = read_reference(FIXTURES / f"{name}.pt", ReferenceOptions(**taus(expected)))
    answer = reference_forward(checkpoint, expected["input_ids"])
    assert (answer.logits_BSV - expected["logits"]).abs().max() < 2e-5
    if name in CHIAR:
        assert (torch.stack(list(answer.entropy_BS.values())) - expected["H"]).abs().max() < 1e-6
        assert torch.equal(torch.stack(list(answer.light_BS.values())).long(), expected["op_idx"])
        assert answer.meta_gate == pytest.approx(float(expected["meta_gate"]), abs=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_what_the_checkpoint_and_the_report_say(models, name):
    model, expected, folder = models[name]
    config, report = model.config.model, json.loads((folder / "conversion.json").read_text())
    kinds = {"chiar_soft_tiny": "soft", "chiar_hard_tiny": "hard"}
    is_chiar = name in CHIAR
    assert config.schedule == ("D R*2 A" if is_chiar else "A*4")
    assert config.router.kind == kinds.get(name, "entropy") and config.router.dc_power_weight == 2.0
    assert (config.num_attention_heads, config.kv_channels, config.vocab_size) == (2, 16, 97)
    assert config.tie_embeddings and config.norm == "post"
    assert (config.meta_router.enabled, config.meta_router.pooling) == (is_chiar, "batch")
    if kinds.get(name) is None and is_chiar:
        midpoint = (expected["tau_low"] + expected["tau_high"]) / 2
        assert report["tau"] == midpoint
        # their epsilon lowers their entropy: what they compare with τ is ours less h·1e-8/ln h
        assert config.router.threshold == midpoint + 32e-8 / math.log(32)
    assert report["step"] == (77 if name == "chiar_mixed_tiny" else 123)
    assert report["verification"]["logits"] < 1e-4
    assert ("_cls_head_imdb.bias" in " ".join(report["notes"])) == (name == "chiar_mixed_tiny")
    padding = (128 - 97) * config.hidden_size  # rows of the vocabulary's table come in multiples of 64
    assert report["parameters"] == sum(p.numel() for p in model.parameters()) - padding
    assert len(summary(report)) >= 3


def test_filters_are_doubled_and_heads_grouped(models):
    model, _, _ = models["chiar_tiny"]
    source = torch.load(FIXTURES / "chiar_tiny.pt", weights_only=True)["model"]
    native = dict(model.module.named_parameters())
    # post-norm hides w[0] from logits, so it is looked at here
    filters = native["decoder.layers.1.spectral.weight"]
    assert torch.equal(filters, 2 * source["layers.1.dct_mix.w"])
    stacked = torch.tensor([10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33])
    assert group_heads(stacked, 2).tolist() == [10, 11, 20, 21, 30, 31, 12, 13, 22, 23, 32, 33]


def test_flags_overrule_the_file(tmp_path):
    source = FIXTURES / "chiar_tiny.pt"
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))
    everything, nothing = {"tau_low": 0.0, "tau_high": 0.0}, {"tau_low": 1.0, "tau_high": 1.0}
    model = converted(source, tmp_path / "heads", num_heads=4, **everything)
    assert (model.config.model.num_attention_heads, model.config.model.kv_channels) == (4, 8)
    logits, _, light = recorded(model, ids)
    assert light.all()
    options = ReferenceOptions(num_heads=4, **everything)
    assert (logits - reference_forward(read_reference(source, options), ids).logits_BSV).abs().max() < 1e-4
    two_heads = reference_forward(read_reference(source, replace(options, num_heads=2)), ids).logits_BSV
    assert (logits - two_heads).abs().max() > 1e-2
    assert not recorded(converted(source, tmp_path / "dark", **nothing), ids)[2].any()
    defaults = converted(source, tmp_path / "defaults")
    assert defaults.config.model.router.threshold == pytest.approx((0.8935 + 0.8973) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("hidden", "heads", "schedule", "mode"),
    [
        (96, 6, "DRRA", None),
        (100, 5, "DRA", "threshold"),
        (100, 5, "DRRA", "soft"),
        (96, 3, "DRRRA", "hard"),
        (32, 2, "D" + 22 * "R" + "A", "threshold"),
        (34, 1, "RADDR", "hard"),
    ],
)
def test_other_sizes(tmp_path, hidden, heads, schedule, mode):
    source = random_file(tmp_path / "a.pt", hidden, heads, schedule, mode)
    ids = torch.randint(53, (3, 17), generator=torch.Generator().manual_seed(1))
    calibration = reference_forward(read_reference(source, ReferenceOptions()), ids)
    tau = torch.cat([entropy.flatten() for entropy in calibration.entropy_BS.values()]).median().item()
    tau += 1e-4  # no token's own
    model = converted(source, tmp_path / "native", tau_low=tau, tau_high=tau)
    answer = reference_forward(read_reference(source, ReferenceOptions(None, tau, tau)), ids)
    assert all(margin.min() > 1e-5 for margin in answer.margin_BS.values())
    logits, entropy, light = recorded(model, ids)
    expected = torch.stack(list(answer.light_BS.values())).long()
    assert torch.equal(light, expected) and 0 < expected.float().mean() < 1
    assert (logits - answer.logits_BSV).abs().max() < 1e-4
    assert (entropy - torch.stack(list(answer.entropy_BS.values()))).abs().max() < 1e-5


def test_an_untied_head_is_kept(tmp_path):
    head = torch.randn(53, 32, generator=torch.Generator().manual_seed(3))
    source = random_file(tmp_path / "a.pt", 32, 2, "DRA", head=head)
    model = converted(source, tmp_path / "native")
    assert not model.config.model.tie_embeddings
    assert torch.equal(model.module.output_layer.weight[:53], head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions(tmp_path, dtype):
    content = torch.load(FIXTURES / "chiar_tiny.pt", weights_only=True)
    content["model"] = {name: tensor.to(dtype) for name, tensor in content["model"].items()}
    torch.save(content, tmp_path / "a.pt")
    model = converted(tmp_path / "a.pt", tmp_path / "native")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    own = dict(model.module.named_parameters())["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(own, content["model"]["layers.0.ffn.0.weight"].float())
    notes = json.loads((tmp_path / "native" / "conversion.json").read_text())["notes"]
    assert str(dtype).removeprefix("torch.") in " ".join(notes)


def test_head_size_is_64_without_rotary_buffers(tmp_path):
    source = random_file(tmp_path / "a.pt", 128, 4, "DRA")
    content = torch.load(source, weights_only=True)
    content["model"] = {n: t for n, t in content["model"].items() if "rope" not in n}
    torch.save(content, source)
    assert converted(source, tmp_path / "native").config.model.num_attention_heads == 2


def test_a_tokenizer_goes_along_and_what_a_killed_conversion_left_is_replaced(tmp_path):
    source, tokenizer = random_file(tmp_path / "a.pt", 32, 2, "DRA", vocab=400), tiny_tokenizer(tmp_path)
    leftover = tmp_path / ".native.converting"
    leftover.mkdir()
    (leftover / "half").write_text("")
    config = converted(source, tmp_path / "native", str(tokenizer)).config
    assert config.data.tokenizer == str(tmp_path / "native" / "tokenizer" / tokenizer.name)
    assert Path(config.data.tokenizer).read_bytes() == tokenizer.read_bytes()
    assert config.data.eod_token == 1
    assert config.model.vocab_size == 400 and not leftover.exists()
    assert not (tmp_path / "native" / "half").exists()
    small = random_file(tmp_path / "b.pt", 32, 2, "DRA", vocab=300)
    with pytest.raises(ConfigError, match="300 is smaller than the tokenizer's 320"):
        converted(small, tmp_path / "small", str(tokenizer))


def test_training_starts_from_a_converted_checkpoint(models, tmp_path):
    model, expected, folder = models["chiar_tiny"]
    config = replace(
        model.config,
        run_dir=str(tmp_path),
        model=replace(model.config.model, schedule="D R R A"),  # the same schedule in other words
        training=replace(model.config.training, init_from=str(folder)),
    )
    engine = MegatronEngine(config, single_process_world("cpu"))
    assert restore(config, engine, CheckpointStore(tmp_path / "checkpoints", config.checkpoint)).step == 0
    with torch.no_grad():
        context = ForwardContext(tokens_BS=expected["input_ids"])
        logits = engine.module.eval()(expected["input_ids"], context)
    assert (logits[..., :97] - expected["logits"]).abs().max() < 1e-4


@torch.no_grad()
def answer_of(model: InferenceModel, ids: Tensor, forced: dict[int, Tensor]) -> Answer:
    """What a loaded model answers, in the verifier's terms."""
    scores: dict[int, Tensor] = {}
    entropies: dict[int, Tensor] = {}
    forced = {number: light.T for number, light in forced.items()}
    context = ForwardContext(
        tokens_BS=ids, forced_light_SB=forced, recorded_score_SB=scores, recorded_entropy_SB=entropies
    )
    answer = Answer(model(ids, context=context))
    answer.score_BS = {number: score.T for number, score in scores.items()}
    answer.entropy_BS = {number: entropy.T for number, entropy in entropies.items()}
    for number in scores:
        answer.border[number] = float(model.module.chiar_layers[number - 1].router.threshold)
    answer.meta_gate = float(model.module.chiar_layers[0].meta_router.last_gate)
    return answer


def test_a_model_that_disagrees_is_seen(models):
    _, expected, folder = models["chiar_tiny"]
    source, ids = FIXTURES / "chiar_tiny.pt", expected["input_ids"]
    options = ConvertOptions(ReferenceOptions(**taus(expected)))
    theirs = Reference().answer(source, options, ids)
    model = load_model(folder, device="cpu")

    def problems(model: InferenceModel, answer: Answer = theirs) -> str:
        return " ".join(compare(answer, answer_of(model, ids, answer.light_BS)).problems())

    assert problems(model) == ""
    other_heads = ConvertOptions(replace(options.reference, num_heads=4))
    assert "logits differ" in problems(model, Reference().answer(source, other_heads, ids))
    router = model.module.chiar_layers[1].router
    router.threshold += 0.01
    assert problems(model).endswith("routing decisions differ") and "logits" not in problems(model)
    router.threshold -= 0.01
    router.config = replace(router.config, dc_power_weight=1.0)  # hardly seen in logits
    assert "entropies differ" in problems(model)
    gate = load_model(folder, device="cpu")
    gate.module.chiar_layers[0].meta_router.gate_proj.bias.data += 0.1
    assert "gate differs" in problems(gate)


def test_the_sources_own_rounding_is_allowed_for(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "ENTROPY_TOLERANCE", 3e-8)  # half a digit of float32
    report = convert("reference", "native", FIXTURES / "chiar_tiny.pt", tmp_path / "native", ConvertOptions())
    found = report["verification"]
    assert found["slack"] > 1 and 3e-8 < found["entropy"] <= 3e-8 * found["slack"]
