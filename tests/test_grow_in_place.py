"""Growth in place: the same objects, the same function, and a training that goes on."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import fxgrow
from fxgrow import training
from fxgrow.training import adoption, in_place

pytestmark = pytest.mark.filterwarnings("ignore::fxgrow.FxgrowWarning")
X = torch.randn(2, 3, 32, 32, dtype=torch.float64)


class Recurrent(nn.Module):
    """An LSTM keeps a second list of its parameters, and weak references to them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Viewed(nn.Module):
    """Sizes are constants of the code, so that the grown one needs a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.hidden = nn.Linear(8 * 4 * 4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).view(-1, 8 * 4 * 4)
        return self.head(torch.relu(self.hidden(x)))

    def penalty(self) -> Tensor:
        """Something else that a trainer calls."""
        return self.conv.weight.square().sum()


class Tied(nn.Module):
    """A table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(self.norm(x + self.mlp(x)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def weight_normed() -> nn.Sequential:
    normed = parametrizations.weight_norm
    return nn.Sequential(normed(nn.Linear(4, 8)), nn.ReLU(), normed(nn.Linear(8, 2)))


def shared() -> nn.Sequential:
    twice = nn.Linear(8, 8)
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(), nn.Linear(8, 2)
    )


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 5)


def vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)
    nn.init.normal_(net.heads.head.weight)  # it begins as zeros
    return net


FLAT = torch.randn(3, 4, dtype=torch.float64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "mlp": (mlp, FLAT, {}),
    "weight norm": (weight_normed, FLAT, {}),
    "shared": (shared, FLAT, {}),
    "resnet": (resnet, X, {}),
    "resnet all": (resnet, X, {"where": "all"}),
    "variance transfer": (resnet, X, {"rescaling": "default_vt", "compensate": True}),
    "vit, by a graph": (vit, X, {}),
    "vit all": (vit, X, {"where": "all"}),
    "view, by a graph": (Viewed, torch.randn(2, 3, 6, 6, dtype=torch.float64), {}),
    "lstm": (Recurrent, torch.randn(2, 5, 6, dtype=torch.float64), {"where": "all"}),
    "tied": (Tied, torch.randint(0, 11, (2, 5)), {"where": "all"}),
    "untied": (Tied, torch.randint(0, 11, (2, 5)), {"where": "all", "untie": True}),
}


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def evaluated(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        was, _ = net.training, net.eval()
        out: Tensor = net(x)
        net.train(was)
    return out


def close(one: Tensor, other: Tensor, bound: float = 1e-10) -> bool:
    return bool((one - other).abs().max() <= bound * other.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_grows_in_place_and_trains_on_as_by_the_three_calls(name: str) -> None:
    make, x, options = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    trained(net, optimizer, x)
    average = AveragedModel(net)
    trained(net, optimizer, x)
    average.update_parameters(net)
    other = copy.deepcopy(net)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    modules, before = dict(net.named_modules()), (evaluated(net, x), evaluated(average, x))
    parameters = dict(net.named_parameters())

    grown = training.grow_(net, "2x", x, optimizer=optimizer, averages=[average], **options)

    assert grown.model is net
    assert isinstance(net, type(other)), "it keeps the interface of its class"
    assert all(dict(net.named_modules())[key] is module for key, module in modules.items())
    assert close(evaluated(net, x), before[0])
    assert close(evaluated(average, x), before[1])
    changed = set(grown.plan.tensors) | set(grown.plan.aliases)
    changed |= {name for step in grown.plan.after for name in step.tensors}
    now = dict(net.named_parameters())
    assert all((now[key] is p) == (key not in changed) for key, p in parameters.items())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}

    by_calls = fxgrow.widen(other, "2x", x, **options)
    fxgrow.grow_optimizer_(other_optimizer, other, by_calls)
    trained(net, optimizer, x)
    trained(by_calls.model, other_optimizer, x)
    wanted = by_calls.model.state_dict()
    assert {key: v.shape for key, v in net.state_dict().items()} == {
        key: value.shape for key, value in wanted.items()
    }
    assert all(torch.equal(value, wanted[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "weight norm"])
def test_what_grew_in_place_copies_pickles_and_grows_again(name: str) -> None:
    make, x, options = NETWORKS[name]
    net = make().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    training.grow_(net, "2x", x, optimizer=optimizer, **options)
    out, file = evaluated(net, x), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert isinstance(read, make if isinstance(make, type) else nn.Module)
    for one in (copy.deepcopy(net), read):
        assert torch.equal(evaluated(one, x), out)
        assert type(one) is type(net)
        assert len(training.state_dict(one)["stages"]) == 1
    again = {key: value for key, value in options.items() if key != "untie"}
    second = training.grow_(
        net, "1.5x" if "all" not in name else "2x", x, optimizer=optimizer, **again
    )
    assert second.report.verification.verdict == "preserved"
    assert close(evaluated(net, x), out)
    trained(net, optimizer, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_resumes_at_a_grown_stage(name: str) -> None:
    make, x, options = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    average = AveragedModel(net)
    trained(net, optimizer, x)
    training.grow_(net, "2x", x, optimizer=optimizer, averages=[average], **options)
    trained(net, optimizer, x)
    file = io.BytesIO()
    torch.save(
        {
            "model": net.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "growth": training.state_dict(net),
        },
        file,
    )
    trained(net, optimizer, x)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make().double()
    second = torch.optim.AdamW(again.parameters(), lr=1e-3)
    means = AveragedModel(again)
    training.regrow_(again, saved["growth"], optimizer=second, averages=[means])
    again.load_state_dict(saved["model"])
    means.load_state_dict(saved["average"])
    second.load_state_dict(saved["optimizer"])
    trained(again, second, x)
    assert all(torch.equal(v, again.state_dict()[key]) for key, v in net.state_dict().items())
    assert training.state_dict(again) == training.state_dict(net)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    training.regrow_(net, saved["growth"])  # nothing is left: plans are as they were read
    assert all(torch.equal(v, net.state_dict()[key]) for key, v in weights.items())
    assert training.state_dict(net) == saved["growth"]


def test_blocks_are_inserted_in_place() -> None:
    net = torchvision.models.resnet18(num_classes=3).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    trained(net, optimizer, X)
    last, out, seen = net.layer1[1], evaluated(net, X), []
    handle = last.register_forward_hook(lambda *_: seen.append(1))
    training.deepen_(net, {"layer1.0": "+1", "layer2": "+1"}, X, optimizer=optimizer)
    assert net.layer1[2] is last, "the block that was second is the third"
    seen.clear()  # of copies that were run
    assert close(evaluated(net, X), out)
    assert seen == [1]
    handle.remove()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    fresh = torchvision.models.resnet18(num_classes=3).double()
    training.regrow_(fresh, training.state_dict(net))
    fresh.load_state_dict(net.state_dict())
    assert close(evaluated(fresh, X), out)
    training.regrow_(net, training.state_dict(fresh))  # nothing is left to do
    assert close(evaluated(net, X), out)


def test_hooks_flags_and_attributes_stay() -> None:
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[2].weight.note = "mine"
    net[2].eval()
    seen: list[str] = []
    forward = net[2].register_forward_hook(lambda *_: seen.append("forward"))
    net[2].weight.register_hook(lambda grad: seen.append("gradient"))
    net[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    parts = [net[0], net[2]]
    training.grow_(net, "2x")
    assert [net[0], net[2]] == parts
    assert not net[0].weight.requires_grad
    assert net[0].bias.requires_grad
    assert net[2].weight.note == "mine"
    assert not net[2].training
    assert net[4].training
    seen.clear()  # of copies that were run
    net(torch.randn(3, 4)).sum().backward()
    assert seen == ["forward", "gradient", "after"]
    forward.remove()
    net(torch.randn(3, 4)).sum().backward()
    assert seen == ["forward", "gradient", "after", "gradient", "after"]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_memory_format_stays(dims: int) -> None:
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    net: Any = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 1), nn.ReLU(), conv(8, 4, 3))
    net.to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters())
    trained(net, optimizer, torch.randn(2, 3, *[8] * dims))
    training.grow_(net, "2x", torch.randn(2, 3, *[8] * dims), optimizer=optimizer)
    for layer in (net[0], net[2], net[4]):
        wanted = torch.empty(layer.weight.shape, memory_format=layout).stride()
        assert layer.weight.stride() == wanted
        assert optimizer.state[layer.weight]["exp_avg"].stride() == wanted


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Return everything of a training that a refusal must not touch."""
    return (
        {name: (id(module), type(module)) for name, module in net.named_modules()},
        {name: id(p) for name, p in net.named_parameters()},
        {name: value.clone() for name, value in net.state_dict().items()},
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        {id(p): {k: copy.copy(v) for k, v in s.items()} for p, s in optimizer.state.items()},
        net.__dict__.keys(),
    )


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (tuple, list)):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


@pytest.mark.parametrize("name", ["mlp", "view, by a graph", "lstm", "untied"])
@pytest.mark.parametrize("late", ["_set_attributes", "with_computed_weights"])
def test_a_failure_leaves_everything_as_it_was(
    name: str, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, x, options = NETWORKS[name]
    net = make().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    trained(net, optimizer, x)
    average = AveragedModel(net)
    before, out = state_of(net, optimizer), evaluated(net, x)

    def fail(*_: object) -> None:
        raise fxgrow.PlanError("planted")

    monkeypatch.setattr(adoption, late, fail)
    with pytest.raises(fxgrow.PlanError, match="planted"):
        training.grow_(net, "2x", x, optimizer=optimizer, averages=average, **options)
    assert_same(before, state_of(net, optimizer))
    assert torch.equal(evaluated(net, x), out)
    assert torch.equal(evaluated(average, x), out)
    trained(net, optimizer, x)


def test_what_cannot_follow_is_refused_by_name() -> None:
    net = mlp()
    first = torch.optim.SGD(net.parameters(), lr=0.1)
    lbfgs = torch.optim.LBFGS(net.parameters())
    before = state_of(net, first)
    with pytest.raises(fxgrow.PlanError, match="LBFGS keeps the parameters"):
        training.grow_(net, "2x", optimizer=[first, lbfgs])
    with pytest.raises(fxgrow.PlanError, match="an average is no copy of the network"):
        training.grow_(net, "2x", optimizer=first, averages=[nn.Linear(2, 2)])
    with pytest.raises(fxgrow.PlanError, match="StepLR drives an optimizer that was not given"):
        training.grow_(net, "2x", scheduler=torch.optim.lr_scheduler.StepLR(first, 2))
    with pytest.raises(fxgrow.PlanError, match="a scheduler is one of torch"):
        training.grow_(net, "2x", optimizer=first, scheduler=object())
    with pytest.raises(fxgrow.PlanError, match="an optimizer is a torch"):
        training.grow_(net, "2x", optimizer=net)  # type: ignore[arg-type]
    with pytest.raises(fxgrow.PlanError, match="no rule 'fast'"):
        training.grow_(net, "2x", lr="fast")  # type: ignore[arg-type]
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(fxgrow.PlanError, match="holds no parameter of the model"):
        training.grow_(net, "2x", optimizer=[first, other])
    assert_same(before, state_of(net, first))


def test_an_optimizer_that_was_not_given_fails_at_its_next_step() -> None:
    net = mlp()
    known = torch.optim.SGD(net.parameters(), lr=0.1)
    forgotten = torch.optim.Adam(net[2].parameters())
    elsewhere = torch.optim.Adam(mlp().parameters())
    training.grow_(net, "2x", optimizer=known)
    trained(net, known, torch.randn(3, 4))
    with pytest.raises(fxgrow.PlanError, match=r"this Adam holds 2\.weight as it was before"):
        forgotten.step()
    elsewhere.step()


def test_gradients_that_wait_make_no_partial_step() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randn(3, 4)).sum().backward()
    training.grow_(net, "2x", include=["0"], optimizer=optimizer)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer.step()
    assert_same(before, net.state_dict())


def test_one_that_failed_to_grow_is_not_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def fail(*_: object) -> None:
        raise fxgrow.PlanError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "adopt", fail)
        with pytest.raises(fxgrow.PlanError, match="planted"):
            training.grow_(net, "2x", optimizer=optimizer)
    trained(net, optimizer, torch.randn(3, 4))


class Plain(nn.Module):
    """A network without a length."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def __getitem__(self, index: int) -> nn.Module:
        return self.net[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Queue(Plain):
    """A network of which ``bool`` is False, since its length is that of a queue."""

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("kind", [mlp, Plain, Queue])
def test_compiled_networks_grow(kind: Callable[[], Any], wrap: bool) -> None:
    net = kind()
    called: Any = torch.compile(net, backend="eager") if wrap else net
    if not wrap:
        net.compile(backend="eager")
    x = torch.randn(3, 4)
    out = called(x)
    optimizer = torch.optim.Adam(called.parameters())
    grown = training.grow_(called, "2x", optimizer=optimizer)
    assert grown.model is called
    assert close(called(x), out, 1e-5)
    trained(called, optimizer, x)
    assert not torch.equal(called(x), out)
    assert net[0].out_features == 16
    assert training.grow_(called, "2x", optimizer=optimizer).plan.steps
    assert len(training.state_dict(called)["stages"]) == 2
    assert net[0].out_features == 32


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler
def test_networks_with_compiled_modules_grow(has_run: bool) -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: object) -> Any:
        compiled.append(1)
        return graph.forward

    units = [torch.compile(Unit(), backend=backend), torch.compile(Unit(), backend=backend)]
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*units), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    out = net(x) if has_run else copy.deepcopy(net)(x)
    optimizer, before = torch.optim.Adam(net.parameters()), len(compiled)
    copied = fxgrow.widen(net, "2x", x).model
    training.grow_(net, "2x", x, optimizer=optimizer)
    training.deepen_(net, {"1": "+1"}, x, optimizer=optimizer)
    assert len(compiled) == before
    assert net[1][0] is units[0]
    assert units[0].up.out_features == net[1][2].up.out_features == 16
    assert close(net(x), out, 1e-5)
    assert close(copied(x), out, 1e-5)
    assert len(compiled) > before
    trained(net, optimizer, x)
    assert not torch.equal(net(x), out)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_clipping_scaling_and_fused_optimizers_go_on(kind: str, how: str) -> None:
    net = mlp()
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=1e-3, **{how: True})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
    scaler, x, losses = torch.amp.GradScaler("cpu"), torch.randn(16, 4), []
    for index in range(16):
        if index == 5:
            training.grow_(net, "2x", optimizer=optimizer, scheduler=schedule)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (net(x) - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses.append(loss.item())
    assert abs(losses[5] - losses[4]) < abs(losses[4] - losses[3]) * 3 + 1e-2
    assert losses[-1] < losses[5]


def test_wrappers_that_hold_on_to_parameters_are_told_how(tmp_path: Path) -> None:
    with pytest.raises(fxgrow.PlanError, match=r"Grow what is in it on every rank"):
        training.grow_(nn.DataParallel(mlp()), "2x")
    script = """
        import sys, torch, torch.distributed as dist
        from torch import nn
        import fxgrow, fxgrow.training as training
        rank, place = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        wrapped = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        torch.manual_seed(rank)
        def step():
            optimizer.zero_grad()
            wrapped(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
        step()
        try:
            training.grow_(wrapped, "2x", optimizer=optimizer)
        except fxgrow.PlanError as error:
            assert "wrap that again" in str(error), error
        training.grow_(wrapped.module, "2x", optimizer=optimizer)
        wrapped = nn.parallel.DistributedDataParallel(net)
        step(), step()
        for p in net.parameters():
            mine = p.detach().clone()
            dist.broadcast(mine, 0)
            assert torch.equal(mine, p)
        from torch.distributed.fsdp import fully_shard
        sharded = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        try:
            training.grow_(sharded, "2x")
        except fxgrow.PlanError as error:
            assert "before fully_shard" in str(error), error
        else:
            raise AssertionError("FSDP2 was not refused")
        print("done", rank)
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for rank, run in enumerate(runs):
        out, error = run.communicate(timeout=300)
        assert f"done {rank}" in out, error


@pytest.mark.parametrize(
    "state",
    [
        None, {}, {"schema": 2, "stages": []}, {"schema": 1}, {"schema": 1, "stages": [3]},
        {"schema": 1, "stages": [{"module": "", "lr": "none"}]},
        {"schema": 1, "stages": [{"module": "", "lr": "none", "plan": "{}"}]},
        {"schema": 1, "stages": [{"module": "", "lr": "x", "plan": "{}"}]},
        {"schema": 1, "stages": [{}] * 1000},
    ],
)  # fmt: skip
def test_a_state_of_anybody_is_checked(state: Any) -> None:
    with pytest.raises(fxgrow.FxgrowError):
        training.regrow_(mlp(), state)


def test_a_state_of_another_network_is_refused() -> None:
    net = mlp()
    training.grow_(net, "2x")
    saved = training.state_dict(net)
    with pytest.raises(fxgrow.PlanError, match="the plan is for another network"):
        training.regrow_(Recurrent(), saved)
    inner = nn.Sequential(mlp())
    training.grow_(inner[0], "2x")
    assert training.state_dict(inner)["stages"][0]["module"] == "0"
    with pytest.raises(fxgrow.PlanError, match="has no module '0'"):
        training.regrow_(nn.ReLU(), training.state_dict(inner))
    again = training.regrow_(nn.Sequential(mlp()), training.state_dict(inner))
    again.load_state_dict(inner.state_dict())
    training.regrow_(again, training.state_dict(inner))  # nothing is left to do
    training.grow_(again[0], "1.5x")
    with pytest.raises(fxgrow.PlanError, match="has grown already, in another way"):
        training.regrow_(again, training.state_dict(inner))
