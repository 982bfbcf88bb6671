"""Channels that a LayerNorm or an RMSNorm ignores: streams and hidden groups at any width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import max_rel
from test_attention import Attention
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import fxgrow
from fxgrow.errors import PlanError
from fxgrow.files.models import open_model, write_grown

WIDTH = 8


class RootMeanSquare(nn.Module):
    """Llama's RMSNorm: in float32 whatever it is given, with an eps of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH, eps=1e-2),
    "LayerNorm without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "RMSNorm without weights": lambda: nn.RMSNorm(WIDTH, eps=1e-2, elementwise_affine=False),
    "Llama": RootMeanSquare,
}


class Gated(nn.Module):
    """A gated branch, with a layer scale or without."""

    def __init__(self, *, scaled: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 6, bias=False), nn.Linear(WIDTH, 6)
        self.down = nn.Linear(6, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH)) if scaled else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """A stream with positions added, two pre-norm branches, and whatever ends it."""

    def __init__(self, norm: Callable[[], nn.Module], end: nn.Module, *, scaled: bool = False):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.norms = nn.ModuleList([norm(), norm()])
        self.branches = nn.ModuleList([Attention(WIDTH), Gated(scaled=scaled)])
        self.end = end
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + branch(norm(x))
        return self.head(self.end(x))


def trained(model: nn.Module) -> nn.Module:
    """Give every vector entries of both signs, in place, and return the model in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return model.double().eval()


def data() -> Tensor:
    return torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, grown: fxgrow.api.widen.Grown, x: Tensor) -> None:
    """Assert that the function is kept in both modes, as the plan says."""
    verification = grown.report.verification
    assert (grown.plan.preserves, verification.verdict) == ("exact", "preserved")
    assert verification.eval.float64.max_rel <= 1e-13
    assert verification.train.float64.max_rel <= 1e-13
    assert verification.without_gradient == ()
    again = fxgrow.Plan.from_json(grown.plan.to_json()).apply(model)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, grown.model.state_dict()[name]), name
    with torch.no_grad():
        assert max_rel(grown.model(x), again(x)) == 0


@settings(max_examples=15, deadline=None)
@given(
    more=st.integers(1, 21),
    norm=st.sampled_from(sorted(NORMS)),
    end=st.sampled_from(["norm", "nothing"]),
    pairing=st.sampled_from(["vv_z_negz", "v_zero", "replicate"]),
    seed=st.integers(0, 3),
)
def test_a_stream_through_norms_grows_to_any_width(
    more: int, norm: str, end: str, pairing: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model = trained(PreNorm(NORMS[norm], NORMS[norm]() if end == "norm" else nn.Identity()))
    grown = fxgrow.widen(model, f"+{more}", data(), where="stream", pairing=pairing)
    check(model, grown, data())
    (group,) = grown.plan.groups
    copies, padding = divmod(WIDTH + more, WIDTH)
    assert group.width == (WIDTH, WIDTH + more)
    if padding:
        held = "the mean" if norm.startswith("LayerNorm") else "zero"
        eta = (copies * WIDTH / (WIDTH + more)) ** 0.5
        assert group.pairing == ("v_zero" if pairing == "v_zero" else "vv_z_negz")
        assert f"carry {held}" in group.reason
        assert f"η = {eta:.6g}" in group.reason
        assert grown.plan.warnings == ()  # no eps changes
    else:
        assert (group.pairing, "whole copies" in group.reason) == ("replicate", True)


def test_the_surplus_is_the_mean_of_what_the_writers_write() -> None:
    torch.manual_seed(0)
    model = trained(PreNorm(NORMS["LayerNorm"], NORMS["LayerNorm"]()))
    grown = fxgrow.widen(model, "+3", data(), where="stream").model
    root = (11 / 8) ** 0.5
    for name in ("embed.weight", "embed.bias", "branches.0.out.weight", "branches.1.down.bias"):
        old, new = model.get_parameter(name), grown.get_parameter(name)
        assert torch.allclose(new[8:], root * old.mean(0).expand_as(new[8:]))
        assert torch.allclose(new[:8], root * old)
    assert torch.allclose(grown.token[..., 8:], root * model.token.mean(-1, keepdim=True))
    assert torch.allclose(grown.positions[..., 8:], root * model.positions.mean(-1, keepdim=True))
    assert torch.allclose(grown.norms[0].weight[:8], model.norms[0].weight / root)
    assert not grown.norms[0].bias[8:].any()


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")
def test_everything_of_a_vision_transformer_grows() -> None:
    torch.manual_seed(0)
    model = trained(VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5))
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grown = fxgrow.widen(model, "1.5x", images, where="all")
    check(model, grown, images)
    stock = VisionTransformer(32, 8, 2, 3, 24, 36, num_classes=5).double().eval()
    stock.load_state_dict(grown.model.state_dict())
    with torch.no_grad():
        assert max_rel(model(images), stock(images)) <= 1e-13
    odd = fxgrow.widen(model, "+1", images, where="stream")  # heads no longer fill the stream
    assert odd.plan.groups[0].width == (16, 17)
    check(model, odd, images)


@pytest.mark.filterwarnings("ignore:.* becomes")
@pytest.mark.parametrize("norm", ["LayerNorm", "Llama"])
def test_where_writers_cannot_be_scaled_the_eps_takes_it(norm: str) -> None:
    torch.manual_seed(0)
    model = trained(PreNorm(NORMS[norm], nn.Tanh()))  # passes no factor on
    grown = fxgrow.widen(model, "+3", data(), where="stream")
    check(model, grown, data())
    attribute = "eps" if norm == "LayerNorm" else "variance_epsilon"
    assert getattr(grown.model.norms[0], attribute) == pytest.approx(1e-2 * 8 / 11)
    assert "its eps by η²" in grown.plan.groups[0].reason
    assert f"norms.0.{attribute} becomes 0.00727" in grown.plan.warnings[0]
    assert torch.equal(grown.model.embed.weight[:8], model.embed.weight)


def through_tanh() -> nn.Module:
    """Return a network whose norms change their eps when its stream grows."""
    return PreNorm(NORMS["LayerNorm"], nn.Tanh())


@pytest.mark.filterwarnings("ignore:.* becomes")
def test_a_file_of_weights_gives_the_eps_back(tmp_path) -> None:
    torch.manual_seed(0)
    torch.save(trained(through_tanh()).state_dict(), tmp_path / "old.pt")
    opened = open_model(tmp_path / "old.pt", arch="test_padding_channels:through_tanh")
    grown = fxgrow.widen(opened.model, "+3", data(), where="stream")
    write_grown(opened, grown, tmp_path / "new.pt")
    back = fxgrow.load(tmp_path / "new.pt", arch="test_padding_channels:through_tanh")
    with torch.no_grad():
        assert torch.equal(back(data()), grown.model(data()))
    assert back.norms[1].eps == grown.model.norms[1].eps != 1e-2


def test_layer_scale_keeps_a_zero_but_no_mean() -> None:
    torch.manual_seed(0)
    rms = trained(PreNorm(NORMS["RMSNorm"], NORMS["RMSNorm"](), scaled=True))
    check(rms, fxgrow.widen(rms, "+3", data(), where="stream"), data())
    layer = PreNorm(NORMS["LayerNorm"], NORMS["LayerNorm"](), scaled=True)
    with pytest.raises(PlanError, match=r"mul at branches.1 changes the mean of channels.*: 16"):
        fxgrow.widen(layer, "+3", data().float(), where="stream")


class PostNorm(nn.Module):
    """A stream that comes out of a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.branch = nn.Linear(3, WIDTH), norm, Gated()
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        return self.head(x + self.branch(x))


def test_a_stream_out_of_a_layer_norm_grows_by_whole_copies() -> None:
    torch.manual_seed(0)
    model = trained(PostNorm(nn.LayerNorm(WIDTH)))
    check(model, fxgrow.widen(model, "2x", data(), where="stream"), data())
    with pytest.raises(PlanError, match=r"joins them with normalised ones.*possible: 16"):
        fxgrow.widen(model, "+3", data(), where="stream")


class Around(nn.Module):
    """A linear layer, something, a norm, a linear layer."""

    def __init__(self, between: nn.Module, norm: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.between, self.norm = nn.Linear(3, WIDTH), between, norm
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.between(self.first(x))))


class Twice(nn.Module):
    """A value beside itself: its mean and zero are kept, its variance is not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 2 * x], -1)


class Lifted(nn.Module):
    """A value and a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.filterwarnings("ignore:.* becomes")
def test_what_lies_between_writer_and_norm_counts() -> None:
    torch.manual_seed(0)
    kept = [
        (nn.GELU(), nn.RMSNorm(WIDTH, eps=1e-2), WIDTH),
        (Twice(), nn.RMSNorm(2 * WIDTH), 2 * WIDTH),
        (Lifted(), nn.LayerNorm(WIDTH), WIDTH),
        (nn.Dropout(), nn.LayerNorm(WIDTH), WIDTH),
    ]
    for between, norm, width in kept:
        model = trained(Around(between, norm, width))
        check(model, fxgrow.widen(model, "+3", data()), data())
    changed = [
        (nn.ReLU(), nn.LayerNorm(WIDTH), WIDTH, "relu at between changes the mean of channels"),
        (Twice(), nn.LayerNorm(2 * WIDTH), 2 * WIDTH, "does not get all of them"),
        (nn.ReLU(), nn.RMSNorm(WIDTH), WIDTH, "relu at between has no slope at zero"),
        (Lifted(), nn.RMSNorm(WIDTH), WIDTH, "add at between changes a channel of zeros"),
        (
            nn.Sigmoid(),
            nn.RMSNorm(WIDTH),
            WIDTH,
            "sigmoid at between makes 0.5 of a channel",
        ),
    ]
    for between, norm, width, reason in changed:
        with pytest.raises(PlanError, match=f"{reason}.*whole copies; possible: 16"):
            fxgrow.widen(Around(between, norm, width), "+3", data().float())


def test_a_reader_that_also_reads_something_else_takes_no_factor() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, WIDTH), NORMS["LayerNorm without weights"]()
            self.last = nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(self.norm(y)) + self.last(torch.tanh(y))

    with pytest.raises(PlanError, match=r"nothing makes up for: .* possible: a whole multiple"):
        fxgrow.widen(Shared(), "+3", data().float())


@pytest.mark.parametrize("width", ["1.5x", "+1", "+5"])
def test_a_depthwise_bias_behind_a_layer_norm_is_not_zero(width: str) -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
            self.kernel, self.last = nn.Conv1d(6, 6, 3, groups=6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x)).transpose(1, 2)
            return self.last(self.kernel(y).transpose(1, 2))

    torch.manual_seed(0)
    model = Depthwise().double()
    grown = fxgrow.widen(model, width, torch.randn(2, 5, 4, dtype=torch.float64))
    assert grown.report.verification.verdict == "preserved"


def test_groups_of_a_convolution_do_not_write_the_mean_of_all() -> None:
    class ChannelsLast(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), ChannelsLast(4), nn.Conv1d(4, 3, 1))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    with pytest.raises(PlanError, match="convolution at 0 changes the mean of channels"):
        fxgrow.widen(model.double(), "1.5x", x)
    assert fxgrow.widen(model, "2x", x).report.verification.verdict == "preserved"


def test_a_parameter_that_nobody_uses_hides_no_norm() -> None:
    """For its sake the network is run in train mode as well, and meets the norm again."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
            self.out, self.unused = nn.Linear(8, 3), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.into(x)))

    grown = fxgrow.widen(Unused(), "1.5x", torch.randn(4, 5))
    assert grown.report.verification.verdict == "preserved"


@pytest.mark.parametrize("both", [False, True])
def test_a_table_of_more_than_these_channels_gives_them_no_mean(both: bool) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.into = nn.Embedding(3, 2 * WIDTH), nn.Linear(4, WIDTH)
            self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.table.weight.chunk(2, 1)
            added = second + first if both else self.table.weight[:, WIDTH:]
            return self.out(self.norm(added + self.into(x)))

    model, x = Half().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.raises(PlanError, match=r"table.weight has others besides them"):
        fxgrow.widen(model, "1.5x", x)
