"""The benchmark on two hosts: what it measures on a real link, what its rivals compute, what it leaves."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def why_not() -> str:
    """Why two namespaces cannot be joined here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "needs ip and tc (iproute2)"
    name = f"hsap-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns does not work: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("hsap-")}


@pytest.mark.slow
def test_bytes_on_the_link_are_those_planned(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    size = ["--tokens", "1024", "--heads", "4", "--width", "32", "--documents", "4", "1"]
    how = ["--rates", "200", "--repeats", "1", "--results", str(tmp_path)]
    script = str(BENCHMARKS / "two_hosts.py")
    command = [sys.executable, script, *size, *how, "--timeline", str(tmp_path / "overlap.png")]
    before = namespaces()
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert namespaces() <= before
    content = json.loads((tmp_path / "two_hosts.json").read_text())
    assert (tmp_path / "overlap.png").stat().st_size > 0
    details = {(row["documents"], row["contender"]): row for row in content["details"]}
    assert len(details) == 6 + 7 and len(content["results"]) == 2 * len(details)
    assert max(row["largest error"] for row in details.values()) < 5e-6
    for documents in (4, 1):
        for name in ("ours", "ours, no overlap"):
            row = details[documents, name]
            assert row["MB predicted"] > 0.5
            assert 1 <= row["measured / predicted"] < 1.15
    # q, k, v and the output cross with half of the heads, and so do their gradients
    heads_exchanged = 8 * 1024 * 4 * 32 * 4 / 2 / 1e6
    assert heads_exchanged <= details[4, "Ulysses"]["MB"] < 1.15 * heads_exchanged
    rivals = [row["MB"] for (n, name), row in details.items() if n == 4 and not name.startswith("ours")]
    assert details[4, "ours"]["MB"] < min(rivals)


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def rivals() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("_rivals")


@given(lengths=LENGTHS, ranks=st.integers(1, 4), whole=st.booleans())
def test_pieces_are_each_allowed_pair_once(rivals: Any, lengths: list[int], ranks: int, whole: bool) -> None:
    tokens = sum(lengths)
    document = [i for i, n in enumerate(lengths) for _ in range(n)]
    chunks = [rivals.chunk(tokens, ranks, i) for i in range(ranks)]
    pairs = []
    for queries in chunks:
        for keys in [range(tokens)] if whole else chunks:
            for here, there, causal in rivals.pieces(lengths, queries, keys):
                for i, q in enumerate(queries[here]):
                    pairs += [(q, k) for j, k in enumerate(keys[there]) if not causal or j <= i]
    assert sorted(pairs) == [
        (q, k) for q in range(tokens) for k in range(q + 1) if document[q] == document[k]
    ]
