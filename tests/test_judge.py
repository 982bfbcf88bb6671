"""What the judge sees: other sizes, zeros, hostile plans, what no example touches."""

from __future__ import annotations

import copy
import math
import types
from collections import UserDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import small_images, small_resnet
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models import resnet18
from typer.testing import CliRunner

import fxgrow
from fxgrow.api.widen import carry_out, plan
from fxgrow.cli.app import app
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import Absorption, AxisEdit, Run, TensorEdit
from fxgrow.plan.step import BlockPlan
from fxgrow.verification import weights
from fxgrow.verification.exact import Exact
from fxgrow.verification.operations import behaviour, other_sizes, resized


class Branching(nn.Module):
    """A network that may do something else with its hidden channels on inputs of some size."""

    def __init__(self, wrong: Callable[[Tensor], bool], dim: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.wrong, self.dim = wrong, dim

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        if self.wrong(x):
            hidden = hidden.flip(self.dim)
        return self.last(hidden)


@pytest.mark.parametrize("batch", [1, 3, 5, 7, 8, 17])
def test_what_depends_on_the_batch_is_judged_there(batch: int) -> None:
    net = Branching(lambda x: x.shape[0] == batch)
    with pytest.raises(fxgrow.VerificationError, match="first part that breaks is first"):
        fxgrow.widen(net, "2x", torch.randn(2, 4))


def test_what_depends_on_the_length_is_judged_there() -> None:
    net = Branching(lambda x: x.shape[1] > 10, dim=2)
    with pytest.raises(fxgrow.VerificationError):
        fxgrow.widen(net, "2x", torch.randn(2, 6, 4))


def test_what_depends_on_the_size_of_images_is_judged_there() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            return self.last(hidden.flip(1) if x.shape[-1] > 20 else hidden)

    with pytest.raises(fxgrow.VerificationError):
        fxgrow.widen(Images(), "2x", torch.randn(2, 3, 16, 16))


def test_a_branch_that_does_no_harm_is_judged_and_told() -> None:
    net = Branching(lambda x: x.shape[0] >= 8, dim=0)
    found = fxgrow.widen(net, "2x", torch.randn(2, 4)).report.verification
    assert found.verdict == "preserved"
    assert "8x4" in found.inputs
    assert any("a batch of 8 too" in note for note in found.notes)


def test_the_same_operations_are_the_same_behaviour_at_every_size() -> None:
    standin = small_resnet().eval().to("meta")
    inputs = (torch.empty(2, 3, 64, 64, device="meta"),)
    first = behaviour(standin, inputs, "eval")
    assert not first.problem
    for size in other_sizes(inputs):
        other = behaviour(standin, resized(inputs, size, meta=True), "eval")
        factor = None if size.batch is None else (size.batch, 2)
        assert other.like(first, size, factor), size.told


class Head(nn.Module):
    """A network whose head may be zero, and whose middle may be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _spoiled(made: fxgrow.Plan, name: str, **changes: object) -> fxgrow.Plan:
    tensors = {**made.tensors, name: replace(made.tensors[name], **changes)}
    return replace(made, tensors=tensors)


def test_a_head_of_zeros_hides_nothing() -> None:
    net, x = Head(), torch.randn(3, 4)
    made = plan(net, "2x", x)
    found = carry_out(made, net, x).report.verification
    assert found.verdict == "preserved"
    assert found.drawn is not None
    assert found.drawn.residual.max_rel < 1e-12
    assert any("does not depend on the input" in note for note in found.notes)
    with pytest.raises(fxgrow.VerificationError):
        carry_out(_spoiled(made, "body.2.weight", scale=1.5), net, x)


def test_norms_that_begin_as_the_identity_hide_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    made = plan(net, "2x", x)
    runs = made.tensors["1.running_mean"].axes[0].runs
    shifted = replace(made.tensors["1.running_mean"].axes[0], runs=(replace(runs[0], start=0),) * 2)
    assert carry_out(made, net, x).report.verification.verdict == "preserved"
    with pytest.raises(fxgrow.FxgrowError):
        carry_out(_spoiled(made, "1.running_mean", axes=(shifted,), scale=2.0), net, x)


def test_outputs_that_depend_on_the_input_are_not_said_to_be_constant() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for x in (torch.randn(3, 4), torch.randn(1, 4)):
        assert fxgrow.widen(net, "2x", x).report.verification.notes == ()


class Parts(nn.Module):
    """A network with a part that is the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.trivial = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.trivial(x))


def test_a_plan_that_points_elsewhere_gains_nothing() -> None:
    net = Parts()
    made = _spoiled(
        plan(net, "2x", torch.randn(2, 4), include=["net.0"]), "net.2.weight", scale=2.0
    )
    elsewhere = replace(made, scopes=(replace(made.scopes[0], module="trivial"),))
    with pytest.raises(fxgrow.VerificationError):
        carry_out(elsewhere, net)


def test_a_plan_that_changes_what_cannot_be_compared_fails() -> None:
    net = nn.ModuleDict({"trivial": nn.Linear(4, 4), "net": Parts()})
    made = plan(net, "2x", torch.randn(2, 4), include=["net.net.0"], module="net")
    elsewhere = replace(made, scopes=(replace(made.scopes[0], module="trivial"),))
    with pytest.raises(fxgrow.VerificationError):
        carry_out(elsewhere, net)


def test_inputs_on_which_a_plan_is_right_are_not_all_that_is_judged() -> None:
    """On images of one pixel only the middle of a kernel counts."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))
    made = plan(net, "2x")
    small = replace(made.scopes[0], inputs=((2, 3, 1, 1),), inputs_inferred=False)
    found = carry_out(replace(made, scopes=(small,)), net).report.verification
    assert found.inputs[0] == "2x3x1x1"
    assert any(not shape.endswith("x1x1") for shape in found.inputs[1:])


@pytest.mark.parametrize("changes", [{"pairing": "none"}, {"noise": 1e-30}])
def test_what_nothing_predicts_is_changed_and_refused_under_strict(
    changes: dict[str, object],
) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    grown = fxgrow.widen(net, "2x", torch.randn(3, 4), **changes)
    assert grown.report.verification.verdict == "changed"
    assert "cannot say by how much" in str(grown.report)
    with pytest.raises(fxgrow.NotPreservedError):
        fxgrow.widen(net, "2x", torch.randn(3, 4), strict=True, **changes)


def test_a_change_that_nothing_predicts_ends_with_0_and_with_4_under_strict(tmp_path) -> None:
    torch.save(resnet18(num_classes=3).state_dict(), tmp_path / "model.pt")
    command = ["widen", str(tmp_path / "model.pt"), "--width", "2x", "--pairing", "none"]
    command += ["--include", "layer1.*", "--verify", "quick", "--input-shape", "2x3x32x32"]
    strict = CliRunner().invoke(app, [*command, "--strict"])
    assert strict.exit_code == 4, strict.output
    assert not list(tmp_path.glob("model-*"))
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "changed" in done.stdout


def test_quick_looks_at_one_input_in_eval_mode_and_none_at_nothing() -> None:
    net, x = small_resnet().eval(), small_images().float()
    quick = fxgrow.widen(net, "2x", x, include=["layer1.*"], verify="quick").report.verification
    assert (quick.verdict, quick.effort, len(quick.inputs)) == ("preserved", "quick", 1)
    assert quick.train is None
    assert quick.drawn is None
    none = fxgrow.widen(net, "2x", x, include=["layer1.*"], verify="none").report.verification
    assert (
        none == fxgrow.widen(net, "2x", x, include=["layer1.*"], verify=False).report.verification
    )
    assert none.verdict == "skipped"
    with pytest.raises(fxgrow.FxgrowError, match="full, quick, none"):
        fxgrow.widen(net, "2x", x, verify="thorough")


def test_progress_tells_what_is_done_and_how_long_the_rest_takes() -> None:
    told: list[str] = []
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    fxgrow.widen(net, "2x", torch.randn(3, 4), progress=told.append)
    assert any("%, about" in text and text.endswith("s left") for text in told)


def test_a_float64_network_holds_none_of_its_large_parameters() -> None:
    net = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))
    exact = Exact(net, weights.own(net))
    x = torch.randn(2, 64, dtype=torch.float64)
    expected = copy.deepcopy(net).double()(x)
    assert torch.equal(exact.module(x), expected)
    held = sum(t.nbytes for t in exact._kept.values())
    assert held < 2 * 8 * (4096 + 64)
    assert exact.used == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_and_tied_weights_are_copied_exactly(kind: type[nn.Module]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(11, 6), kind(6, 6, batch_first=True)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layer(self.table(ids))[0])

    net = Tied()
    exact = Exact(net, weights.own(net)).module
    ids = torch.randint(11, (2, 5))
    expected = copy.deepcopy(net).double()(ids)
    assert torch.allclose(exact(ids), expected, rtol=0, atol=1e-14)


def test_what_a_run_does_to_buffers_is_undone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    exact = Exact(net, weights.own(net))
    exact.module.train()(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert exact.module[1].running_mean.any()
    exact.reset()
    assert not exact.module[1].running_mean.any()
    assert not net[1].running_mean.any()


def test_drawn_weights_depend_on_names_alone_and_leave_constants_of_the_code() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
    net.register_buffer("table", torch.arange(3.0))
    one, other = weights.drawn(net), weights.drawn(copy.deepcopy(net))
    for name, tensor in named_tensors(net).items():
        assert torch.equal(one(name), other(name))
        assert one(name).shape == tensor.shape
    assert torch.equal(one("table"), torch.arange(3.0, dtype=torch.float64))
    assert (one("1.running_var") > 0).all()
    assert one("1.weight").std() > 0


def test_networks_that_refuse_drawn_weights_are_judged_on_their_own() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            self.scale = nn.Parameter(torch.full((3, 1), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * (self.scale - 1).log().T

    found = fxgrow.widen(Careful(), "2x", torch.randn(3, 4)).report.verification
    assert found.verdict == "preserved"
    assert any("drawn weights gave no finite output" in note for note in found.notes)


def test_an_expert_that_no_input_reaches_is_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)
            )
            self.chosen = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[self.chosen](x)

    net = Experts()
    x = torch.randn(3, 4)
    made = plan(net, "2x", x)
    assert "experts.1.0.weight" not in made.tensors
    net.chosen = 1
    hidden = plan(net, "2x", x)
    net.chosen = 0
    found = carry_out(hidden, net, x).report.verification
    assert any("experts.1.0.weight" in note and "took no part" in note for note in found.notes)


def test_classes_are_compared_where_they_are_all_that_comes_out() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 30))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(-1)

    net, x = Classes(), torch.randn(64, 4)
    other = copy.deepcopy(net)
    nn.init.normal_(other.body[2].weight)
    assert fxgrow.verify(net, copy.deepcopy(net), x).verdict == "preserved"
    assert fxgrow.verify(net, other, x).verdict == "failed"


def test_both_roundings_and_their_ratio_are_told() -> None:
    net = small_resnet().eval()
    found = fxgrow.widen(net, "2x", small_images().float(), include=["layer1.*"])
    for result in (found.report.verification.eval, found.report.verification.train):
        assert result.ratio == result.grown_rounding.max_rel / result.rounding.max_rel
    (headings,) = (line for line in str(found.report).splitlines() if line.startswith("change in"))
    assert headings.split()[-3:] == ["rounding", "before", "ratio"]


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device: str) -> None:
    torch.save(resnet18(num_classes=3).state_dict(), tmp_path / "model.pt")
    command = ["widen", str(tmp_path / "model.pt"), "--width", "2x", "--device", device]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 2, found.output
    assert "device" in found.output
    assert not list(tmp_path.glob("model-*"))


def test_a_network_that_rounds_far_more_than_before_is_told_where_and_what_to_do() -> None:
    """A row that is nearly dead, twins of full size beside it, and a norm that magnifies both."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, eps=1e-12), nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    with torch.no_grad():
        net[3].weight[::4] *= 1e-4
        net.train()
        for _ in range(50):
            net(torch.randn(16, 3, 12, 12))
    net.eval()
    x = torch.randn(4, 3, 12, 12)
    loud = fxgrow.widen(net, "1.5x", x, init="copy_uniform", include=["0"]).report.verification
    assert loud.verdict == "preserved"
    assert max(loud.eval.ratio, loud.train.ratio) > 10
    (note,) = (note for note in loud.notes if "times the rounding" in note)
    assert "first at what reads 0" in note
    assert "copy_rows" in note
    calm = fxgrow.widen(net, "1.5x", x, include=["0"]).report.verification
    assert max(calm.eval.ratio, calm.train.ratio) < 2
    assert not any("times the rounding" in note for note in calm.notes)


def test_a_head_of_zeros_moves_before_gradients_are_missed() -> None:
    found = fxgrow.widen(Head(), "2x", torch.randn(3, 4)).report.verification
    assert found.without_gradient == ()


class Written(nn.Module):
    """Two layers, and a forward that a test writes."""

    def __init__(self, forward: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.written = forward

    def forward(self, x: Tensor) -> object:
        return self.written(self, x)


def _hidden(net: Written, x: Tensor) -> Tensor:
    return net.a(x).relu()


def _crashes_later(net: Written, x: Tensor) -> Tensor:
    hidden = _hidden(net, x)
    return net.c(hidden + net.d(hidden) if len(x) >= 8 else hidden)


def _other_half(net: Written, x: Tensor) -> Tensor:
    halves, first = _hidden(net, x).view(len(x), 2, -1), int(len(x) >= 8)
    return net.c(torch.cat([halves[:, first], halves[:, 1 - first]], 1))


def _flips_long_ones(net: Written, x: Tensor) -> Tensor:
    hidden = net.a(x.flip(-1)).relu()
    return net.c(hidden.flip(-1) if x.shape[1] >= 16 else hidden)


WRONG: dict[str, tuple[Callable[..., object], tuple[int, ...], dict[str, object]]] = {
    "the grown one crashes at another batch": (_crashes_later, (2, 4), {}),
    "in train mode at another batch": (
        lambda n, x: n.c(_hidden(n, x).flip(1) if n.training and len(x) >= 8 else _hidden(n, x)),
        (2, 4), {},
    ),
    "another shift": (
        lambda n, x: n.c(torch.roll(_hidden(n, x), 1 if len(x) >= 8 else 0, 1)), (2, 4), {},
    ),
    "another index": (_other_half, (2, 4), {}),
    "another number": (
        lambda n, x: n.c(F.gelu(n.a(x) + (0.3 if len(x) >= 8 else 0.0))), (2, 4),
        {"pairing": "zero_z"},
    ),
    "another number in train mode": (
        lambda n, x: n.c(F.gelu(n.a(x) + (0.3 if n.training else 0.0))), (2, 4),
        {"pairing": "zero_z"},
    ),
    "a width as a number": (
        lambda n, x: n.c(_hidden(n, x)) * (_hidden(n, x).shape[1] if n.training else 1.0),
        (2, 4), {},
    ),
    "an operation that there is elsewhere": (_flips_long_ones, (2, 8, 4), {}),
    "nothing to compare": (lambda n, x: setattr(n, "out", n.c(_hidden(n, x))), (2, 4), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_looks_alike_is_told_apart(name: str) -> None:
    forward, shape, options = WRONG[name]
    net = Written(forward, d=nn.Linear(8, 8)).eval()
    with pytest.raises(fxgrow.FxgrowError):
        fxgrow.widen(net, "2x", torch.randn(shape), **options)


def _in_place(net: Written, x: Tensor) -> Tensor:
    x -= 0.5
    return net.c(_hidden(net, x))


RIGHT: dict[str, Callable[..., object]] = {
    "a namespace": lambda n, x: types.SimpleNamespace(logits=n.c(_hidden(n, x))),
    "a mapping of its own": lambda n, x: UserDict(logits=n.c(_hidden(n, x))),
    "complex numbers": lambda n, x: torch.fft.rfft(n.c(_hidden(n, x))),
    "an input that is changed": _in_place,
    "parameters in a dict": lambda n, x: n.c(F.linear(x, **_renamed(n.a._parameters)).relu()),
    "masked logits": lambda n, x: n.c(_hidden(n, x)).masked_fill(
        torch.tensor([True, False, False]), -torch.inf
    ),
}


def _renamed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**parameters}


@pytest.mark.parametrize("name", RIGHT)
def test_networks_that_return_and_do_uncommon_things_are_judged(name: str) -> None:
    net, x = Written(RIGHT[name]).eval(), torch.randn(2, 4)
    given = x.clone()
    found = fxgrow.widen(net, "2x", x).report.verification
    assert found.verdict == "preserved"
    assert found.drawn is not None
    assert torch.equal(x, given)
    assert [
        group.name for group in fxgrow.inspect(net, x).parts[0].groups if group.kind != "pinned"
    ]


def test_the_width_of_what_an_object_holds_is_kept() -> None:
    net, x = Written(RIGHT["a namespace"]).eval(), torch.randn(2, 4)
    assert fxgrow.widen(net, "2x", x, where="all").model(x).logits.shape == (2, 3)


def test_judging_writes_into_no_parameter() -> None:
    net = nn.Sequential(
        nn.Embedding(20, 4, max_norm=1.0), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        net[0].weight.mul_(5)
    before = net[0].weight.clone()
    grown = fxgrow.widen(net, "2x", torch.arange(10).view(2, 5))
    assert torch.equal(net[0].weight, before)
    assert torch.equal(grown.model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_networks_are_others_in_every_dtype(dtype: torch.dtype) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)

    x = torch.randn(2, 4, dtype=dtype)
    one, broken = make(0), make(0)
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    assert fxgrow.verify(one, make(0), x).verdict == "preserved"
    assert fxgrow.verify(one, make(1), x).verdict == "failed"
    assert fxgrow.verify(broken, make(1), x).verdict == "failed"
    with torch.no_grad():
        for network in (one, other := make(0)):
            network[2].weight.mul_(1e-3)
            network[2].bias.zero_()
        other[2].weight.mul_(1.5)
    assert fxgrow.verify(one, other, x).verdict == "failed"


def test_inputs_without_numbers_show_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(fxgrow.VerificationError, match="hold no numbers"):
        fxgrow.verify(net, copy.deepcopy(net), torch.randn(0, 4))


def test_a_plan_that_loses_rows_fails() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 4))
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.table[ids])

    net, ids = Table(), torch.arange(10).view(2, 5)
    made = plan(net, "2x", ids)
    axis = AxisEdit(0, "carrier", 1, (Run("old", 0, 10), Run("zero", 0, 10)))
    lost = {**made.tensors, "table": TensorEdit((20, 4), (20, 4), axes=(axis,))}
    with pytest.raises(fxgrow.VerificationError, match="do not go on"):
        carry_out(replace(made, tensors=lost), net, ids)


def test_a_block_that_is_not_there_excuses_no_change_in_training() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 4)
    made = plan(net, "2x", x)
    taken = Absorption("running_var", 2.0, 1e-5, "1.running_var")
    tensors = {
        **made.tensors,
        "1.weight": replace(made.tensors["1.weight"], scale=2.0),
        "1.running_var": replace(made.tensors["1.running_var"], absorption=taken),
    }
    block = BlockPlan("0", "0", "net2deeper", (), "exact", "", 0, in_training="no")
    with pytest.raises(fxgrow.VerificationError):
        carry_out(replace(made, tensors=tensors, blocks=(block,)), net, x)


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, -math.inf])
def test_what_masks_are_filled_with_does_not_hide_the_rest(fill):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu()).masked_fill(x[:, :5] > 0, fill)

    torch.manual_seed(0)
    net, x = Masked(), torch.randn(4, 6)
    grown = fxgrow.widen(net, "2x", x)
    assert grown.report.verification.verdict == "preserved"
    with torch.no_grad():
        grown.model.last.bias[0] += 1
    assert fxgrow.verify(net, grown.model, x).verdict == "failed"
