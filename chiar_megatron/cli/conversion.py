"""`chiar convert`: checkpoints of other frameworks and layouts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chiar_megatron.cli.common import count
from chiar_megatron.errors import EXIT_DONE, EXIT_RESUMABLE, ConfigError

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_convert(verbs: Verbs) -> None:
    """The verb with its options."""
    convert = verbs.add_parser(
        "convert",
        help="turn a checkpoint into another format, verified, on the CPU",
        description="Formats: native (a run folder or step_... folder), reference (one of the authors' .pt "
        "files), huggingface (a folder of transformers; a dense Llama, Mistral or Qwen2 with --schedule), "
        "deepspeed (ZeRO shards and universal checkpoints of the transformers model), megatron "
        "(Megatron-LM's checkpoints). One side is native.",
    )
    convert.add_argument(
        "--inspect", metavar="SRC", dest="inspected", help="say what SRC is; nothing is loaded"
    )
    convert.add_argument("--json", action="store_true", help="with --inspect: as one JSON object")
    convert.add_argument("--from", dest="source_format", metavar="F", help="format of SRC")
    convert.add_argument("--to", dest="target_format", metavar="G", help="format of DST")
    convert.add_argument("source", metavar="SRC", nargs="?", help="file or folder to read")
    convert.add_argument("destination", metavar="DST", nargs="?", help="file or folder to make")
    convert.add_argument("--num-heads", type=count, metavar="N", help="reference: default from rope.inv_freq")
    convert.add_argument("--tau-low", type=float, metavar="X", help="reference: 33rd percentile (0.8935)")
    convert.add_argument("--tau-high", type=float, metavar="Y", help="reference: 67th percentile (0.8973)")
    convert.add_argument(
        "--routing-mode", choices=("threshold", "soft", "hard"), help="reference: default what the file tells"
    )
    convert.add_argument("--config", metavar="PATH", help="deepspeed: config.json (the one beside SRC)")
    convert.add_argument("--tokenizer", metavar="PATH", help="that the model was trained with")
    convert.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights written (SRC's)")
    convert.add_argument(
        "--shard-bytes", type=_size, default=2 * 10**9, metavar="N", help="largest file, such as 500MB (2GB)"
    )
    convert.add_argument(
        "--checkpoint-format", choices=("torch_dist", "torch"), default="torch_dist",
        help="megatron: distributed (the default), or mp_rank_XX files",
    )  # fmt: skip
    convert.add_argument("--tensor-parallel", type=count, default=1, metavar="N", help="of mp_rank_XX files")
    convert.add_argument(
        "--pipeline-parallel", type=count, default=1, metavar="N", help="of mp_rank_XX files"
    )
    convert.add_argument(
        "--transformer-impl", choices=("transformer_engine", "local"), default="transformer_engine",
        help="megatron: whose names mp_rank_XX files bear (transformer_engine)",
    )  # fmt: skip
    convert.add_argument(
        "--schedule", metavar="S", help="layers of the CHIAR model a dense one becomes: R*32"
    )
    convert.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    convert.set_defaults(run=_convert)


def _size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = units.get(text[-2:].upper(), 1)
    value = float(text[:-2] if unit > 1 else text) * unit
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return int(value)


def _convert(parsed: argparse.Namespace) -> int:
    from chiar_megatron.conversion.convert import convert, inspect, inspection, summary
    from chiar_megatron.conversion.formats import ConvertOptions, MegatronOptions, ReferenceOptions
    from chiar_megatron.runtime.distributed import shutdown
    from chiar_megatron.runtime.env import check_versions

    check_versions()
    options = ConvertOptions(
        reference=ReferenceOptions(parsed.num_heads, parsed.tau_low, parsed.tau_high, parsed.routing_mode),
        megatron=MegatronOptions(
            parsed.checkpoint_format,
            parsed.tensor_parallel,
            parsed.pipeline_parallel,
            parsed.transformer_impl,
        ),
        config=parsed.config,
        tokenizer=parsed.tokenizer,
        schedule=parsed.schedule,
        dtype=parsed.dtype,
        shard_bytes=parsed.shard_bytes,
        verify=not parsed.no_verify,
    )
    try:
        if parsed.inspected is not None:
            if parsed.target_format or parsed.source or parsed.destination:
                raise ConfigError("--inspect takes neither --to nor a second path; leave them out")
            found = inspect(Path(parsed.inspected), options, parsed.source_format)
            print(json.dumps(found) if parsed.json else "\n".join(inspection(found)))
            return EXIT_DONE
        for option in ("source_format", "target_format", "source", "destination"):
            if getattr(parsed, option) is None:
                raise ConfigError("give --from F --to G SRC DST, or --inspect SRC")
        report = convert(
            parsed.source_format,
            parsed.target_format,
            Path(parsed.source),
            Path(parsed.destination),
            options,
            lambda note: print(f"note: {note}", flush=True),
        )
    except KeyboardInterrupt:
        print("chiar: interrupted; the same command takes up what is finished", file=sys.stderr)
        return EXIT_RESUMABLE
    finally:
        shutdown()
    print("\n".join([*summary(report, with_notes=False), f"written to {parsed.destination}"]))
    return EXIT_DONE
