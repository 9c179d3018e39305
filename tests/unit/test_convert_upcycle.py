"""Dense models of the Llama architecture, made by the real transformers, become CHIAR models."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from chiar_megatron.checkpoint.store import CheckpointStore
from chiar_megatron.conversion.convert import convert
from chiar_megatron.conversion.formats import ConvertOptions
from chiar_megatron.errors import ChiarError, ConfigError
from chiar_megatron.inference.load import load_model
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine
from chiar_megatron.training.restore import restore

SIZES = dict(
    vocab_size=151, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=10)),
    "llama 3.1": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3)
    ),
    "linear": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LINEAR)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
}
OPTIONS = ConvertOptions(schedule="R A R")


def saved(model, folder):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # zero at the start: nothing would be seen of it
                parameter.normal_()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_all_light_it_answers_as_the_dense_model(tmp_path, name):
    dense = saved(MODELS[name](), tmp_path / "dense")
    convert("huggingface", "native", tmp_path / "dense", tmp_path / "native", OPTIONS)
    ids = torch.randint(151, (2, 100), generator=torch.Generator().manual_seed(0))
    model = load_model(tmp_path / "native", device="cpu")
    light: dict[int, torch.Tensor] = {}
    scores: dict[int, torch.Tensor] = {}
    context = ForwardContext(tokens_BS=ids, recorded_light_SB=light, recorded_score_SB=scores)
    logits = model(ids, context=context)
    assert (logits - dense(ids).logits).abs().max() < 1e-4
    assert set(light) == {1, 3} and all(decided.all() for decided in light.values())
    # Scores differ from token to token, or a controller could not part them.
    assert all(len(score.unique()) > 60 for score in scores.values())


def test_training_continues_from_it_with_a_target(tmp_path):
    saved(MODELS["qwen2"](), tmp_path / "dense")
    convert("huggingface", "native", tmp_path / "dense", tmp_path / "native", OPTIONS)
    config = load_model(tmp_path / "native", device="cpu").config
    training = replace(config.training, init_from=str(tmp_path / "native"))
    config = replace(config, run_dir=str(tmp_path / "run"), training=training)
    engine = MegatronEngine(config, single_process_world("cpu"))
    store = CheckpointStore(tmp_path / "checkpoints", config.checkpoint)
    assert restore(config, engine, store).step == 0
    # And on to Hugging Face as a CHIAR model.
    report = convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions())
    assert report["verification"]["logits"] < 1e-4


def test_what_is_refused(tmp_path):
    def refusal(model, schedule: str | None = "R A R", kind: type[ChiarError] = ChiarError) -> str:
        folder = tmp_path / "dense"
        saved(model, folder)
        with pytest.raises(kind) as caught:
            convert("huggingface", "native", folder, tmp_path / "no", ConvertOptions(schedule=schedule))
        assert not (tmp_path / "no").exists()
        return str(caught.value)

    assert "--schedule is missing" in refusal(MODELS["llama"](), None, ConfigError)
    assert "3 attention layers" in refusal(MODELS["llama"](), "R R", ConfigError)
    assert "some D" in refusal(MODELS["llama"](), "D R A", ConfigError)
    assert "sliding_window is 16" in refusal(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    assert "attention_bias" in refusal(LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)))
    assert "hidden_act is gelu" in refusal(LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")))
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    assert "yarn" in refusal(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=yarn)))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    assert "'gpt2'" in refusal(gpt2)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == "gpt2"
