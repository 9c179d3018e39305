"""`chiar doctor` and `chiar bench`: this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chiar_megatron.bench.commands import add_bench_arguments, run_bench
from chiar_megatron.errors import EXIT_DONE, LaunchError

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_machine_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
    doctor = verbs.add_parser(
        "doctor", help="what is installed, which fused parts are active, what is missing and what it costs"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON line only")
    doctor.set_defaults(run=_doctor)

    bench = verbs.add_parser("bench", help="the benchmarks")
    add_bench_arguments(bench)
    bench.set_defaults(run=run_bench)


def _doctor(parsed: argparse.Namespace) -> int:
    from chiar_megatron.runtime.env import check_versions
    from chiar_megatron.runtime.installed import installed_packages, launch_description

    report: dict[str, Any] = {
        "refused": None,
        "packages": [asdict(package) for package in installed_packages()],
        "launch": launch_description(),
    }
    refusal = None
    try:
        check_versions()
    except LaunchError as error:  # torch may not even be there: report what needs none of it
        refusal, report["refused"] = error, str(error)
    if refusal is None:
        report |= _of_torch()
    print("\n".join([json.dumps(report)] if parsed.json else _doctor_lines(report)), flush=True)
    if refusal is not None:
        raise refusal
    return EXIT_DONE


def _of_torch() -> dict[str, Any]:

    from chiar_megatron.runtime.device import select_device
    from chiar_megatron.runtime.installed import torch_libraries, visible_devices
    from chiar_megatron.runtime.paths import describe_paths

    device = select_device("auto", local_rank=0)
    names = ("part", "path", "reason")
    return {
        "libraries": torch_libraries(),
        "devices": [asdict(device) for device in visible_devices()],
        "paths_on": str(device),
        "paths": [dict(zip(names, row, strict=True)) for row in describe_paths(device)],
    }


def _doctor_lines(report: dict[str, Any]) -> Iterator[str]:
    yield "installed"
    for package in report["packages"]:
        version, note = package["version"], package["used_for"]
        if version is None and package["cost_of_lack"]:
            note = f"{note}; without it: {package['cost_of_lack']}"
        yield f"  {package['name']:<20}{version or 'missing':<16}{note}"
    if report["refused"] is None:
        built = {name: version for name, version in report["libraries"].items() if version is not None}
        yield f"  torch is built {'with ' + _pairs(built) if built else 'without CUDA'}"
        yield "devices"
        for device in report["devices"]:
            memory = "" if device["memory_gib"] is None else f"{device['memory_gib']} GiB, "
            yield f"  {device['kind']:<6}{device['name']}: {memory}{device['detail']}"
        yield f"paths taken on {report['paths_on']}"
        for row in report["paths"]:
            yield f"  {row['part']:<30}{row['path']}: {row['reason']}"
    yield "launch"
    launch = report["launch"]
    place = launch["place"]
    if place is None:
        yield f"  problem: {launch['problem']}"
    elif place["launcher"] == "none":
        yield "  no launcher: one process, or as many as a recipe's layout needs"
    else:
        yield (
            f"  {place['launcher']}: rank {place['rank']} of {place['world_size']}, "
            f"{place['local_world_size']} of them on {place['host']}, "
            f"meeting at {place['master_addr']}:{place['master_port']}"
        )
    yield f"  variables set: {_pairs(launch['variables']) or 'none of those that matter'}"


def _pairs(values: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
