"""The planner against brute force, by example. `check` is the checker, also for test_plan_properties.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from hsap_compile.plan import BAND, CAUSAL, FULL, MOD, Attended, MeshShape, Plan, RankTables, make, place
from hsap_compile.plan.placement import expand, unfold


def mesh_of(inter: int, intra: int) -> MeshShape:
    return MeshShape(tuple(tuple(range(i * intra, (i + 1) * intra)) for i in range(inter)))


def packed(*lengths: int, **options: object) -> Attended:
    """Causal documents of these lengths in one row."""
    labels = np.repeat(np.arange(len(lengths)), lengths)[None]
    return Attended(1, int(labels.size), labels, **{"lo": 0, **options})  # type: ignore[arg-type]


def allowed(mask: Attended) -> np.ndarray:
    """(B, S, S) bool [b, q, k], from the definition."""
    n = mask.tokens
    result = np.ones((mask.batch, n, n), np.bool_)
    if mask.labels is not None:
        result &= mask.labels[:, :, None] == mask.labels[:, None, :]
    if mask.key_valid is not None:
        result &= mask.key_valid[:, None, :]
    if mask.query_valid is not None:
        result &= mask.query_valid[:, :, None]
    offset = np.arange(n)[:, None] - np.arange(n)
    return result & (offset >= mask.band[0]) & (offset <= mask.band[1])


def wanted(mask: Attended) -> np.ndarray:
    """(B, S, S) bool: the pairs that must be computed."""
    result = allowed(mask)
    return result | ~result.any(axis=2, keepdims=True) if mask.soft else result


def check(
    masks: Sequence[Attended], mesh: MeshShape, plan: Plan, tables: Sequence[RankTables] | None = None
) -> None:
    """Assert that the tables of all ranks together compute every mask, and that no row moves unneeded."""
    tables = [plan.tables(r) for r in range(mesh.size)] if tables is None else tables
    tokens = masks[0].tokens
    check_columns(mesh, tokens, tables)
    assert plan.exchanged.tolist() == [len(t.columns) - t.alone for t in tables]
    for i, mask in enumerate(masks):
        batch = mask.batch
        check_alone(mask, tables)
        check_rows(mask, mesh, tables, i)
        sent = np.stack([t.masks[i].splits[0] for t in tables])
        assert np.array_equal(plan.masks[i].rows_sent, sent)
        want = wanted(mask)
        for r, t in enumerate(tables):
            alone, shared = t.columns[: t.alone], t.group_columns
            assert plan.masks[i].area[r] == want[:, alone].sum() + want[:, shared].sum() / mesh.intra
            remote = t.masks[i].remote[: t.masks[i].splits[1].sum()]
            rows = [(b, c) for b in range(batch) for c in shared]
            check_slices(mask, rows, rows + [tuple(x) for x in remote.tolist()], t.masks[i].slices)
            rows = [(b, c) for b in range(batch) for c in alone]
            check_slices(mask, rows, rows, t.masks[i].alone_slices)


def check_columns(mesh: MeshShape, tokens: int, tables: Sequence[RankTables]) -> None:
    longest = -(-tokens // mesh.size)
    laid = np.full(mesh.size * longest, -1)
    for r, t in enumerate(tables):
        assert len(t.columns) == tokens // mesh.size + (r < tokens % mesh.size)
        assert np.all(np.diff(t.columns[: t.alone]) > 0) and np.all(np.diff(t.columns[t.alone :]) > 0)
        assert mesh.intra > 1 or t.alone == 0
        laid[r * longest : r * longest + len(t.columns)] = t.columns
        group = mesh.groups[mesh.group_of(r)[0]]
        shared = [tables[m].columns[tables[m].alone :] for m in group]
        assert np.array_equal(np.concatenate(shared), t.group_columns)
        for m in range(mesh.size):
            mine = (len(t.columns) - t.alone, len(tables[m].columns) - tables[m].alone)
            assert tuple(t.head_splits[:, m]) == (mine if m in group else (0, 0))
    for t in tables:
        assert np.array_equal(laid[unfold(t.order, tokens)], np.arange(tokens))


def check_alone(mask: Attended, tables: Sequence[RankTables]) -> None:
    """Alone columns attend to, and are attended from, alone columns of their rank only."""
    holder = np.full(mask.tokens, -1)
    for r, t in enumerate(tables):
        holder[t.columns[: t.alone]] = r
    apart = (holder[:, None] != holder[None, :])[None]
    assert not (wanted(mask) & apart).any()


def check_rows(mask: Attended, mesh: MeshShape, tables: Sequence[RankTables], i: int) -> None:
    """What is sent is what is received, in order, and is exactly what is needed."""
    for r, t in enumerate(tables):
        mine = t.masks[i]
        group, position = mesh.group_of(r)
        need = wanted(mask)[:, t.group_columns].any(axis=1)
        need[:, t.group_columns] = False
        every: list[tuple[int, int]] = []
        for stage, arriving in enumerate(mine.exchanges):
            got: list[tuple[int, int]] = []
            for other, u in enumerate(tables):
                theirs = u.masks[i].exchanges[stage]
                n = int(theirs.splits[0, r])
                assert n == arriving.splits[1, other]
                assert n == 0 or (mesh.group_of(other)[1] == position and mesh.group_of(other)[0] != group)
                start = int(theirs.splits[0, :r].sum())
                b, index = np.divmod(theirs.send_rows[start : start + n], max(1, len(u.group_columns)))
                part = list(zip(b.tolist(), u.group_columns[index].tolist(), strict=True))
                assert part == sorted(part)
                got += part
            assert got == [tuple(x) for x in arriving.remote.tolist()]
            assert len(arriving.send_rows) == arriving.splits[0].sum()
            every += got
        assert sorted(every) == [tuple(x) for x in np.argwhere(need).tolist()]
        assert [tuple(x) for x in mine.remote.tolist()] == every


def check_slices(
    mask: Attended, rows: list[tuple[int, int]], keys: list[tuple[int, int]], slices: np.ndarray
) -> None:
    """Each wanted pair of the group's query rows is in one slice, which holds others only for a formula."""
    may, want = allowed(mask), wanted(mask)
    seen = np.zeros_like(may, np.int64)
    real = slices[slices[:, 1] > slices[:, 0]]
    assert np.all(slices[len(real) :] == 0)
    assert real[:, [0, 2]].tolist() == sorted(real[:, [0, 2]].tolist())
    for q0, q1, k0, k1, kind, lo, hi in real.tolist():
        assert k1 > k0 and q1 <= len(rows) and k1 <= len(keys)
        assert k1 <= len(rows) or k0 >= len(rows), "own and received rows in one slice"
        (b, q), (_, k) = rows[q0], keys[k0]
        assert rows[q0:q1] == [(b, q + n) for n in range(q1 - q0)]
        assert keys[k0:k1] == [(b, k + n) for n in range(k1 - k0)]
        i, j = np.arange(q1 - q0)[:, None], np.arange(k1 - k0)
        assert kind == BAND or (lo, hi) == (0, 0)
        assert kind != CAUSAL or q1 - q0 == k1 - k0
        inside = {
            FULL: i + j >= 0,
            CAUSAL: j <= i,
            BAND: (lo <= i - j) & (i - j <= hi),
            MOD: i + j >= 0,
        }[kind]
        block = (b, slice(q, q + q1 - q0), slice(k, k + k1 - k0))
        assert kind == MOD or np.all(may[block][inside]), "a pair that the mask forbids"
        assert kind == MOD or not mask.residual
        seen[block] += inside
    held = np.zeros(may.shape[:2], np.bool_)
    held[tuple(np.array(rows, np.int64).reshape(-1, 2).T)] = True
    assert np.all(seen[want & held[:, :, None]] == 1), "a pair that is missing or twice"
    assert seen.max() <= 1 and not seen[~held].any()
    assert not seen[held & ~want.any(axis=2)].any(), "a row that attends to nothing"


MESHES = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2)]
MASKS = {
    "lengths 1": packed(*[1] * 24),
    "one giant": packed(29),
    "one giant, no labels": Attended(1, 29, lo=0),
    "mixed": packed(1, 9, 2, 1, 17, 3, 4),
    "bidirectional": packed(7, 13, 5, 8, lo=None),
    "window": packed(7, 13, 20, hi=2),
    "anti-causal": packed(7, 13, 5, lo=None, hi=0),
    "strictly causal": packed(7, 13, 5, lo=1),
    "interleaved": Attended(1, 26, np.arange(26)[None] % 3, lo=0),
    "soft, dead tail": Attended(1, 20, lo=0, key_valid=np.arange(20)[None] >= 6, soft=True),
    "residual": packed(7, 13, 5, residual=True),
    "nothing": Attended(1, 20, lo=0, key_valid=np.zeros((1, 20), np.bool_)),
    "nothing, soft": Attended(2, 20, lo=0, query_valid=np.zeros((1, 20), np.bool_), soft=True),
    "two rows": Attended(2, 21, np.sort(np.arange(42) * 7 % 5).reshape(2, 21), lo=0),
}


@pytest.mark.parametrize("kind", ["balanced", "contiguous"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_against_brute_force(name, shape, kind):
    mesh = mesh_of(*shape)
    plan = make([MASKS[name]], mesh, kind)
    plan.verify()
    check([MASKS[name]], mesh, plan)


def test_several_masks_and_a_permuted_mesh():
    masks = [packed(7, 13, 20), packed(7, 13, 20, hi=3), packed(40, lo=None)]
    mesh = MeshShape(((5, 0), (1, 4), (2, 3)))
    plan = make(masks, mesh)
    plan.verify()
    check(masks, mesh, plan)


@pytest.mark.parametrize("lo", [0, None])
def test_a_document_whole_on_a_group_is_one_slice(lo):
    plan = make([packed(300, 100, 300, 100, lo=lo)], mesh_of(2, 1))
    rows = np.concatenate([plan.tables(r).masks[0].slices for r in (0, 1)])
    assert sorted((rows[:, 1] - rows[:, 0]).tolist()) == [100, 100, 300, 300]
    assert np.all(rows[:, 4] == (FULL if lo is None else CAUSAL))
    assert plan.masks[0].rows_sent.sum() == 0


def test_three_levels():
    """The documents of 8 tokens are alone on a rank each; the one of 32 exchanges heads in its group."""
    mask = packed(8, 8, 8, 8, 32)
    mesh = mesh_of(1, 2)
    plan = make([mask], mesh)
    tables = [plan.tables(r) for r in range(2)]
    assert [t.alone for t in tables] == [16, 16] and plan.exchanged.tolist() == [16, 16]
    assert tables[0].group_columns.tolist() == list(range(32, 64))
    assert plan.area.tolist() == [2 * 36 + 32 * 33 / 4] * 2
    for t in tables:
        assert t.masks[0].slices[:, :5].tolist() == [[0, 32, 0, 32, CAUSAL]]
        assert t.masks[0].alone_slices[:, :5].tolist() == [[0, 8, 0, 8, CAUSAL], [8, 16, 8, 16, CAUSAL]]
        assert t.head_splits.tolist() == [[16, 16], [16, 16]]


def test_contiguous_documents_are_alone_where_they_happen_to_lie_on_one_rank():
    plan = make([packed(4, 8, 10, 2)], mesh_of(1, 2), "contiguous")
    assert [t.alone for t in map(plan.tables, (0, 1))] == [12, 12]
    plan = make([packed(4, 10, 8, 2)], mesh_of(1, 2), "contiguous")
    tables = [plan.tables(r) for r in (0, 1)]
    assert [t.alone for t in tables] == [4, 10]
    assert tables[1].columns.tolist() == [*range(14, 24), 12, 13]
    assert tables[0].group_columns.tolist() == list(range(4, 14))


def test_nothing_is_alone_where_a_query_attends_to_its_whole_row():
    valid = np.arange(24)[None] < 20
    hard = packed(4, 8, 8, 4, key_valid=valid)
    assert make([hard], mesh_of(1, 2)).exchanged.sum() < 24
    soft = packed(4, 8, 8, 4, key_valid=valid, soft=True)
    assert make([soft], mesh_of(1, 2)).exchanged.tolist() == [12, 12]


def test_documents_of_other_rows_and_masks_keep_a_column_from_being_alone():
    """Rows cut at 4 and at 6 are one unit of 8 columns; a second mask joins the rest of the row to it."""
    labels = np.array([[0] * 4 + [1] * 4 + [2] * 8, [0] * 6 + [1] * 2 + [2] * 8])
    rows = Attended(2, 16, labels, lo=0)
    assert make([rows], mesh_of(1, 2), "contiguous").exchanged.tolist() == [0, 0]
    assert make([rows, Attended(2, 16, hi=2, lo=0)], mesh_of(1, 2), "contiguous").exchanged.tolist() == [8, 8]
    shifted = Attended(2, 16, np.roll(labels, 1, axis=1), lo=0)
    assert make([shifted], mesh_of(1, 2), "contiguous").exchanged.tolist() == [8, 8]


def runs(plan: Plan, rank: int) -> list[list[int]]:
    """[start, stop) of each run of a rank's columns."""
    columns = plan.tables(rank).columns
    parts = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)
    return [[int(part[0]), int(part[-1]) + 1] for part in parts]


def test_zigzag_halves():
    plan = make([packed(800)], mesh_of(4, 1))
    assert plan.balance < 1.01
    assert [runs(plan, r) for r in range(4)] == [
        [[0, 100], [700, 800]],
        [[100, 200], [600, 700]],
        [[200, 300], [500, 600]],
        [[300, 500]],
    ]
    # group 0 attends to all keys, group 3 to those before column 500
    assert plan.masks[0].rows_sent.sum(axis=0).tolist() == [600, 500, 400, 300]


def test_a_window_is_cut_into_blocks():
    mask = packed(4096, hi=255)
    (slices,) = [t.slices for t in make([mask], mesh_of(1, 1)).tables(0).masks]
    assert len(slices) == 2 * 4096 // 256 - 1
    size = (slices[:, 1] - slices[:, 0]) * (slices[:, 3] - slices[:, 2])
    assert size.sum() <= 2 * allowed(mask).sum()
    check([mask], mesh_of(1, 1), make([mask], mesh_of(1, 1)))


def test_a_window_needs_its_halo_only():
    plan = make([packed(4096, hi=255)], mesh_of(4, 1))
    assert plan.masks[0].rows_sent.sum() == 3 * 255
    assert plan.balance < 1.05


def test_labels_too_interleaved_go_to_the_formula():
    tokens = 1200
    mask = Attended(1, tokens, np.arange(tokens)[None] % 2, lo=0)
    plan = make([mask], mesh_of(2, 1))
    assert plan.balance < 1.05
    for r in range(2):
        t = plan.tables(r).masks[0]
        assert set(t.slices[:, 4]) == {MOD} and len(t.slices) < 10
    check([mask], mesh_of(2, 1), plan)


def test_packs_are_balanced():
    rng = np.random.default_rng(0)
    for groups in (2, 4, 8):
        for sigma in (0.8, 1.2, 1.6):
            lengths = np.minimum(np.exp(rng.normal(6, sigma, 150)).astype(int) + 1, 30000)
            assert make([packed(*lengths)], mesh_of(groups, 1)).balance < 1.1


def test_deterministic():
    masks = [MASKS["mixed"], MASKS["mixed"]]
    plans = [make(masks, mesh_of(4, 2)) for _ in range(2)]
    assert plans[0].digest() == plans[1].digest()
    one, two = (plan.tables(5) for plan in plans)
    for a, b in zip(one.masks, two.masks, strict=True):
        for x, y in [(a, b), *zip(a.exchanges, b.exchanges, strict=True)]:
            arrays = [f.name for f in dataclasses.fields(x) if f.name != "exchanges"]
            assert all(np.array_equal(getattr(x, name), getattr(y, name)) for name in arrays)
    assert np.array_equal(one.order, two.order)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError) as error:
        place([packed(7)], mesh_of(2, 2))
    assert str(error.value) == (
        "place: got 7 tokens a row on 4 ranks; wanted at least 8, two a rank: "
        "use fewer ranks or a longer batch"
    )
    with pytest.raises(ValueError, match=r"got masks over \[7, 8\] tokens; wanted one or more masks"):
        place([packed(7), packed(8)], mesh_of(1, 1))
    with pytest.raises(ValueError, match="got placement 'random'; wanted 'balanced' or 'contiguous'"):
        place([packed(9)], mesh_of(1, 1), "random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got groups .* wanted groups of one size"):
        MeshShape(((0, 1), (2,)))
    with pytest.raises(ValueError, match=r"got rank 4; wanted 0..3"):
        make([packed(9)], mesh_of(2, 2)).tables(4)
    with pytest.raises(
        ValueError, match=r"Attended.labels: got int32 of shape \(5,\); wanted int64 of shape"
    ):
        Attended(1, 5, np.zeros(5, np.int32))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"Attended.starts: got bool of shape \(1, 4\); wanted bool of shape \(1 or 1, 5\)"
    ):
        Attended(1, 5, np.zeros((1, 5), np.int64), starts=np.ones((1, 4), np.bool_))
    with pytest.raises(ValueError, match="got lo=3 > hi=2"):
        Attended(1, 5, lo=3, hi=2)


def test_intervals_unfold_to_their_columns() -> None:
    start, stop = np.array([5, 5, 9, 0, 3]), np.array([7, 5, 10, 2, 3])
    assert expand(start, stop).tolist() == [5, 6, 9, 0, 1]
    assert expand(start[:0], stop[:0]).tolist() == []
    assert expand(start[1:2], stop[1:2]).tolist() == []
