"""Which tensor of one format is which of ours, and how its numbers are laid out: names and shapes only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One tensor: its name and shape in the foreign format, its native name, and the way there and back."""

    source: str
    native: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], Tensor]
    invert: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model in the authors' format; all attention layers alike, all feed-forward layers alike."""

    vocab: int
    hidden: int
    ffn: int
    heads: int
    head_size: int


def reference_rules(
    kind: str, schedule: Sequence[str], sizes: Sizes, *, has_router: bool, has_head: bool
) -> list[Rule]:
    """Rules of an authors' file. kind: "chiar" or "baseline"; schedule: a letter a layer.

    has_router: routed layers hold a soft or hard router's gate. has_head: the output head is not tied.
    """
    vocab, hidden = sizes.vocab, sizes.hidden
    rules = [Rule("token_emb.weight", "embedding.word_embeddings.weight", (vocab, hidden), _same, _same)]
    if kind == "chiar":
        native = "decoder.layers.0.meta_router.gate_proj"
        rules += _linear("meta_router.gate_proj", native, 1, hidden)
    for index, letter in enumerate(schedule):
        rules += _layer(kind, index, letter, sizes)
        if has_router and letter == "R":
            native = f"decoder.layers.{index}.router.gate_proj"
            rules += _linear(f"layers.{index}.router.gate_proj", native, 2, hidden + 1)
    rules += _norm("norm", "decoder.final_layernorm", hidden)
    if has_head:
        rules.append(Rule("lm_head.weight", "output_layer.weight", (vocab, hidden), _same, _same))
    return rules


def _layer(kind: str, index: int, letter: str, sizes: Sizes) -> list[Rule]:
    hidden, width = sizes.hidden, sizes.heads * sizes.head_size
    native = f"decoder.layers.{index}"
    if kind == "baseline":
        attention, ffn, ffn_norm = f"attns.{index}", f"ffns.{index}", f"ffn_norms.{index}"
    else:
        layer = f"layers.{index}"
        attention, ffn, ffn_norm = f"{layer}.attn", f"{layer}.ffn", f"{layer}.ffn_norm"
    rules = []
    if letter in "DR":
        mixing = f"layers.{index}.dct_mix"
        # Their transform is not orthonormal: their mixing is twice ours.
        rules.append(Rule(f"{mixing}.w", f"{native}.spectral.weight", (hidden,), _double, _halve))
        rules += _norm(f"{mixing}.norm", f"{native}.spectral_norm", hidden)
    if letter in "AR":
        regroup = (partial(group_heads, heads=sizes.heads), partial(stack_heads, heads=sizes.heads))
        qkv = f"{native}.self_attention.linear_qkv"
        rules += _linear(f"{attention}.qkv", qkv, 3 * width, hidden, *regroup)
        rules += _linear(f"{attention}.out_proj", f"{native}.self_attention.linear_proj", hidden, width)
        rules += _norm(f"{attention}.norm", f"{native}.input_layernorm", hidden)
    rules += _linear(f"{ffn}.0", f"{native}.mlp.linear_fc1", sizes.ffn, hidden)
    rules += _linear(f"{ffn}.3", f"{native}.mlp.linear_fc2", hidden, sizes.ffn)
    return rules + _norm(ffn_norm, f"{native}.pre_mlp_layernorm", hidden)


def unwrapped_names(names: Iterable[str], anchor: str) -> dict[str, str]:
    """Names without what torch.compile and wrapping modules (DataParallel, Lightning) put before them.

    anchor: the name of a tensor that every model has; what stands before it in one of the names, all begin
    with. Names that no wrapper explains stay as they are.
    """
    found = {name: name.replace("_orig_mod.", "") for name in names}
    prefixes = {inner.removesuffix(anchor) for inner in found.values() if inner.endswith(anchor)}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    if prefix and all(inner.startswith(prefix) for inner in found.values()):
        found = {name: inner.removeprefix(prefix) for name, inner in found.items()}
    return found if len(set(found.values())) == len(found) else {name: name for name in found}


def group_heads(stacked: Tensor, heads: int) -> Tensor:
    """`[q; k; v]` along the output, `[3·n·d, ...]`, to megatron-core's order: q, k, v of head 1, then of 2"""
    by_part = stacked.unflatten(0, (3, heads, -1))
    by_head: Tensor = by_part.transpose(0, 1).flatten(0, 2)
    return by_head


def stack_heads(grouped: Tensor, heads: int) -> Tensor:
    """The inverse of `group_heads`."""
    by_head = grouped.unflatten(0, (heads, 3, -1))
    stacked: Tensor = by_head.transpose(0, 1).flatten(0, 2)
    return stacked


def _linear(
    source: str,
    native: str,
    rows: int,
    columns: int,
    convert: Callable[[Tensor], Tensor] | None = None,
    invert: Callable[[Tensor], Tensor] | None = None,
) -> list[Rule]:
    ways = (convert or _same, invert or _same)
    return [
        Rule(f"{source}.weight", f"{native}.weight", (rows, columns), *ways),
        Rule(f"{source}.bias", f"{native}.bias", (rows,), *ways),
    ]


def _norm(source: str, native: str, size: int) -> list[Rule]:
    return [
        Rule(f"{source}.{part}", f"{native}.{part}", (size,), _same, _same) for part in ("weight", "bias")
    ]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _double(tensor: Tensor) -> Tensor:
    return 2 * tensor


def _halve(tensor: Tensor) -> Tensor:
    return tensor / 2
