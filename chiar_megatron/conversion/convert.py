"""`chiar convert`: read one format, write another, verify, and only then give the result its name."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chiar_megatron.checkpoint.files import file_digest, sync_folder, write_durably
from chiar_megatron.config.load import to_dict
from chiar_megatron.conversion.native import SEQ_LENGTH, native_config, schedule_text, write_native
from chiar_megatron.conversion.reference import ReferenceCheckpoint, ReferenceOptions, read_reference
from chiar_megatron.conversion.verify import Agreement, verify_native
from chiar_megatron.errors import CheckpointError, ConfigError
from chiar_megatron.runtime.distributed import single_process_world

FORMATS = ("native", "reference", "huggingface", "megatron", "deepspeed")
BUILT = (("reference", "native"),)
REPORT = "conversion.json"


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert."""

    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    """What overrules or completes one of the authors' files."""

    tokenizer: str | None = None
    """Path of the tokenizer the model was trained with, noted in the result."""

    verify: bool = True
    """Compare the result with the source, and refuse it if they differ."""


def convert(
    source_format: str, target_format: str, source: Path, destination: Path, options: ConvertOptions
) -> dict[str, Any]:
    """Convert a checkpoint on the CPU; returns the report that also lies in `destination/conversion.json`.

    The destination appears whole, under its final name, or not at all. Raises ConfigError for formats
    that are not built or options that contradict the source, CheckpointError for a source that is torn or
    unknown, a destination that exists or cannot be written, and a result that does not agree.
    """
    _check_formats(source_format, target_format)
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination} exists already; remove it or give another destination")
    checkpoint = read_reference(source, options.reference)
    config = native_config(checkpoint, destination, options.tokenizer)
    temporary = destination.absolute().parent / f".{destination.name}.converting"
    world = single_process_world("cpu")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
        temporary.mkdir(parents=True)
        write_native(checkpoint.native_tensors(), config, temporary, checkpoint.step, world)
        agreement = verify_native(temporary, checkpoint) if options.verify else None
        report = {
            "from": source_format,
            "to": target_format,
            "source": {"path": str(source.absolute()), **file_digest(source)},
            **_describe(checkpoint, agreement),
            "model": to_dict(config)["model"],
        }
        write_durably(temporary / REPORT, json.dumps(report, indent=1) + "\n")
        temporary.rename(destination)
        sync_folder(temporary.parent)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def summary(report: dict[str, Any]) -> list[str]:
    """The report in lines for the terminal."""
    sizes = report["sizes"]
    lines = [
        f"{report['kind']}, layers {report['schedule']}, hidden {sizes['hidden']}, {sizes['heads']} heads of "
        f"{sizes['head_size']}, vocabulary {sizes['vocab']}, routing {report['routing_mode']}, "
        f"{report['parameters']:,} parameters, step {report['step']}",
        *(f"note: {note}" for note in report["notes"]),
    ]
    found = report["verification"]
    if found is None:
        return [*lines, "not verified"]
    return [
        *lines,
        f"verified: logits within {found['logits']:.1g}, entropies within {found['entropy']:.1g}, "
        f"{found['tokens_routed'] - found['tokens_too_near_the_threshold']} of {found['tokens_routed']} "
        "routing decisions compared and equal",
    ]


def _check_formats(source_format: str, target_format: str) -> None:
    for option, name in (("--from", source_format), ("--to", target_format)):
        if name not in FORMATS:
            raise ConfigError(f"{option} {name} is unknown; use one of {', '.join(FORMATS)}")
    if (source_format, target_format) not in BUILT:
        built = ", ".join(f"--from {known} --to {target}" for known, target in BUILT)
        raise ConfigError(f"--from {source_format} --to {target_format} is not built yet; built: {built}")


def _describe(checkpoint: ReferenceCheckpoint, agreement: Agreement | None) -> dict[str, Any]:
    notes = [*checkpoint.notes, f"model.seq_length {SEQ_LENGTH} assumed: the file does not tell it"]
    if checkpoint.kind == "chiar":
        notes.append(
            "meta_router.pooling stays batch, as trained, so that logits agree: it sees future tokens"
        )
    routes_by_entropy = checkpoint.routing_mode == "threshold" and "R" in checkpoint.schedule
    return {
        "kind": checkpoint.kind,
        "schedule": schedule_text(checkpoint.schedule),
        "routing_mode": checkpoint.routing_mode if "R" in checkpoint.schedule else None,
        "sizes": asdict(checkpoint.sizes),
        "tied": checkpoint.tied,
        "tau": checkpoint.tau if routes_by_entropy else None,
        "threshold": checkpoint.threshold if routes_by_entropy else None,
        "step": checkpoint.step,
        "val_ppl": checkpoint.val_ppl,
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        "notes": notes,
        "verification": None if agreement is None else asdict(agreement),
    }
