"""What transformers asks of a model besides plain logits: real calls, each compared with the plainest one."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    pipeline,
)

import chiar_megatron.huggingface  # noqa: F401 (registers the model)
from chiar_megatron.conversion.convert import convert
from chiar_megatron.conversion.formats import ConvertOptions
from tests.unit.tiny_models import save_model, tiny_config, tiny_model, tiny_tokenizer

PRE = {"norm": "pre", "normalization": "RMSNorm", "activation": "swiglu", "add_bias": False}
MODELS = {
    "threshold": dict(router={"kind": "entropy"}),
    "learned": dict(router={"kind": "learned", "target": 0.5}, pooling="causal", **PRE, num_query_groups=2),
    "routed keys": dict(router={"kind": "learned", "keys_values": "routed"}, tie_embeddings=False),
    "hard": dict(router={"kind": "hard"}),
    "soft": dict(router={"kind": "soft"}, schedule="A R R D"),
    "documents": dict(
        router={"kind": "entropy"},
        pooling="causal",
        mask_documents=True,
        data={"eod_token": 1},
        schedule="D R A D",
    ),
    "no attention": dict(schedule="D D", pooling="causal"),
}
NEW = 6
SETTINGS = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=1)  # padding is the end
LENGTHS = (9, 6, 3)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request, tmp_path_factory):
    """Name, folder, the model of transformers, ids, and greedy continuations made without a cache."""
    folder = tmp_path_factory.mktemp("hf")
    native = tiny_model(tiny_config(**MODELS[request.param]))
    save_model(native, folder / "native")
    convert("native", "huggingface", folder / "native", folder / "hf", ConvertOptions())
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    ids = torch.randint(2, native.vocab_size, (3, 9), generator=torch.Generator().manual_seed(5))
    if request.param == "documents":
        ids[:, 4] = 1
    return request.param, folder / "hf", model, ids, greedy(model, ids)


@torch.no_grad()
def greedy(model, ids: torch.Tensor, steps: int = NEW) -> torch.Tensor:
    """By whole forward passes of rows without padding."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths, padded on the left, and their mask."""
    rows, mask = torch.ones(3, 13, dtype=torch.int64), torch.zeros(3, 13, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        rows[row, 13 - length :], mask[row, 13 - length :] = ids[row, :length], 1
    return rows, mask


@torch.no_grad()
def test_rows_of_several_lengths_continue_as_each_alone(case):
    name, _, model, ids, expected = case
    rows, mask = padded(ids)
    for use_cache in (True, False):
        found = model.generate(rows, attention_mask=mask, use_cache=use_cache, **SETTINGS)
        for row, length in enumerate(LENGTHS):
            alone = greedy(model, ids[row : row + 1, :length])[0, length:]
            assert torch.equal(found[row, 13:], alone), (use_cache, row)
    # In two calls with a cache handed in, padding in the first.
    cache = DynamicCache()
    model(rows[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    later = model(rows[:, 8:], attention_mask=mask, past_key_values=cache).logits
    whole = model(rows, attention_mask=mask, use_cache=False).logits[:, 8:]
    assert (later - whole)[mask[:, 8:].bool()].abs().max() < 1e-4


@torch.no_grad()
def test_a_cache_is_continued_cropped_and_reordered(case):
    _, _, model, ids, expected = case
    whole = model(ids, use_cache=False).logits
    full = torch.ones_like(expected)
    cache = DynamicCache(config=model.config)
    first = model.generate(
        ids, attention_mask=full[:, :9], past_key_values=cache, **SETTINGS | {"max_new_tokens": 2}
    )
    rest = SETTINGS | {"max_new_tokens": NEW - 2}
    assert torch.equal(
        model.generate(first, attention_mask=full[:, :11], past_key_values=cache, **rest), expected
    )
    cache = DynamicCache()
    turn = model.generate(ids[:, :5], attention_mask=full[:, :5], past_key_values=cache, **SETTINGS)
    turn = torch.cat((turn, ids[:, 5:]), dim=1)
    found = model.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=cache, **SETTINGS)
    assert torch.equal(found, greedy(model, turn))
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    cache.crop(-4)
    assert (model(ids[:, 5:], past_key_values=cache).logits - whole[:, 5:]).abs().max() < 1e-4
    cache.crop(-4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert (model(ids[[2, 0], 5:], past_key_values=cache).logits - whole[[2, 0], 5:]).abs().max() < 1e-4


@torch.no_grad()
def test_every_way_to_generate(case):
    name, folder, model, ids, expected = case
    mask = torch.ones_like(ids)
    draft = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in draft.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    for options in (
        dict(assistant_model=draft),
        dict(prompt_lookup_num_tokens=3),
        dict(prefill_chunk_size=4),
    ):
        found = model.generate(ids[:1], attention_mask=mask[:1], **options, **SETTINGS)
        assert torch.equal(found, expected[:1]), options
    sampled = SETTINGS | {"do_sample": True, "num_return_sequences": 2}
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **sampled))
    assert samples[0].shape == (6, 9 + NEW) and torch.equal(samples[0], samples[1])
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, use_cache=c, **SETTINGS)
        for c in (True, False)
    ]
    assert torch.equal(beams[0], beams[1])
    if name != "documents":
        vectors = model.get_input_embeddings()(ids)
        found = model.generate(inputs_embeds=vectors, attention_mask=mask, **SETTINGS)
        assert torch.equal(found, expected[:, 9:])


@torch.no_grad()
def test_outputs(case):
    _, folder, model, ids, _ = case
    whole = model(ids, use_cache=False).logits
    labels = ids.clone()
    labels[:, :3] = -100
    by_hand = torch.nn.functional.cross_entropy(whole[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten())
    assert model(ids, labels=labels).loss == pytest.approx(by_hand.item(), abs=1e-5)
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0], model.get_input_embeddings()(ids))
    assert (model.lm_head(states[-1]) - whole).abs().max() < 1e-5
    kept = model(ids, logits_to_keep=torch.tensor([2, 5]), use_cache=False).logits
    assert (kept - whole[:, [2, 5]]).abs().max() < 1e-5
    # A tuple where the call or the config asks for one, of the inner model too.
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[0], whole)
    assert isinstance(model.model(ids, return_dict=False), tuple)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple) and isinstance(model(ids, return_dict=True).logits, torch.Tensor)
    model.config.return_dict = True
    inner = AutoModel.from_pretrained(folder)
    assert torch.equal(inner(ids, use_cache=False).last_hidden_state, states[-1])


def test_reentrant_checkpointing_gives_the_same_gradients(case):
    _, folder, _, ids, _ = case
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.zero_grad()
        model(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-5) for n in gradients[0])
    with pytest.raises(ValueError, match="fill the cache twice"):
        model(ids, past_key_values=DynamicCache())


@torch.no_grad()
def test_what_is_not_supported_says_so(case):
    name, _, model, ids, _ = case
    mask = torch.ones_like(ids)

    def refusal(call) -> str:
        with pytest.raises(ValueError) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    static = StaticCache(config=model.config, max_cache_len=32)
    assert "StaticCache" in refusal(lambda: model(ids, past_key_values=static))
    static = SETTINGS | {"cache_implementation": "static"}
    assert "DynamicCache()" in refusal(lambda: model.generate(ids, attention_mask=mask, **static))
    assert "output_attentions" in refusal(lambda: model(ids, output_attentions=True))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, -1)
    assert "packed" in refusal(lambda: model(ids, position_ids=packed))
    assert "[batch, 9]" in refusal(lambda: model(ids, attention_mask=mask[:, 1:]))
    if name == "documents":
        vectors = model.get_input_embeddings()(ids)
        assert "input_ids must be given" in refusal(lambda: model(inputs_embeds=vectors))


def test_text_generation_pipeline(tmp_path):
    """In batches, with padding, as one by one; the tokenizer comes from the folder."""
    tokenizer = tiny_tokenizer(tmp_path)
    fields = dict(
        vocab_size=320, data={"tokenizer": str(tokenizer), "eod_token": 1}, router={"kind": "entropy"}
    )
    save_model(tiny_model(tiny_config(**fields)), tmp_path / "native")
    convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions())
    made = pipeline("text-generation", model=str(tmp_path / "hf"))
    made.tokenizer.pad_token, made.tokenizer.padding_side = made.tokenizer.eos_token, "left"
    texts, settings = ["ba de", "ba de fi go du", "ka"], dict(max_new_tokens=5, do_sample=False)
    together = [answer[0]["generated_text"] for answer in made(texts, batch_size=3, **settings)]
    assert together == [made(text, **settings)[0]["generated_text"] for text in texts]
    assert all(answer.startswith(text) for answer, text in zip(together, texts, strict=True))
