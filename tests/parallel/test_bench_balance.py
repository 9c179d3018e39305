"""`chiar bench balance` at its smallest: both sides train, the record is whole, the streams are skewed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.run_server import RunServer

OPTIONS = (
    "bench balance --device cpu --processes 2 --steps 6 --warmup 4 --hidden-size 32 --seq-length 128 "
    "--micro-batch-size 4 --ranks 8"
).split()


def test_both_sides_are_compared(server: RunServer, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    files = ["--folder", tmp_path / "runs", "--output", output]
    run = server.start([*OPTIONS, "--schedule", "D R*2 A", *files], ranks=2)
    assert run.wait() == [0, 0], run.output()
    record = json.loads(output.read_text())
    on, off = record["results"]
    assert on["executed_max_over_mean"] == on["all_layers_executed_max_over_mean"] == 1.0
    assert off["useful_over_executed"] == 1.0 and off["overflow_over_light"] == 0.0
    assert off["executed_max_over_mean"] == pytest.approx(off["light_max_over_mean"])
    assert on["validation"].keys() == off["validation"].keys() == {"easy_validation", "hard_validation"}
    for side in (on, off):
        assert {e["ranks"] for e in side["simulation"]["estimates"]} == {2, 8}
        assert side["simulation"]["traced_replicas"] == 2
    # Two replicas: each one's own text, and tables are digits where prose is letters.
    checked = {check["what"]: check["error"] for check in record["checks"]}
    assert len([what for what in checked if "text: share of digits" in what]) == 2
    assert "balance on" in run.output() or "| on " in run.output()


def test_what_is_out_of_time_is_left_out_and_said(server: RunServer, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    files = ["--folder", tmp_path / "runs", "--output", output]
    run = server.start([*OPTIONS, "--time-limit", 0, *files], ranks=2)
    assert run.wait() == [0, 0], run.output()
    record = json.loads(output.read_text())
    assert record["results"] == []
    assert record["notes"] == [f"{s}: skipped, --time-limit has passed" for s in ("warmup", "on", "off")]


def test_an_odd_number_of_processes_is_refused(server: RunServer, tmp_path: Path) -> None:
    run = server.start(["bench", "balance", "--processes", 3, "--folder", tmp_path / "runs"])
    assert run.wait() == [2] and "--processes: 3 must be even" in run.output()
