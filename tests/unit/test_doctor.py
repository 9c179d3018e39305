"""`chiar doctor` as its own process: what it reports, and when it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chiar_megatron.runtime.installed import VARIABLES, installed_packages, launch_description
from chiar_megatron.runtime.paths import describe_paths

REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = "ts-5ecret"


def doctor(*options: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with these variables and, ahead of all other packages, what lies in `path`."""
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environ["PYTHONPATH"] = os.pathsep.join([*([str(path)] if path else []), str(REPOSITORY)])
    command = [sys.executable, "-m", "chiar_megatron.cli", "doctor", *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environ | variables, cwd=REPOSITORY
    )


def pretend(folder: Path, name: str, version: str) -> Path:
    """A folder that claims to hold a package of this version."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_it_reports_versions_devices_paths_and_launch():
    done = doctor("--json", SLURM_JOB_ID="77", SLURM_JWT=SECRET, WANDB_API_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["torch"] == torch.__version__ and report["refused"] is None
    code = "import megatron.core, sys; print(sys.version_info[:3], megatron.core.__version__)"
    command = [sys.executable, "-c", code]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert versions["megatron-core"] in listed
    assert versions["python"] == ".".join(re.findall(r"\d+", listed)[:3])
    kinds = [device["kind"] for device in report["devices"]]
    assert kinds == ["cuda"] * torch.cuda.device_count() + ["cpu"]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert report["devices"][-1]["memory_gib"] == pytest.approx(pages / 2**30, abs=0.1)
    rows = [(row["part"], row["path"], row["reason"]) for row in report["paths"]]
    assert rows == describe_paths(torch.device(report["paths_on"]))
    assert report["launch"]["variables"]["SLURM_JOB_ID"] == "77" and SECRET not in line
    assert report["launch"]["place"]["launcher"] == "none"


def test_it_prints_the_same_for_people():
    done = doctor(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="n1",
                  MASTER_PORT="29501")  # fmt: skip
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [head.split()[0] for head in heads] == ["installed", "devices", "paths", "launch"]
    assert re.search(rf"^  torch +{re.escape(torch.__version__)} ", done.stdout, re.MULTILINE)
    assert "torchrun: rank 1 of 4, 2 of them on" in done.stdout and "n1:29501" in done.stdout
    for part, path, _ in describe_paths(
        torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ):
        assert part in done.stdout and path in done.stdout


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_versions_we_refuse_are_reported_and_end_with_2(tmp_path, options):
    done = doctor(*options, path=pretend(tmp_path, "megatron-core", "0.15.0"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("chiar: Untested versions: megatron-core 0.15.0 (needs exactly")
    assert done.stderr.count("\n") == 1 and "0.15.0" in done.stdout


def test_what_is_missing_says_what_it_costs(tmp_path):
    found = {package.name: package for package in installed_packages()}
    missing = [name for name, package in found.items() if package.version is None]
    done = doctor(path=pretend(tmp_path, "deepspeed", "9.9.9"))
    assert re.search(r"^  deepspeed +9\.9\.9 ", done.stdout, re.MULTILINE)
    for name in set(missing) - {"deepspeed"}:
        (line,) = (line for line in done.stdout.splitlines() if re.match(rf"  {name} ", line))
        assert "missing" in line and found[name].cost_of_lack in line


def test_no_package_is_said_to_be_unused_that_a_conversion_needs():
    """Hugging Face's are imported by what is built; DeepSpeed's files are read without it."""
    found = {package.name: package for package in installed_packages()}
    for name in ("transformers", "safetensors"):
        assert "Hugging Face's format" in found[name].used_for and found[name].cost_of_lack
    assert "converts" in found["deepspeed"].used_for and not found["deepspeed"].cost_of_lack
    assert not [package for package in found.values() if re.search(r"\byet\b", package.used_for)]


def test_a_contradicting_launch_is_a_finding_not_a_failure():
    done = doctor(RANK="3", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="a",
                  MASTER_PORT="29500")  # fmt: skip
    assert done.returncode == 0 and "problem: " in done.stdout and "RANK=3" in done.stdout
    described = launch_description({"RANK": "0"})
    assert described["place"] is None and "WORLD_SIZE" in described["problem"]
    assert described["variables"] == {"RANK": "0"}
