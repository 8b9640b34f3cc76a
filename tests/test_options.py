"""Options are checked before anything is compiled; what a user reads is pinned here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from hsap_compile.errors import Refused
from hsap_compile.mesh import group_name, mesh_shape, place_in
from hsap_compile.options import Options, parse
from threads import run_threads


def refusal(options: dict[str, Any] | None = None, mode: str | None = None) -> str:
    with pytest.raises(Refused) as caught:
        parse(options, mode)
    return str(caught.value)


def test_defaults() -> None:
    assert parse(None, None) == Options()


def test_none_is_the_default() -> None:
    assert parse(dict.fromkeys(vars(Options())), None) == parse({}, None)


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    text = refusal({"placment": "balanced"})
    assert 'there is no option "placment"' in text
    assert 'did you mean "placement"?' in text
    assert "attention, check, kernel_options, received, memory_budget, inductor, on_step" in text


@pytest.mark.parametrize("key", ["placement", "outputs", "lower", "received"])
def test_a_value_that_does_not_exist_is_refused(key: str) -> None:
    text = refusal({key: "fast"})
    assert f'option "{key}" has a value that does not exist' in text
    assert "got:    'fast'" in text


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("strict", 1, "bool"), ("intra", "2", "int"), ("intra", True, "int"), ("mesh", 4, "DeviceMesh")],
)
def test_a_wrong_type_is_refused(key: str, value: Any, kind: str) -> None:
    text = refusal({key: value})
    assert f'option "{key}" has the wrong type' in text
    assert f"wanted: a {kind}" in text


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_received_rows_are_held_in_bytes(value: Any) -> None:
    text = refusal({"received": value})
    assert f"got:    {value!r}" in text and "wanted: 'save', 'again', or a number of bytes" in text
    assert parse({"received": 2**20}, None).received == 2**20


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, True, "half", float("nan")])
def test_a_budget_that_is_no_share_is_refused(value: Any) -> None:
    text = refusal({"memory_budget": value})
    assert 'option "memory_budget" is not a share of the activations' in text
    assert f"got:    {value!r}" in text and "wanted: a number above 0 and up to 1; nothing kept" in text
    assert parse({"memory_budget": 0.5}, None).memory_budget == 0.5


def test_mode_is_honoured_or_refused() -> None:
    assert parse(None, "default") == Options()
    patches = parse(None, "max-autotune-no-cudagraphs").inductor
    assert patches["max_autotune"] is True
    assert parse({"inductor": {"max_autotune": False}}, "max-autotune").inductor["max_autotune"] is False
    assert 'mode="reduce-overhead" is not supported' in refusal(mode="reduce-overhead")


def _groups(options: Options, kv_heads: int, heads: int) -> Any:
    return mesh_shape(options, kv_heads, heads, place_in(group_name(options.mesh))[1]).groups


def test_the_default_group_is_the_largest_that_divides_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert run_threads(4, _groups, Options(), 2, 8)[0] == ((0, 1), (2, 3))
    assert run_threads(4, _groups, Options(), 4, 8)[0] == ((0, 1, 2, 3),)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert run_threads(4, _groups, Options(), 4, 8)[0] == ((0, 1), (2, 3))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # of two hosts: groups of two would lie on both
    assert run_threads(6, _groups, Options(), 4, 8)[0] == tuple((i,) for i in range(6))


def test_an_impossible_group_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(Refused, match=r"groups of 3 ranks are not possible") as caught:
        run_threads(4, _groups, Options(intra=3), 4, 8)
    assert "one of [1, 2, 4]" in str(caught.value)


def _of_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    return _groups(Options(mesh=init_device_mesh("cpu", shape, mesh_dim_names=names)), 4, 8)


def test_a_device_mesh_names_its_levels() -> None:
    assert run_threads(4, _of_mesh, (2, 2), ("inter", "intra"))[0] == ((0, 1), (2, 3))
    assert run_threads(4, _of_mesh, (2, 2), ("intra", "inter"))[0] == ((0, 2), (1, 3))
    assert run_threads(2, _of_mesh, (2,), ("inter",))[0] == ((0,), (1,))
    assert run_threads(2, _of_mesh, (2,), ("intra",))[0] == ((0, 1),)


def test_a_mesh_with_other_dimensions_is_refused() -> None:
    with pytest.raises(Refused, match=r"other dimensions than inter and intra"):
        run_threads(2, _of_mesh, (2,), ("dp",))


def _of_replica(names: tuple[str, ...], *part: str) -> Any:
    mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)[part]
    return _groups(Options(mesh=mesh), 4, 8), place_in(group_name(mesh))


def test_ranks_of_a_replica_are_counted_from_its_first() -> None:
    names, part = ("inter", "data", "intra"), ("inter", "intra")  # of rank 6, the ranks 2, 3, 6 and 7
    assert run_threads(8, _of_replica, names, *part)[6] == (((0, 1), (2, 3)), (2, 4))
    assert run_threads(4, _of_replica, ("intra", "data"), "intra")[3] == (((0, 1),), (1, 2))
    assert run_threads(4, _of_replica, ("data", "inter"), "inter")[1] == (((0,), (1,)), (1, 2))


def test_a_mesh_of_another_number_of_ranks_is_refused() -> None:
    mesh = run_threads(2, lambda: init_device_mesh("cpu", (2,), mesh_dim_names=("inter",)))[0]
    with pytest.raises(Refused, match=r"the mesh has another number of ranks") as caught:
        mesh_shape(Options(mesh=mesh), 4, 8, 8)
    assert "a mesh of ranks [0, 1], and 8 ranks" in str(caught.value)
    assert "ask about hsap_ranks=2" in str(caught.value)


def test_mesh_and_intra_exclude_each_other() -> None:
    mesh = run_threads(1, lambda: init_device_mesh("cpu", (1,), mesh_dim_names=("inter",)))[0]
    assert "both a mesh and a group size are given" in refusal({"mesh": mesh, "intra": 1})


def test_torch_versions(recwarn: pytest.WarningsRecorder) -> None:
    from hsap_compile._torch import check_version

    check_version.__wrapped__(torch.__version__)
    assert not recwarn.list
    with pytest.raises(Refused, match=r"this torch is too old"):
        check_version.__wrapped__("2.10.0")
    with pytest.warns(UserWarning, match=r"newer than what was tested"):
        check_version.__wrapped__("9.0.0+cu1")
