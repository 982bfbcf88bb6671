"""Inits by side and by name, noise, and growth of tensors by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app
from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.init import INITS
from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.rescaling import RESCALINGS


def ones(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    del reference, fan_in
    tensor.fill_(1.0)


def twos(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    del reference, fan_in
    tensor.fill_(2.0)


def pair(hidden: int = 6, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(hidden), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(5, hidden), *between, nn.Linear(hidden, 3)).double()


X = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# ── by side ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given", [(ones, twos), ("test_inits:ones", "test_inits:twos")])
def test_outputs_are_filled_by_one_init_and_inputs_by_the_other(given: tuple[object, ...]) -> None:
    outputs, inputs = given
    grown = fxgrow.widen(pair(), "+4", X, output_init=outputs, input_init=inputs)  # type: ignore[arg-type]
    first, last = grown.model[0], grown.model[2]
    assert first.weight[6:].eq(1).all()
    assert first.bias[6:].eq(1).all()
    assert last.weight[:, 6:8].eq(2).all()
    assert last.weight[:, 8:].eq(-2).all()
    assert grown.report.verification.verdict == "preserved"
    assert grown.plan.request.drawing.inits == ("copy_rows", "test_inits:ones", "test_inits:twos")


@pytest.mark.parametrize("side", ["output_init", "input_init"])
def test_one_side_leaves_the_other_to_init(side: str) -> None:
    plain = fxgrow.widen(pair(), "+4", X, init="kaiming").model
    mixed = fxgrow.widen(pair(), "+4", X, init="kaiming", **{side: "zeros"}).model
    rows = [model[0].weight[6:] for model in (plain, mixed)]
    columns = [model[2].weight[:, 6:] for model in (plain, mixed)]
    zero, kept = (rows, columns) if side == "output_init" else (columns, rows)
    assert zero[1].eq(0).all()
    assert zero[0].ne(0).all()
    assert torch.equal(*kept)


def test_a_plan_keeps_both_and_an_older_one_has_neither() -> None:
    grown = fxgrow.widen(pair(), "+4", X, output_init="zeros", input_init="lecun")
    plan = fxgrow.Plan.from_json(grown.plan.to_json())
    assert plan == grown.plan
    again = plan.apply(pair()).state_dict()
    assert all(torch.equal(again[name], t) for name, t in grown.model.state_dict().items())
    told = grown.plan.to_dict()
    del told["request"]["output_init"], told["request"]["input_init"]
    older = fxgrow.Plan.from_dict(told)
    assert older.request.drawing.inits == ("copy_rows", None, None)
    plain = fxgrow.widen(pair(), "+4", X).model.state_dict()
    assert all(torch.equal(t, plain[name]) for name, t in older.apply(pair()).state_dict().items())
    told["request"]["input_init"] = "no name"
    with pytest.raises(PlanError, match="input_init"):
        fxgrow.Plan.from_dict(told)


def test_code_of_a_plans_sides_is_not_run_unasked() -> None:
    grown = fxgrow.widen(pair(), "+4", X, input_init="test_inits:twos")
    with pytest.raises(PlanError, match="not run unasked"):
        grown.plan.apply(pair())
    second = fxgrow.widen(pair(), "+2", X, after=grown.plan, input_init="test_inits:twos")
    assert second.model[2].weight[:, 6:].abs().eq(2).all()
    third = fxgrow.widen(pair(), "+2", X, after=grown.plan, input_init=twos)
    assert torch.equal(third.model[2].weight, second.model[2].weight)


def test_an_init_of_data_takes_no_sides() -> None:
    tiny = fxgrow.Tiny(nn.functional.mse_loss, [(X, torch.zeros(7, 3).double())])
    for given in ({"init": tiny, "output_init": "zeros"}, {"input_init": tiny}):
        with pytest.raises(UsageError, match="rows and new columns together"):
            fxgrow.widen(pair(), "+1", X, **given)


def test_the_command_line_takes_both_sides(tmp_path: Path) -> None:
    torch.save(pair().float(), tmp_path / "net.pt")
    plan, out = tmp_path / "plan.json", tmp_path / "out.pt"
    options = ["--output-init", "test_inits:ones", "--input-init", "zeros"]
    source = str(tmp_path / "net.pt")
    arguments = ["widen", source, "--width", "+4", *options, "--plan", str(plan), "-o", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    weights = fxgrow.load(out)
    assert weights[0].weight[6:].eq(1).all()
    assert weights[2].weight[:, 6:].eq(0).all()
    assert json.loads(plan.read_text())["request"]["input_init"] == "zeros"
    apply = ["apply", str(plan), source, "-o", str(out), "--force"]
    refused = CliRunner().invoke(app, apply)
    assert refused.exit_code == 1
    assert CliRunner().invoke(app, [*apply, *options[:2]]).exit_code == 0
    assert torch.equal(fxgrow.load(out)[0].weight, weights[0].weight)


class Normed(nn.Module):
    """A residual block with batch norms, whose statistics are those of data, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.first, self.second = (
            nn.Conv2d(i, o, 3) for i, o in ((3, 4), (4, 6), (6, 4))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (4, 6, 4))
        self.head = nn.Linear(4, 2)
        self.double()
        for _ in range(3):
            self(IMAGES)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norms[0](self.stem(x)))
        y = nn.functional.gelu(self.norms[1](self.first(x)))
        y = x[..., 2:-2, 2:-2] + self.norms[2](self.second(y))
        return self.head(y.mean((2, 3)))


IMAGES = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
NAMES = [*INITS]


@pytest.mark.parametrize("rescaling", RESCALINGS)
@pytest.mark.parametrize("pairing", [name for name in PAIRINGS if name not in ("none", "zero_z")])
@pytest.mark.parametrize("place", range(len(NAMES)))
def test_every_combination_preserves(pairing: str, rescaling: str, place: int) -> None:
    """Each init on each side; where a norm takes a factor up, in train mode up to eps."""
    hidden, options = ["first"], {"rescaling": rescaling, "pairing": pairing}
    grown = fxgrow.widen(
        Normed(), "+5", IMAGES, include=hidden, seed=place,
        output_init=NAMES[place], input_init=NAMES[place - 1], **options,
    )  # fmt: skip
    verification = grown.report.verification
    assert (grown.plan.preserves, verification.verdict) == ("exact", "preserved")
    assert verification.eval.float64.max_rel <= 1e-10
    assert verification.train.residual.max_rel <= 1e-10
    assert rescaling != "none" or verification.train.float64.max_rel <= 1e-10
    assert verification.drawn.residual.max_rel <= 1e-10


def test_copied_pairs_are_copies_behind_the_norm_too() -> None:
    """In both modes: the norm has the old channels' statistics, which batches agree with."""
    model = Normed()
    grown = fxgrow.widen(model, "2x", IMAGES, pairing="copy_pair", where="all")
    assert grown.report.verification.verdict == "preserved"
    assert grown.report.verification.without_gradient == ()
    for name in ("norms.0", "norms.1"):
        old, new = model.get_submodule(name), grown.model.get_submodule(name)
        twins = [*range(old.num_features)] + 2 * [*range(old.num_features // 2)]
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(new, part), getattr(old, part)[twins])
    hidden = {}
    for mode in (True, False):
        wide = grown.model.train(mode)
        wide.norms[1].register_forward_hook(lambda m, i, o: hidden.update(y=o))
        wide(IMAGES)
        torch.testing.assert_close(hidden["y"][:, 6:9], hidden["y"][:, :3], rtol=1e-12, atol=1e-14)
        assert torch.equal(hidden["y"][:, 6:9], hidden["y"][:, 9:])


# ── by name ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def named() -> Iterator[None]:
    fxgrow.register_init("ones", ones)
    yield
    del INITS._entries["ones"]


@pytest.mark.usefixtures("named")
def test_a_registered_init_is_known_by_its_name_in_plans_too() -> None:
    assert fxgrow.inits["ones"] is ones
    grown = fxgrow.widen(pair(), "+4", X, output_init="ones")
    assert fxgrow.Plan.from_json(grown.plan.to_json()).apply(pair())[0].weight[6:].eq(1).all()
    assert fxgrow.widen(pair(), "+4", X, output_init=ones).plan == grown.plan
    with pytest.raises(UsageError, match="already"):
        fxgrow.register_init("ones", twos)
    with pytest.raises(TypeError):
        fxgrow.inits["mine"] = ones  # type: ignore[index]


@pytest.mark.parametrize(("name", "init"), [("a b", ones), ("", ones), (3, ones), ("mine", 3)])
def test_what_is_no_init_is_not_registered(name: object, init: object) -> None:
    with pytest.raises(UsageError):
        fxgrow.register_init(name, init)  # type: ignore[arg-type]
    assert name not in fxgrow.inits


@pytest.mark.parametrize(("name", "variance"), [("lecun", 1), ("lecun_normal", 1), ("kaiming", 2)])
def test_variances_over_the_new_fan_in(name: str, variance: int) -> None:
    grown = fxgrow.widen(pair(256), "2x", X, init=name, verify=False).model
    drawn = grown[2].weight[:, 256:512]
    rows = grown[0].weight[256:512]
    assert drawn.var().item() == pytest.approx(variance / 512, rel=0.15)
    assert rows.var().item() == pytest.approx(variance / 5, rel=0.15)
    bounded = drawn.abs().max() <= (3 * variance / 512) ** 0.5
    assert bool(bounded) == (name != "lecun_normal")


# ── noise ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("init", ["copy_uniform", "lecun"])
def test_noise_is_relative_to_the_new_columns_themselves(init: str) -> None:
    model = pair(256)
    with torch.no_grad():
        model[2].weight.mul_(50)
    quiet, loud = (
        fxgrow.widen(model, "2x", X, input_init=init, noise=noise, verify=False).model[2].weight
        for noise in (0.0, 0.25)
    )
    gap = loud - quiet
    assert gap[:, :256].eq(0).all()
    assert gap[:, 256:].std().item() == pytest.approx(0.25 * quiet[:, 256:].std().item(), rel=0.1)
    assert not torch.allclose(gap[:, 256:384], -gap[:, 384:])


def test_columns_of_zeros_get_no_noise() -> None:
    grown = fxgrow.widen(pair(), "2x", X, pairing="v_zero", noise=0.5)
    assert grown.model[2].weight[:, 6:].eq(0).all()


# ── pairs of tensors ──────────────────────────────────────────────────────────────────────────


def trained(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.2, 1.0, generator=generator)
        norm.running_var[0] = 1e-7  # of which less than eps is left under a small factor
    return norm.eval()


def function(writer: Tensor, bias: Tensor, norm: fxgrow.NormTensors, reader: Tensor) -> Tensor:
    hidden = nn.functional.batch_norm(
        nn.functional.linear(X, writer, bias), norm.running_mean, norm.running_var,
        norm.weight, norm.bias, eps=norm.eps,
    )  # fmt: skip
    return nn.functional.silu(hidden) @ reader.T


DRAWING = [name for name in PAIRINGS if "replicate" not in name]


@pytest.mark.parametrize("rescaling", ["none", "vt_constraint_new_shape", "default_vt"])
@pytest.mark.parametrize("pairing", DRAWING)
def test_tensors_with_bias_and_norm_are_rescaled_and_paired(pairing: str, rescaling: str) -> None:
    """A batch norm takes the writer's factor up, exactly; what is drawn cancels in the reader."""
    model = pair(norm=True)
    writer, reader, old_bias = model[0].weight, model[3].weight, model[0].bias
    norm = fxgrow.NormTensors.of(trained(model[1]))
    before = function(writer, old_bias, norm, reader)
    scaled = fxgrow.apply_rescaling(writer, rescaling, new_fan_in=40, bias=old_bias, norm=norm)
    if rescaling == "default_vt":
        factor = (5 / 40) ** 0.5
        torch.testing.assert_close(scaled.bias, factor * old_bias, rtol=1e-12, atol=0)
        assert scaled.norm.running_var[0] == 0
        assert scaled.norm.weight[0] != norm.weight[0]
    torch.testing.assert_close(
        function(scaled.weight, scaled.bias, scaled.norm, reader), before, rtol=1e-10, atol=1e-12
    )
    rows, row_bias, columns = (torch.randn(*shape).double() for shape in ((4, 5), (4,), (3, 4)))
    drawn, bias = (None, None) if pairing == "copy_pair" else (rows, row_bias)
    grown = fxgrow.apply_pairing(
        scaled.weight, reader, drawn, columns, pairing, bias=scaled.bias, new_bias=bias,
        norm=scaled.norm,
    )  # fmt: skip
    after = function(grown.writer, grown.bias, grown.norm, grown.reader)
    assert (max_rel(before, after) <= 1e-10) == (pairing != "none")
    new = slice(6, None)
    if pairing == "vv_z_negz":
        assert torch.equal(grown.bias[new], torch.cat([row_bias, row_bias]))
    if pairing == "copy_pair":
        twins = [0, 1, 2, 3, 0, 1, 2, 3]
        assert torch.equal(grown.writer[new], scaled.weight[twins])
        assert torch.equal(grown.bias[new], scaled.bias[twins])
        assert torch.equal(grown.norm.running_var[new], scaled.norm.running_var[twins])
    else:
        fresh = [getattr(grown.norm, name)[new].unique().tolist() for name in
                 ("weight", "bias", "running_mean", "running_var")]  # fmt: skip
        assert fresh == [[1.0], [0.0], [0.0], [1.0]]


def test_noise_on_tensors_is_relative_to_the_new_columns() -> None:
    writer, reader = torch.zeros(5, 4), torch.zeros(300, 5)
    rows, columns = torch.randn(50, 4), 3 * torch.randn(300, 50)
    generator = torch.Generator().manual_seed(0)
    _, loud = fxgrow.apply_pairing(
        writer, reader, rows, columns, "vv_z_negz", noise=0.1, generator=generator
    )
    gap = loud[:, 5:] - torch.cat([columns, -columns], 1)
    assert gap.std().item() == pytest.approx(0.1 * columns.std().item(), rel=0.05)
    assert loud[:, :5].eq(0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.zeros(6)}, "bias has shape"),
        ({"bias": torch.zeros(5), "new_bias": torch.zeros(3)}, "new_bias has shape"),
        ({"new_bias": torch.zeros(2)}, "no bias"),
        ({"norm": fxgrow.NormTensors(weight=torch.ones(4))}, "norm's weight has shape"),
        ({"norm": fxgrow.NormTensors(running_mean=torch.ones(5))}, "or neither"),
        ({"new_rows": None}, "needs new rows"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    given = {"new_rows": torch.zeros(2, 4), "new_columns": torch.zeros(3, 2)} | changes
    with pytest.raises(PlanError, match=message):
        fxgrow.apply_pairing(torch.zeros(5, 4), torch.zeros(3, 5), pairing="vv_z_negz", **given)  # type: ignore[call-overload]


def test_a_norm_without_weight_refuses_what_it_cannot_take_up() -> None:
    norm = fxgrow.NormTensors(running_mean=torch.zeros(2), running_var=torch.tensor([0.0, 1.0]))
    with pytest.raises(PlanError, match="no weight"):
        fxgrow.apply_rescaling(torch.ones(2, 4), "default_vt", new_fan_in=16, norm=norm)
