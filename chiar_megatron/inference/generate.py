"""Sampling from a model, token by token, with a key/value cache.

Shapes: b rows, s tokens so far, v vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.data.tokenizer import Tokenizer
from chiar_megatron.errors import ConfigError, DataError
from chiar_megatron.inference.load import InferenceModel
from chiar_megatron.operators.context import GenerationState

_log = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: InferenceModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue `input_ids` (int64 `[b, s]`) by up to `max_new_tokens` tokens; `[b, s + new]`, on the CPU.

    temperature: divides the logits; 0 takes the likeliest token (greedy). top_k: only the so many
    likeliest tokens. top_p: only the likeliest tokens that together reach this probability, after top_k.
    seed: of the draws; None: another each time. use_cache: False computes the whole prefix for each token.
    A row that has reached the model's end-of-document token (`config.data.eod_token`) is filled up with
    it; all rows there, generation ends. Positions beyond the training's `seq_length` are warned of.
    Raises ConfigError for settings out of range and for cached generation with MetaRouter's `batch`
    pooling, ChiarError for ids that are no input of the model.
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    config = model.config.model
    if use_cache and config.meta_router.enabled and config.meta_router.pooling == "batch":
        raise ConfigError(
            "model.meta_router.pooling: batch averages over the whole window, later tokens included, so "
            "nothing can be cached; use --no-cache (use_cache=False), or train with pooling: running"
        )
    ids_BS = input_ids.cpu()
    length = ids_BS.shape[-1] + max_new_tokens
    if length > config.seq_length:
        _log.warning(
            "%d tokens of prompt and text go beyond the %d the model was trained on; quality may fall",
            length, config.seq_length,
        )  # fmt: skip
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    state = GenerationState(capacity=length) if use_cache else None
    eod = model.config.data.eod_token
    ended_B = torch.zeros(len(ids_BS), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits_BV = next_logits(model, ids_BS, state)
        next_B = _draw(logits_BV.cpu(), temperature, top_k, top_p, generator)
        if eod is not None:
            next_B = torch.where(ended_B, eod, next_B)
            ended_B |= next_B == eod
        ids_BS = torch.cat((ids_BS, next_B[:, None]), dim=1)
        if ended_B.all():
            break
    return ids_BS


def generate_texts(
    model: InferenceModel, tokenizer: Tokenizer, prompt: str, samples: int, **settings: Any
) -> list[str]:
    """`samples` continuations of `prompt`, each with the prompt before it; settings: those of `generate`.

    The prompt begins a document: the model reads it after an end-of-document token, as in training and
    evaluation. Raises DataError for an empty prompt where there is no such token.
    """
    data = model.config.data
    eod = tokenizer.eod if data.eod_token is None else data.eod_token
    model = InferenceModel(model.module, replace(model.config, data=replace(data, eod_token=eod)))
    start = [] if eod is None else [eod]
    prompt_ids = start + tokenizer.encode(prompt)
    if not prompt_ids:
        raise DataError("--prompt: is empty, and the tokenizer has no end-of-document token to start from")
    ids_BS = generate(model.eval(), torch.tensor([prompt_ids] * samples), **settings)
    texts = []
    for row in ids_BS[:, len(start) :].tolist():
        prompt_length = len(prompt_ids) - len(start)
        end = row.index(eod, prompt_length) if eod in row[prompt_length:] else len(row)
        # Rows of the vocabulary beyond the tokenizer's are padding.
        texts.append(tokenizer.decode([token for token in row[:end] if token < tokenizer.vocab_size]))
    return texts


def next_logits(model: InferenceModel, ids_BS: Tensor, state: GenerationState | None = None) -> Tensor:
    """Logits `[b, v]` float32 of the token after `ids_BS`, computing only what `state` has not yet seen;
    `state` then has seen them all. None computes all of them."""
    documents_BS = _document_ids(model, ids_BS)
    if state is None:
        # Row by row: with `batch` pooling rows would mix.
        rows = range(len(ids_BS))
        return torch.cat([model(ids_BS[i : i + 1], _row(documents_BS, i))[:, -1] for i in rows])
    new_BS = ids_BS[:, state.length :]
    logits_BSV = model(new_BS, documents_BS, generation=state)
    state.length = ids_BS.shape[1]
    return logits_BSV[:, -1]  # type: ignore[no-any-return]


def _document_ids(model: InferenceModel, ids_BS: Tensor) -> Tensor | None:
    """Numbers of the tokens' documents, where the model was trained with documents masked from each other."""
    eod = model.config.data.eod_token
    if not model.config.model.mask_documents or eod is None:
        return None
    ends_BS = (ids_BS == eod).long()
    return (ends_BS.cumsum(dim=1) - ends_BS).to(model.device)


def _row(documents_BS: Tensor | None, index: int) -> Tensor | None:
    return None if documents_BS is None else documents_BS[index : index + 1]


def _check_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: {temperature} must be 0 (greedy) or a number above it")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: {top_k} must be at least 1; leave it out to draw from all tokens")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p: {top_p} must be above 0 and at most 1; leave it out to draw from all")


def _draw(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One token a row, int64 `[b]`."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    # Less the largest first: a tiny temperature then leaves it alone instead of overflowing.
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)).double() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kept_BK = logits_BV.topk(top_k, dim=-1)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(-1, kept_BK.indices, kept_BK.values)
    probability_BV = torch.softmax(logits_BV, dim=-1)
    if top_p is not None:
        sorted_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it have not reached top_p: the first one always does.
        sorted_BV = sorted_BV.where(sorted_BV.cumsum(dim=-1) - sorted_BV < top_p, 0.0)
        probability_BV = torch.zeros_like(probability_BV).scatter(-1, order_BV, sorted_BV)
    return torch.multinomial(probability_BV, 1, generator=generator).squeeze(-1)
