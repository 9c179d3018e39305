"""The recipe: schedule strings, loading, overrides, messages, resolving, and checks across fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiar_megatron.config.fields import field_types, value_at
from chiar_megatron.config.load import config_from_dict, dump_config, load_config, to_dict
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ConfigError

Recipe = Callable[..., RunConfig]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Loads a recipe given as YAML text, with overrides."""

    def load(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


# Loading: values


def test_recipe_sets_nested_fields_and_leaves_defaults(recipe: Recipe) -> None:
    config = recipe("model: {seq_length: 64, router: {kind: learned}}\noptimizer: {lr: 1e-4}\n")
    assert config.model.seq_length == 64
    assert config.model.router.kind == "learned"
    assert config.optimizer.lr == 1e-4  # YAML 1.1 alone would make this a text
    assert config.training == RunConfig().training
    assert config.model.meta_router == RunConfig().model.meta_router


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.steps=7", "training.steps", 7),
        ("--training.steps=7", "training.steps", 7),
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel", True),
        ("parallel.sequence_parallel=False", "parallel.sequence_parallel", False),
        ("model.router.threshold=null", "model.router.threshold", None),
        ("model.schedule=D R*4 A", "model.schedule", "D R*4 A"),
        ("data.tokenizer=a=b.model", "data.tokenizer", "a=b.model"),
        ("data.tokenizer=123", "data.tokenizer", "123"),
        ("data.train=[0.70, a, 0.3, b]", "data.train", ("0.70", "a", "0.3", "b")),
        ("data.train=[]", "data.train", ()),
        ("data.skip_samples=[100:120]", "data.skip_samples", ("100:120",)),
        ("model.router={kind: hard}", "model.router.kind", "hard"),
        ("logging.wandb_mode=offline", "logging.wandb_mode", "offline"),
    ],
)
def test_override_is_typed(recipe: Recipe, override: str, path: str, value: object) -> None:
    found = value_at(recipe("model: {router: {threshold: 0.5}}", override), path)
    assert found == value
    assert type(found) is type(value)


def test_overrides_win_over_the_recipe_and_later_ones_over_earlier(recipe: Recipe) -> None:
    config = recipe("training: {steps: 5, seed: 6}", "training.steps=7", "training.steps=8")
    assert (config.training.steps, config.training.seed) == (8, 6)


def test_numbers_and_ranges_in_yaml_lists_of_texts_keep_their_spelling(recipe: Recipe) -> None:
    config = recipe("data:\n  train: [0.70, a, 0.3, b]\n  skip_samples: [100:120]\n")
    assert config.data.train == ("0.70", "a", "0.3", "b")
    assert config.data.skip_samples == ("100:120",)


def test_null_section_keeps_its_defaults(recipe: Recipe) -> None:
    assert recipe("model:\nrun_dir: runs/x\n") == dataclasses.replace(RunConfig(), run_dir="runs/x")


def test_yaml_anchors_and_merges_work(recipe: Recipe) -> None:
    config = recipe("training: &t {steps: 9}\noptimizer: {decay_steps: 9}\n", "training.seed=1")
    assert config.training.steps == 9
    with pytest.raises(ConfigError, match="unknown field checkpoint.steps"):
        recipe("training: &t {steps: 9}\ncheckpoint: {<<: *t, keep_last: 1}\n")


@pytest.mark.parametrize("path", sorted(field_types()))
def test_overriding_any_field_by_its_own_default_changes_nothing(recipe: Recipe, path: str) -> None:
    default = value_at(RunConfig(), path)
    plain = list(default) if isinstance(default, tuple) else default
    text = default if isinstance(default, str) else json.dumps(plain)
    assert recipe("run_dir: runs/default", f"{path}={text}") == RunConfig()


def test_recipe_and_overrides_win_over_the_preset(recipe: Recipe) -> None:
    text = "model: {preset: 400m, seq_length: 512, meta_router: {decay: 0.5}}"
    model = recipe(text, "model.hidden_size=2048").model
    assert (model.seq_length, model.hidden_size, model.num_attention_heads) == (512, 2048, 16)
    assert (model.meta_router.decay, model.dropout) == (0.5, 0.1)
    assert recipe(text, "model.preset=400m-twin").model.meta_router.enabled is False
    assert recipe("model: {preset: 400m}", "model.preset=null").model == RunConfig().model


# Loading: messages


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.lr", "optimizer.lr"),
        ("model.hiden_size", "model.hidden_size"),
        ("model.router.knd", "model.router.kind"),
        ("optimiser.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("router.kind", "model.router.kind"),
        ("training.steps.x", "training.steps"),
        ("model.heads", "model.num_attention_heads"),
        ("training.batch_size", "training.micro_batch_size, training.global_batch_size"),
        ("model.tensor_model_parallel_size", "parallel.tensor_model_parallel_size"),
    ],
)
def test_unknown_override_names_the_nearest_field(recipe: Recipe, key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe("run_dir: x", f"{key}=1")
    assert str(error.value) == f"command line: unknown field {key}; nearest: {nearest}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1}", "unknown field training.lr; nearest: optimizer.lr"),
        ("optimiser: {lr: 1}", "unknown field optimiser; nearest: optimizer"),
        ("router: {kind: soft}", "unknown field router; nearest: model.router"),
        ("model: {router: {treshold: 1}}", "unknown field model.router.treshold; "
         "nearest: model.router.threshold"),
        ("logging: {qqq: 1}", "unknown field logging.qqq; "
         "fields of logging: log_interval_steps, tensorboard, wandb_project, wandb_mode, routing_traces"),
        ("training: {steps: abc}", "training.steps: 'abc' is not an integer"),
        ("training: {steps: 1.5}", "training.steps: '1.5' is not an integer"),
        ("training: {steps: true}", "training.steps: 'true' is not an integer"),
        ("training: {steps: }", "training.steps: null is not an integer"),
        ("training: {steps: [1]}", "training.steps: ['1'] is not an integer"),
        ("training: {exit_after_steps: x}", "training.exit_after_steps: 'x' is not an integer or null"),
        ("optimizer: {lr: fast}", "optimizer.lr: 'fast' is not a number"),
        ("parallel: {sequence_parallel: 1}", "parallel.sequence_parallel: '1' is not true or false"),
        ("model: {norm: both}", "model.norm: 'both' is not one of post, pre"),
        ("logging: {wandb_mode: off}", "logging.wandb_mode: 'off' is not one of online, offline or null"),
        ("data: {train: prefix}", "data.train: 'prefix' is not a list of texts, such as [\"a\", \"b\"]"),
        ("model: {schedule: {D: 1}}", "model.schedule: {'D': '1'} is not a text"),
        ("logging: 3", "logging: '3' is not a mapping; "
         "fields: log_interval_steps, tensorboard, wandb_project, wandb_mode, routing_traces"),
        ("model: {preset: 40m}", "model.preset: '40m' is unknown; use one of tiny, tiny-twin, 17m, 17m-twin, "
         "400m, 400m-twin"),
    ],
)  # fmt: skip
def test_bad_field_in_a_recipe(recipe: Recipe, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(text)
    assert str(error.value) == f"{tmp_path / 'recipe.yaml'}: {message}"


def test_several_problems_are_reported_together(recipe: Recipe) -> None:
    with pytest.raises(ConfigError) as error:
        recipe("training: {lr: 1, steps: x}", "model.seq_length=y", "model.foo=1", "training.steps")
    lines = str(error.value).splitlines()
    assert len(lines) == 4 + 1
    for part in ("training.lr", "training.steps: 'x'", "model.seq_length: 'y'", "model.foo", "has no '='"):
        assert sum(part in line for line in lines) == 1, part


def test_no_more_than_twelve_lines(recipe: Recipe) -> None:
    with pytest.raises(ConfigError) as error:
        recipe("\n".join(f"unknown{i}: 1" for i in range(20)))
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "and 9 more"


def test_long_values_are_cut(recipe: Recipe) -> None:
    with pytest.raises(ConfigError) as error:
        recipe("training: {steps: " + "x" * 1000 + "}")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the recipe is empty"),
        (b"# only a comment\n", "the recipe is empty"),
        (b"- a\n- b\n", "the recipe is a list, not a mapping"),
        (b"hello\n", "the recipe is a text, not a mapping"),
        (b"model: [1\n", "line 2, column 1: not valid YAML: "),
        (b"a: b: c\n", "line 1, column 5: not valid YAML: mapping values are not allowed here"),
        (b"run_dir: a\nrun_dir: b\n", "line 2, column 1: not valid YAML: 'run_dir' is given twice; keep one"),
        (b"run_dir: !!python/object:os.system x\n", "not valid YAML: could not determine a constructor"),
        (b"run_dir: \xff\xfe\n", "not a text file in UTF-8"),
        (b"run_dir: \x00\n", "not a text file in UTF-8"),
    ],
)
def test_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run_dir: x")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "recipes.yaml")
    assert str(error.value) == f"recipe {tmp_path / 'recipes.yaml'} does not exist; nearest: recipe.yaml"
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "no_folder" / "recipe.yaml")


# Dictionaries and dumps


def changed_everywhere() -> RunConfig:
    """A config in which no field has its default."""
    changed = {
        "preset": "17m", "schedule": "A*3", "activation": "swiglu", "norm": "pre", "normalization": "RMSNorm",
        "kind": "soft", "operators": "spectral_attention_rbf", "keys_values": "routed", "pooling": "causal",
        "precision": "bf16", "device": "cpu", "split": "1,2,3", "wandb_mode": "online",
        "run_dir": "runs/ä: #1", "tokenizer": "123", "capacity": "none", "dispatch": "dense",
        "recompute": "full", "compile": True, "cuda_graph": False, "add_qkv_bias": False,
        "rope_type": "linear",
    }  # fmt: skip

    def other(path: str, field_type: object) -> object:
        name, default = path.rpartition(".")[2], value_at(RunConfig(), path)
        if name == "schedule" and path.startswith("optimizer"):
            return "wsd"
        if name in changed:
            return changed[name]
        if isinstance(default, bool):
            return not default
        if isinstance(default, tuple):
            return ["0.5", "a: b", "1:2"]
        if isinstance(default, (int, float)):
            return default + 1
        if isinstance(default, str) and field_type is str:
            return f"{default}-other"
        return {"int": 3, "float": 1e-7, "str": "null-like"}[
            str(field_type).split("[")[-1].split()[0].strip("]")
        ]

    config: dict[str, Any] = {}
    for path, kind in field_types().items():
        *sections, name = path.split(".")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = other(path, kind)
    return config_from_dict(config)


def test_dump_loads_back_to_the_equal_config(recipe: Recipe) -> None:
    config = changed_everywhere()
    unchanged = [path for path in field_types() if value_at(config, path) == value_at(RunConfig(), path)]
    assert unchanged == []
    assert recipe(dump_config(config)) == config
    assert recipe(dump_config(RunConfig())) == RunConfig()


def test_dictionary_round_trip_also_through_json() -> None:
    config = changed_everywhere()
    assert config_from_dict(to_dict(config)) == config
    assert config_from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert config_from_dict(dataclasses.asdict(config)) == config


def test_dictionary_is_strict_and_names_its_source() -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict({"model": {"seq_len": 1, "hidden_size": 1.5}}, source="step_10/config.json")
    assert str(error.value).splitlines() == [
        "step_10/config.json: unknown field model.seq_len; nearest: model.seq_length",
        "step_10/config.json: model.hidden_size: 1.5 is not an integer",
    ]


def test_dump_is_plain_yaml() -> None:
    assert yaml.safe_load(dump_config(RunConfig()))["model"]["router"]["kind"] == "entropy"
