"""What is told of grown parts in training, and which growth is ahead after some steps."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import pytest
import torch
from test_growth_schedule import Deep, mlp
from torch import nn

from fxgrow.errors import PlanError, UsageError
from fxgrow.training import deepen_, effective_rank, grow_, monitor, probe
from fxgrow.training.origins import grown_groups

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    """Train a step, and keep the gradients."""
    optimizer.zero_grad()
    (net(x) - x[:, :3]).square().mean().backward()
    optimizer.step()


def told_after(net: nn.Module, steps: int = 2, lr: float = 0.1) -> dict[str, float]:
    torch.manual_seed(1)
    optimizer, seen = torch.optim.SGD(net.parameters(), lr=lr), monitor(net)
    told = {}
    for _ in range(steps):
        step(net, optimizer, torch.randn(16, 6))
        told = seen.step()
    return told


@pytest.mark.parametrize("pairing", ["vv_z_negz", "v_zero", "replicate"])
def test_norms_are_those_of_the_old_and_the_new_entries(pairing):
    torch.manual_seed(0)
    net = mlp(8)
    grow_(net, "1.5x", torch.randn(2, 6), pairing=pairing)
    optimizer, seen, x = SGD(net.parameters()), monitor(net), torch.randn(16, 6)
    step(net, optimizer, x)
    assert not any("update" in key for key in seen.step())
    before = [p.detach().clone() for p in net.parameters()]
    step(net, optimizer, x)
    told = seen.step()

    def norm(tensors: list[torch.Tensor], part: slice) -> float:
        w0, b0, w2, _ = tensors
        parts = [w0[part], b0[part], w2[:, part]]
        return math.sqrt(sum(float(p.square().sum()) for p in parts))

    now = [p.detach() for p in net.parameters()]
    for part, which in (("old", slice(0, 8)), ("new", slice(8, 12))):
        grads, moved = [p.grad for p in net.parameters()], [
            a - b for a, b in zip(now, before, strict=True)
        ]  # fmt: skip
        assert told[f"0/grad_norm/{part}"] == pytest.approx(norm(grads, which))
        assert told[f"0/update_norm/{part}"] == pytest.approx(norm(moved, which))
        assert told[f"0/weight_norm/{part}"] == pytest.approx(norm(now, which))
        assert told[f"0/update_ratio/{part}"] == pytest.approx(
            norm(moved, which) / norm(now, which)
        )
    assert all(type(value) is float and math.isfinite(value) for value in told.values())


def test_twins_and_copies_part():
    torch.manual_seed(0)
    net = mlp(8)
    grow_(net, "2x", torch.randn(2, 6))
    first = monitor(net).measure()
    assert first["0/cosine/twins"] == pytest.approx(1.0)
    assert "0/cosine/copies" not in first
    assert told_after(net)["0/cosine/twins"] < 1 - 1e-6
    tied = mlp(8)
    grow_(tied, "2x", torch.randn(2, 6), pairing="replicate", split_noise=0)
    assert told_after(tied)["0/cosine/copies"] == pytest.approx(1.0)
    parting = mlp(8)
    grow_(parting, "2x", torch.randn(2, 6), pairing="replicate", split_noise=0.5)
    assert told_after(parting)["0/cosine/copies"] < 1 - 1e-6


def test_effective_rank():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(7, 5)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    assert effective_rank(torch.zeros(0, 5)) == 0
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 64)
    tied = copy.deepcopy(net)
    grow_(tied, "2x", x, pairing="replicate", split_noise=0)
    told = monitor(tied).measure()
    # Copies add nothing, twins as many again less what they share.
    assert told["0/effective_rank"] == pytest.approx(told["0/effective_rank/old"], rel=1e-3)
    grow_(net, "2x", x)
    told = monitor(net).measure()
    assert told["0/effective_rank"] > 1.2 * told["0/effective_rank/old"]
    assert "0/effective_rank" not in monitor(net, rank=False).measure()


def test_dead_channels():
    torch.manual_seed(0)
    net = mlp(8)
    grow_(net, "1.5x", torch.randn(2, 6))
    with torch.no_grad():
        net[0].weight[[1, 9]] = 0
        net[0].bias[[1, 9]] = -1.0
    told = told_after(net, lr=0.0)
    assert told["0/dead/old"] == pytest.approx(1 / 8)
    assert told["0/dead/new"] == pytest.approx(1 / 4)


def test_a_second_growth_is_what_is_new_then():
    torch.manual_seed(0)
    net, x = mlp(8), torch.randn(2, 6)
    seen = monitor(net)
    assert seen.step() == {}
    optimizer = SGD(net.parameters())
    grow_(net, "2x", x, optimizer=optimizer)
    step(net, optimizer, torch.randn(16, 6))
    seen.step()
    grow_(net, {"0": "20"}, x, optimizer=optimizer)
    step(net, optimizer, torch.randn(16, 6))
    assert not any("update" in key for key in seen.step())
    step(net, optimizer, torch.randn(16, 6))
    assert "0/update_norm/new" in seen.step()
    (group,) = grown_groups(net)
    _, positions = group.writers["0.weight"]
    assert positions.growth.tolist() == [0] * 8 + [1] * 8 + [2] * 4
    first, other = positions.alike(drawn=True)
    pairs = {*zip(first.tolist(), other.tolist(), strict=True)}
    assert pairs == {(8 + i, 12 + i) for i in range(4)} | {(16 + i, 18 + i) for i in range(2)}


def test_gradients_that_were_dropped_before_are_warned_of_once():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    grow_(net, "2x", optimizer=optimizer)
    watched = monitor(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            net(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step()
    assert [str(one.message).partition(":")[0] for one in told] == [
        "there are no gradients to measure"
    ]


def test_steps_between_cost_no_copy():
    net = mlp(8)
    grow_(net, "2x", torch.randn(2, 6))
    optimizer, seen = SGD(net.parameters()), monitor(net, every=3)
    told, held = [], []
    for _ in range(6):
        step(net, optimizer, torch.randn(16, 6))
        told.append(bool(seen.step()))
        held.append(bool(seen._before))
    assert told == [False, False, True] * 2
    assert held == [False, True, False] * 2
    with pytest.raises(UsageError):
        monitor(net, every=0)


class ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.bn(self.conv1(x)))))


def test_new_blocks_and_the_groups_in_a_convolutional_network():
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(ConvBlock(8)), *head)
    x = torch.randn(4, 3, 8, 8)
    deepen_(net, {"1": "+1"}, x, verify="none")
    grow_(net, "1.5x", x, where="all", verify="none")
    optimizer, seen = SGD(net.parameters()), monitor(net)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        told = seen.step()
    assert told["1.1/weight_norm/new"] > 0
    assert "1.1/weight_norm/old" not in told
    assert {key.partition("/")[0] for key in told} == {"0", "1.0.conv1", "1.1.conv1", "1.1"}
    assert all(math.isfinite(value) for value in told.values())
    assert told["1.0.conv1/update_norm/new"] > 0
    assert told["0/cosine/twins"] < 1


def test_new_blocks_move_with_later_growth_of_depth():
    net, x = Deep(8, 1), torch.randn(2, 4)
    deepen_(net, {"blocks": "+1"}, x)
    deepen_(net, {"blocks.0": "+1"}, x)
    groups = {group.name: group for group in grown_groups(net)}
    fresh = {name for group in groups.values() for name in group.fresh}
    assert fresh == {n for n, _ in net.named_parameters() if n.startswith(("blocks.1", "blocks.2"))}
    assert sum(len(group.fresh) for group in groups.values()) == len(fresh)


def loss(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (net(batch) - batch[:, :3]).square().mean()


def test_a_probe_ranks_and_leaves_the_network_alone():
    torch.manual_seed(0)
    net, batches = mlp(8).train(), torch.randn(5, 32, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for batch in batches:
        step(net, optimizer, batch)
    state, kept = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    candidates = {
        "as it is": {},
        "twins": {"width": "2x"},
        "random": {"width": "3x", "preset": "random", "init": wild},
    }
    ranking = probe(net, candidates, loss, batches, steps=16, optimizer=optimizer, repeats=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    moments = optimizer.state_dict()["state"]
    assert all(
        torch.equal(moments[i]["momentum_buffer"], kept["state"][i]["momentum_buffer"])
        for i in moments
    )
    assert net.training
    tried = {one.name: one for one in ranking.tried}
    assert ranking.best == ranking.tried[0].name
    assert ranking.tried[0].behind == 0
    assert tried["twins"].start == pytest.approx(tried["as it is"].start, rel=1e-5)
    assert tried["random"].start > 1.2 * tried["twins"].start
    assert tried["twins"].parameters == sum(p.numel() for p in mlp(16).parameters())
    assert all(len(one.losses) == 4 and one.spread > 0 for one in ranking.tried)
    assert [one.mean for one in ranking.tried] == sorted(one.mean for one in ranking.tried)
    assert "Exact copies win short probes" in str(ranking)
    again = probe(net, candidates, loss, batches, steps=16, optimizer=optimizer, repeats=4)
    assert again == ranking


def wild(tensor: torch.Tensor, reference: object, fan_in: int) -> None:
    tensor.normal_(0, 0.5)


def test_a_probe_continues_the_optimizers_state():
    """What stays as it is does exactly what the network itself would have done."""
    torch.manual_seed(0)
    net, batch = mlp(8), torch.randn(1, 32, 6)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        step(net, optimizer, batch[0])
    ranking = probe(net, {"same": {}}, loss, batch, steps=5, optimizer=optimizer, repeats=1)
    for _ in range(5):
        step(net, optimizer, batch[0])
    assert ranking.tried[0].losses[0] == pytest.approx(float(loss(net, batch[0]).detach()))
    assert math.isnan(ranking.tried[0].spread)


def test_a_probe_tells_what_cannot_be_carried_out():
    net, batches, x = Deep(8, 2), torch.randn(2, 8, 4), torch.randn(2, 4)
    candidates = {
        "deeper": {"blocks": {"blocks": "+1"}},
        "none": {"width": {"stem": "2"}, "where": "all"},
    }

    def fit(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (net(batch) - batch[:, :2]).square().mean()

    ranking = probe(net, candidates, fit, batches, steps=2, optimizer=SGD, example_inputs=x)
    assert [one.name for one in ranking.tried] == ["deeper"]
    assert "only widens" in ranking.refused["none"]
    assert "only widens" in str(ranking)
    with pytest.raises(PlanError, match="no candidate can be carried out; none"):
        probe(net, {"none": candidates["none"]}, fit, batches, optimizer=SGD)
    for wrong in ({"candidates": {}}, {"batches": []}, {"steps": 0}, {"repeats": 0}):
        given = {"candidates": candidates, "batches": batches, "steps": 1, **wrong}
        with pytest.raises(UsageError):
            probe(net, loss_fn=fit, optimizer=SGD, **given)


def test_candidates_that_diverge_come_last():
    net, batches = mlp(8), torch.randn(3, 32, 6)

    def explode(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        wide = net[0].out_features > 8
        return loss(net, batch) * (math.nan if wide else 1.0)

    ranking = probe(
        net, {"wide": {"width": "2x"}, "same": {}}, explode, batches, steps=2, optimizer=SGD
    )
    assert [one.name for one in ranking.tried] == ["same", "wide"]
    assert math.isnan(ranking.tried[1].mean)
    assert str(ranking)
