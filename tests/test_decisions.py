"""Networks whose Python looks at values: followed, grown, and judged by what they decide."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchvision
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import TraceError
from fxgrow.labels.trace import trace
from fxgrow.modules.calling import tensors_in
from fxgrow.modules.decisions import Decision, Replay
from fxgrow.verification.choices import Choosing


def block(outer: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(outer, inner), nn.Tanh(), nn.Linear(inner, outer))


class Policy(nn.Module):
    """A policy whose distribution checks its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=self.head(self.body(x))).entropy()


class Normal(Policy):
    """Another, of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        spread = torch.ones(3, dtype=x.dtype)
        return torch.distributions.Normal(self.head(self.body(x)), spread).log_prob(x[:, :3])


class Experts(nn.Module):
    """Sends each row to two experts; those that get none are not run."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(5, count)
        self.experts = nn.ModuleList([block(5, 7) for _ in range(count)])

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.gate(x).softmax(-1).topk(2))  # type: ignore[return-value]


class AddedExperts(Experts):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == index)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None])
        return out


class MaskedExperts(Experts):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for index, expert in enumerate(self.experts):
            mask = (chosen == index).any(-1)
            if mask.any():
                out[mask] += expert(x[mask]) * (weights * (chosen == index)).sum(-1)[mask][:, None]
        return out


class FoundExperts(Experts):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for index in torch.unique(chosen).tolist():
            rows = (chosen[:, 0] == index).nonzero().flatten()
            out[rows] = self.experts[index](x[rows]) * weights[rows, :1]
        return out


class Halting(nn.Module):
    """Thinks until each row has halted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.step, self.halt = nn.Linear(4, 6), block(6, 9), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        sum_ = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        while (sum_ < 0.95).any():
            h = torch.tanh(h + self.step(h))
            sum_ = sum_ + self.halt(h).squeeze(-1).sigmoid() * (sum_ < 0.95)
        return self.halt(h)


class Greedy(nn.Module):
    """Writes the likeliest token until one of them ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(11, 6), block(6, 9), nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(4):
            h = self.table(ids).mean(1)
            scores = self.head(h + self.body(h))
            following = scores.argmax(-1)
            ids = torch.cat([ids, following[:, None]], 1)
            if following[0].item() == 0:
                break
        return scores, ids


class Boxes(nn.Module):
    """Keeps boxes that do not overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        found = []
        for rows in self.head(self.body(images)).flatten(2).transpose(1, 2):
            corner, size, (score, kind) = rows[:, :2], rows[:, 2:4].exp(), rows[:, 4:].sigmoid().T
            mask = score > 0.4
            boxes = torch.cat([corner - size, corner + size], 1)[mask]
            kept = torchvision.ops.batched_nms(boxes, score[mask], (kind > 0.5).int()[mask], 0.5)
            found.append(torch.cat([boxes[kept], score[mask][kept, None]], 1))
        return found


class Packed(nn.Module):
    """Reads sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = block(4, 6), nn.GRU(4, 5, batch_first=True), block(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[..., 0] > -9).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.first(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.last(self.cell(packed)[1][0])


class Guarded(nn.Module):
    """Looks at its numbers before it goes on, and scales by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x[:, [0, 2]]).any() or not x.abs().max() < 1e3:
            raise ValueError("these are no numbers")
        largest = x.abs().max().item()
        hidden = F.relu(self.first(x / largest))
        chosen = torch.masked_select(self.last(hidden), x[:, :1] > 0)
        return torch.cat([chosen, self.last(hidden).flatten()]) * largest


def rows() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def fives() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "policy": (Policy, rows, 1),
    "normal": (Normal, rows, 1),
    "added experts": (AddedExperts, fives, 8),
    "masked experts": (MaskedExperts, fives, 8),
    "found experts": (FoundExperts, fives, 1),
    "halting": (Halting, rows, 1),
    "greedy": (Greedy, lambda: torch.tensor([[1, 2, 3], [4, 5, 6]]), 1),
    "boxes": (Boxes, lambda: torch.randn(2, 3, 8, 8, dtype=torch.float64), 1),
    "packed": (Packed, lambda: torch.randn(2, 3, 4, dtype=torch.float64), 2),
    "guarded": (Guarded, rows, 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_forward_that_looks_at_values_grows_and_computes_the_same(name, seed):
    torch.manual_seed(seed)
    build, draw, least = CASES[name]
    model, x = build().double().eval(), draw()
    grown = fxgrow.widen(model, "2x", x)
    assert grown.report.verification.verdict == "preserved"
    assert len(grown.plan.groups) >= least
    for mine, theirs in zip(tensors_in(model(x)), tensors_in(grown.model(x)), strict=True):
        torch.testing.assert_close(mine, theirs)
    again = copy.deepcopy(grown.model).train()
    loss = sum(t.sum() for t in tensors_in(again(x)) if t.requires_grad)
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in again.parameters())


class Mean(Policy):
    """A distribution over hidden channels, which is only asked for its mean."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.distributions.Normal(self.body(x), 1.0).mean)


def test_checks_of_arguments_bind_no_channels() -> None:
    grown = fxgrow.widen(Mean(), "2x", torch.randn(5, 4))
    assert grown.model.body[0].out_features == 16
    assert grown.report.verification.verdict == "preserved"


@pytest.mark.parametrize("kind", [AddedExperts, MaskedExperts])
def test_groups_do_not_depend_on_what_is_drawn(kind):
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        inspection = fxgrow.inspect(kind().double(), fives()[:1])
        found.add(
            frozenset(g["name"] for g in inspection.to_dict()["groups"] if g["kind"] == "hidden")
        )
    assert len(found) == 1
    assert len(found.pop()) == 8


def test_a_network_without_values_is_followed_on_drawn_ones():
    with torch.device("meta"):
        model = AddedExperts()
    grown = fxgrow.widen(model, "2x", torch.randn(4, 5), verify=False)
    assert len(grown.plan.groups) == 8


def test_inputs_are_inferred_for_a_forward_that_looks_at_values():
    assert fxgrow.widen(Policy(), "2x").report.verification.verdict == "preserved"


def test_inputs_are_blamed_where_the_network_does_not_take_them_and_nowhere_else():
    with pytest.raises(TraceError, match=r"same reduction dim.*Give inputs that it takes"):
        fxgrow.widen(Policy(), "2x", torch.randn(5, 3))

    class Endless(Policy):
        def forward(self, x: Tensor) -> Tensor:
            kept = x.detach().numpy().tolist() if x.is_meta else x
            return self.head(self.body(torch.as_tensor(kept)))

    class Secret(Policy):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling() or type(x.sum().item()) is not float:
                return x
            return torch.from_dlpack(self.head(self.body(x)).detach())

    fxgrow.widen(Endless(), "2x", torch.randn(5, 4))
    with pytest.raises(TraceError) as caught:
        fxgrow.widen(Secret(), "2x", torch.randn(5, 4))
    assert "the model runs on inputs of 5x4" in str(caught.value)
    assert "Give inputs" not in str(caught.value)


def test_the_users_network_and_random_state_stay_as_they_are():
    model = nn.Sequential(nn.BatchNorm1d(4), Policy()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = rows().float()
    state = torch.get_rng_state()
    trace(model, x).follow()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_decisions_that_are_not_asked_for_in_order_are_refused():
    replay = Replay([Decision("aten::nonzero", 3)], torch.device("cpu"))
    with pytest.raises(TraceError, match="asks for what aten::equal tells"):
        replay.decide(torch.ops.aten.equal.default, (), {})
    with pytest.raises(TraceError, match="asked for nothing there"):
        replay.read(torch.empty(0), "tolist", Tensor.tolist)


class Tied(nn.Module):
    """Chooses between two numbers that are the same but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        both = torch.stack([self.last(hidden), self.last(hidden * 3.0) / 3.0])
        return torch.where(both.argmax(0) == 0, 1.0, -1.0).to(x.dtype) + both[0]


def test_choices_that_only_rounding_parts_are_made_alike_and_told():
    torch.manual_seed(0)
    found = fxgrow.widen(Tied().double(), "2x", rows()).report.verification
    assert found.verdict == "preserved"
    assert any("of argmax) were made as in the original network" in note for note in found.notes)


def test_another_choice_for_another_reason_is_not_excused():
    torch.manual_seed(0)
    model = Tied().double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.last.weight[:32] *= 1 + 1e-6
    assert fxgrow.verify(model, other, rows()).verdict == "failed"


def test_a_choice_is_taken_over_where_the_numbers_agree_alone():
    x = torch.tensor([1.0, 1.0 + 1e-12, 0.5], dtype=torch.float64)
    noting = Choosing()
    with noting:
        assert int(x.argmax()) == 1
    near, far = torch.tensor([1.0, 1.0, 0.5]).double(), torch.tensor([1.1, 1.0, 0.5]).double()
    for other, wanted in ((near, 1), (far, 0)):
        choosing = Choosing(noting.made, 1e-9)
        with choosing:
            assert int(other.argmax()) == wanted
        assert choosing.parted["argmax"] == (wanted == 1)


def test_values_are_the_runs_own_where_positions_are_taken_over():
    x = torch.tensor([2.0, 2.0 + 1e-12, 1.0]).double()
    noting = Choosing()
    with noting:
        x.sort(descending=True)
    with Choosing(noting.made, 1e-9):
        values, order = x.flip(0).flip(0).sort(descending=True)
    assert order.tolist() == noting.made[0].result[1].tolist()
    assert values.shape == (3,)


def test_a_detector_is_followed_as_a_whole_and_judged_in_the_mode_that_runs():
    torch.manual_seed(0)
    build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = build(weights=None, weights_backbone=None, num_classes=3).eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 48, 64)]
    grown = fxgrow.widen(model, "2x", (images,))
    found = grown.report.verification
    assert [scope.module for scope in grown.plan.scopes] == [""]
    assert found.verdict == "preserved"
    assert found.train is None
    assert any("train mode was not judged" in note for note in found.notes)


class Experts(nn.Module):
    """Four experts between two layers, of which Python chooses some by values."""

    def __init__(self, choose: Callable[[Experts, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.choose(self, torch.relu(self.a(x))))


def _routed(net: Experts, h: Tensor) -> Tensor:
    chosen, found = net.r(h).argmax(-1), torch.zeros_like(h)
    for expert in chosen.unique().tolist():
        mask = chosen == expert
        found[mask] = net.experts[expert](h[mask])
    return found


def _deep(net: Experts, h: Tensor) -> Tensor:
    for expert in net.experts[: 1 + int(net.r(h).abs().sum() * 3) % 4]:
        h = h + torch.relu(expert(h))
    return h


def _picked(net: Experts, h: Tensor) -> Tensor:
    return net.experts[int(net.r(h).mean(0).argmax())](h)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("choose", [_routed, _deep, _picked])
def test_experts_that_the_inputs_do_not_choose_grow_as_well(choose, seed: int) -> None:
    torch.manual_seed(seed)
    net, x = Experts(choose).eval(), torch.randn(6, 6)
    grown = fxgrow.widen(net, "2x", x, where="all")
    assert grown.report.verification.verdict == "preserved"
    assert all(expert.in_features == 16 for expert in grown.model.experts)
    with torch.no_grad():
        for other in torch.randn(20, 5, 6) * 3:
            assert torch.allclose(net(other), grown.model(other), atol=1e-4)


class Heads(nn.Module):
    """Two heads, of which one is used by a flag or by chance."""

    def __init__(self, use: Callable[[bool], bool]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.use = use

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(h) if self.use(flag) else self.b(h)


def test_a_head_that_no_run_reaches_is_named() -> None:
    net = Heads(bool).eval()
    with pytest.warns(fxgrow.FxgrowWarning, match="c takes no part in the run"):
        grown = fxgrow.widen(net, "2x", torch.randn(3, 6))
    assert any(text.startswith("c takes no part") for text in grown.report.to_dict()["warnings"])
    narrow = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    narrow[0].idle = nn.Linear(7, 9)  # it meets nothing that grows
    assert not fxgrow.widen(narrow, "2x", torch.randn(3, 6)).plan.warnings


@pytest.mark.parametrize(
    "use",
    [
        lambda _: torch.rand(1).item() > 0.6,
        lambda _: random.random() < 0.6,
        lambda _: random.sample(range(4), 2)[0] > 1 and random.sample(range(4), 2)[0] > 1,
    ],
)
def test_heads_that_are_used_by_chance_grow(use) -> None:
    grown = fxgrow.widen(Heads(use).eval(), "2x", torch.randn(3, 6))
    assert (grown.model.b.in_features, grown.model.c.in_features) == (16, 16)
    assert not grown.plan.warnings


def _any(net: Experts, h: Tensor) -> Tensor:
    return random.choice(net.experts)(h)


def _some_rows(net: Experts, h: Tensor) -> Tensor:
    if net.training:
        kept = (torch.rand(len(h), device=h.device) < 0.4).nonzero()[:, 0]
        return h.index_add(0, kept, net.experts[0](h[kept]))
    return sum(expert(h) for expert in net.experts)


@pytest.mark.filterwarnings("ignore:r takes no part in the run")
@pytest.mark.parametrize("choose", [_any, _some_rows])
def test_parts_that_are_used_by_chance_grow(choose) -> None:
    grown = fxgrow.widen(Experts(choose).eval(), "2x", torch.randn(6, 6), where="all")
    assert [expert.in_features for expert in grown.model.experts] == [16] * 4
    assert not [text for text in grown.plan.warnings if "experts" in text]


def test_a_grown_network_that_fails_where_the_original_runs_is_another() -> None:
    net = Experts(_picked).eval()
    broken = copy.deepcopy(net)
    broken.experts[2] = nn.Linear(9, 8)
    with torch.no_grad():
        for model in (net, broken):
            model.r.bias[2] = 100.0
    found = fxgrow.verify(net, broken, torch.randn(3, 6))
    assert found.verdict == "failed"
    assert "(at experts.2)" in found.notes[-1]
