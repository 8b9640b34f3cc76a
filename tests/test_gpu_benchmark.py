"""The script for a GPU's owner runs, at sizes that measure nothing, on a machine without one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def rows(part: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--parts", part]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [row for row in found if "contender" in row]


def test_kernels() -> None:
    found = {row["contender"]: row for row in rows("kernels")}
    assert found["varlen, user's"]["note"].endswith("torch has no such kernel on cpu")
    for name in ("ours, flex", "ours, varlen", "SDPA, dense mask"):
        row = found[name]
        assert row["note"] == "" and float(row["error"]) < 1e-5 and row["both_ms"] > 0, row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "contenders"),
    [("share", ("ours, flex", "ours, varlen")), ("model", ("hsap, slices", "torch.compile, dense mask"))],
)
def test_others(part: str, contenders: tuple[str, ...]) -> None:
    found = rows(part)
    for name in contenders:
        mine = [row for row in found if row["contender"] == name]
        assert mine and all(row["note"] == "" and math.isfinite(row["both_ms"]) for row in mine), mine
