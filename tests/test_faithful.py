"""New weights that float32 does not notice: laws by output, the same on every path."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import lived_in
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from typer.testing import CliRunner

import fxgrow
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.cli.app import app
from fxgrow.errors import PlanError
from fxgrow.plan.deviations import Place, deviation_by_output
from fxgrow.plan.init import INITS, Init, PlacedInit, find_init, init_name

Layer = Callable[[int, int], nn.Module]
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (nn.Linear, (5, 8)),
    "conv1d": (lambda i, o: nn.Conv1d(i, o, 3, padding=1), (2, 8, 6)),
    "conv2d": (lambda i, o: nn.Conv2d(i, o, 3, padding=1), (2, 8, 6, 6)),
    "grouped": (lambda i, o: nn.Conv2d(i, o, 3, padding=1, groups=2), (2, 8, 6, 6)),
    "transposed": (lambda i, o: nn.ConvTranspose2d(i, o, 3, padding=1), (2, 8, 6, 6)),
}


def chain(kind: str, hidden: int = 16, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return two layers of a kind with 8 inputs and 8 outputs, and an activation between them."""
    torch.manual_seed(0)
    layer, _ = LAYERS[kind]
    return nn.Sequential(layer(8, hidden), nn.ReLU(), layer(hidden, 8)).to(dtype)


def rows_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer with its outputs first."""
    weight = layer.weight.detach()
    return weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight


def new_columns(before: nn.Module, after: nn.Module) -> Tensor:
    """Return what each output reads from channels that it did not have, shape (outputs, …)."""
    return rows_of(after)[:, rows_of(before).shape[1] :]


def widened(model: nn.Module, width: str = "2x", kind: str = "", **told: object) -> nn.Module:
    example = torch.zeros(LAYERS[kind][1]) if kind else None
    if example is not None:
        example = example.to(next(model.parameters()).dtype)
    return fxgrow.widen(model, width, example, verify=False, **told).model  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LAYERS)
def test_new_columns_have_the_deviation_of_their_output(kind: str) -> None:
    net = chain(kind, 512)
    with torch.no_grad():
        rows_of(net[2])[3] *= 1e-4
        rows_of(net[2])[6] *= 30
    fresh = new_columns(net[2], widened(net, kind=kind)[2])
    for old, new in zip(rows_of(net[2]), fresh, strict=True):
        assert new.abs().max() <= math.sqrt(3) * old.std() * (1 + 1e-5)
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)
    alike = widened(net, kind=kind, init="copy_uniform")[2]
    assert new_columns(net[2], alike)[3].std() > 1e3 * rows_of(net[2])[3].std()


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "grouped"])
def test_new_rows_follow_the_variance_of_the_whole(kind: str) -> None:
    net = chain(kind, 256)
    with torch.no_grad():
        rows_of(net[0])[::16] *= 1e-4
    fresh = rows_of(widened(net, kind=kind)[0])[256:384]
    assert float(fresh.std()) == pytest.approx(float(rows_of(net[0]).std()), rel=0.05)
    assert fresh.abs().max() <= math.sqrt(3) * rows_of(net[0]).std() * (1 + 1e-5)


def test_a_fused_projection_is_filled_by_its_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 3 * 32))
    with torch.no_grad():
        net[2].weight[:32] *= 1e-4  # q, beside k and v
    fresh = new_columns(net[2], widened(net)[2]).split(32)
    for new, old in zip(fresh, net[2].weight.detach().split(32), strict=True):
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_scaling_an_output_scales_what_is_new_in_it_and_nothing_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*LAYERS]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    hidden = 2 * data.draw(st.integers(2, 9))
    row = data.draw(st.integers(0, 7))
    factor = 2.0 ** data.draw(st.integers(-12, 12))
    pairing = data.draw(st.sampled_from(["vv_z_negz", "replicate", "none"]))
    width = data.draw(st.sampled_from(["2x", "+4"]))
    net = chain(kind, hidden, dtype)
    other = copy.deepcopy(net)
    with torch.no_grad():
        rows_of(other[2])[row] *= factor
    one, two = (widened(n, width, kind, pairing=pairing) for n in (net, other))
    assert torch.equal(rows_of(one[0]), rows_of(two[0]))
    expected = rows_of(one[2]).clone()
    expected[row] *= factor
    assert torch.equal(rows_of(two[2]), expected)


def test_rows_that_tell_nothing_take_the_deviation_of_the_smallest_that_does() -> None:
    place = Place("weight", "reader1", 1, (0,))
    reference = torch.randn(6, 40) * torch.tensor([1.0, 5.0, 0.0, 2.0, 1.0, 1.0])[:, None]
    reference[4] = 0.3  # all alike
    reference[5, 0] = math.nan
    found = deviation_by_output(reference, place)
    assert found is not None
    live = reference[[0, 1, 3]].std(1)
    assert torch.allclose(found[[0, 1, 3], 0], live)
    assert torch.allclose(found[[2, 4, 5], 0], live.min())
    few = deviation_by_output(torch.tensor([[3.0], [-0.5], [0.0]]), place)
    assert few is not None
    assert few.flatten().tolist() == [0.5] * 3
    assert deviation_by_output(torch.zeros(3, 9), place) is None


def test_a_reader_of_zeros_is_filled_as_a_fresh_layer_is() -> None:
    net = chain("linear")
    nn.init.zeros_(net[2].weight)
    fresh = new_columns(net[2], widened(net)[2])
    assert fresh.abs().max() <= math.sqrt(6 / 32)
    assert fresh.std() == pytest.approx(math.sqrt(2 / 32), rel=0.2)


def test_biases_that_are_all_alike_stay_so() -> None:
    net = chain("linear")
    nn.init.zeros_(net[0].bias)
    assert not widened(net)[0].bias.any()
    assert widened(net, init="copy_uniform")[0].bias.any()


@pytest.mark.parametrize("pairing", ["vv_z_negz", "replicate"])
def test_nearly_dead_channels_stay_within_the_rounding_of_the_network(pairing: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, 12, 12)
    net = nn.Sequential(*(BasicBlock(64, 64, norm_layer=precise) for _ in range(2)))
    net = lived_in(net, x).requires_grad_(False)
    exact = copy.deepcopy(net).double()(x.double())
    own = float((net(x) - exact).abs().max())
    ratios = {}
    for init in ("copy_rows", "copy_uniform"):
        grown = fxgrow.widen(net, "2x", x, init=init, pairing=pairing, verify=False)
        ratios[init] = float((grown.model(x) - exact).abs().max()) / own
    assert ratios["copy_rows"] <= 2
    assert ratios["copy_uniform"] > 10


def precise(width: int) -> nn.Module:
    """Return a batch norm whose eps hides nothing of nearly dead channels."""
    return nn.BatchNorm2d(width, eps=1e-9)


def changing(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Write into what is only there to be read."""
    del fan_in
    tensor.zero_()
    if reference is not None:
        reference.mul_(2)


class Changing(PlacedInit):
    """One that changes the old weights before it fills anything."""

    def for_place(self, place: Place, reference: Tensor | None) -> Init:
        if reference is not None and "reader" in place.role:
            reference.data.numpy()[:] = 0
        return INITS["zeros"]


@pytest.mark.parametrize(
    ("init", "name"), [(changing, "changing"), (Changing(), "Changing"),
                       ("test_faithful:changing", "changing")]
)  # fmt: skip
@pytest.mark.parametrize("verify", [True, False])
def test_an_init_that_changes_old_weights_is_refused_and_they_stay(
    init: str | Init, name: str, verify: bool
) -> None:
    net = chain("linear")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PlanError, match=name) as caught:
        fxgrow.widen(net, "2x", init=init, verify=verify)
    assert "clone" in str(caught.value)
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)


def test_an_init_that_changes_old_weights_is_refused_by_the_command_line(tmp_path: Path) -> None:
    net, path = chain("linear"), tmp_path / "net.pt"
    torch.save(net, path)
    before = path.read_bytes()
    arguments = ["widen", str(path), "--width", "2x", "--init", "test_faithful:changing"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "test_faithful:changing" in result.output
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == before


def taking(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
    """Use old weights in place of random numbers, in layouts that only a plain copy has."""
    del fan_in
    if reference is not None:
        assert reference.is_contiguous()
        assert not reference.requires_grad
        tensor.copy_(reference.view(-1)[:1].expand(tensor.numel()).view(tensor.shape))


@pytest.mark.parametrize(
    "init", ["copy_rows", "copy_uniform", "copy_normal", "test_faithful:taking"]
)
@pytest.mark.parametrize("pairing", ["vv_z_negz", "replicate"])
@pytest.mark.parametrize("kind", ["conv2d", "grouped", "transposed"])
def test_every_path_makes_the_same_numbers(init: str, pairing: str, kind: str) -> None:
    net = nn.Sequential(*chain(kind, 32), nn.BatchNorm2d(8))
    x = torch.randn(LAYERS[kind][1])
    grown = fxgrow.widen(net, "1.5x", x, init=init, pairing=pairing, verify=False)
    expected = grown.model.state_dict()
    fill = find_init(init)
    channels_last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    average = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    paths = {
        "state_dict": apply_to_state_dict(grown.plan, net.state_dict(), fill),
        "channels_last": apply_to_state_dict(grown.plan, channels_last.state_dict(), fill),
        "read from JSON": apply_to_state_dict(
            fxgrow.Plan.from_json(grown.plan.to_json()), net.state_dict(), fill
        ),
    }
    for path, found in paths.items():
        assert all(torch.equal(found[name], expected[name]) for name in expected), path
    if pairing == "vv_z_negz" and kind != "grouped":
        followed = apply_to_state_dict(grown.plan, average, fill, net.state_dict())
        assert torch.equal(
            rows_of(grown.model[2])[:, 32:],
            followed["2.weight"].transpose(0, int(kind == "transposed"))[:, 32:],
        )


@pytest.mark.filterwarnings("ignore::fxgrow.FxgrowWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("pairing", ["vv_z_negz", "replicate"])
@pytest.mark.parametrize("rescaling", ["none", "default_vt"])
@pytest.mark.parametrize("kind", ["conv2d", "grouped", "transposed", "mean"])
def test_a_source_on_cuda_gets_the_same_numbers(kind: str, rescaling: str, pairing: str) -> None:
    if kind == "mean":  # in channels that a norm is computed over
        net = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 4))
        example = torch.randn(2, 5)
    else:
        net = nn.Sequential(*chain(kind, 32)).insert(1, nn.BatchNorm2d(32))
        example = torch.randn(LAYERS[kind][1])
    told = {"rescaling": rescaling, "pairing": pairing, "verify": False}
    plan = fxgrow.widen(net, "1.5x", example, **told).plan  # type: ignore[arg-type]
    expected = apply_to_state_dict(plan, net.state_dict())
    found = apply_to_state_dict(plan, copy.deepcopy(net).cuda().state_dict())
    assert {tensor.device.type for tensor in found.values()} == {"cuda"}
    assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


def test_registered_inits_are_recorded_by_their_names() -> None:
    assert {name: init_name(INITS[name]) for name in INITS} == {name: name for name in INITS}
    assert fxgrow.widen(chain("linear"), "2x").plan.request.init == "copy_rows"
