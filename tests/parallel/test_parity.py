"""Every layout computes what one process computes (issue 2, item 3), over a grid of small models.

Launches are few and long: all cases of all layouts of 2 processes share one. In each the model is trained
6 float32 steps with the one-process decisions replayed, then 1 step with its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.model.pipeline import pipeline_layout
from chiar_megatron.planning.weights import stage_parameters
from tests.parallel.harness import run_ranks
from tests.parallel.parity_cases import CASES, LAYOUTS, RBF, calibrated, one_process
from tests.parallel.workers_parity import STEPS, Answer, Piece, start_layout, train_case

TOLERANCE = 1e-5  # of the loss in nats, and of the gradient norm relative to it
RUNS = [
    (size, layout, case) for size, named in LAYOUTS.items() for layout in named for case in named[layout][1]
]


@dataclass(frozen=True)
class Reference:
    """One process's run of a case, with the threshold its scores called for."""

    config: RunConfig
    answer: Answer
    decisions: Path


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    torch.set_num_threads(1)
    found = {}
    world = start_layout(ParallelConfig(), next(iter(CASES.values())))
    for name, config in CASES.items():
        folder = tmp_path_factory.mktemp("decisions")
        config = calibrated(config, world)
        found[name] = Reference(config, one_process(config, world, folder), folder)
    return found


class Launches:
    """Answers of all ranks, by number of processes; launched when first asked for."""

    def __init__(self, references: dict[str, Reference]) -> None:
        self.references = references
        self.answers: dict[int, list[dict[tuple[str, str], dict[str, Answer]]]] = {}

    def of(self, size: int, layout: str, case: str) -> dict[str, list[Answer]]:
        """kind of run ("replayed" or "free") -> answers by rank."""
        if size not in self.answers:
            jobs = [
                {
                    "layout": name,
                    "parallel": parallel,
                    "case": chosen,
                    "config": self.references[chosen].config,
                    "decisions": str(self.references[chosen].decisions),
                }
                for name, (parallel, cases) in LAYOUTS[size].items()
                for chosen in cases
            ]
            self.answers[size] = run_ranks(
                "tests.parallel.workers_parity:train_jobs", size, {"jobs": jobs}, 240
            )
        ranks = [answers[layout, case] for answers in self.answers[size]]
        return {kind: [rank[kind] for rank in ranks] for kind in ("replayed", "free")}


@pytest.fixture(scope="module")
def launches(references: dict[str, Reference]) -> Launches:
    return Launches(references)


class Largest:
    """The largest deviations seen, printed when all is done."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, str]] = {}

    def note(self, what: str, value: float, where: str) -> None:
        if value >= self.seen.get(what, (-1.0, ""))[0]:
            self.seen[what] = (value, where)


@pytest.fixture(scope="module")
def largest(request: pytest.FixtureRequest):
    largest = Largest()
    yield largest
    plugins = request.config.pluginmanager
    lines = [f"  {what}: {value:.3g} ({where})" for what, (value, where) in sorted(largest.seen.items())]
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        text = "\nLargest deviations from one process:\n" + "\n".join(lines)
        plugins.get_plugin("terminalreporter").write_line(text)


def whole(pieces: list[Piece], rows: int) -> Tensor:
    """A parameter from what the ranks of one tensor-parallel group hold; padding of the vocabulary cut."""
    pieces = sorted(pieces, key=lambda piece: piece.tensor_parallel_rank)
    dim, stride = pieces[0].partition_dim, pieces[0].partition_stride
    if dim is None:
        assert all(torch.equal(piece.shard, pieces[0].shard) for piece in pieces), "copies differ"
        return pieces[0].shard
    parts = [piece.shard.chunk(stride, dim) for piece in pieces]
    # Of a gated layer every rank holds a slice of each of the `stride` matrices.
    full = torch.cat([torch.cat([part[i] for part in parts], dim) for i in range(stride)], dim)
    if dim == 0:
        assert not full[rows:].any(), "padding of the vocabulary is not zero"
        full = full[:rows]
    return full


def gathered(ranks: list[Answer], what: str, reference: dict[str, Piece]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, whole tensor and the one-process tensor of every parameter, from every tensor-parallel group."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, answer in enumerate(ranks):
        groups[answer.tensor_parallel_group].append(rank)
    found = []
    for members in groups.values():
        held = [getattr(ranks[rank], what) for rank in members]
        assert all(part.keys() == held[0].keys() for part in held)
        for name in held[0]:
            expected = reference[name].shard
            found.append((name, whole([part[name] for part in held], expected.shape[0]), expected))
    assert {name for name, _, _ in found} == set(reference), "a parameter is nowhere, or has no counterpart"
    return found


def test_the_grid_is_covered():
    runs = {name: cases for named in LAYOUTS.values() for name, (_, cases) in named.items()}
    for cases in (runs["TP=2+SP"], runs["PP=2"], runs["TP=2"] + runs["TP=2 PP=2"]):
        configs = [CASES[case] for case in cases]
        models = [config.model for config in configs]
        routed = [model for model in models if "R" in model.schedule]
        routers = [model.router for model in routed]
        assert {r.kind for r in routers} == {"entropy", "learned", "entropy_gated", "soft", "hard", "random"}
        assert {r.keys_values for r in routers} == {"all", "routed"}
        assert {(r.kind, r.operators) for r in routers} >= {(k, RBF) for k in ("soft", "hard")}
        assert {r.collapse_weight > 0 for r in routers} == {True, False}
        metas = [m.meta_router for m in models]
        assert {m.pooling for m in metas if m.enabled} == {"running", "batch", "causal"}
        for norm in ("post", "pre"):
            assert {m.schedule for m in models if m.norm == norm} >= {"A*4", "D R*2 A"}
        assert {m.normalization for m in models} == {"LayerNorm", "RMSNorm"}
        assert {m.activation for m in models} == {"gelu", "swiglu"}
        for option in ("tie_embeddings", "mask_documents", "add_bias"):
            assert {getattr(m, option) for m in models} == {True, False}
        assert any(m.num_query_groups < m.num_attention_heads for m in models)
        assert any(m.hidden_size % 2 for m in models) and any(m.vocab_size % 2 for m in models)
        assert any(config.training.z_loss > 0 for config in configs)


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("twin")])
def test_the_decisions_are_mixed(references, case):
    answer = references[case].answer
    for fractions in answer.fractions:
        assert len(fractions) == 2  # a routed fraction for each of two layers
    light = torch.cat(list(answer.light.values())).float().mean()
    assert 0.2 <= light <= 0.8


@pytest.mark.parametrize(("size", "layout", "case"), RUNS)
def test_trains_as_one_process_does(launches, references, largest, size, layout, case):
    ranks = launches.of(size, layout, case)["replayed"]
    reference = references[case].answer
    for rank, answer in enumerate(ranks):
        assert answer.losses == ranks[0].losses and answer.grad_norms == ranks[0].grad_norms, rank
    where = f"{layout}: {case}"
    answer = ranks[0]
    assert len(answer.losses) == STEPS and all(map(math.isfinite, answer.losses + answer.grad_norms))
    loss_error = max(abs(a - b) for a, b in zip(answer.losses, reference.losses, strict=True))
    norm_error = max(abs(a / b - 1) for a, b in zip(answer.grad_norms, reference.grad_norms, strict=True))
    largest.note("loss, nats", loss_error, where)
    largest.note("gradient norm, relative", norm_error, where)
    assert loss_error <= TOLERANCE
    assert norm_error <= TOLERANCE
    assert answer.z_losses == pytest.approx(reference.z_losses, abs=TOLERANCE)
    assert answer.fractions == reference.fractions
    if reference.gates[0] is not None:
        assert answer.gates == pytest.approx(reference.gates, abs=TOLERANCE)


@pytest.mark.parametrize(("size", "layout", "case"), RUNS)
def test_starts_from_the_same_full_tensors(launches, references, size, layout, case):
    ranks = launches.of(size, layout, case)["replayed"]
    for name, tensor, expected in gathered(ranks, "initial", references[case].answer.initial):
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(("size", "layout", "case"), RUNS)
def test_the_plan_counts_what_each_rank_holds(launches, references, size, layout, case):
    ranks = launches.of(size, layout, case)["replayed"]
    config = replace(references[case].config, parallel=LAYOUTS[size][layout][0])
    stages = config.parallel.pipeline_model_parallel_size
    for rank, answer in enumerate(ranks):
        held = sum(piece.shard.numel() for piece in answer.initial.values())
        stage = rank * stages // size
        planned = stage_parameters(config.model, config.parallel, pipeline_layout(config), stage)
        assert held == planned, rank


@pytest.mark.parametrize(("size", "layout", "case"), RUNS)
def test_gradients_are_those_of_one_process(launches, references, largest, size, layout, case):
    """Of the first step, for every parameter apart: a norm over all could hide a small one's error."""
    if LAYOUTS[size][layout][0].distributed_optimizer:
        pytest.skip("each replica keeps only its share of the summed gradients")
    ranks = launches.of(size, layout, case)["replayed"]
    whole_norm = references[case].answer.grad_norms[0]
    for name, tensor, expected in gathered(ranks, "gradients", references[case].answer.gradients):
        # A gate's bias sums terms that nearly cancel, and post-norm leaves some filters a gradient of 0:
        # there the rounding of what flows through the whole model remains.
        scale = max(float(expected.norm()), 1e-2 * whole_norm)
        error = float((tensor - expected).norm()) / scale
        largest.note("gradient of one parameter, relative", error, f"{layout}: {case}: {name}")
        assert error <= TOLERANCE, name


@pytest.mark.parametrize(("size", "layout", "case"), RUNS)
def test_free_decisions_differ_only_next_to_the_threshold(launches, references, largest, size, layout, case):
    reference, config = references[case].answer, references[case].config
    light: dict[tuple[int, int], Tensor] = {}
    scores: dict[tuple[int, int], Tensor] = {}
    for answer in launches.of(size, layout, case)["free"]:
        for key in answer.light:
            # Bit for bit the same on every rank that decides for this sample in this layer.
            assert torch.equal(light.setdefault(key, answer.light[key]), answer.light[key]), key
            assert torch.equal(scores.setdefault(key, answer.scores[key]), answer.scores[key]), key
    assert set(light) == {key for key in reference.light if key[0] < config.training.global_batch_size}
    flips = 0
    for key in light:
        differs = light[key] != reference.light[key]
        flips += int(differs.sum())
        assert not (differs & ~near_threshold(config, reference.scores[key])).any(), key
    where = f"{layout}: {case}"
    largest.note("free decisions that differ (all within 1e-5 of the threshold)", flips, where)
    if flips == 0 and light:
        error = max(float((scores[key] - reference.scores[key]).abs().max()) for key in scores)
        largest.note("score", error, where)
        assert error <= TOLERANCE


def near_threshold(config: RunConfig, score: Tensor) -> Tensor:
    """Where rounding may decide. Of three operators one weight does not tell how near the others are."""
    router = config.model.router
    if router.kind in ("soft", "hard"):
        return ((score - 0.5).abs() < TOLERANCE) & (router.operators != RBF)
    return (score - router.threshold).abs() < TOLERANCE


@pytest.mark.parametrize(("size", "layout", "case"), [run for run in RUNS if "TP" in run[1]])
def test_scores_agree_across_a_tensor_parallel_group(launches, size, layout, case):
    for ranks in launches.of(size, layout, case).values():
        for answer in ranks:
            for member in answer.tensor_parallel_group:
                other = ranks[member]
                assert answer.light.keys() == other.light.keys()
                assert all(torch.equal(answer.light[key], other.light[key]) for key in answer.light)
                assert all(torch.equal(answer.scores[key], other.scores[key]) for key in answer.scores)


def test_bfloat16_trains_near_float32(references):
    for case in ("twin", "learned, pre, SwiGLU, untied", "soft, RBF, collapse"):
        reference = references[case]
        training = replace(reference.config.training, precision="bf16")
        config = replace(reference.config, training=training)
        world = start_layout(ParallelConfig(), config)
        answer = train_case(config, world, STEPS, reference.decisions)
        assert all(map(math.isfinite, answer.grad_norms))
        assert answer.losses == pytest.approx(reference.answer.losses, rel=0.02)
        assert answer.losses != reference.answer.losses
