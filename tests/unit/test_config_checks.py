"""Problems across the fields of a recipe, of its layout and of its paths, and what each message says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chiar_megatron.config.fields import field_types
from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.config.validate import LIMITS, check_config, check_paths
from chiar_megatron.errors import ConfigError
from tests.unit.config_fields import with_fields


def problems_of(config: RunConfig, world_size: int | None = None) -> list[str]:
    try:
        check_config(config, world_size)
    except ConfigError as error:
        return str(error).splitlines()
    return []


TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
CP = "parallel__context_parallel_size"
VPP, LAYOUT = "parallel__virtual_pipeline_model_parallel_size", "parallel__layout"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({TP: 3, "model__ffn_hidden_size": 300}, "model.num_attention_heads: 4 is not divisible by "
         "parallel.tensor_model_parallel_size 3; use 3 or 6, or change the divisor"),
        ({TP: 4, "model__num_query_groups": 2}, "model.num_query_groups: 2 is not divisible by "
         "parallel.tensor_model_parallel_size 4; use 4"),
        ({TP: 4, "model__ffn_hidden_size": 30}, "model.ffn_hidden_size: 30 is not divisible by "
         "parallel.tensor_model_parallel_size 4; use 28 or 32"),
        ({TP: 2, "parallel__sequence_parallel": True, "model__seq_length": 255}, "model.seq_length: 255 is "
         "not divisible by parallel.tensor_model_parallel_size 2; use 254 or 256"),
        ({"parallel__sequence_parallel": True}, "parallel.sequence_parallel: true needs "
         "parallel.tensor_model_parallel_size above 1"),
        ({CP: 3, "model__seq_length": 300}, "parallel.context_parallel_size: 3 does not divide the 4 query "
         "heads of a process (model.num_attention_heads 4 / tensor_model_parallel_size 1); use a divisor"),
        ({CP: 4, TP: 2}, "parallel.context_parallel_size: 4 does not divide the 2 query heads of a process "
         "(model.num_attention_heads 4 / tensor_model_parallel_size 2); use a divisor of 2"),
        ({CP: 2, "model__seq_length": 255}, "model.seq_length: 255 is not divisible by "
         "parallel.context_parallel_size 2; use 254 or 256"),
        ({CP: 2, TP: 2, "parallel__sequence_parallel": True, "model__seq_length": 258}, "model.seq_length: "
         "258 is not divisible by tensor 2 × context 2 parallel size = 4; use 256 or 260"),
        ({PP: 3, LAYOUT: "even"}, "model.schedule: 'D R*2 A', number of layers: 4 is not divisible by "
         "3 stages × 1 chunks"),
        ({PP: 8}, "model.schedule: 'D R*2 A', number of layers: 4 is too few for 8 stages × 1 chunks"),
        ({VPP: 2}, "parallel.virtual_pipeline_model_parallel_size: 2 needs "
         "parallel.pipeline_model_parallel_size above 1"),
        ({PP: 2, VPP: 2, "training__micro_batch_size": 4, "training__global_batch_size": 12},
         "training.global_batch_size: 12 gives each of 1 replicas 3 micro-batches of 4"),
        ({PP: 2, LAYOUT: "Et*4"}, "parallel.layout: 'Et*4' must be auto, even, or chunks"),
        ({PP: 2, LAYOUT: "Et*9999999|tL"}, "parallel.layout: 'Et*9999999|tL' names far too many"),
        ({PP: 2, LAYOUT: "E(t*99999)*99999|tL"}, "parallel.layout: 'E(t*99999)*99999|tL' names far too many"),
        ({PP: 2, LAYOUT: "Et*2|t|tL"}, "parallel.layout: 'Et*2|t|tL' has 3 chunks, but there are 2 stages"),
        ({PP: 2, LAYOUT: "Et*2|tL"}, "parallel.layout: 'Et*2|tL' has 3 layers, but model.schedule has 4"),
        ({PP: 3, LAYOUT: "Et*2||t*2L"}, "parallel.layout: 'Et*2||t*2L': a chunk is empty"),
        ({"parallel__overlap_param_gather": True, "parallel__distributed_optimizer": True},
         "parallel.overlap_param_gather: true needs parallel.distributed_optimizer and "
         "parallel.overlap_grad_reduce"),
        ({"model__num_query_groups": 3}, "model.num_attention_heads: 4 is not divisible by "
         "model.num_query_groups 3; use 3 or 6"),
        ({"model__hidden_size": 99}, "model.hidden_size: 99 is not divisible by model.num_attention_heads 4; "
         "change one, or set model.kv_channels"),
        ({"model__hidden_size": 60}, "model.kv_channels: 15 (hidden_size / num_attention_heads) is odd, but "
         "rotary positions need an even head size; set model.kv_channels to an even number"),
        ({"model__kv_channels": 7}, "model.kv_channels: 7 is odd"),
        ({"model__schedule": "D Q"}, "model.schedule: 'D Q', character 3: unexpected 'Q'"),
        ({"model__vocab_size": 1}, "model.vocab_size: 1 must be at least 2"),
        ({"model__vocab_size": 10, "data__eod_token": 10}, "data.eod_token: 10 must be below "
         "model.vocab_size 10"),
        ({"model__mask_documents": True}, "model.mask_documents: true needs the token that ends documents"),
        ({"model__router": {"kind": "soft", "keys_values": "routed"}}, "model.router.keys_values: routed "
         "does not go with model.router.kind soft"),
        ({"model__router": {"kind": "hard", "keys_values": "routed"}}, "model.router.keys_values: routed "
         "does not go with model.router.kind hard"),
        ({"model__router": {"random_fraction": 1.5}}, "model.router.random_fraction: 1.5 must be "
         "between 0 and 1"),
        ({"model__dropout": 1.0}, "model.dropout: 1.0 must be 0 or more and below 1"),
        ({"training__global_batch_size": 12}, "training.global_batch_size: 12 is not divisible by "
         "micro_batch_size 8 × 1 replicas = 8; use 8 or 16"),
        ({"parallel__data_parallel_size": 3}, "training.global_batch_size: 8 is not divisible by "
         "micro_batch_size 8 × 3 replicas = 24; use 24"),
        ({"training__precision": "fp8"}, "training.precision: fp8 is not built yet; use bf16 (or fp32)"),
        ({"training__steps": 0}, "training.steps: 0 must be at least 1"),
        ({"training__exit_after_minutes": -1.0}, "training.exit_after_minutes: -1.0 must be 0 or more"),
        ({"training__seed": 2**32}, "training.seed: 4294967296 must be between 0 and 4294967295"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr: nan must be finite and above 0"),
        ({"optimizer__lr": float("inf")}, "optimizer.lr: inf must be finite and above 0"),
        ({"optimizer__beta2": 1.0}, "optimizer.beta2: 1.0 must be 0 or more and below 1"),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr: 1.0 must not be above optimizer.lr 0.0003; lower it"),
        ({"optimizer__warmup_steps": 101}, "optimizer.warmup_steps: 101 must not be "
         "above optimizer.decay_steps 100 (training.steps)"),
        ({"optimizer__warmup_steps": 11, "optimizer__decay_steps": 10}, "optimizer.warmup_steps: 11 must not "
         "be above optimizer.decay_steps 10; warm up"),
        ({"optimizer__schedule": "wsd", "optimizer__warmup_steps": 95}, "optimizer.wsd_decay_steps: 10 must "
         "not be above the 5 steps between warmup and optimizer.decay_steps 100"),
        ({"data__split": "98,2"}, "data.split: '98,2' must be three shares"),
        ({"data__split": "0,0,0"}, "data.split: '0,0,0' must be three shares"),
        ({"data__split": "1,-1,0"}, "data.split: '1,-1,0' must be three shares"),
        ({"data__split": "a,b,c"}, "data.split: 'a,b,c' must be three shares"),
        ({"data__train": ["0.7", "a", "b"]}, "data.train: ['0.7', 'a', 'b'] must have a weight before every"),
        ({"data__validation": ["a", "0.7"]}, "data.validation: ['a', '0.7'] must have a weight before every"),
        ({"data__train": ["1", "2"]}, "data.train: ['1', '2'] must have a weight before every prefix or "
         "before none"),
        ({"data__test": ["0", "a", "1", "b"]}, "data.test: weight '0' must be above 0"),
        ({"data__train": ["a", " "]}, "data.train: has an empty entry"),
        ({"data__skip_samples": ["5"]}, "data.skip_samples: '5' must be \"first:last\""),
        ({"data__skip_samples": ["9:5"]}, "data.skip_samples: '9:5' must be \"first:last\""),
        ({"data__skip_samples": ["-1:5"]}, "data.skip_samples: '-1:5' must be \"first:last\""),
        ({"run_dir": ""}, "run_dir: is empty"),
    ],
)  # fmt: skip
def test_check_names_field_value_limit_and_remedy(fields: dict[str, Any], message: str) -> None:
    problems = problems_of(with_fields(**fields))
    assert len(problems) == 1, problems
    assert problems[0].startswith(message)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model__hidden_size": 99, "model__kv_channels": 2},  # any hidden size, with a head size of its own
        {"model__schedule": "R*3 A"},  # the gate stands over layer 1 of any kind
        {"model__meta_router": {"pooling": "batch"}},
        {PP: 4, "model__tie_embeddings": True},
        {TP: 2, "parallel__sequence_parallel": True},
        {"model__num_query_groups": 2, TP: 2},
        {"model__num_query_groups": 2, TP: 2, CP: 2, "parallel__sequence_parallel": True},  # 1 group, 2 ranks
        {"data__train": ["0.7", "a", "0.3", "b"]},
        {"data__train": ["a", "b", "./2024"]},
        {"data__skip_samples": ["0:0", "10:20"]},
        {"data__split": "98.5, 1, 0.5"},
        {"optimizer__warmup_steps": 100},
        {"optimizer__schedule": "wsd", "optimizer__warmup_steps": 90},
        {"training__exit_after_steps": 0, "training__exit_after_minutes": 0.0},
        {"training__deterministic": True},
        {"model__mask_documents": True, "data__eod_token": 0},
    ],
)
def test_check_accepts(fields: dict[str, Any]) -> None:
    assert problems_of(with_fields(**fields)) == []


@pytest.mark.parametrize(
    ("fields", "world_size", "message"),
    [
        ({TP: 2}, 4, None),
        ({TP: 2, PP: 2, "parallel__data_parallel_size": 1}, 4, None),
        ({TP: 2, PP: 2}, 6, "parallel: tensor 2 × pipeline 2 × context 1 = 4 does not divide the 6 processes "
         "started; start 4 or 8, or change the sizes"),
        ({TP: 2, "parallel__data_parallel_size": 2}, 8, "parallel.data_parallel_size: 2 × tensor 2 × "
         "pipeline 1 × context 1 = 4 processes, but 8 are started; start 4, or "
         "set data_parallel_size to null"),
        ({TP: 2, "training__micro_batch_size": 3, "training__global_batch_size": 9}, 4,
         "training.global_batch_size: 9 is not divisible by micro_batch_size 3 × 2 replicas = 6; use 6 or "
         "12"),
    ],
)  # fmt: skip
def test_check_against_the_number_of_processes(
    fields: dict[str, Any], world_size: int, message: str | None
) -> None:
    problems = problems_of(with_fields(**{"training__micro_batch_size": 4, **fields}), world_size)
    assert len(problems) == (message is not None), problems
    assert message is None or problems[0].startswith(message)


def test_check_reports_all_problems_at_once_and_at_most_twelve_lines() -> None:
    bad = {TP: 3, "training__precision": "fp8", "model__dropout": 2.0}
    assert len(problems_of(with_fields(**bad))) == 4  # heads, width, precision, dropout
    zeros = {limit_path.replace(".", "__"): 0 for limit_path in LIMITS[0].fields}
    problems = problems_of(with_fields(**zeros), world_size=2)
    assert len(problems) == 12
    assert problems[-1] == f"and {len(zeros) - 11} more"


def test_every_number_of_the_schema_has_a_limit() -> None:
    limited = [path for limit in LIMITS for path in limit.fields]
    numbers = [
        path
        for path, kind in field_types().items()
        if kind in (int, float, int | None, float | None)
    ]  # fmt: skip
    assert sorted(limited) == sorted(numbers)


# Paths


def test_check_paths_names_the_nearest_existing_file(tmp_path: Path) -> None:
    for name in ("wiki_train.bin", "wiki_train.idx", "half.bin", "spm.model"):
        (tmp_path / name).touch()
    good = with_fields(
        data__train=["0.5", str(tmp_path / "wiki_train")], data__tokenizer=str(tmp_path / "spm.model"),
        training__init_from=str(tmp_path),
    )  # fmt: skip
    check_paths(good)
    bad = with_fields(
        data__train=[str(tmp_path / "wiki_trian"), str(tmp_path / "half"), str(tmp_path / "wiki_train.bin")],
        data__validation=["no_folder/x"],
        data__test=[str(tmp_path / "qqq")],
        data__tokenizer=str(tmp_path / "spn.model"),
        training__init_from=str(tmp_path / "none" / "checkpoint"),
    )
    with pytest.raises(ConfigError) as error:
        check_paths(bad)
    assert str(error.value).splitlines() == [
        f"data.tokenizer: '{tmp_path}/spn.model' does not exist; nearest: spm.model",
        f"training.init_from: '{tmp_path}/none/checkpoint' does not exist, nor does its folder "
        f"{tmp_path}/none; correct the path",
        f"data.train: no files {tmp_path}/wiki_trian.bin and .idx; nearest: wiki_train",
        f"data.train: '{tmp_path}/half' lacks {tmp_path}/half.idx; run `chiar preprocess` again",
        f"data.train: '{tmp_path}/wiki_train.bin' must be the prefix alone; use '{tmp_path}/wiki_train'",
        "data.validation: 'no_folder/x' does not exist, nor does its folder no_folder; correct the path",
        f"data.test: no files {tmp_path}/qqq.bin and .idx; make them with `chiar preprocess`",
    ]


def test_check_paths_wants_training_data() -> None:
    with pytest.raises(ConfigError, match=r"^data.train: is empty; give prefixes of .bin/.idx files"):
        check_paths(RunConfig())


def test_a_replica_is_held_by_tensor_pipeline_and_context_ranks():
    sizes = {"tensor": 2, "pipeline": 3, "context": 5}
    parallel = {f"{name}_{'model_' * (name != 'context')}parallel_size": n for name, n in sizes.items()}
    assert ParallelConfig(**parallel, data_parallel_size=7).processes_per_replica == 30
