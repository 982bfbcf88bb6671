"""What goes with growth besides weights, at its edges: optimizers, globs, twins, batches, parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.inits_by_side import init_for
from fxgrow.plan.requests import Drawing

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

OPTIMIZERS = ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop"]


def pair(hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_an_empty_layer(name: str) -> None:
    net, x = pair(0), torch.randn(8, 4)
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-2)
    net(x).square().sum().backward()
    optimizer.step()
    grown = fxgrow.widen(net, "+5", x)
    fxgrow.grow_optimizer_(optimizer, net, grown)
    optimizer.zero_grad()
    (grown.model(x) - 1).square().sum().backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in grown.model.parameters())


class Calls(nn.Module):
    """Layers a, b, c and what is done with them."""

    def __init__(self, run: Callable[[Calls, Tensor], Tensor], **widths: tuple[int, int]) -> None:
        super().__init__()
        self._run = run
        for name, (before, after) in widths.items():
            self.add_module(name, nn.Linear(before, after))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


EMPTY: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: pair(0),
    "two in a row": lambda: nn.Sequential(
        nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 0), nn.GELU(), nn.Linear(0, 3)
    ),
    "slopes and dropout": lambda: nn.Sequential(
        nn.Linear(4, 0), nn.PReLU(0), nn.Dropout(), nn.Linear(0, 3)
    ),
    "a gate": lambda: Calls(
        lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))), a=(4, 0), b=(4, 0), c=(0, 3)  # type: ignore[operator]
    ),
    "in a concatenation": lambda: Calls(
        lambda m, x: m.c(torch.cat([m.a(x), F.relu(m.b(x))], -1)), c=(2, 3), b=(4, 2), a=(4, 0)  # type: ignore[operator]
    ),
    "a branch": lambda: Calls(
        lambda m, x: m.d(m.a(x) + m.c(F.relu(m.b(m.a(x))))), a=(4, 6), b=(6, 0), c=(0, 6), d=(6, 3)  # type: ignore[operator]
    ),
    "several readers": lambda: Calls(
        lambda m, x: m.b(F.relu(m.a(x))) + m.c(F.relu(m.a(x))), a=(4, 0), b=(0, 3), c=(0, 3)  # type: ignore[operator]
    ),
    "behind a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 0), nn.ReLU(), nn.Linear(0, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
@pytest.mark.parametrize("name", EMPTY)
def test_none_becomes_one(name: str, pairing: str) -> None:
    torch.manual_seed(0)
    net, x = EMPTY[name]().double(), torch.randn(64, 4, dtype=torch.float64)
    grown = fxgrow.widen(net, "+1", x, where="all", pairing=pairing)
    of_none = [group for group in grown.plan.groups if group.width[0] == 0]
    assert of_none
    assert {group.width for group in of_none} == {(0, 1)}
    assert grown.report.verification.verdict == "preserved"
    writer, reader = (
        grown.model.get_submodule(names[0]) for names in (of_none[0].writers, of_none[0].readers)
    )
    assert (writer.out_features, bool(writer.weight.any())) == (1, True)  # type: ignore[operator]
    for training in (False, True):
        with torch.random.fork_rng():
            before = net.train(training)(x)
        after = grown.model.train(training)(x)
        assert (after - before).abs().max() <= 1e-10
    (after - 1).square().sum().backward()
    if name != "two in a row":  # of two, the first is read by what nothing reads yet
        assert bool(reader.weight.grad.any())  # type: ignore[union-attr, operator]


def _gated(m: Calls, x: Tensor, parts: int) -> Tensor:
    first, *others = m.a(x).chunk(parts, -1)  # type: ignore[operator]
    return m.b(math.prod((torch.tanh(other) for other in others), start=first))  # type: ignore[operator]


CUT: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "a GLU": (2, lambda: nn.Sequential(nn.Linear(4, 0), nn.GLU(), nn.Linear(0, 3))),
    "GLUs in a row": (
        2,
        lambda: nn.Sequential(
            nn.Linear(4, 0), nn.GLU(), nn.Linear(0, 8), nn.GLU(), nn.Linear(4, 0), nn.GLU(),
            nn.Linear(0, 3),
        ),
    ),
    "halves": (2, lambda: Calls(lambda m, x: _gated(m, x, 2), a=(4, 0), b=(0, 3))),
    "thirds": (3, lambda: Calls(lambda m, x: _gated(m, x, 3), a=(4, 0), b=(0, 3))),
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", CUT)
def test_an_empty_layer_that_is_cut_grows_by_whole_channels(name: str, channels: int) -> None:
    torch.manual_seed(0)
    parts, make = CUT[name]
    net, x = make().double(), torch.randn(64, 4, dtype=torch.float64)
    grown = fxgrow.widen(net, f"+{channels * parts}", x)
    of_none = [group for group in grown.plan.groups if group.width[0] == 0]
    assert {group.width for group in of_none} == {(0, channels * parts)}
    assert grown.report.verification.verdict == "preserved"
    assert (grown.model(x) - net(x)).abs().max() <= 1e-10
    for group in of_none:
        reader = grown.model.get_submodule(group.readers[0])
        assert reader.in_features == channels
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(net)
    assert all(map(torch.equal, again.parameters(), grown.model.parameters()))
    with pytest.raises(PlanError, match=f"each has {parts} rows, .* possible: .*× {parts} rows"):
        fxgrow.widen(net, f"+{parts * channels + 1}", x, include=of_none[0].writers)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "SGD"])
def test_an_optimizer_goes_on_from_none_to_one(name: str) -> None:
    net, x = pair(0), torch.randn(64, 4)
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-2)
    net(x).square().sum().backward()
    optimizer.step()
    grown = fxgrow.widen(net, "1", x)
    fxgrow.grow_optimizer_(optimizer, net, grown)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append((grown.model(x) - 1).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert bool(grown.model[2].weight.any())  # type: ignore[index]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("method", [fxgrow.Tiny, fxgrow.GradMax])
def test_data_say_what_one_channel_of_none_is(method: type[fxgrow.Tiny | fxgrow.GradMax]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 3)).double()
    x, y = (torch.randn(60, n, dtype=torch.float64) for n in (4, 3))
    y[:, 0] += torch.tanh(3 * x[:, 1])
    grown = fxgrow.widen(net, "1", x, init=method(F.mse_loss, [(x, y)])).model
    loss = F.mse_loss(grown(x), y)
    loss.backward()
    if method is fxgrow.Tiny:
        assert loss < F.mse_loss(net(x), y)
    assert bool(grown[0].weight.grad.any())  # type: ignore[index]


def test_what_is_told_of_one_channel_is_what_is_there() -> None:
    """A plan of one for none is read back, and tells the sizes of the network that it makes."""
    net = pair(0)
    grown = fxgrow.widen(net, "1")
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(net)
    assert [p.shape for p in again.parameters()] == [(1, 4), (1,), (3, 1), (3,)]
    assert grown.plan.parameters == (3, 11)
    assert grown.plan.flops == (0, fxgrow.widen(pair(1), "2").plan.flops[0])


def test_code_that_does_something_else_with_one_is_refused() -> None:
    def run(m: Calls, x: Tensor) -> Tensor:
        hidden = F.relu(m.a(x))  # type: ignore[operator]
        return m.c(hidden.neg() if hidden.shape[1] == 1 else hidden)  # type: ignore[no-any-return, operator]

    net = Calls(run, a=(4, 0), c=(0, 3))
    with pytest.raises(PlanError, match="something else with one channel; ask for more"):
        fxgrow.widen(net, "1", torch.randn(8, 4))
    assert fxgrow.widen(net, "2", torch.randn(8, 4)).plan.groups[0].width == (0, 2)


def test_globs_of_pairings_match_single_channels() -> None:
    grown = fxgrow.widen(pair(1), "+3", pairing={"0": "v_zero", "*": "vv_z_negz"})
    assert grown.plan.groups[0].pairing == "v_zero"


@pytest.mark.parametrize("options", [{"input_init": "zeros"}, {"init": {"2": "zeros"}}])
def test_twins_that_are_read_by_zeros_are_told_of(options: dict[str, object]) -> None:
    with pytest.warns(fxgrow.FxgrowWarning, match="never part"):
        fxgrow.widen(pair(8), "2x", **options)  # type: ignore[arg-type]
    fxgrow.widen(pair(8), "2x", pairing="v_zero", **options)  # type: ignore[arg-type]


def mine(tensor: torch.Tensor, reference: torch.Tensor | None, fan_in: int) -> None:
    tensor.fill_(0.25)


def test_an_init_that_a_plan_names_for_one_side_is_for_that_side() -> None:
    drawing = Drawing(output_init=f"{__name__}:mine")
    plan = fxgrow.widen(pair(8), "2x", output_init=mine).plan
    assert plan.request.drawing.output_init == drawing.output_init
    by_side = init_for(drawing, mine)
    assert (by_side.rows, by_side.columns) == (mine, init_for(Drawing()))  # type: ignore[attr-defined]
    by_layer = init_for(Drawing(init={"0": f"{__name__}:mine", "*": "zeros"}), mine)
    assert by_layer.inits == {"0": mine, "*": init_for(Drawing(init="zeros"))}  # type: ignore[attr-defined]


BAD_PARTS: dict[str, tuple[Callable[[], object], str]] = {
    "no inputs": (
        lambda: fxgrow.apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=0),
        "new_fan_in must be",
    ),
    "less than none": (
        lambda: fxgrow.apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=4, fan_in=-1),
        "fan_in must be",
    ),
    "no batch norm": (lambda: fxgrow.NormTensors.of(nn.LayerNorm(4)), "is no batch norm"),
    "noise": (
        lambda: fxgrow.apply_pairing(
            torch.ones(2, 4), torch.ones(3, 2), torch.ones(1, 4), torch.ones(3, 1), "vv_z_negz",
            noise=math.nan,
        ),
        "the noise must be",
    ),
    "gain": (lambda: fxgrow.widen(pair(8), gain=1e30), "the gain must be from"),
    "width": (lambda: fxgrow.widen(pair(8), "9" * 30), "more than any layer"),
    "increment": (lambda: fxgrow.widen(pair(8), "+100000000"), "more than any layer"),
    "sides by layer": (lambda: fxgrow.widen(pair(8), output_init="0=lecun"), "is by layer"),
    "keep": (lambda: fxgrow.Tiny(F.mse_loss, [(torch.ones(2), torch.ones(2))], keep=0), "keep"),
    "threshold": (
        lambda: fxgrow.Tiny(F.mse_loss, [(torch.ones(2), torch.ones(2))], threshold=5),
        "threshold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PARTS)
def test_what_cannot_be_meant_is_refused(what: str) -> None:
    call, told = BAD_PARTS[what]
    with pytest.raises(PlanError, match=told) as caught:
        call()
    assert what == "no batch norm" or isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([(torch.ones(3, 7), torch.ones(3, 3))], "does not run on the first batch"),
        ([(torch.ones(3, 4).double(), torch.ones(3, 3))], "does not run on the first batch"),
        ([(torch.ones(3, 4), torch.ones(3, 3)), (torch.ones(0, 4), torch.ones(0, 3))], "batch 1"),
        (None, "no batches"),
    ],
)
def test_batches_that_do_not_fit_are_told_of(batches: object, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        fxgrow.widen(pair(8), init=fxgrow.Tiny(F.mse_loss, batches))  # type: ignore[arg-type]


def test_classes_may_be_any_whole_numbers_in_range() -> None:
    from fxgrow.grow.data.losses import cross_entropy

    logits = torch.randn(4, 3)
    wanted = F.cross_entropy(logits, torch.tensor([0, 2, -100, 1]))
    assert cross_entropy(logits, torch.tensor([0, 2, -100, 1], dtype=torch.int32)) == wanted
    with pytest.raises(PlanError, match="no class from 0 to 2"):
        cross_entropy(logits, torch.tensor([0, 3, 1, 1]))


def test_parts_take_a_norm_as_a_module() -> None:
    norm = nn.BatchNorm1d(2)
    scaled = fxgrow.apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=16, norm=norm)  # type: ignore[call-overload]
    assert scaled.norm.running_mean.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("method", [fxgrow.Tiny, fxgrow.GradMax])
def test_data_tell_nothing_behind_an_empty_layer(method: Callable[..., object]) -> None:
    """The empty layer itself grows; that it leaves the next one nothing to read is told."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 0), nn.GELU(), nn.Linear(0, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    batches = [(torch.randn(14, 5).double(), torch.randn(14, 3).double())]
    grown = fxgrow.widen(net, "+2", init=method(F.mse_loss, batches), verify=False)
    assert [(group.name, group.width) for group in grown.plan.groups] == [("0", (0, 2))]
    assert [(r.name, "2 reads no channels yet" in r.reason) for r in grown.plan.refused] == [
        ("2", True)
    ]
    table = fxgrow.inspect(net, growth=method(F.mse_loss, batches)).growth
    assert [len(row.gains) > 0 for row in table.groups] == [True, False]
    both = nn.Sequential(nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 0), nn.Tanh(), nn.Linear(0, 3))
    batches = [(torch.randn(7, 4), torch.randn(7, 3))]
    with pytest.raises(PlanError, match=r"0: .*2 writes no channels yet.* 2: .*2 reads no channe"):
        fxgrow.widen(both, "+2", init=method(F.mse_loss, batches))
