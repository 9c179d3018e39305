"""`chiar convert`: read one format, write another, verify, and only then give the result its name."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chiar_megatron.checkpoint.files import file_digest, write_durably
from chiar_megatron.config.load import to_dict
from chiar_megatron.conversion.canonical import Canonical, cast, describe
from chiar_megatron.conversion.formats import ConvertOptions, Format
from chiar_megatron.conversion.journal import Journal, report_path, source_fingerprint
from chiar_megatron.conversion.verify import Agreement, Side, verify
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.errors import CheckpointError, ChiarError, ConfigError
from chiar_megatron.runtime.distributed import single_process_world

FORMATS = ("native", "reference", "deepspeed", "huggingface", "megatron")  # in the order of their tests
_M_MMAP_THRESHOLD = -3  # of malloc.h
__all__ = ["ConvertOptions", "convert", "inspect", "summary"]


def convert(
    source_format: str,
    target_format: str,
    source: Path,
    destination: Path,
    options: ConvertOptions,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Convert a checkpoint on the CPU; returns the report that also lies in `destination/conversion.json`.

    The destination appears whole, under its final name, or not at all; what a killed run has finished is
    taken up by the next. say: told, before work starts, what is assumed or not carried.
    Raises ConfigError for formats and options that do not fit, CheckpointError for a source that is torn or
    unknown, what the target cannot carry, a destination that exists or cannot be written, and a result that
    does not agree.
    """
    reader, writer = _formats(source_format, target_format)
    _refuse_unused(source_format, target_format, options)
    for path in (destination, report_path(destination, writer.is_single_file)):
        if os.path.lexists(path):
            raise CheckpointError(f"{path} exists already; remove it or give another destination")
    _return_freed_memory()
    single_process_world("cpu")
    with _readable(source):
        _refuse_another(reader, source)
        model = _with_tokenizer(cast(reader.read(source, options), options.dtype), options)
        model = replace(model, notes=(*model.notes, *writer.losses(model, options)))
        fingerprint = [str(source.absolute()), source_fingerprint(source)]
    if destination.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{destination} lies within the source {source}; give another destination")
    for note in model.notes:
        say(note)
    conversion = {
        "from": source_format,
        "to": target_format,
        "options": asdict(options),
        "source": fingerprint,
    }
    journal: Journal | None = None
    try:
        journal = Journal(destination, conversion, writer.is_single_file)
        with _progress(model, options) as bar:
            journal.advance = bar.update
            writer.write(model, journal, options)
            if journal.resumed:
                resumed = f"{journal.resumed} files taken from a conversion that was interrupted"
                model = replace(model, notes=(*model.notes, resumed))
            agreement = None
            if options.verify:
                target = journal.content / destination.name if writer.is_single_file else journal.content
                agreement = verify(Side(reader, source), Side(writer, target), model, options, bar.update)
        report = _report(source_format, target_format, source, model, agreement)
        journal.commit(lambda path: write_durably(path, json.dumps(report, indent=1) + "\n"))
    except OSError as error:
        if Path(str(error.filename)).absolute().is_relative_to(source.absolute()):
            raise CheckpointError(_unreadable(error, source)) from None
        raise CheckpointError(
            f"{destination} cannot be written: {error}; free space there, or give another destination"
        ) from None
    except ChiarError:
        if journal is not None:
            journal.discard()
        raise
    return report


def inspect(source: Path, options: ConvertOptions, source_format: str | None = None) -> dict[str, Any]:
    """What a checkpoint is, from its headers: no tensor is loaded.

    Raises CheckpointError for what no format recognises, or what its own finds wrong.
    """
    if source_format is not None and source_format not in FORMATS:
        raise ConfigError(f"--from {source_format} is unknown; use one of {', '.join(FORMATS)}")
    single_process_world("cpu")
    with _readable(source):
        names = [name for name in FORMATS if _recognised_by(name, source)]
        if source_format is not None:
            names = [source_format]
        if not names:
            raise CheckpointError(f"{source} is of no known format ({', '.join(FORMATS)}); name it by --from")
        format = _format(names[0])
        _refuse_unused(format.name, "", options)
        _refuse_another(format, source)
        return {"format": format.name, "path": str(source), **format.inspect(source, options)}


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Raise CheckpointError for a source that is not there, and within for what the system does not let us
    read, naming it."""
    try:
        if not os.path.lexists(source):
            raise CheckpointError(_missing(source))
        yield
    except OSError as error:
        raise CheckpointError(_unreadable(error, source)) from None


def _unreadable(error: OSError, source: Path) -> str:
    reason = error.strerror or error
    return f"{error.filename or source} cannot be read: {reason}; see to it that this user may, or copy it"


def summary(report: dict[str, Any], with_notes: bool = True) -> list[str]:
    """The report in lines for the terminal."""
    lines = [*_headline(report), *(f"note: {note}" for note in report["notes"] if with_notes)]
    found = report["verification"]
    if found is None:
        return [*lines, "not verified"]
    return [
        *lines,
        f"verified: {found['tensors']} tensors read back equal, logits within {found['logits']:.1g}, "
        f"entropies within {found['entropy']:.1g}, "
        f"{found['tokens_routed'] - found['tokens_too_near_the_threshold']} of {found['tokens_routed']} "
        "routing decisions compared and equal",
    ]


def inspection(description: dict[str, Any]) -> list[str]:
    """What `inspect` found, in lines for the terminal."""
    skipped = ("format", "path", "schedule", "sizes", "router", "parameters", "step", "notes", "model")
    return [
        f"{description['path']}: {description['format']}",
        *(_headline(description) if "sizes" in description else [f"step: {description['step']}"]),
        *(
            f"{key}: {value}"
            for key, value in description.items()
            if key not in skipped and value is not None
        ),
        *(f"note: {note}" for note in description["notes"]),
    ]


def _headline(report: dict[str, Any]) -> list[str]:
    sizes = report["sizes"]
    return [
        f"layers {report['schedule']}, hidden {sizes['hidden']}, {sizes['heads']} heads of "
        f"{sizes['head_size']}, vocabulary {sizes['vocab']}, router {report['router']}, "
        f"{report['parameters']:,} parameters, step {report['step']}"
    ]


def _format(name: str) -> Format:
    """Imported when it is asked for: not everyone has transformers."""
    if name == "native":
        from chiar_megatron.conversion.native import Native

        return Native()
    if name == "reference":
        from chiar_megatron.conversion.reference_format import Reference

        return Reference()
    if name == "megatron":
        from chiar_megatron.conversion.megatron import Megatron

        return Megatron()
    try:
        from chiar_megatron.conversion.deepspeed import DeepSpeed
        from chiar_megatron.conversion.huggingface_format import HuggingFace
    except ImportError as error:
        raise ConfigError(f"{name}: {error}; install chiar-megatron[huggingface]") from None
    return HuggingFace() if name == "huggingface" else DeepSpeed()


def _formats(source_format: str, target_format: str) -> tuple[Format, Format]:
    for option, name in (("--from", source_format), ("--to", target_format)):
        if name not in FORMATS:
            raise ConfigError(f"{option} {name} is unknown; use one of {', '.join(FORMATS)}")
    if source_format == target_format:
        raise ConfigError(f"--from and --to are both {source_format}: there is nothing to convert")
    if "native" not in (source_format, target_format):
        raise ConfigError(
            f"--from {source_format} --to {target_format}: convert to native first, then from native to "
            f"{target_format}"
        )
    return _format(source_format), _format(target_format)


def _refuse_unused(source_format: str, target_format: str, options: ConvertOptions) -> None:
    """Raise ConfigError for an option that means nothing to these formats: another was meant."""
    reference, megatron = options.reference, options.megatron
    older = megatron.checkpoint_format == "torch" or None
    is_older = older is not None and target_format == "megatron"
    of_reference = {
        "--num-heads": reference.num_heads,
        "--tau-low": reference.tau_low,
        "--tau-high": reference.tau_high,
        "--routing-mode": reference.routing_mode,
    }
    cuts = {"--tensor-parallel": megatron.tensor_parallel, "--pipeline-parallel": megatron.pipeline_parallel}
    given_cuts = {option: size for option, size in cuts.items() if size > 1}
    for where, is_so, given in (
        ("--from reference", source_format == "reference", of_reference),
        ("--from deepspeed", source_format == "deepspeed", {"--config": options.config}),
        ("--from huggingface", source_format == "huggingface", {"--schedule": options.schedule}),
        ("--to megatron", is_older, {"--checkpoint-format torch": older}),
        ("--to megatron --checkpoint-format torch", is_older, given_cuts),
    ):
        wrong = next((option for option, value in given.items() if value is not None), None)
        if wrong is not None and not is_so:
            raise ConfigError(f"{wrong} is for {where} alone; leave it out")


def _return_freed_memory() -> None:
    """Have the C library give every freed tensor back to the system. By itself glibc keeps those below 32 MB
    once it has seen one freed, in pieces, so that the peak would grow with the model."""
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    except (OSError, AttributeError):  # another C library
        pass


def _refuse_another(format: Format, source: Path) -> None:
    """Raise CheckpointError for a source that is clearly of another format."""
    if format.recognises(source):
        return
    others = [name for name in FORMATS if name != format.name and _recognised_by(name, source)]
    if others:
        raise CheckpointError(f"{source} is no {format.name} checkpoint but {others[0]}: --from {others[0]}")


def _recognised_by(name: str, source: Path) -> bool:
    try:
        return _format(name).recognises(source)
    except ConfigError:  # its library is not installed
        return False


def _missing(path: Path) -> str:
    from chiar_megatron.config.fields import nearest_name

    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    return f"{path} does not exist{nearest_name(path.name, names)}"


def _with_tokenizer(model: Canonical, options: ConvertOptions) -> Canonical:
    """The model with the tokenizer asked for, or its own. Raises if the vocabulary is too small for it."""
    path = model.tokenizer if options.tokenizer is None else Path(options.tokenizer)
    if path is None:
        return model
    tokenizer = load_tokenizer(path)
    vocab_size = model.config.model.vocab_size or 0
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "give the tokenizer it was trained with by --tokenizer"
        )
    data = model.config.data
    eod = tokenizer.eod if data.eod_token is None else data.eod_token
    data = replace(data, eod_token=eod, tokenizer=str(path.resolve()))
    return replace(model, tokenizer=path, config=replace(model.config, data=data))


def _progress(model: Canonical, options: ConvertOptions) -> Any:
    """A bar over the bytes written, and read back; on a terminal only."""
    rounds = 2 if options.verify else 1
    return tqdm(
        total=rounds * model.bytes, unit="B", unit_scale=True, desc="convert", disable=None, leave=False
    )


def _report(
    source_format: str, target_format: str, source: Path, model: Canonical, agreement: Agreement | None
) -> dict[str, Any]:
    files = {"path": str(source.absolute()), **(file_digest(source) if source.is_file() else {})}
    return {
        "from": source_format,
        "to": target_format,
        "source": files,
        **describe(model),
        "verification": None if agreement is None else asdict(agreement),
        "model": to_dict(model.config)["model"],
    }
