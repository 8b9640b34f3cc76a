"""The cost model: seconds from figures, figures from files, and the mesh that it chooses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hsap_compile.plan.cost import A100, BACKWARD, H100, MACHINES, AttentionShape, CostModel, Link
from hsap_compile.plan.load import Load, Setting, Stage, stage, there_and_back

#: 1 FLOP, byte and token take a second each, so that seconds can be read off.
PLAIN = CostModel(
    Link(10.0, 2.0), Link(100.0, 1.0), 1.0, 1.0, 1.0, AttentionShape(1, 1, 1, 1), overlap=0.5, name="plain"
)


def test_seconds_of_links_attention_and_matrix_work() -> None:
    assert PLAIN.intra.seconds(6.0) == 13
    assert PLAIN.intra.seconds(6.0, 3) == 33
    assert PLAIN.intra.seconds(0.0) == 0
    assert PLAIN.inter.seconds(np.array([0.0, 5.0])).tolist() == [0, 105]
    assert PLAIN.attention_seconds(10.0, 1) == 40
    assert PLAIN.attention_seconds(10.0, BACKWARD) == 100
    assert PLAIN.attention_seconds(10.0) == 140
    assert PLAIN.linear_seconds(7.0) == 7
    assert PLAIN.side_by_side(10.0, 4.0) == 12
    assert PLAIN.side_by_side(4.0, 10.0) == 12


def load() -> Load:
    """Two ranks in two groups; 3 and 5 pairs on own keys while 6 bytes travel, then 2 on received ones."""
    there = np.array([[0, 6], [0, 0]])
    first = stage(Setting((4, 4), 2, 1), np.array([3, 5]), there)
    return there_and_back(
        np.array([4, 4]), first, Stage(np.array([0.0, 2.0]), *np.zeros((2, 2, 2), int), remote=True)
    )


def test_a_stage_takes_its_longer_part_and_what_is_not_hidden_of_the_shorter() -> None:
    predicted = load().predicted(PLAIN)
    assert predicted.forward.own.tolist() == [12, 20]
    assert predicted.forward.remote.tolist() == [0, 8]
    assert predicted.forward.inter.tolist() == [106, 106]
    assert predicted.forward.intra.tolist() == [0, 0]
    assert predicted.forward.total.tolist() == [106 + 6, 106 + 10 + 8]
    assert predicted.backward.total.tolist() == [106 + 15, 106 + 25 + 20]
    assert predicted.attention == 124 + 151
    assert predicted.layer == 124 + 151 + 4
    assert (load().most_bytes("inter"), load().most_bytes("intra")) == (6, 0)


def test_the_timeline_is_the_forward() -> None:
    spans = [x for x in load().timeline(PLAIN) if np.any(x.stop > x.start)]
    assert [x.kind for x in spans] == ["own", "inter", "remote"]
    assert [x.start.tolist() for x in spans] == [[0, 0], [0, 0], [112, 116]]
    assert [x.stop.tolist() for x in spans] == [[12, 20], [106, 106], [112, 124]]


@pytest.mark.parametrize(
    ("heads", "kv", "ways", "share"),
    [(8, 4, 2, 2), (8, 4, 4, 1), (8, 4, 8, 1), (8, 1, 4, 1), (6, 2, 3, 2), (12, 4, 6, 2)],
)
def test_heads_are_repeated_just_enough(heads: int, kv: int, ways: int, share: int) -> None:
    """`share` key/value heads on each of `ways` ranks."""
    shape = AttentionShape(heads, kv, 16, 2)
    assert shape.splits(ways)
    assert shape.kv_share_bytes(ways) == share * 2 * 16 * 2


@pytest.mark.parametrize("cost", [H100, A100, PLAIN])
def test_what_is_saved_is_loaded(cost: CostModel, tmp_path: Path) -> None:
    cost.save(tmp_path / "machine.json")
    assert CostModel.load(tmp_path / "machine.json") == cost


def test_machines_have_names() -> None:
    assert CostModel.load("H100") is H100 and CostModel.load("A100") is A100
    assert len({m.name for m in MACHINES.values()}) == len(MACHINES)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"overlap": 2}, "CostModel: got overlap=2; wanted a number from 0 to 1: correct it"),
        ({"overlap": None}, "CostModel: got overlap=None; wanted a number from 0 to 1: correct it"),
        ({"linear_flops_per_s": 0}, "got linear_flops_per_s=0; wanted a number of at least 1: correct it"),
        ({"ranks_per_host": 1.5}, "got ranks_per_host=1.5; wanted a whole number of at least 1: correct it"),
        ({"shape": {"kv_heads": 5}}, "got 32 query heads and 5 key/value heads; wanted the first to be a"),
        ({"inter": {"latency_s": 0}}, "missing 1 required positional argument: 'bandwidth_bytes_per_s'"),
        ({"colour": 3}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_file_with_nonsense_is_refused(change: dict, text: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(dataclasses.asdict(H100) | change))
    with pytest.raises(ValueError) as refused:
        CostModel.load(path)
    message = str(refused.value)
    assert text in message
    assert message.startswith(f"machine '{path}': got ")
    assert message.endswith(
        "wanted one of H100, A100, or a file that `python -m hsap_compile calibrate` wrote: write one"
    )


@pytest.mark.parametrize("content", [None, "[1]", "{"])
def test_what_is_no_machine_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "B200"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="wanted one of H100, A100, or a file that"):
        CostModel.load(path)
