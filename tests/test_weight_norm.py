"""Weights that are computed of others: weight norm grows in both forms, others say how to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.nn.utils import parametrizations, parametrize

import fxgrow
from fxgrow.plan.schema import Plan

Norm = Callable[..., nn.Module]
OLD = nn.utils.weight_norm
FORMS: dict[str, Norm] = {"hook": OLD, "parametrization": parametrizations.weight_norm}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network in float64 whose lengths are not the norms of its directions."""
    torch.manual_seed(0)
    net = build().double().eval()
    for name, parameter in net.named_parameters():
        if name.endswith(("weight_g", "original0")):
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return net


class Gated(nn.Module):
    """A layer of WaveNet, with what is skipped; then one that writes by a transposed kernel."""

    def __init__(self, norm: Norm, dim: int | None = 0) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(2, 4, 1), dim=dim)
        self.gates = norm(nn.Conv1d(4, 8, 3, padding=1), dim=dim)
        self.both = norm(nn.Conv1d(4, 8, 1), dim=dim)
        self.up = norm(nn.ConvTranspose1d(4, 3, 4, 2, 1), dim=dim)
        self.last = norm(nn.Conv1d(3, 2, 1), dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        a, b = self.gates(x).chunk(2, 1)
        kept, skipped = self.both(a.tanh() * b.sigmoid()).chunk(2, 1)
        return self.last(F.leaky_relu(self.up(x + kept + skipped), 0.1))


class Causal(nn.Module):
    """A block of a temporal convolutional network: its layers have two names each."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.conv2 = norm(nn.Conv1d(3, 6, 3, padding=2)), norm(nn.Conv1d(6, 6, 1))
        self.net = nn.Sequential(self.conv1, nn.ReLU(), nn.Dropout(0.1), self.conv2)
        self.down, self.out = nn.Conv1d(3, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.net(x)[..., :-2] + self.down(x)).relu()[..., -1])


class Positions(nn.Module):
    """A grouped convolution, normed for each tap, beside a stream that a norm holds."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.conv = norm(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.norm(x + F.gelu(self.conv(x.mT)).mT))


def residual(norm: Norm) -> nn.Module:
    """Return a stream whose writers are all normed, and which a LayerNorm holds."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = norm(nn.Linear(3, 8)), norm(nn.Linear(8, 2))
            self.up, self.down, self.norm = norm(nn.Linear(8, 6)), norm(nn.Linear(6, 8)), norms()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.norm(x + self.down(F.gelu(self.up(x)))))

    def norms() -> nn.Module:
        return nn.LayerNorm(8)

    return Residual()


NETWORKS: dict[str, tuple[Callable[[Norm], nn.Module], Tensor]] = {
    "gated": (Gated, data(2, 2, 6)),
    "gated, one norm": (lambda norm: Gated(norm, None), data(2, 2, 6)),
    "gated, norms of columns": (lambda norm: Gated(norm, 1), data(2, 2, 6)),
    "causal": (Causal, data(2, 3, 7)),
    "positions": (Positions, data(2, 5, 3)),
    "residual": (residual, data(2, 5, 3)),
}


class Sequences(nn.Module):
    """A recurrent layer whose state is read by a normed weight."""

    def __init__(self, norm: Norm, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.out = kind(4, 6, batch_first=True), nn.Linear(6, 2)
        norm(self.layer, "weight_hh_l0")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


PAIRINGS = {
    "hook": (("vv_z_negz", "2x"), ("v_zero", "2x"), ("copy_pair", "2x")),
    "parametrization": (("replicate", "2x"), ("vv_z_negz", "1.5x")),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_weight_norm_grows_and_computes_the_same(name: str, form: str) -> None:
    build, x = NETWORKS[name]
    net = made(lambda: build(FORMS[form]))
    for pairing, width in PAIRINGS[form]:
        if name == "positions" and width == "1.5x":  # what it adds to the stream has no mean
            continue
        grown = fxgrow.widen(net, width, x, where="all", pairing=pairing)
        assert grown.report.verification.verdict == "preserved"
        assert sum(p.numel() for p in grown.model.parameters()) > sum(
            p.numel() for p in net.parameters()
        )
        assert all(bool(t.isfinite().all()) for t in grown.model.state_dict().values())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("form", FORMS)
def test_recurrent_layers_with_a_normed_weight_grow(form: str, kind: type[nn.RNNBase]) -> None:
    net, x = made(lambda: Sequences(FORMS[form], kind)), data(2, 5, 4)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert grown.report.verification.verdict == "preserved"
    assert grown.model.layer.hidden_size == 12
    assert (grown.model(x) - net(x)).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_a_normed_network_grows_as_the_plain_one_and_trains_on(form: str) -> None:
    net, x = made(lambda: Gated(FORMS[form])), data(2, 2, 6)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    net(x).square().sum().backward()
    optimizer.step()
    grown = fxgrow.widen(net, "2x", x, where="all")
    fxgrow.grow_optimizer_(optimizer, net, grown)
    before = [p.detach().clone() for p in grown.model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        grown.model(x).square().sum().backward()
        optimizer.step()
    after = list(grown.model.parameters())
    assert all(bool(p.isfinite().all()) for p in after)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def causal(form: str) -> nn.Module:
    """Return what files of weights are for."""
    return Causal(FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_normed_weights_go_through_files(form: str, suffix: str, tmp_path: Path) -> None:
    net, x = made(lambda: Causal(FORMS[form])).float(), data(2, 3, 7).float()
    arch = {"arch": "test_weight_norm:causal", "arch_arguments": {"form": form}}
    path, out = tmp_path / f"net.{suffix}", tmp_path / f"wide.{suffix}"
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    opened = fxgrow.open_model(path, **arch)
    fxgrow.write_grown(opened, fxgrow.widen(opened.model, "2x", x, where="all"), out)
    loaded = fxgrow.load(out, **arch)
    assert loaded.conv1.out_channels == 12
    assert torch.allclose(loaded(x), net(x), rtol=0, atol=1e-5)


def test_a_module_with_the_hook_is_pickled_whole(tmp_path: Path) -> None:
    net, x = made(lambda: Gated(OLD)), data(2, 2, 6)
    fxgrow.save(fxgrow.widen(net, "2x", x, where="all"), tmp_path / "net.pt")
    loaded = fxgrow.load(tmp_path / "net.pt", trust_pickle=True)
    assert torch.allclose(loaded(x), net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_factors_are_those_of_the_weight(form: str) -> None:
    """A rescaling of a normed layer is what it is of the layer without its norm."""
    x = data(3, 4)

    def build() -> nn.Module:
        norm = FORMS[form]
        return nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), norm(nn.Linear(6, 3)))

    net, plain = made(build), made(build)
    for layer in plain[::2]:
        if form == "hook":
            nn.utils.remove_weight_norm(layer)
        else:
            parametrize.remove_parametrizations(layer, "weight")
    for rescaling in ("default_vt", "vt_constraint_old_shape", "vt_constraint_new_shape"):
        found, wanted = (
            fxgrow.widen(m, "2x", x, rescaling=rescaling, verify=m is net) for m in (net, plain)
        )
        assert found.report.verification.verdict == "as predicted"
        factors = [group.factors for group in found.plan.groups]
        assert factors == [pytest.approx(group.factors) for group in wanted.plan.groups]
        have, want = (grown.model.eval() for grown in (found, wanted))
        assert torch.allclose(have[0].weight[:6], want[0].weight[:6])
        assert torch.allclose(have[2].weight[:, :6], want[2].weight[:, :6])


@pytest.mark.parametrize("init", ["zeros", "kaiming", "copy_uniform"])
def test_no_direction_is_left_without_a_norm(init: str) -> None:
    net, x = made(lambda: Gated(OLD)), data(2, 2, 6)
    for pairing in ("v_zero", "zero_z", "vv_z_negz"):
        where = "hidden" if pairing == "zero_z" else "all"
        grown = fxgrow.widen(net, "2x", x, where=where, pairing=pairing, init=init)
        assert grown.report.verification.verdict == "preserved"


def test_a_copy_with_the_hook_has_the_weight_of_its_parts() -> None:
    net, x = made(lambda: Causal(OLD)), data(2, 3, 7)
    net(x)  # leaves weights behind that have a history
    grown = fxgrow.widen(net, "2x", x)
    layer = grown.model.conv1
    assert layer.weight.shape == layer.weight_v.shape == (12, 3, 3)
    nn.utils.remove_weight_norm(layer)
    assert torch.allclose(grown.model(x), net(x), rtol=0, atol=1e-12)


def test_a_plan_of_parts_is_checked() -> None:
    data_ = fxgrow.widen(made(lambda: Gated(OLD)), "2x", data(2, 2, 6)).plan.to_dict()
    assert Plan.from_dict(data_).to_dict() == data_
    data_["tensors"]["gates.weight_v"]["normed"]["length"] = "both.weight_g"
    with pytest.raises(fxgrow.PlanError, match="normed"):
        Plan.from_dict(data_)


class Squashed(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.sigmoid()


def squashed(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Squashed())
    return layer


@pytest.mark.parametrize("where", ["hidden", "stream", "all"])
@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (nn.utils.spectral_norm, "spectral norm.*remove_spectral_norm"),
        (parametrizations.spectral_norm, "spectral norm.*remove_parametrizations"),
        (parametrizations.orthogonal, "Orthogonal.*remove_parametrizations"),
        (squashed, "Squashed.*remove_parametrizations"),
    ],
)
def test_what_cannot_be_seen_through_says_how_to_take_it_off(
    rule: Norm, told: str, where: str
) -> None:
    net = made(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), rule(nn.Linear(5, 2))))
    with pytest.raises(fxgrow.PlanError, match=f"the weight of 2 is computed by {told}"):
        fxgrow.widen(net, "2x", data(4, 3), where=where)


def test_what_no_pickle_holds_is_refused_with_what_gives_it_back(tmp_path):
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    grown = fxgrow.widen(net, "2x")
    with pytest.raises(fxgrow.SourceError, match=r"0 has a parametrization") as caught:
        fxgrow.save(grown, tmp_path / "net.pt")
    assert "Plan.from_json(text).apply(old_network)" in str(caught.value)
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(net)
    again.load_state_dict(grown.model.state_dict())
    inputs = torch.randn(3, 4)
    torch.testing.assert_close(again(inputs), net(inputs))
