"""Formulas that no output shows: other numbers would leave the function alone.

Twins of zero rows may be read with any signs, a norm takes up any factor, an η may be inverted and
compensated, and new weights that cancel may be of any size. Each number is computed here anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from growth_mutations import Absorbing, Stream
from torch import Tensor, nn

import fxgrow

Make = Callable[[int], list[nn.Module]]


def linear(hidden: int) -> list[nn.Module]:
    return [nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 7)]  # fmt: skip


def convolutions(hidden: int) -> list[nn.Module]:
    return [nn.Conv2d(5, hidden, 3), nn.ReLU(), nn.Conv2d(hidden, hidden, (1, 3)), nn.ReLU(),
            nn.Conv2d(hidden, 7, 1)]  # fmt: skip


def grouped(hidden: int) -> list[nn.Module]:
    return [nn.Conv1d(5, hidden, 3), nn.ReLU(), nn.Conv1d(hidden, hidden, 3, groups=2), nn.ReLU(),
            nn.Conv1d(hidden, 7, 2)]  # fmt: skip


def transposed(hidden: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(5, hidden, 3), nn.ReLU(),
            nn.ConvTranspose2d(hidden, hidden, (1, 2)), nn.ReLU(),
            nn.ConvTranspose2d(hidden, 7, 2)]  # fmt: skip


SHAPES: dict[Make, tuple[int, ...]] = {
    linear: (3, 5), convolutions: (3, 5, 6, 7), grouped: (3, 5, 9), transposed: (3, 5, 4, 4),
}  # fmt: skip
LAYERS = (0, 2, 4)
# In how many parts the rows and the columns of each layer lie, each with its new ones at its end.
PARTS = {grouped: ((2, 1), (2, 1), (1, 2))}


def chain(make: Make, hidden: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*make(hidden)).double()


def widened(make: Make, width: str, **options: object) -> tuple[nn.Sequential, nn.Module]:
    """Return a chain of three layers, and the same grown."""
    model = chain(make)
    x = torch.randn(SHAPES[make], dtype=torch.float64)
    return model, fxgrow.widen(model, width, x, verify=False, **options).model  # type: ignore[arg-type]


def rows_first(layer: nn.Module) -> Tensor:
    """Return a weight as (outputs, inputs of a group, kernel), without gradient."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment, union-attr]
    weight = weight.transpose(0, 1) if getattr(layer, "transposed", False) else weight
    return weight.reshape(*weight.shape[:2], -1)


def parts(make: Make, before: nn.Module, after: nn.Module, place: int) -> tuple[Tensor, Tensor]:
    """Return the weights of a layer, old and new ones in order.

    Returns:
        The old weight, and the new one with its old rows and columns first; both are (outputs,
        inputs of a group, kernel).
    """
    old, new = (rows_first(model.get_submodule(str(place))) for model in (before, after))
    counts = PARTS.get(make, ((1, 1),) * 3)[place // 2]
    for dim, count in enumerate(counts):
        inside = new.unflatten(dim, (count, -1))
        width = old.shape[dim] // count
        kept, added = inside.tensor_split([width], dim + 1)
        new = torch.cat([kept.flatten(dim, dim + 1), added.flatten(dim, dim + 1)], dim)
    return old, new


# ── twins ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", SHAPES)
def test_twins_are_written_by_one_row_and_read_by_z_and_minus_z(make: Make) -> None:
    before, after = widened(make, "2x")
    for place in LAYERS:
        old, new = parts(make, before, after, place)
        (height, width), size = old.shape[:2], 0.1 * old.square().mean()
        new_rows, new_columns = new[height:], new[:height, width:]
        if len(new_rows):
            assert is_twice(new_rows, sign=1)
            assert new_rows.square().mean() > size
        if new_columns.numel():
            assert is_twice(new_columns.transpose(0, 1), sign=-1)
            assert new_columns.square().mean() > size


@pytest.mark.parametrize("make", SHAPES)
def test_rows_of_copied_pairs_are_old_rows_and_columns_are_drawn(make: Make) -> None:
    """As the whole row is, with what it reads of new channels; the old weights stay."""
    before, after = widened(make, "2x", pairing="copy_pair")
    for place in LAYERS:
        old, new = parts(make, before, after, place)
        height, width = old.shape[:2]
        assert torch.equal(new[:height, :width], old)
        half = height // 2
        if len(new) > height and make is not grouped:  # where a group has its own round
            assert torch.equal(new[height:], new[[*range(half)] * 2])
            bias, whole = (m.get_submodule(str(place)).bias for m in (before, after))
            assert torch.equal(whole, bias[[*range(height), *range(half), *range(half)]])
        if new.shape[1] > width:
            columns = new[:height, width:].transpose(0, 1)
            assert is_twice(columns, sign=-1)
            assert not (columns[:, None] == old.transpose(0, 1)[None]).flatten(2).all(2).any()


def is_twice(slices: Tensor, sign: int) -> bool:
    """Return whether each slice has one other that is it, times a sign, and is no zero."""
    others = (slices[:, None] == sign * slices).flatten(2).all(2)
    alone = ~torch.eye(len(slices), dtype=torch.bool)
    return bool(((others & alone).sum(1) == 1).all()) and bool(slices.flatten(1).any(1).all())


# ── rescaling ─────────────────────────────────────────────────────────────────────────────────


def table(rescaling: str, fan_in: int, new_fan_in: int, variance: float, gain: float) -> float:
    return {
        "none": 1.0,
        "default_vt": math.sqrt(fan_in / new_fan_in),
        "vt_constraint_old_shape": gain / math.sqrt(fan_in * variance),
        "vt_constraint_new_shape": gain / math.sqrt(new_fan_in * variance),
    }[rescaling]


@pytest.mark.parametrize(
    ("rescaling", "gain"),
    [
        ("none", 1.0), ("default_vt", 1.0), ("vt_constraint_old_shape", 1.0),
        ("vt_constraint_old_shape", 2.5), ("vt_constraint_new_shape", 1.0),
        ("vt_constraint_new_shape", 2.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", SHAPES)
def test_factors_of_all_kinds_of_layers_follow_the_table(
    make: Make, rescaling: str, gain: float
) -> None:
    """Of a layer that reads one group and writes the next, once."""
    before, after = widened(make, "1.5x", rescaling=rescaling, gain=gain)
    for place in LAYERS:
        old, new = parts(make, before, after, place)
        fan_in, new_fan_in = (weight[0].numel() for weight in (old, new))
        factor = table(rescaling, fan_in, new_fan_in, old.var().item(), gain)
        kept = new[: old.shape[0], : old.shape[1]]
        torch.testing.assert_close(kept, old * factor, rtol=1e-12, atol=0)


# ── norms ─────────────────────────────────────────────────────────────────────────────────────


def absorbing() -> nn.Module:
    torch.manual_seed(0)
    model = Absorbing().double()
    for vector in (model.norm.weight, model.norm.bias, model.norm.running_mean):
        nn.init.uniform_(vector, -1.0, 1.0)
    model.norm.running_var.copy_(torch.tensor([0.0, 1e-6, 0.3, 1.0, 40.0]))
    return model


def test_statistics_take_up_a_gain_exactly() -> None:
    """running_var' = s²·(running_var + eps) − eps, and what would be negative goes on a weight."""
    model = absorbing()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    grown = fxgrow.widen(model, "2x", x, rescaling="default_vt", include=["conv1"]).model
    old, new, eps, s = model.norm, grown.norm, model.norm.eps, math.sqrt(0.5)
    exact = s**2 * (old.running_var + eps) - eps
    assert (exact < 0).tolist() == [True, True, False, False, False]
    torch.testing.assert_close(new.running_var, exact.clamp(min=0), rtol=1e-12, atol=1e-18)
    torch.testing.assert_close(new.running_mean, s * old.running_mean, rtol=1e-12, atol=0)
    weight = old.weight * math.sqrt(eps) / (s * (old.running_var + eps).sqrt())
    want = torch.where(exact < 0, weight, old.weight)
    torch.testing.assert_close(new.weight, want, rtol=1e-12, atol=0)
    assert torch.equal(new.bias, old.bias)
    assert new.eps == eps


@pytest.mark.parametrize(("width", "copies"), [("12", 1), ("11", 1), ("20", 2)])
def test_writers_take_one_over_eta_and_norms_eta(width: str, copies: int) -> None:
    """η² = k·D/T, so that eps stays what it was: a stock architecture takes the weights."""
    torch.manual_seed(0)
    model = Stream().double()
    grown = fxgrow.widen(model, width, torch.randn(4, 5).double(), where="stream").model
    eta = math.sqrt(copies * 8 / int(width))
    for name in ("stem", "down"):
        old, new = model.get_submodule(name), grown.get_submodule(name)
        for part in ("weight", "bias"):
            want = getattr(old, part) / eta
            torch.testing.assert_close(getattr(new, part)[:8], want, rtol=1e-12, atol=0)
    for name in ("norm", "last"):
        old, new = model.get_submodule(name), grown.get_submodule(name)
        torch.testing.assert_close(new.weight[:8], old.weight * eta, rtol=1e-12, atol=0)
        assert new.eps == old.eps


@pytest.mark.filterwarnings("ignore:.* becomes")
def test_where_writers_are_rescaled_the_eps_takes_eta() -> None:
    """eps' = η²·eps, times the square of the gain that the norm takes up besides."""
    torch.manual_seed(0)
    model = Stream().double()
    grown = fxgrow.widen(
        model, "12", torch.randn(4, 5).double(), where="stream", rescaling="default_vt"
    ).model
    torch.testing.assert_close(grown.stem.weight[:8], model.stem.weight, rtol=0, atol=0)
    eta = math.sqrt(8 / 12)
    assert grown.norm.eps == pytest.approx(eta**2 * model.norm.eps, rel=1e-12)
    torch.testing.assert_close(grown.norm.weight[:8], eta * model.norm.weight, rtol=1e-12, atol=0)


# ── new weights ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", SHAPES)
def test_new_rows_have_the_deviation_of_the_old_ones(make: Make) -> None:
    """U(±√3·σ) has the standard deviation σ, and that of the rescaled weights is meant."""
    model = chain(make, 64)
    x = torch.randn(SHAPES[make], dtype=torch.float64)
    options = {"init": "copy_uniform", "rescaling": "vt_constraint_old_shape"}
    grown = fxgrow.widen(model, "4x", x, verify=False, **options).model
    before, new = parts(make, model, grown, 0)
    old, drawn = new[: len(before)], new[len(before) :]
    bound = math.sqrt(3) * old.std()
    assert drawn.square().mean().sqrt().item() == pytest.approx(old.std().item(), rel=0.06)
    assert 0.97 * bound < drawn.abs().max() <= bound * (1 + 1e-12)


@pytest.mark.parametrize("make", SHAPES)
def test_kaiming_rows_have_the_variance_of_their_new_fan_in(make: Make) -> None:
    model = chain(make, 64)
    x = torch.randn(SHAPES[make], dtype=torch.float64)
    grown = fxgrow.widen(model, "4x", x, init="kaiming", verify=False).model
    old, new = parts(make, model, grown, 4)
    drawn = new[:, old.shape[1] :]
    bound = math.sqrt(6 / new[0].numel())
    assert drawn.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.1)
    assert 0.97 * bound < drawn.abs().max() <= bound * (1 + 1e-12)


# ── attributes ────────────────────────────────────────────────────────────────────────────────


BETWEEN: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda n: nn.Linear(n, n), (2,)),
    "BatchNorm1d": (lambda n: nn.BatchNorm1d(n), (2,)),
    "LayerNorm": (lambda n: nn.LayerNorm(n), (2,)),
    "RMSNorm": (lambda n: nn.RMSNorm(n), (2,)),
    "PReLU": (lambda n: nn.PReLU(n), (2,)),
    "Conv1d": (lambda n: nn.Conv1d(n, n, 3, padding=1), (2, 6)),
    "Conv2d, depthwise": (lambda n: nn.Conv2d(n, n, 3, padding=1, groups=n), (2, 6, 6)),
    "Conv3d": (lambda n: nn.Conv3d(n, n, 1), (2, 3, 3, 3)),
    "ConvTranspose2d": (lambda n: nn.ConvTranspose2d(n, n, 3), (2, 5, 5)),
    "InstanceNorm2d": (lambda n: nn.InstanceNorm2d(n, affine=True), (2, 6, 6)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_layers_tell_their_new_sizes(name: str) -> None:
    """As a layer that is built with these sizes does."""
    make, (batch, *space) = BETWEEN[name]
    kernel = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(space)]
    ends = (lambda i, o: kernel(i, o)) if not space else (lambda i, o: kernel(i, o, 1))
    model = nn.Sequential(ends(3, 8), make(8), ends(8, 2))
    grown = fxgrow.widen(model, "2x", torch.randn(batch, 3, *space), verify=False).model
    want = nn.Sequential(ends(3, 16), make(16), ends(16, 2))
    assert repr(grown) == repr(want)


class ByTable(nn.Module):
    """A stream times the root of the table's own width, with readers before and behind no norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.h = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.l = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.l(self.e(x) * self.e.embedding_dim**0.5))


def test_a_number_of_the_tables_own_width_is_taken_up_beside_eta() -> None:
    grown = fxgrow.widen(ByTable().eval(), "1.5x", torch.randint(0, 11, (2, 5)), where="all")
    assert grown.model.e.embedding_dim == 12
    assert grown.report.verification.verdict == "preserved"


def test_what_keeps_heads_from_growing_is_told_of_what_comes_in() -> None:
    grown = fxgrow.widen(ByTable().eval(), "+2", torch.randint(0, 11, (2, 5)), where="all")
    (reason,) = (r["reason"] for r in grown.report.to_dict()["refused"] if r["name"] == "e")
    assert "is no whole number of channels" in reason
