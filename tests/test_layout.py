"""Every entry of a grown tensor is where the plan puts it, and any that is not is named."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PlainResNet, PreactivationNet, mild
from torch import Tensor, nn

import fxgrow
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.modules.bits import same_bits
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import AxisEdit, Run, TensorEdit
from fxgrow.plan.schema import Plan
from fxgrow.verification.layout import check_layout


def misplaced(
    plan: Plan,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    free: Collection[str] = (),
) -> str:
    """Return what is not as the plan lays it out, or "" where all is."""
    try:
        check_layout(plan, before, after, free=free)
    except fxgrow.VerificationError as error:
        return error.message
    return ""


IMAGES = torch.randn(2, 3, 6, 6)


class Grouped(nn.Module):
    """A grouped and a transposed convolution between plain ones, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.inner = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.out = nn.Conv1d(8, 3, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.inner(self.table(ids).transpose(1, 2))))
        return self.out(torch.relu(self.up(x)))


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return mild(Grouped())


def preactivation() -> nn.Module:
    torch.manual_seed(0)
    return mild(PreactivationNet("projection"))


IDS = torch.randint(5, (2, 4))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "grouped": (grouped, IDS),
    "preactivation": (preactivation, IMAGES.double()),
}
WAYS: dict[str, dict[str, object]] = {
    "twins": {},
    "all twins, an odd number": {"where": "all", "width": "+3"},
    "rescaled": {"rescaling": "default_vt"},
    "to the old shape": {"rescaling": "vt_constraint_old_shape"},
    "read by zeros": {"pairing": "v_zero", "where": "all"},
    "copies": {"pairing": "replicate", "where": "all"},
    "some copies": {"pairing": "replicate", "width": "1.5x"},
    "copied pairs": {"pairing": "copy_pair", "where": "all"},
    "copies drawn": {"pairing": "replicate_random", "where": "all"},
    "not paired": {"pairing": "none"},
    "noise": {"noise": 0.1},
    "whole groups": {"grouped": "count", "where": "all"},
}


def grown_by(name: str, way: str, dtype: torch.dtype) -> tuple[nn.Module, fxgrow.Grown]:
    make, inputs = NETWORKS[name]
    model = make().to(dtype)
    arguments = {"width": "2x", **WAYS[way]}
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return model, fxgrow.widen(model, arguments.pop("width"), inputs, verify=False, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_executor_makes_is_laid_out_as_the_plan_says(name, way, dtype):
    model, grown = grown_by(name, way, dtype)
    assert misplaced(grown.plan, named_tensors(model), named_tensors(grown.model)) == ""
    assert misplaced(grown.plan, model.state_dict(), grown.model.state_dict()) == ""


def free_places(plan: Plan, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return which entries of a tensor nothing determines, told by hand: what is drawn once."""
    edit = plan.tensors[name]
    free = torch.zeros(shape, dtype=torch.bool)
    for axis in edit.axes:
        position = 0
        draws: dict[int, list[int]] = {}
        for run in axis.runs:
            if run.kind in ("new", "minus"):
                for i in range(run.length):
                    draws.setdefault(run.start + i, []).append(position + i)
            position += run.length
        lone = [places[0] for places in draws.values() if len(places) == 1]
        free.movedim(axis.dim, 0)[lone] = True
    return free


@settings(max_examples=40, deadline=None)
@given(
    way=st.sampled_from([w for w in WAYS if w not in ("noise", "not paired", "whole groups")]),
    data=st.data(),
)
def test_any_entry_that_is_changed_is_seen(way, data):
    model, grown = grown_by("preactivation", way, torch.float64)
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(grown.model).items()}
    name = data.draw(st.sampled_from([n for n, t in tensors.items() if t.is_floating_point()]))
    tensor = tensors[name]
    flat = data.draw(st.integers(0, tensor.numel() - 1))
    shape = tuple(tensor.shape)
    if name in grown.plan.tensors and free_places(grown.plan, name, shape).reshape(-1)[flat]:
        return
    tensor.view(-1)[flat] += 0.01
    found = misplaced(grown.plan, named_tensors(model), tensors)
    assert found.startswith(f"{name} is not as the plan lays it out")


def changed(change: Callable[[dict[str, Tensor]], object], way: str = "twins") -> str:
    model, grown = grown_by("grouped", way, torch.float64)
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(grown.model).items()}
    change(tensors)
    return misplaced(grown.plan, named_tensors(model), tensors)


def test_a_row_that_no_example_reaches_is_seen():
    assert "old entry [20, 0]" in changed(lambda t: t["table.weight"][20].zero_())


def test_a_fault_is_told_with_its_positions():
    told = changed(lambda t: t["up.weight"][:, -1].mul_(-1))
    assert "new positions 15 along dim 1 should be equal to others" in told
    assert "should be zero" in changed(lambda t: t["norm.running_mean"][-1].fill_(0.5))
    assert "should be one" in changed(lambda t: t["norm.running_var"][-1].fill_(0.5))
    assert "are not finite" in changed(
        lambda t: t["up.weight"].fill_(float("nan")), "not paired")  # fmt: skip
    assert "it is missing" in changed(lambda t: t.pop("up.bias"))
    assert "its shape is (9,)" in changed(lambda t: t.update({"up.bias": torch.zeros(9)}))
    assert "it is torch.float32" in changed(
        lambda t: t.update({"up.weight": t["up.weight"].float()}))  # fmt: skip


def test_new_rows_read_twins_with_opposite_signs():
    model, grown = grown_by("preactivation", "all twins, an odd number", torch.float64)
    (name,) = [n for n in grown.plan.tensors if n == "block.conv2.weight"]
    tensors = {n: t.detach().clone() for n, t in named_tensors(grown.model).items()}
    reader, writer = grown.plan.tensors[name].axes
    minus = next(sum(r.length for r in reader.runs[:i])
                 for i, run in enumerate(reader.runs) if run.kind == "minus")  # fmt: skip
    rows = [i for i, kind in enumerate(k for r in writer.runs for k in [r.kind] * r.length)
            if kind == "new"]  # fmt: skip
    tensors[name][rows, minus] *= -1
    assert "should read twins with opposite signs" in misplaced(
        grown.plan, named_tensors(model), tensors)  # fmt: skip


def test_several_steps_are_read_back():
    model = preactivation()
    inputs = IMAGES.double()
    first = fxgrow.widen(model, "2x", inputs, include="block.conv1", verify=False)
    both = fxgrow.widen(model, "+5", inputs, where="all", after=first.plan, verify=False)
    before, after = named_tensors(model), named_tensors(both.model)
    assert misplaced(both.plan, before, after) == ""
    for name, tensor in after.items():
        if tensor.is_floating_point() and name in both.plan.tensors and name in before:
            spoilt = tensor.detach().clone()
            spoilt.view(-1)[0] += 0.01
            assert misplaced(both.plan, before, {**after, name: spoilt}).startswith(name)


def test_new_blocks_kernels_and_other_architectures_are_read_back():
    model, images = mild(PlainResNet()), IMAGES.double()
    deeper = fxgrow.deepen(model, {"blocks": "+1"}, images, verify=False)
    wider = fxgrow.widen(model, "2x", images, after=deeper.plan, verify=False)
    larger = fxgrow.morph_kernel(model, "5", images, verify=False)
    for grown in (deeper, wider, larger):
        before, after = named_tensors(model), named_tensors(grown.model)
        assert misplaced(grown.plan, before, after) == ""
    name = "blocks.0.conv1.weight"
    after = dict(named_tensors(larger.model))
    after[name] = after[name].detach().clone()
    after[name][0, 0, 0, 0] = 1.0
    assert "along dim 3 should be zero" in misplaced(larger.plan, named_tensors(model), after)


def test_statistics_that_were_given_since_are_free():
    model, grown = grown_by("grouped", "twins", torch.float64)
    after = {name: tensor.detach().clone() for name, tensor in named_tensors(grown.model).items()}
    after["norm.running_mean"][-1] = 0.25
    free = ["norm.running_mean"]
    assert misplaced(grown.plan, named_tensors(model), after)
    assert misplaced(grown.plan, named_tensors(model), after, free=free) == ""
    after["norm.running_mean"].zero_()
    with pytest.raises(fxgrow.VerificationError) as caught:
        check_layout(grown.plan, named_tensors(model), after, free=free)
    assert caught.value.name == "norm.running_mean"


KINDS = ("old", "share", "borrowed", "new", "minus", "zero", "one", "mean")


@st.composite
def edits(draw: st.DrawFn) -> tuple[TensorEdit, tuple[int, int]]:
    """Draw an edit that no planner would make: runs of any kinds, in any order, on both axes."""
    groups = draw(st.sampled_from([1, 1, 2]))
    rows, columns = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3))

    def runs(size: int, kinds: tuple[str, ...], multiple: int) -> tuple[Run, ...]:
        first = [Run("share" if "share" in kinds and draw(st.booleans()) else "old", 0, size)]
        more = []
        for kind in draw(st.lists(st.sampled_from(kinds), max_size=3)):
            start = draw(st.integers(0, size - 1))
            more.append(Run(kind, start, draw(st.integers(1, size - start))))
        found = draw(st.permutations([*first, *more]))
        if any(r.kind == "minus" for r in found) and not any(r.kind == "new" for r in found):
            found.append(Run("new", 0, 1))
        spare = -sum(run.length for run in found) % multiple
        return (*found, Run("zero", 0, spare)) if spare else tuple(found)

    reader = AxisEdit(1, "reader", groups, runs(columns * groups, KINDS, groups))
    writer = AxisEdit(
        0, "writer", 1, runs(rows, tuple(k for k in KINDS if k not in ("share", "minus")), groups)
    )
    width = sum(run.length for run in reader.runs) // groups
    height = sum(run.length for run in writer.runs)
    scale = draw(st.sampled_from([1.0, 0.5, 0.3]))
    edit = TensorEdit((rows, columns), (height, width), scale, (reader, writer))
    return edit, (rows, columns)


@settings(max_examples=120, deadline=None)
@given(edits(), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_edits_of_all_kinds_are_read_back(drawn, dtype, data):
    edit, shape = drawn
    plan = fxgrow.widen(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "+1", verify=False).plan
    plan = replace(plan, tensors={"w": edit}, aliases={}, source={"w": (shape, str(dtype)[6:])})
    before = {"w": torch.randn(shape, dtype=dtype)}
    after = apply_to_state_dict(plan, before)
    assert misplaced(plan, before, after) == ""
    old = next(run for run in edit.axes[1].runs if run.kind == "old")
    row = sum(r.length for r in edit.axes[1].runs[: edit.axes[1].runs.index(old)])
    if edit.axes[0].groups == 1:
        place = sum(r.length for r in edit.axes[0].runs[: next(
            i for i, r in enumerate(edit.axes[0].runs) if r.kind in ("old", "share"))])  # fmt: skip
        after["w"][row, place] += 1.0
        assert misplaced(plan, before, after)


def test_bits_are_compared_and_not_values():
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bits(nan, nan.double())
    for dtype in (torch.bool, torch.int8, torch.bfloat16, torch.complex64, torch.complex128,
                  torch.float8_e5m2):  # fmt: skip
        ones, zeros = torch.ones(3, 2).to(dtype), torch.zeros(3, 2).to(dtype)
        assert same_bits(ones, ones.clone())
        assert same_bits(ones.T, ones.T.clone(memory_format=torch.contiguous_format))
        assert not same_bits(ones, zeros)
