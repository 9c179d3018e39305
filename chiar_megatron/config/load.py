"""Recipes: YAML -> typed dataclasses -> `key.sub=value` overrides, and back to YAML.

jsonargparse types the values: it reads plain dataclass annotations, accepts YAML text for each, and
parses one field at a time, so all errors are reported together; tyro stops at the first and exits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from chiar_megatron.config.fields import (
    describe_type,
    field_types,
    is_optional,
    names_in,
    nearest_fields,
    nearest_name,
    section_types,
)
from chiar_megatron.config.presets import PRESETS
from chiar_megatron.config.problems import raise_problems, shown
from chiar_megatron.config.schema import ModelConfig, RunConfig
from chiar_megatron.errors import ConfigError

PAPER_HIDDEN_SIZE, PAPER_ENTROPY_THRESHOLD = 1024, 0.8954  # midpoint of 0.8935 and 0.8973, as published


class _RecipeLoader(yaml.SafeLoader):
    """YAML whose plain scalars stay text, except null: the schema's types decide what they mean.

    So `1e-4` is a number where a number is wanted, `100:200` is not base 60, and `0.7` in a list of
    texts keeps its digits. A key given twice is an error rather than silently the last one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key.value}' is given twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Given(NamedTuple):
    """A field's value as given, and where it was given."""

    value: object
    source: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML recipe at `path`, then apply `overrides`, each `key.sub=value` or `--key.sub=value`.

    `model.preset` lies beneath the recipe's and the overrides' own fields. Raises `ConfigError` with a
    line for each unknown field (with the nearest valid ones) and for each value of a wrong type.
    """
    reader = _Reader()
    reader.add_mapping(_read_yaml(Path(path)), str(path))
    for override in overrides:
        reader.add_override(override)
    return reader.build()


def config_from_dict(mapping: Mapping[str, object], source: str = "config") -> RunConfig:
    """The config whose nested fields are `mapping`, as `to_dict` gives them; absent ones take defaults.

    Raises `ConfigError` as `load_config` does; its lines begin with `source`, e.g. a checkpoint's path.
    """
    reader = _Reader()
    reader.add_mapping(mapping, source)
    return reader.build()


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dicts of plain numbers, texts, booleans, None and lists: fit for YAML and JSON."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in items}

    return dataclasses.asdict(config, dict_factory=plain)


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=1000)


def default_ffn_hidden_size(model: ModelConfig) -> int:
    """Width of the feed-forward layer where the recipe has none (SwiGLU: equal parameters to 4h)."""
    if model.activation == "gelu":
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * 64)) * 64


def default_wsd_decay_steps(decay_steps: int) -> int:
    """Steps of the final decay of `wsd` where the recipe has none."""
    return max(1, decay_steps // 10)


def resolve_config(config: RunConfig, *, vocab_size: int | None, eod_token: int | None) -> RunConfig:
    """`config` with its nulls filled in; `vocab_size` and `eod_token` are the tokenizer's, or None.

    Left as they are: what depends on the launch (`parallel.data_parallel_size`,
    `runtime.threads_per_process`), what has no default (`data.tokenizer`, ...), the unused threshold of
    soft and hard routers. Resolving twice changes nothing. Raises `ConfigError` where no value exists.
    """
    model, optimizer, data = config.model, config.optimizer, config.data
    problems: list[str] = []
    own_vocab = model.vocab_size if model.vocab_size is not None else vocab_size
    if own_vocab is None:
        problems.append("model.vocab_size: null, and there is no tokenizer to ask; set it or data.tokenizer")
    elif vocab_size is not None and own_vocab < vocab_size:
        problems.append(
            f"model.vocab_size: {own_vocab} is smaller than the tokenizer's {vocab_size}; "
            f"use at least {vocab_size}, or null to take the tokenizer's"
        )
    if model.num_attention_heads < 1:
        problems.append(f"model.num_attention_heads: {model.num_attention_heads} must be at least 1")
    elif model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        problems.append(indivisible_heads(model))
    raise_problems(problems)
    decay_steps = _first(optimizer.decay_steps, config.training.steps)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            num_query_groups=_first(model.num_query_groups, model.num_attention_heads),
            kv_channels=_first(model.kv_channels, model.hidden_size // model.num_attention_heads),
            ffn_hidden_size=_first(model.ffn_hidden_size, default_ffn_hidden_size(model)),
            vocab_size=own_vocab,
            router=dataclasses.replace(model.router, threshold=_threshold(model)),
        ),
        data=dataclasses.replace(
            data,
            train=tuple(data.train),
            validation=tuple(data.validation),
            test=tuple(data.test),
            skip_samples=tuple(data.skip_samples),
            eod_token=eod_token if data.eod_token is None else data.eod_token,
            cache_dir=str(Path(config.run_dir) / "index_cache") if data.cache_dir is None else data.cache_dir,
        ),
        optimizer=dataclasses.replace(
            optimizer,
            decay_steps=decay_steps,
            wsd_decay_steps=_first(optimizer.wsd_decay_steps, default_wsd_decay_steps(decay_steps)),
        ),
    )


def indivisible_heads(model: ModelConfig) -> str:
    """The problem of a hidden size from which no head size follows."""
    return (
        f"model.hidden_size: {model.hidden_size} is not divisible by model.num_attention_heads "
        f"{model.num_attention_heads}; change one, or set model.kv_channels (the size of a head)"
    )


def _first(value: int | None, default: int) -> int:
    return default if value is None else value


def _threshold(model: ModelConfig) -> float | None:
    router = model.router
    if router.threshold is not None or router.kind in ("soft", "hard"):
        return router.threshold
    if router.kind == "learned":
        return 0.0
    if router.kind == "random":
        return 1.0 - router.random_fraction
    if model.hidden_size == PAPER_HIDDEN_SIZE:
        return PAPER_ENTROPY_THRESHOLD
    return noise_entropy(model.hidden_size)


def noise_entropy(hidden_size: int) -> float:
    """Expected spectral entropy of Gaussian noise: (ψ(h/2 + 1) - ψ(3/2)) / ln h.

    Its power spectrum is Dirichlet(1/2, ..., 1/2). Embeddings start as noise, so that a threshold here
    sends about half of the first tokens to attention at any size; at h = 1024 it is 0.8949, next to the
    published 0.8954.
    """
    if hidden_size < 2:
        return 0.0
    return (_digamma(hidden_size / 2 + 1) - _digamma(1.5)) / math.log(hidden_size)


def _digamma(x: float) -> float:
    """ψ(x) for x > 0 to 1e-10: recurrence up to 6, then the asymptotic series."""
    shift = 0.0
    while x < 6:
        shift -= 1 / x
        x += 1
    square = 1 / (x * x)
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square * (1 / 240 - square / 132))))
    return shift + math.log(x) - 1 / (2 * x) - series


def _read_yaml(path: Path) -> Mapping[object, object]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except FileNotFoundError as error:
        folder = path.parent
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise ConfigError(f"recipe {path} does not exist{nearest_name(path.name, names)}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a text file in UTF-8, so not a YAML recipe") from error
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}; give a YAML file") from error
    if content is None:
        raise ConfigError(f"{path}: the recipe is empty; give it fields such as `model:` and `data:`")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: the recipe is a {'list' if isinstance(content, list) else 'text'}, not a mapping; "
            "its top level holds sections such as `model:` and `data:`"
        )
    return content


class _Reader:
    """Collects the fields given, by dotted path, and the problems met; later values win."""

    def __init__(self) -> None:
        self.given: dict[str, _Given] = {}
        self.problems: list[str] = []

    def add_mapping(self, mapping: Mapping[Any, Any], source: str, section: str = "") -> None:
        for key, value in mapping.items():
            self._add(f"{section}.{key}" if section else str(key), value, source)

    def add_override(self, override: str) -> None:
        path, equals, text = override.removeprefix("--").partition("=")
        source = "command line"
        if not equals:
            self.problems.append(f"{source}: {shown(override)} has no '='; write {path}=VALUE")
            return
        value: object = text
        if path in section_types() or field_types().get(path) == tuple[str, ...]:
            try:
                value = yaml.load(text, Loader=_RecipeLoader)
            except yaml.YAMLError:
                pass  # the text itself is then refused by its type
        self._add(path, value, source)

    def _add(self, path: str, value: object, source: str) -> None:
        if path in field_types():
            self.given[path] = _Given(value, source)
        elif path not in section_types():
            nearest = nearest_fields(path, is_section=isinstance(value, Mapping))
            self.problems.append(f"{source}: unknown field {path}; {nearest}")
        elif isinstance(value, Mapping):
            self.add_mapping(value, source, path)
        elif value is not None:  # a section with every line commented out is null
            inside = ", ".join(names_in(path))
            self.problems.append(f"{source}: {path}: {shown(value)} is not a mapping; fields: {inside}")

    def build(self) -> RunConfig:
        self._add_preset()
        values: dict[str, object] = {}
        for path, given in self.given.items():
            field_type = field_types()[path]
            try:
                values[path] = _typed(field_type, given.value)
            except ValueError:
                wanted = describe_type(field_type)
                self.problems.append(f"{given.source}: {path}: {shown(given.value)} is not {wanted}")
        raise_problems(self.problems)
        config = _build(RunConfig, "", values)
        assert isinstance(config, RunConfig)
        return config

    def _add_preset(self) -> None:
        given = self.given.get("model.preset", _Given(None, ""))
        try:
            name = _typed(field_types()["model.preset"], given.value)
        except ValueError:
            return  # reported with the other types
        if name is None:
            return
        if name not in PRESETS:
            source = given.source
            names = ", ".join(PRESETS)
            self.problems.append(f"{source}: model.preset: {shown(name)} is unknown; use one of {names}")
            return
        beneath = _Reader()
        beneath.add_mapping({"model": PRESETS[str(name)]}, f"preset {name}")
        self.given = {**beneath.given, **self.given}


def _build(cls: type, prefix: str, values: Mapping[str, object]) -> object:
    arguments: dict[str, object] = {}
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        if path in section_types():
            arguments[field.name] = _build(section_types()[path], path + ".", values)
        elif path in values:
            arguments[field.name] = values[path]
    return cls(**arguments)


@functools.cache
def _parser(field_type: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=field_type)
    return parser


def _typed(field_type: Any, value: object) -> object:
    """`value` as `field_type`; `ValueError` if it is none."""
    if is_optional(field_type) and field_type != Optional[str] and value in ("none", "None"):
        value = None  # as people write it for a number or a switch
    if value is None:  # jsonargparse takes None for "not given", whatever the type
        if is_optional(field_type):
            return None
        raise ValueError
    try:
        return _parser(field_type).parse_object({"value": value})["value"]
    except ArgumentError as error:
        raise ValueError from error
