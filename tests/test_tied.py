"""Tables that both write and read a stream: silenced by the last norm, or untied."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import fxgrow
from fxgrow.api.widen import plan as make_plan

WORDS, WIDTH = 13, 8


class RMSNorm(nn.Module):
    """A norm that multiplies by its weight, or by one and its weight."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.offset, self.eps = offset, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * (self.weight + self.offset) if self.offset else x * self.weight


class Block(nn.Module):
    """One head of attention and an MLP, each behind a norm."""

    def __init__(self, width: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 24), nn.Linear(8, width)
        self.fc, self.proj = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, -1, 4)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.proj(F.gelu(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    """nanoGPT: the head has the table of the embedding; which of the two is first is chosen."""

    def __init__(self, head_first: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        if head_first:
            self.lm_head = nn.Linear(width, WORDS, bias=False)
        self.wte, self.wpe = nn.Embedding(WORDS, width), nn.Embedding(6, width)
        self.h = nn.ModuleList([Block(width), Block(width)])
        self.ln_f = nn.LayerNorm(width)
        if not head_first:
            self.lm_head = nn.Linear(width, WORDS, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Functional(nn.Module):
    """The table itself is the head; its norm multiplies by 1 + weight; a second head reads too."""

    def __init__(self, offset: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.fc, self.proj = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm_1, self.norm = RMSNorm(WIDTH, offset), RMSNorm(WIDTH, offset)
        self.value = nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        x = x + self.proj(self.fc(self.norm_1(x)).relu())
        x = self.norm(x)
        return F.linear(x, self.table.weight), self.value(x.mean(1))


class Scaled(nn.Module):
    """Numbers of the width on both sides, as the Transformer and T5 have them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.d_model = width
        self.table = nn.Embedding(WORDS, width)
        self.fc, self.proj = nn.Linear(width, 12), nn.Linear(12, width)
        self.norm_1, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * math.sqrt(self.d_model)
        x = x + self.proj(self.fc(self.norm_1(x)).relu())
        return self.head(self.norm(x) * self.d_model**-0.5)


class Masked(nn.Module):
    """BERT with its head: norms behind additions, and a dense layer, a GELU and a norm before."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.fc, self.proj, self.norm_2 = (
            nn.Linear(WIDTH, 12),
            nn.Linear(12, WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.dense, self.norm_3 = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.decoder = nn.Linear(WIDTH, WORDS)
        self.decoder.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids))
        x = self.norm_2(x + self.proj(F.gelu(self.fc(x))))
        return self.decoder(self.norm_3(F.gelu(self.dense(x))))


class Batched(nn.Module):
    """A batch norm, which asks for no copies, before the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.fc, self.proj = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, momentum=0.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.proj(self.fc(x).relu())
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return F.linear(x, self.table.weight)


class Gained(nn.Module):
    """A learned gain and shift for each channel, before a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.fc, self.proj = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.proj(self.fc(x).relu())
        return (x * self.gain + self.shift) @ self.table.weight.t()


class Bare(GPT):
    """Nothing stands between the stream and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_f = nn.Identity()


class Plain(GPT):
    """The last norm has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(WIDTH, elementwise_affine=False)


class Again(GPT):
    """What the last norm gives goes back into the stream."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        x = x + self.h[0](self.ln_f(x))
        return self.lm_head(self.ln_f(x))


def made(kind: type[nn.Module], *args: object) -> nn.Module:
    """Return a network in float64 with weights that are none of the simple ones."""
    torch.manual_seed(0)
    net = kind(*args).double().eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data += 0.3 * noise
    return net


def ids() -> Tensor:
    return torch.randint(WORDS, (3, 5), generator=torch.Generator().manual_seed(2))


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    found = net(x)
    return [found] if isinstance(found, Tensor) else list(found)


def check(net: nn.Module, grown: fxgrow.Grown, folder: Path) -> None:
    """Check that a stream grew and nothing changed, through a file and at another length too."""
    assert any(group.kind == "stream" for group in grown.plan.groups)
    assert all(group.preserves == "exact" for group in grown.plan.groups)
    assert grown.report.verification.verdict == "preserved"
    linear = [one for one in grown.model.modules() if isinstance(one, nn.Linear)]
    assert all((one.out_features, one.in_features) == one.weight.shape for one in linear)
    fxgrow.save(grown, folder / "grown.pt")
    saved = torch.load(folder / "grown.pt", weights_only=False)
    for model in (grown.model, saved if isinstance(saved, nn.Module) else grown.model):
        for training in (False, True):
            for x in (ids(), ids()[:, :3]):
                pairs = zip(
                    outputs(net.train(training), x), outputs(model.train(training), x), strict=True
                )
                for old, new in pairs:
                    assert (old - new).abs().max() <= 1e-10 * old.abs().max()
    optimizer = torch.optim.SGD(grown.model.train().parameters(), lr=0.1)
    sum(y.square().mean() for y in outputs(grown.model, ids())).backward()
    optimizer.step()
    assert all(y.isfinite().all() for y in outputs(grown.model, ids()))


@pytest.mark.parametrize("width", ["2x", "1.5x"])
@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (GPT, ()), (GPT, (True,)), (Functional, ()), (Functional, (0.0,)), (Scaled, ()),
        (Masked, ()), (Batched, ()), (Gained, ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pairing", ["vv_z_negz", "replicate"])
def test_a_tied_stream_grows(
    kind: type[nn.Module], args: tuple[object, ...], width: str, pairing: str, tmp_path: Path
) -> None:
    net = made(kind, *args)
    width = "2x" if kind is Masked else width  # its norms are the stream, and want whole copies
    check(net, fxgrow.widen(net, width, ids(), where="all", pairing=pairing), tmp_path)


@pytest.mark.parametrize("width", ["2x", "1.5x"])
@pytest.mark.parametrize(
    ("kind", "args"),
    [(GPT, ()), (GPT, (True,)), (Scaled, ()), (Bare, ()), (Plain, ())],
)
def test_an_untied_stream_grows(
    kind: type[nn.Module], args: tuple[object, ...], width: str, tmp_path: Path
) -> None:
    net = made(kind, *args)
    grown = fxgrow.widen(net, width, ids(), where="all", untie=True)
    table = (grown.model.wte if isinstance(net, GPT) else grown.model.table).weight
    head = (grown.model.lm_head if isinstance(net, GPT) else grown.model.head).weight
    assert table is not head
    assert table.shape == head.shape
    check(net, grown, tmp_path)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Bare, "add at h.1, which stands before it, is no weight for each channel"),
        (Plain, "native_layer_norm at ln_f, which stands before it"),
        (Again, "ln_f.bias is used elsewhere as well"),
    ],
)
def test_a_tied_stream_that_nothing_silences_says_why_and_what_helps(
    kind: type[nn.Module], why: str
) -> None:
    found = fxgrow.inspect(made(kind), ids())
    (pinned,) = [g for g in found.parts[0].groups if "tied" in g.reason]
    assert why in pinned.reason
    assert pinned.pin is not None
    assert "--untie" in pinned.pin.remedy


def test_new_channels_of_the_last_norm_are_zero_and_copies_share_its_weight() -> None:
    net = made(GPT)
    grown = fxgrow.widen(net, "2x", ids(), where="stream").model
    old, new = net.ln_f.weight, grown.ln_f.weight
    torch.testing.assert_close(new[:WIDTH] + new[WIDTH:], old)
    assert grown.wte.weight is grown.lm_head.weight
    drawn = made(Batched)
    wide = fxgrow.widen(drawn, "2x", ids(), where="stream").model
    assert (wide.norm.weight[WIDTH:] == 0).all()
    assert (wide.table.weight[:, WIDTH:] != 0).all()


def test_numbers_of_the_width_follow_it_so_that_a_new_model_takes_the_weights() -> None:
    net = made(Scaled)
    for width, size in (("2x", 16), ("1.5x", 12)):
        grown = fxgrow.widen(net, width, ids(), where="stream").model
        assert grown.d_model == size
        anew = Scaled(size).double().eval()
        anew.load_state_dict(grown.state_dict())
        old, new = net(ids()), anew(ids())
        assert (old - new).abs().max() <= 1e-10 * old.abs().max()


def test_an_optimizer_goes_on_with_both_parts_of_what_was_tied() -> None:
    for head_first in (False, True):
        net = made(GPT, head_first)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        net(ids()).square().mean().backward()
        optimizer.step()
        average = optimizer.state[net.wte.weight]["exp_avg"].clone()
        grown = fxgrow.widen(net, "2x", ids(), where="stream", untie=True)
        fxgrow.grow_optimizer_(optimizer, net, grown)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in grown.model.parameters()}
        reads = optimizer.state[grown.model.lm_head.weight]["exp_avg"]
        writes = optimizer.state[grown.model.wte.weight]["exp_avg"]
        torch.testing.assert_close(reads[:, :WIDTH], average)
        torch.testing.assert_close(writes[:, :WIDTH], average / 2)  # of two copies


def test_where_nothing_is_tied_or_no_name_is_left_untying_says_so() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(fxgrow.PlanError, match="nothing is tied"):
        fxgrow.widen(net, "2x", torch.randn(2, 3), untie=True)
    with pytest.raises(fxgrow.PlanError, match="reads it by the name by which it writes it"):
        fxgrow.widen(made(Functional), "2x", ids(), untie=True)


def test_a_plan_that_unties_is_data_and_hostile_ones_are_refused() -> None:
    net = made(GPT)
    plan = make_plan(net, "2x", ids(), where="stream", untie=True)
    again = fxgrow.Plan.from_json(plan.to_json())
    assert again == plan
    grown = again.apply(net)
    assert (grown(ids()) - net(ids())).abs().max() < 1e-10
    for change in (
        {"untied": {"lm_head.weight": "wpe.weight"}},
        {"untied": {"lm_head.weight": "lm_head.weight"}},
        {"untied": {}},
        {"modules": [{"module": "", "attribute": "training", "before": True, "after": False}]},
    ):
        data = plan.to_dict()
        data["after"][0].update(change)
        with pytest.raises(fxgrow.PlanError, match=r"after\.0\."):
            fxgrow.Plan.from_dict(data)
