"""Files in the authors' format: their fixtures, and others with random weights."""

import math
from pathlib import Path

import torch
from torch import Tensor

from chiar_megatron.conversion.convert import convert
from chiar_megatron.conversion.formats import ConvertOptions, ReferenceOptions
from chiar_megatron.inference.load import InferenceModel, load_model

REPOSITORY = Path(__file__).parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "reference"


def converted(source: Path, destination: Path, tokenizer: str | None = None, **options) -> InferenceModel:
    reference = ReferenceOptions(**options)
    convert("reference", "native", source, destination, ConvertOptions(reference, tokenizer=tokenizer))
    return load_model(destination, device="cpu")


def random_file(
    path: Path,
    hidden: int,
    heads: int,
    schedule: str,
    mode: str | None = None,
    head: Tensor | None = None,
    vocab: int = 53,
) -> Path:
    """A CHIAR file of the authors' with random weights that matter."""
    generator = torch.Generator().manual_seed(hidden + len(schedule))

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        weight = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(rows, generator=generator) / 10}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + vector() / 5, f"{name}.bias": vector() / 5}

    def vector() -> Tensor:
        return torch.randn(hidden, generator=generator)

    embedding = torch.randn(vocab, hidden, generator=generator) * torch.rand(vocab, 1, generator=generator)
    state = {"token_emb.weight": embedding, **linear("meta_router.gate_proj", 1, hidden)}
    for index, letter in enumerate(schedule):
        layer = f"layers.{index}"
        if letter in "DR":
            state |= {f"{layer}.dct_mix.w": 0.5 + vector() / 5, **norm(f"{layer}.dct_mix.norm")}
        if letter in "AR":
            state |= linear(f"{layer}.attn.qkv", 3 * hidden, hidden) | norm(f"{layer}.attn.norm")
            state |= linear(f"{layer}.attn.out_proj", hidden, hidden)
            state[f"{layer}.attn.rope.inv_freq"] = 10000.0 ** -(
                torch.arange(0, hidden // heads, 2) / (hidden // heads)
            )
        state |= linear(f"{layer}.ffn.0", 3 * hidden, hidden) | linear(f"{layer}.ffn.3", hidden, 3 * hidden)
        state |= norm(f"{layer}.ffn_norm")
        if letter == "R" and mode in ("soft", "hard"):
            state |= linear(f"{layer}.router.gate_proj", 2, hidden + 1)
    state |= norm("norm") | {"lm_head.weight": embedding if head is None else head}
    content = {"step": 9, "model": state, "val_ppl": 20.0}
    torch.save(content | ({"cfg": {"routing_mode": mode}} if mode else {}), path)
    return path
