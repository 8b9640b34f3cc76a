"""Parameters of which every rank holds a part: the values of eager's whole ones, in one graph, and nothing
sent twice."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint_of_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from hsap_compile import Refused, explain, pipeline, shard_parameters
from hsap_compile.passes.sum_gradients import sum_gradients
from hsap_compile.plan.text import short
from models import LONGEST, VOCABULARY, WIDTH, batch, build, difference, error_of_mean, whole
from pool import Pool

PACKS = ([[5, 1, 9, 4, 8]], [[30, 2, 9]])  # of each replica, other documents and other lengths


def compiled(model: nn.Module, lower: str, **options: Any) -> Any:
    return torch.compile(model, backend="hsap", options={"lower": lower, **options})


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, **given: Any) -> Any:
        return checkpoint(self.inside, **given, use_reentrant=False)


def compared(name: str, lower: str, dtype: torch.dtype, how: str = "") -> float:
    """The largest relative error of loss, logits and all gradients, of two lengths."""
    model = build(name, dtype, **({"tied": False} if how == "not tied" else {}))
    if how == "a checkpoint":
        model = Checkpointed(model)
    reference = copy.deepcopy(model)
    step = compiled(shard_parameters(model), lower)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return max(difference(step, model, reference, batch(name, rows)) for rows in PACKS)


@pytest.mark.parametrize(
    ("name", "lower", "world", "how"),
    [
        ("nano", "eager", 4, ""),  # the words' rows are no multiple of four
        ("nano", "aot_eager", 2, "not tied"),
        ("nano", "aot_eager", 2, "a checkpoint"),
        ("gpt2", "eager", 2, ""),
        pytest.param("nano", "inductor", 2, "not tied", marks=pytest.mark.slow),
        pytest.param("llama", "inductor", 4, "", marks=pytest.mark.slow),
        pytest.param("nano", "inductor", 2, "a checkpoint", marks=pytest.mark.slow),
    ],
)
def test_values_are_those_of_whole_parameters(
    pool: Pool, name: str, lower: str, world: int, how: str
) -> None:
    dtype, most = (torch.float32, 2e-5) if lower == "inductor" else (torch.float64, 1e-12)
    most = max(most, 2e-6 if name == "gpt2" else 0.0)  # its loss is computed in float32
    assert max(pool.run(compared, name, lower, dtype, how, world=world)) < most


def training() -> float:
    """The largest difference of parameters after three steps with clipped gradients."""
    model = build("nano")
    models = [model, copy.deepcopy(model)]
    step = compiled(shard_parameters(model), "aot_eager")
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    for seed in range(3):
        given = batch("nano", PACKS[seed % 2], seed=seed)
        for function, m, optimiser in zip([step, models[1]], models, optimisers, strict=True):
            function(**given)[0].backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimiser.step()
            optimiser.zero_grad()
    both = zip(*(m.parameters() for m in models), strict=True)
    return max(float((whole(p.detach()) - q.detach()).abs().max()) for p, q in both)


def test_optimiser_and_clipping_know_the_parts(pool: Pool) -> None:
    assert max(pool.run(training, world=2)) < 1e-11


def loaded(path: str) -> float:
    """Saved in parts, loaded into a model that was made on the meta device."""
    saved = build("nano")
    reference = copy.deepcopy(saved)
    checkpoint_of_ranks.save({"model": shard_parameters(saved).state_dict()}, checkpoint_id=path)
    with torch.device("meta"):
        model = type(reference)().double()
    model = shard_parameters(model).to_empty(device="cpu")
    state = {"model": model.state_dict()}
    checkpoint_of_ranks.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    return difference(compiled(model, "eager"), model, reference, batch("nano", PACKS[0]))


def test_a_model_of_the_meta_device_loads_its_parts(pool: Pool, tmp_path: Path) -> None:
    assert max(pool.run(loaded, str(tmp_path), world=2)) < 1e-12


class Initialised(nn.Module):
    """As models are that initialise themselves: by functions of torch, by ``data``, and by tying."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.norm = nn.LayerNorm(WIDTH)

    def initialise(self) -> None:
        nn.init.constant_(self.norm.weight, 0.5)
        self.norm.bias.data.fill_(0.25)
        with torch.no_grad():
            self.words.weight.uniform_(-1.0, 1.0)
            self.head.bias.zero_().add_(0.125)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.norm(self.words(ids)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


def initialised() -> tuple[float, list[str]]:
    """The error of a step of a model that was made on the meta device, and initialised in parts, and what its
    parameters are called then."""
    with torch.device("meta"):
        model = Initialised().double()
    model = shard_parameters(model).to_empty(device="cpu")
    for p in model.parameters():
        p.detach().fill_(torch.nan)
    torch.manual_seed(torch.distributed.get_rank())  # without a GPU, torch draws every part on its own
    model.initialise()
    reference = Initialised().double()
    reference.load_state_dict({name: whole(x) for name, x in model.state_dict().items()})
    reference.head.weight = reference.words.weight
    assert all(bool(p.isfinite().all()) and float(p.detach().abs().max()) > 0 for p in reference.parameters())
    error = difference(compiled(model, "eager"), model, reference, batch("nano", PACKS[0]))
    return error, [name for name, _ in model.named_parameters()]


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
def test_a_model_of_the_meta_device_is_initialised_in_parts(pool: Pool) -> None:
    for error, names in pool.run(initialised, world=2):
        assert error < 1e-12 and names == ["words.weight", "head.bias", "norm.weight", "norm.bias"]


def copied() -> float:
    """The largest difference of logits of a copy that runs in eager, where parameters are read whole, too."""
    reference = build("nano")
    model = copy.deepcopy(shard_parameters(copy.deepcopy(reference)))
    given = batch("nano", PACKS[0])
    return float((model(**given)[1] - reference(**given)[1]).detach().abs().max())


def test_a_copy_runs_without_being_compiled(pool: Pool) -> None:
    assert max(pool.run(copied, world=2)) < 1e-12


class Returning(nn.Module):
    """Its head's matrix beside logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.words(ids)), self.head.weight


def returned(outputs: str) -> float:
    """The largest relative error of gradients of rows and of what is whole on every rank."""
    model = Returning().double()
    reference = copy.deepcopy(model)
    step = compiled(shard_parameters(model), "eager", outputs=outputs)
    ids = batch("nano", PACKS[0])["ids"]
    for function in (step, reference):
        logits, weight = function(ids)
        (logits.pow(2).sum() + 10 * weight.pow(2).sum()).backward()
    return error_of_mean(model, [reference])


@pytest.mark.parametrize("outputs", ["gather", "local"])
def test_a_parameter_that_is_returned_has_its_gradient_once(pool: Pool, outputs: str) -> None:
    assert max(pool.run(returned, outputs, world=2)) < 1e-12


def set_anew() -> float:
    model = build("nano", tied=False)
    reference = copy.deepcopy(model)
    shard_parameters(model)
    for changed in (model, reference):
        changed.head.weight = nn.Parameter(torch.ones(VOCABULARY, WIDTH).double().tril())  # type: ignore[union-attr]
        changed.norm.bias = None  # type: ignore[union-attr]
    return difference(compiled(model, "eager"), model, reference, batch("nano", PACKS[0]))


def test_a_parameter_may_be_set_anew(pool: Pool) -> None:
    assert max(pool.run(set_anew, world=2)) < 1e-12


def averaged(sizes: dict[str, int], over: str) -> float:
    """The largest difference of gradients from the mean of what eager gives each replica's batch, where parts
    are made over ``over``."""
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    replica = mesh.get_local_rank("data")
    model = build("nano")
    references = [copy.deepcopy(model) for _ in PACKS]
    parts = {
        "all": None,
        "copies of parts": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "part")),
        "replicas": mesh["data"],
    }
    step = compiled(shard_parameters(model, parts[over]), "eager", mesh=mesh["inter", "intra"])
    given = [batch("nano", rows, seed=i) for i, rows in enumerate(PACKS)]
    step(**given[replica])[0].backward()
    for reference, of_replica in zip(references, given, strict=True):
        reference(**of_replica)[0].backward()
    return error_of_mean(model, references)


@pytest.mark.parametrize("over", ["all", "copies of parts", "replicas"])
@pytest.mark.parametrize(
    "sizes", [{"data": 2, "inter": 1, "intra": 2}, {"inter": 2, "data": 2, "intra": 1}], ids=str
)
def test_gradients_are_the_mean_over_replicas(pool: Pool, sizes: dict[str, int], over: str) -> None:
    assert max(pool.run(averaged, sizes, over, world=4)) < 1e-12


# --- what is sent and kept ----------------------------------------------------------------------------


def elements(events: Any) -> dict[str, list[int]]:
    """Of every kind of collective, how many elements each one was given."""
    found: dict[str, list[int]] = {}
    for event in events:
        packet, _, kind = event.name.partition("::")
        if packet == "_c10d_functional" and kind != "wait_tensor":
            found.setdefault(kind, []).append(math.prod(event.input_shapes[0]))
    return {kind: sorted(sizes) for kind, sizes in found.items()}


def sent() -> tuple[Any, ...]:
    """What collectives of forward and backward are given, the shapes of what is kept between them and of
    the parameters."""
    model = build("nano")
    shapes = [tuple(p.shape) for p in model.parameters()]
    step = compiled(shard_parameters(model), "aot_eager", outputs="local", check="first")
    step(**batch("nano", PACKS[0]))[0].backward()
    kept: list[tuple[int, ...]] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with (
        profile(record_shapes=True, acc_events=True) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        loss = step(**batch("nano", PACKS[0]))[0]
    with profile(record_shapes=True, acc_events=True) as backward:
        loss.backward()
    return elements(forward.events()), elements(backward.events()), kept, shapes


def test_a_parameter_travels_where_it_is_read_and_its_gradient_once(pool: Pool) -> None:
    for forward, backward, kept, shapes in pool.run(sent, world=2):
        parts = [-(-shape[0] // 2) * math.prod(shape[1:]) for shape in shapes]
        words = [shape for shape in shapes if shape[0] == VOCABULARY]
        assert forward.pop("all_to_all_single") and backward.pop("all_to_all_single")
        assert forward == {"all_gather_into_tensor": sorted(parts), "all_reduce": [2]}  # of the loss
        whole = [2 * n for n in parts] + [(VOCABULARY + 1) * WIDTH] * len(words)  # which are read twice
        assert backward.pop("reduce_scatter_tensor") == sorted(whole)
        again = Counter(backward.pop("all_gather_into_tensor"))
        assert not backward
        matrices = Counter(n for n, shape in zip(parts, shapes, strict=True) if len(shape) == 2)
        matrices -= Counter({LONGEST // 2 * WIDTH: 1})  # the places' rows, which no backward reads
        assert Counter({n: many for n, many in again.items() if n in matrices}) == matrices
        assert again <= Counter(parts)  # of the norms' scales, those that torch reads
        like_a_part = {(48, WIDTH), (WIDTH, 48)}
        whole_ones = {shape for shape in shapes if len(shape) == 2} - like_a_part
        assert whole_ones.isdisjoint(kept) and whole_ones.isdisjoint(shape[::-1] for shape in kept)


def explained() -> tuple[str, list[tuple[int, ...]]]:
    model = build("nano")
    shapes = [tuple(p.shape) for p in model.parameters()]
    return str(explain(shard_parameters(model), hsap_ranks=2, **batch("nano", PACKS[0]))), shapes


def test_what_parts_send_is_explained(pool: Pool) -> None:
    text, shapes = pool.run(explained, world=2)[0]
    whole_bytes = 8 * sum(map(math.prod, [*shapes, (VOCABULARY, WIDTH)]))  # the words twice, as the head's
    gathered, summed = (line for line in text.splitlines() if "of parts" in line or "in parts" in line)
    many, size = str(len(shapes) + 1), short(whole_bytes, "B")
    assert gathered.split("reads")[1].split() == ["their", "mesh", many, *size.split(), "0", "0", "B"]
    assert summed.split("parts")[1].split() == ["their", "mesh", "0", "0", "B", many, *size.split()]


# --- parts that a model makes whole itself ------------------------------------------------------------


class Head(nn.Module):
    """Of parts of a matrix, read as ``how`` says."""

    def __init__(self, weight: Tensor, how: str) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.how = how
        self.parts = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))

    def forward(self, x: Tensor) -> Tensor:
        everywhere = self.parts.redistribute(placements=[Replicate()])
        if self.how == "detached":
            with torch.no_grad():
                scale = self.parts.full_tensor().abs().mean()
            return x @ everywhere.to_local(grad_placements=[Partial("avg")]).T * scale
        if self.how == "first read under no_grad":
            weight = everywhere.to_local(grad_placements=[Partial("avg")])
            with torch.no_grad():
                scale = weight.abs().mean()
            return x @ weight.T * scale
        if self.how == "scaled":
            return x @ (2 * everywhere).to_local().T
        if self.how == "summed":
            return x @ everywhere.to_local(grad_placements=[Partial("sum")]).T
        if self.how == "of tokens":
            tokens = DTensor.from_local(x, self.parts.device_mesh, [Replicate()], run_check=False)
            return tokens.full_tensor() @ self.parts.full_tensor().T
        more = self.parts.to_local().mean() if self.how == "a part" else 0.0
        return x @ self.parts.full_tensor().T + more


def by_hand(how: str) -> float:
    """The largest error of a model whose head reads parts, to the same model in eager, whose head does."""
    model = build("nano", tied=False)
    model.head = Head(model.head.weight.detach(), how)  # type: ignore[union-attr, arg-type]
    reference = copy.deepcopy(model)
    reference.head.parts = nn.Parameter(model.head.parts.detach().clone())  # type: ignore[union-attr, operator]
    return difference(compiled(model, "eager"), model, reference, batch("nano", PACKS[0]))


@pytest.mark.parametrize(
    ("how", "world"),
    [(how, 2) for how in ("full_tensor", "scaled", "summed", "detached", "first read under no_grad")]
    + [("first read under no_grad", 1)],
)
def test_a_model_may_gather_its_parts_itself(pool: Pool, how: str, world: int) -> None:
    assert max(pool.run(by_hand, how, world=world)) < 1e-12


@pytest.mark.parametrize(
    ("how", "got"), [("a part", "to_local, of or with a DTensor"), ("of tokens", ", of or with a DTensor")]
)
def test_distributed_tensors_that_compute_are_refused(pool: Pool, how: str, got: str) -> None:
    for text in pool.run(refusal, by_hand, how, world=2):
        assert "a tensor that is distributed over ranks takes part in the model's computation" in text
        assert got in text and "hsap_compile.shard_parameters" in text
        assert "test_sharded_parameters.py" in text


# --- errors -------------------------------------------------------------------------------------------


def refusal(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except Exception as error:
        return str(error)
    return "accepted"


def shares() -> None:
    compiled(shard_parameters(build("nano")), "eager", grad_sync=False)(**batch("nano", PACKS[0]))


class Keeping(nn.Module):
    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.kept = keep(self.weight)


def kept_in_a_table() -> None:
    shard_parameters(Keeping(lambda weight: {"of words": [weight]}))


def kept_as_a_view() -> None:
    shard_parameters(Keeping(lambda weight: weight.data.T))


def limited() -> None:
    shard_parameters(nn.Embedding(4, 2, max_norm=1.0))


def elsewhere() -> None:
    shard_parameters(build("nano"), DeviceMesh("cpu", [1, 0]))


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def written() -> None:
    model = build("nano", tied=False)
    model.head = Clamped(WIDTH, VOCABULARY).double()
    compiled(shard_parameters(model), "eager")(**batch("nano", PACKS[0]))


def twice() -> None:
    shard_parameters(shard_parameters(build("nano")))


def recurrent() -> None:
    shard_parameters(nn.LSTM(2, 2))


def recurrent_of_meta() -> None:
    shard_parameters(nn.LSTM(2, 2, device="meta"))


def beside_each_other() -> None:
    """In one piece of memory, as a file's contents are, but not in the same place of it."""
    model, memory = nn.Linear(2, 2, bias=False), torch.arange(8.0)
    model.weight = nn.Parameter(memory[:4].view(2, 2))
    model.register_buffer("scale", memory[4:])
    shard_parameters(model)


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (shares, ("summed over the ranks where they are computed", 'drop "grad_sync": False')),
        (written, ("writes into a parameter of which every rank holds a part", "weight.clamp(-1, 1)")),
        (twice, ("parameters are distributed already", "words.weight, a DTensor", "drop the other call")),
        (recurrent, ("where it is not read by name", "LSTM._flat_weights", "or leave it out")),
        (recurrent_of_meta, ("where it is not read by name", "LSTM._flat_weights")),
        (beside_each_other, ("accepted",)),
        (kept_in_a_table, ("where it is not read by name", "Keeping.kept, which holds one")),
        (kept_as_a_view, ("where it is not read by name", "Keeping.kept, which holds one")),
        (limited, ("writes into its parameter", "Embedding with max_norm", "drop max_norm")),
        (elsewhere, ("cannot be sharded over this mesh", "ranks [1, 0], on rank", "drop mesh, or pass")),
    ],
)
def test_refusals_say_what_to_do(pool: Pool, function: Any, texts: tuple[str, ...]) -> None:
    for said in pool.run(refusal, function, world=2):
        assert all(text in said for text in texts), said


def test_without_ranks_there_are_no_parts() -> None:
    with pytest.raises(Refused, match=r"no ranks to shard parameters over[\s\S]*init_process_group"):
        shard_parameters(build("nano"))


# --- the mutation -------------------------------------------------------------------------------------


def unsummed() -> float:
    def for_one(graph: Any, mode: Any, group: str, ranks: int) -> int:
        return sum_gradients(graph, mode, group, 1)

    with mock.patch.object(pipeline, "sum_gradients", for_one):
        return compared("nano", "eager", torch.float64)


def test_shares_that_are_averaged_as_if_they_were_whole_are_found(pool: Pool) -> None:
    assert min(pool.run(unsummed, world=2)) > 0.1
