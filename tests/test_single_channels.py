"""Layers of no channel and of one grow as any other, and what is broadcast stays."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.channels.scope import follow
from fxgrow.errors import FxgrowWarning, PlanError, TraceError
from fxgrow.grow.sizes.narrow import at_other_widths
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.rescaling import LayerStatistics, rescaling_factor

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """Layers by name and what is done with them."""

    def __init__(self, forward: Callable[[Calls, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def in_double(model: nn.Module) -> nn.Module:
    """Return a network in float64 and eval mode, with statistics as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    return model.double().eval()


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Return linear layers with an activation between."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return in_double(nn.Sequential(*layers[:-1]))


def bottleneck(width: int) -> nn.Module:
    return Calls(
        lambda m, x: m.out(F.relu(m.stem(x) + m.b(F.relu(m.norm(m.a(m.stem(x))))))),  # type: ignore[operator]
        stem=nn.Conv2d(3, 6, 3, padding=1), a=nn.Conv2d(6, width, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(width), b=nn.Conv2d(width, 6, 3, padding=1), out=nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def squeeze(width: int) -> nn.Module:
    return Calls(
        lambda m, x: m.out(m.a(x) * torch.sigmoid(m.up(F.relu(m.down(m.a(x).mean((2, 3), True)))))),  # type: ignore[operator]
        a=nn.Conv2d(3, 6, 3), down=nn.Conv2d(6, width, 1), up=nn.Conv2d(width, 6, 1),
        out=nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def concatenated(width: int) -> nn.Module:
    return Calls(
        lambda m, x: m.out(F.relu(torch.cat([m.a(x), m.b(x), m.c(x)], 1))),  # type: ignore[operator]
        a=nn.Conv2d(3, width, 3), b=nn.Conv2d(3, 7, 3), c=nn.Conv2d(3, width, 3),
        out=nn.Conv2d(7 + 2 * width, 2, 1),
    )  # fmt: skip


def convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1),
    )  # fmt: skip


def head_of_values(width: int) -> nn.Module:
    """A convolution to one plane and linear layers after it, as in networks that play games."""
    return nn.Sequential(
        nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * width, 5), nn.ReLU(), nn.Linear(5, 1),
    )  # fmt: skip


def transposed(width: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, width, 3), nn.PReLU(), nn.ConvTranspose2d(width, 2, 3, bias=False)
    )


NETWORKS = {
    "mlp": (lambda h: mlp(8, h, 4), (5, 8)),
    "tokens": (lambda h: mlp(8, h, 4, activation=nn.GELU), (2, 5, 8)),
    "convolutions": (convolutions, (2, 3, 8, 8)),
    "flattened": (head_of_values, (2, 3, 8, 8)),
    "transposed": (transposed, (2, 3, 8, 8)),
    "bottleneck": (bottleneck, (2, 3, 8, 8)),
    "squeeze": (squeeze, (2, 3, 8, 8)),
    "concatenated": (concatenated, (2, 3, 8, 8)),
}


def widths_of(grown: fxgrow.Grown) -> dict[str, tuple[int, int]]:
    return {group.name: group.width for group in grown.plan.groups}


def same(model: nn.Module, grown: fxgrow.Grown, x: Tensor) -> bool:
    """Return whether a network computes what it did, in float64."""
    before, after = model.eval()(x), grown.model.eval()(x)
    return bool((before - after).abs().max() <= 1e-10 * before.abs().max().clamp(min=1))


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_channel_grows_as_two_do(name: str, pairing: str) -> None:
    make, shape = NETWORKS[name]
    plans = []
    for width in (1, 2):
        torch.manual_seed(0)
        model, x = in_double(make(width)), data(*shape)
        grown = fxgrow.widen(model, "7", x, pairing=pairing, verify="quick")
        assert same(model, grown, x)
        plans.append(grown.plan)
    groups = [[(g.name, g.width[1], g.writers, g.readers) for g in p.groups] for p in plans]
    assert groups[0] == groups[1]
    assert plans[0].tensors.keys() == plans[1].tensors.keys()


@pytest.mark.parametrize(("width", "wanted"), [("2x", 2), ("3x", 3), ("+2", 3), ("2", 2)])
def test_one_channel_has_the_width_that_is_asked_for(width: str, wanted: int) -> None:
    model = mlp(8, 1, 4)
    grown = fxgrow.widen(model, width, data(3, 8))
    assert grown.model[0].weight.shape == (wanted, 8)  # type: ignore[index]
    assert torch.equal(grown.model[0].weight[:1], model[0].weight)  # type: ignore[index]
    assert torch.equal(grown.model[2].weight[:, :1], model[2].weight)  # type: ignore[index]


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate", "replicate_random"])
def test_an_empty_layer_grows(pairing: str) -> None:
    model, x = mlp(8, 0, 4), data(6, 8)
    grown = fxgrow.widen(model, "8", x, pairing=pairing)
    assert widths_of(grown) == {"0": (0, 8)}
    assert grown.report.verification.verdict == "preserved"
    assert same(model, grown, x)
    columns = grown.model[2].weight  # type: ignore[index]
    assert bool(columns.any()) == (pairing == "vv_z_negz")  # what cannot be copied is read by zeros


@pytest.mark.parametrize("init", ["copy_rows", "copy_uniform", "copy_normal"])
def test_an_init_that_finds_nothing_to_refer_to_is_kaiming(init: str) -> None:
    grown = fxgrow.widen(mlp(50, 0, 40), "400", data(2, 50), init=init).model
    for layer, fan_in in ((grown[0], 50), (grown[2], 400)):  # type: ignore[index]
        assert math.isclose(layer.weight.var().item() * fan_in, 2.0, rel_tol=0.1)


def test_rescaling_leaves_alone_what_reads_nothing_yet() -> None:
    for rescaling in ("default_vt", "vt_constraint_old_shape", "vt_constraint_new_shape"):
        factor, warning = rescaling_factor(rescaling, LayerStatistics(0, 8, math.nan, 1.0))
        assert factor == 1.0
        assert "nothing to rescale" in warning
    assert rescaling_factor("none", LayerStatistics(0, 8, math.nan, 1.0)) == (1.0, "")
    model = mlp(8, 0, 4)
    with pytest.warns(FxgrowWarning, match="2: it has read no channel"):
        grown = fxgrow.widen(model, "8", data(6, 8), rescaling="default_vt")
    assert grown.plan.preserves == "exact"


def test_a_ratio_of_no_channel_is_none() -> None:
    with pytest.raises(PlanError, match=r"'2x' of no channel is none.*\+8"):
        fxgrow.widen(mlp(8, 0, 4), "2x", data(3, 8))
    model = nn.ModuleDict({"a": mlp(8, 0, 4), "b": mlp(8, 3, 4)})
    both = in_double(Calls(lambda m, x: m.n["a"](x) + m.n["b"](x), n=model))  # type: ignore[index, operator]
    grown = fxgrow.widen(both, "2x", data(3, 8))
    assert widths_of(grown) == {"n.b.0": (3, 6)}
    assert [refusal.name for refusal in grown.plan.refused] == ["n.a.0"]


def test_one_channel_does_not_become_one() -> None:
    with pytest.raises(PlanError, match="has one channel already; ask for more"):
        fxgrow.widen(mlp(8, 1, 4), "1", data(3, 8))


def groups_of(model: nn.Module, *shape: int) -> dict[str, tuple[int, str, str]]:
    found = fxgrow.inspect(in_double(model), data(*shape)).to_dict()["groups"]
    return {g["name"]: (g["width"], g["kind"], g["reason"]) for g in found}


def test_inspection_lists_what_grows() -> None:
    assert groups_of(mlp(8, 0, 4, 1, 3), 3, 8) == {
        "0": (0, "hidden", ""), "2": (4, "hidden", ""), "4": (1, "hidden", ""),
        "6": (3, "pinned", "an output of the network"),
    }  # fmt: skip
    inspection = fxgrow.inspect(mlp(8, 1, 4), data(3, 8))
    assert "0 rows: hidden group 0, width 1" in str(inspection.why("0"))
    assert "2 columns" in str(inspection.why("0"))


def test_a_stream_of_one_channel_is_one_group() -> None:
    model = Calls(
        lambda m, x: m.out(m.a(x) + m.c(F.relu(m.b(m.a(x))))),  # type: ignore[operator]
        a=nn.Linear(8, 1), b=nn.Linear(1, 5), c=nn.Linear(5, 1), out=nn.Linear(1, 3),
    )  # fmt: skip
    assert groups_of(model, 4, 8)["a"] == (1, "stream", "")
    grown = fxgrow.widen(model, "4", data(4, 8), where="stream")
    assert widths_of(grown) == {"a": (1, 4)}
    assert next(g for g in grown.plan.groups).writers == ("a", "c")
    assert same(model, grown, data(9, 8))


BROADCAST = {
    "a gate in space": (
        lambda m, x: m.out(m.a(x) * torch.sigmoid(m.g(m.a(x)))),
        {"a": nn.Conv2d(3, 6, 3), "g": nn.Conv2d(6, 1, 1), "out": nn.Conv2d(6, 2, 1)},
        (2, 3, 8, 8), "a width of one is broadcast",
    ),
    "a map of attention": (
        lambda m, x: m.out((m.a(x) * torch.softmax(m.g(m.a(x)), 1)).sum(1)),
        {"a": nn.Linear(8, 6), "g": nn.Linear(6, 1), "out": nn.Linear(6, 2)},
        (2, 5, 8), "",
    ),
    "what is added to the input": (
        lambda m, x: m.out(F.relu(x + m.g(x))),
        {"g": nn.Conv2d(1, 1, 3, padding=1), "out": nn.Conv2d(1, 2, 1)},
        (2, 1, 8, 8), "a width of one is broadcast",
    ),
    "what gates one channel": (
        lambda m, x: m.out(x[:, :1] * m.g(x)),
        {"g": nn.Conv2d(3, 1, 3, padding=1), "out": nn.Conv2d(1, 2, 1)},
        (2, 3, 8, 8), "a width of one is broadcast",
    ),
    "a norm over one channel": (
        lambda m, x: m.out(m.n(m.g(x))),
        {"g": nn.Linear(8, 1), "n": nn.LayerNorm(1), "out": nn.Linear(1, 2)},
        (4, 8), "makes it a constant",
    ),
    "an output": (
        lambda m, x: m.g(x) + 0 * m.out(m.g(x)).sum(),
        {"g": nn.Linear(8, 1), "out": nn.Linear(1, 2)},
        (4, 8), "an output of the network",
    ),
    "a number of the width": (
        lambda m, x: m.out(m.g(x) / m.g(x).shape[1]),
        {"g": nn.Linear(8, 1), "out": nn.Linear(1, 2)},
        (4, 8), "makes a number of its width",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROADCAST)
def test_what_is_broadcast_or_fixed_stays(name: str) -> None:
    forward, layers, shape, reason = BROADCAST[name]
    torch.manual_seed(0)
    model = Calls(forward, **copy.deepcopy(layers))  # type: ignore[arg-type]
    width, kind, told = groups_of(model, *shape)["g"]
    assert (width, kind) == (1, "pinned")
    assert reason in told
    with pytest.raises(PlanError, match="g"):
        fxgrow.widen(model, "8", data(*shape), include=["g"])


def test_nothing_else_is_looked_for_where_no_layer_is_single() -> None:
    """Heads of one output, one head of attention and depthwise kernels leave nothing to try."""
    for model, shape in (
        (mlp(8, 6, 1), (3, 8)),
        (nn.TransformerEncoderLayer(8, 1, 16, batch_first=True).double(), (2, 5, 8)),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)).double(), (2, 3, 8, 8)),
    ):
        (plain,), _ = follow(model, data(*shape), "")
        assert at_other_widths(plain) is plain


def test_the_network_is_as_it_was_after_it_was_followed_at_another_width() -> None:
    (plain,), _ = follow(in_double(convolutions(1)), data(2, 3, 8, 8), "")
    standin = plain.traced.standin
    shapes = {name: tensor.shape for name, tensor in named_tensors(standin).items()}
    found = at_other_widths(plain)
    assert [group.width for group in found.groups] == [1, 1, 4]
    assert {name: tensor.shape for name, tensor in named_tensors(standin).items()} == shapes
    assert str(standin[0]) == "Conv2d(3, 1, kernel_size=(3, 3), stride=(1, 1))"  # type: ignore[index]


def test_others_grow_beside_a_single_channel_that_stays() -> None:
    model = mlp(8, 1, 4, 3)
    grown = fxgrow.widen(model, "2x", data(3, 8), exclude=["0"])
    assert widths_of(grown) == {"2": (4, 8)}
    assert torch.equal(grown.model[0].weight, model[0].weight)  # type: ignore[index]
    assert same(model, grown, data(9, 8))
    only = fxgrow.widen(model, {"0": "+3"}, data(3, 8))
    assert widths_of(only) == {"0": (1, 4)}
    assert only.model[4].weight.shape == (3, 4)  # type: ignore[index]


def test_what_torch_does_not_run_is_told() -> None:
    with pytest.raises(
        PlanError, match=r"not run a convolution that writes none \(make it with one channel"
    ):
        fxgrow.widen(
            nn.Sequential(nn.Conv2d(3, 0, 3), nn.ReLU(), nn.Conv2d(0, 8, 3)),
            "8", torch.randn(2, 3, 8, 8),
        )  # fmt: skip
    with pytest.raises(TraceError, match=r"0 has no channels.*Give it one channel"):
        fxgrow.inspect(
            nn.Sequential(nn.Conv2d(3, 0, 3), nn.BatchNorm2d(0), nn.Conv2d(0, 8, 3)),
            torch.randn(2, 3, 8, 8),
        )


@pytest.mark.parametrize("width", [0, 1])
def test_what_grew_is_saved_and_its_optimizer_grows(width: int) -> None:
    model, x = mlp(8, width, 4), data(6, 8)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    grown = fxgrow.widen(model, "6", x)
    fxgrow.grow_optimizer_(optimizer, model, grown)
    first, second = grown.model[0].weight, grown.model[2].weight  # type: ignore[index]
    moments = [optimizer.state[p]["exp_avg"] for p in (first, second)]
    assert [m.shape for m in moments] == [(6, 8), (4, 6)]
    assert not moments[0][width:].any()
    assert moments[0][:width].any(dim=1).all()
    stored = io.BytesIO()
    torch.save(grown.model.state_dict(), stored)
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(model)
    assert torch.equal(again(x), grown.model(x))


@pytest.mark.parametrize("width", [0, 1])
def test_a_file_of_what_grew_is_read_back(width: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    grown, x = fxgrow.widen(mlp(8, width, 4), "6", data(3, 8)), data(5, 8)
    fxgrow.save(grown, tmp_path / "grown.pt")
    assert torch.equal(fxgrow.load(tmp_path / "grown.pt")(x), grown.model(x))


@pytest.mark.parametrize("width", [0, 1])
def test_data_say_what_the_first_channels_are(width: int) -> None:
    model, x = mlp(8, width, 4, activation=nn.Tanh), data(60, 8)
    batches = [(x, data(60, 9)[:, :4])]

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return F.mse_loss(network(x), batches[0][1]).item()

    grown = fxgrow.widen(model, "+3", x, init=fxgrow.Tiny(F.mse_loss, batches))
    assert loss(grown.model) < loss(model)
    kept = fxgrow.widen(model, "+3", x, init=fxgrow.GradMax(F.mse_loss, batches))
    assert kept.report.verification.verdict == "preserved"
    F.mse_loss(kept.model(x), batches[0][1]).backward()
    assert kept.model[0].weight.grad[width:].abs().sum() > 0  # type: ignore[index]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_networks_with_narrow_layers(draw: st.DataObject) -> None:
    convolution = draw.draw(st.booleans(), label="convolution")
    least = 1 if convolution else 0  # torch runs no convolution that writes none
    widths = draw.draw(
        st.lists(st.sampled_from([least, 1, 1, 4]), min_size=1, max_size=4), label="widths"
    )
    layers: list[nn.Module] = []
    torch.manual_seed(0)
    for before, after in zip([3, *widths], [*widths, 2], strict=True):
        if convolution:
            layers.append(nn.Conv2d(before, after, 3, padding=1, bias=draw.draw(st.booleans())))
            layers += [nn.BatchNorm2d(after)] if draw.draw(st.booleans()) else []
        else:
            layers.append(nn.Linear(before, after, bias=draw.draw(st.booleans())))
        layers.append(draw.draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.PReLU()])))
    model = in_double(nn.Sequential(*layers))
    x = data(2, 3, 6, 6) if convolution else data(5, 3)
    pairing = draw.draw(st.sampled_from(["vv_z_negz", "v_zero", "replicate"]), label="pairing")
    more = draw.draw(st.integers(2, 5), label="more")
    grown = fxgrow.widen(model, f"+{more}", x, pairing=pairing, verify="quick")
    assert [g.width for g in grown.plan.groups] == [(width, width + more) for width in widths]
    assert same(model, grown, x)


def test_layers_of_one_kind_that_fail_are_not_all_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try is a run of the whole network, and a deep one has many gates."""
    gates = nn.ModuleList(nn.Linear(6, 1) for _ in range(8))

    def forward(m: Calls, x: Tensor) -> Tensor:
        x = m.a(x)  # type: ignore[operator]
        for gate in m.gates:  # type: ignore[union-attr]
            x = x * torch.softmax(gate(x), 1)
        return m.out(x)  # type: ignore[no-any-return, operator]

    model = in_double(Calls(forward, a=nn.Linear(8, 6), gates=gates, out=nn.Linear(6, 2)))
    (plain,), _ = follow(model, data(2, 5, 8), "")
    runs: list[object] = []
    label = type(plain.traced).label
    monkeypatch.setattr(
        type(plain.traced), "label", lambda self, watch: runs.append(0) or label(self, watch)
    )
    found = [group for group in at_other_widths(plain).groups if group.width == 1]
    assert [group.name for group in found] == [f"gates.{i}" for i in range(8)]
    assert len(runs) == 2
