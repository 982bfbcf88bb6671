"""Deeper networks whose blocks are attributes of a module, not items of a list."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from networks import PlainBlock, max_rel
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.api import widen as api
from fxgrow.api.deepen import plan_deepening
from fxgrow.apply.module import apply_to_state_dict
from fxgrow.cli.app import app

X = torch.randn(3, 4, 6, 6, dtype=torch.float64)


class Stage(nn.Module):
    """Blocks of its own, which it calls one after the other, whatever they are called."""

    def __init__(self, blocks: int, width: int = 4) -> None:
        super().__init__()
        for place in range(blocks):
            self.add_module(f"b{place + 1}", PlainBlock(width))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Staged(nn.Module):
    """Two stages and a head."""

    def __init__(self, first: int = 3, second: int = 2) -> None:
        super().__init__()
        self.s1, self.down = Stage(first), nn.Conv2d(4, 6, 2, stride=2)
        self.s2, self.head = Stage(second, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.s2(self.down(self.s1(x))).mean((2, 3)))


class Named(nn.Module):
    """Blocks called by their names, and a buffer and a parameter that the code uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.block1, self.block2, self.block3 = (PlainBlock(4) for _ in range(3))
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)) * self.scale + self.shift
        x = self.block1(x)
        x = self.block2(x)
        x = self.block3(x)
        return self.head(self.dropout(x).mean((2, 3)))


def seeded(make, *args) -> nn.Module:
    torch.manual_seed(0)
    return make(*args).double().eval()


def deepened(net: nn.Module, blocks: dict[str, str], x: Tensor = X, **options) -> fxgrow.Grown:
    """Deepen a network a module of which becomes a GraphModule, which a warning says."""
    with pytest.warns(fxgrow.FxgrowWarning, match="is a torch.fx.GraphModule with the same names"):
        return fxgrow.deepen(net, blocks, x, **options)


def assert_kept(net: nn.Module, grown: fxgrow.Grown, x: Tensor = X) -> None:
    """Assert that both compute the same, in both modes, by fxgrow's measure and by another."""
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert max(r.float64.max_rel for r in (found.eval, found.train)) <= 1e-10
    assert found.without_gradient == ()
    assert max_rel(net(x), grown.model.eval()(x)) <= 1e-10


def children(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


# ── blocks that are called whatever they are called ────────────────────────────────────────────


@pytest.mark.parametrize("method", ["r2deeper", "zero_last"])
@pytest.mark.parametrize(
    ("blocks", "depths"),
    [
        ({"s1": "+2"}, (5, 2)),
        ({"s1.b1": "+1"}, (4, 2)),
        ({"s1.b2": "2x", "s2": "4"}, (6, 4)),
    ],
)
def test_a_module_that_calls_its_children_keeps_its_class(blocks, depths, method):
    net = seeded(Staged)
    grown = fxgrow.deepen(net, blocks, X, method)
    assert_kept(net, grown)
    assert [type(m) for m in grown.model.modules()].count(Stage) == 2
    sibling = Staged(*depths).double().eval()
    assert list(grown.model.state_dict()) == list(sibling.state_dict())
    sibling.load_state_dict(grown.model.state_dict(), strict=True)
    assert max_rel(net(X), sibling(X)) <= 1e-10
    assert all(edit.caller is None for edit in grown.plan.rearrangements)


class Projecting(PlainBlock):
    """A residual block that takes what may have another width."""

    def __init__(self, entry: int, width: int) -> None:
        super().__init__(width)
        self.entry = nn.Identity() if entry == width else nn.Conv2d(entry, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.entry(x))


@pytest.mark.parametrize("key", ["s2", "s2.b2", "s2.b1"])
def test_the_first_block_of_a_run_may_be_another(key):
    net = seeded(Staged)
    net.down, net.s2.b1, net.s2.b2 = nn.Identity(), Projecting(4, 6), Projecting(6, 6)
    net.double()
    if key == "s2.b1":
        with pytest.raises(fxgrow.PlanError, match=r"s2\.b1\.conv1 and .* no run.*Stages: s1\."):
            plan_deepening(net, {key: "+1"}, X)
        net.s2.b3 = Projecting(6, 6).double()  # now two of them are alike
    grown = fxgrow.deepen(net, {key: "+1"}, X)
    assert_kept(net, grown)
    assert grown.plan.blocks[0].name == ("s2.b2" if key == "s2.b1" else "s2.b3")


def test_regnet_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("regnetx_002", num_classes=5).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grown = fxgrow.deepen(net, {"s3": "+2", "s4.b3": "+1"}, images)
    assert_kept(net, grown, images)
    assert type(grown.model.s3) is type(net.s3)
    assert children(grown.model.s3) == [f"b{place}" for place in range(1, 7)]
    assert [block.name for block in grown.plan.blocks] == ["s3.b5", "s3.b6", "s4.b4"]
    old, new = net.s4.state_dict(), grown.model.s4.state_dict()
    assert torch.equal(new["b5.conv1.conv.weight"], old["b4.conv1.conv.weight"])


# ── blocks that are called by their names ──────────────────────────────────────────────────────


def test_a_new_block_is_called_in_the_graph():
    net = seeded(Named)
    before = copy.deepcopy(net.state_dict())
    grown = deepened(net, {"block3": "+2"})
    assert_kept(net, grown)
    assert isinstance(grown.model, fx.GraphModule)
    state = grown.model.state_dict()
    assert set(state) - set(before) == {
        f"block{i}.conv{j}.{k}" for i in (4, 5) for j in (1, 2) for k in ("weight", "bias")
    }
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert [n.target for n in grown.model.graph.nodes if "block" in n.name] == [
        f"block{place}" for place in range(1, 6)
    ]
    assert (children(net)[-1], type(net)) == ("head", Named)
    assert not hasattr(net, "block4")
    grown.model.train()
    assert not torch.equal(grown.model(X), grown.model(X))  # dropout is still there


def test_blocks_after_a_new_one_in_the_middle_are_renumbered():
    net = seeded(Named)
    grown = deepened(net, {"block1": "+1"})
    assert_kept(net, grown)
    old, new = net.state_dict(), grown.model.state_dict()
    for before, after in (("block1", "block1"), ("block2", "block3"), ("block3", "block4")):
        assert torch.equal(new[f"{after}.conv1.weight"], old[f"{before}.conv1.weight"])
    assert [block.name for block in grown.plan.blocks] == ["block2"]
    calls = [node for node in grown.model.graph.nodes if node.op == "call_module"]
    assert all(node.name == node.target for node in calls)


def test_the_module_that_holds_a_run_can_be_named():
    net = seeded(Named)
    plan = plan_deepening(net, {"": "4"}, X)
    assert [block.name for block in plan.blocks] == ["block4"]


class Around(nn.Module):
    """A network around one whose blocks are attributes, and a list beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = Named(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


def test_only_the_module_that_calls_the_blocks_becomes_a_graph():
    net = seeded(Around)
    grown = deepened(net, {"body.block2": "+1"})
    assert_kept(net, grown)
    assert [type(net) for net in (grown.model, grown.model.tail)] == [Around, nn.Sequential]
    assert isinstance(grown.model.body, fx.GraphModule)
    assert grown.plan.rearrangements[0].caller == "body"
    within = deepened(net, {"body.block2": "+1"}, module="body")
    assert set(within.model.state_dict()) == set(grown.model.state_dict())
    assert max_rel(net(X), within.model(X)) <= 1e-10


class Held(nn.Module):
    """Calls blocks that another module holds, the way in which they are called told by name."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.list = nn.Module(), nn.ModuleList(Gated(4) for _ in range(2))
        self.held.g1, self.held.g2 = Gated(4), Gated(4)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        x = self.held.g2(x=self.held.g1(x=x, gate=gate), gate=gate)
        return self.list[1](self.list[0](x, gate), gate)


class Gated(nn.Module):
    """A residual block with two arguments, or a layer that gives another width."""

    def __init__(self, width: int, given: int | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, given or width, 1)
        self.conv2 = None if given else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = self.conv1(x)
        return y if self.conv2 is None else x + self.conv2(F.relu(y) * torch.sigmoid(gate))


@pytest.mark.parametrize("key", ["held.g2", "held", "list", "list.0"])
def test_other_arguments_are_those_of_the_block_that_is_copied(key):
    net = seeded(Held)
    grown = deepened(net, {key: "+1"})
    assert_kept(net, grown)
    assert grown.plan.rearrangements[0].caller == ""
    assert set(net.state_dict()) < set(grown.model.state_dict())


# ── plans, files, optimizers, and more than one surgery ────────────────────────────────────────


def test_a_plan_is_data_and_serves_a_state_dict():
    net = seeded(Named)
    plan = plan_deepening(net, {"block2": "+1"}, X)
    again = fxgrow.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.rearrangements[0].caller == ""
    assert again.makes_graphs
    grown = again.apply(net)
    assert max_rel(net(X), grown(X)) <= 1e-10
    weights = apply_to_state_dict(again, net.state_dict())
    assert set(weights) == set(grown.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in grown.state_dict().items())
    assert again.apply(copy.deepcopy(net).train()).training


def test_deeper_and_wider_in_one_plan():
    net = seeded(Named)
    deeper = plan_deepening(net, {"block2": "+1"}, X)
    both = api.plan(net, {"block3.conv1": "2x"}, X, after=deeper)
    grown = api.carry_out(fxgrow.Plan.from_json(both.to_json()), net, X)
    assert_kept(net, grown)
    assert grown.model.block3.conv1.out_channels == 8
    wider = api.plan(net, {"block3.conv1": "+3"}, X)
    both = plan_deepening(net, {"block3": "+1"}, X, after=wider)
    with pytest.warns(fxgrow.FxgrowWarning, match="GraphModule"):
        grown = api.carry_out(both, net, X)
    assert_kept(net, grown)
    assert grown.model.block4.conv1.out_channels == 7


def test_a_larger_kernel_after_a_new_block():
    net = seeded(Named)
    first = plan_deepening(net, {"block3": "+1"}, X)
    grown = fxgrow.morph_kernel(net, {"block4.conv1": "5"}, X, after=first)
    assert_kept(net, grown)
    assert grown.model.block4.conv1.kernel_size == (5, 5)


def test_a_graph_copies_pickles_and_gets_deeper_again():
    net = seeded(Named)
    once = deepened(net, {"block1": "+1"}).model
    for other in (copy.deepcopy(once), pickle.loads(pickle.dumps(once))):
        assert torch.equal(other(X), once(X))
        assert list(other.state_dict()) == list(once.state_dict())
    grown = deepened(once, {"block4": "+1"})
    assert_kept(net, grown)
    assert [block.name for block in grown.plan.blocks] == ["block5"]


def test_an_optimizer_goes_on():
    net = seeded(Named)
    optimizer = torch.optim.Adam(net.parameters())
    net(X).square().sum().backward()
    optimizer.step()
    old = optimizer.state[net.block3.conv1.weight]["exp_avg"].clone()
    grown = deepened(net, {"block1": "+1"})
    fxgrow.grow_optimizer_(optimizer, net, grown)
    assert torch.equal(optimizer.state[grown.model.block4.conv1.weight]["exp_avg"], old)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in grown.model.parameters()}
    first = grown.model(X).square().sum()
    first.backward()
    optimizer.step()
    assert grown.model(X).square().sum() < first


def test_the_command_writes_a_file_that_loads(tmp_path):
    net = seeded(Named).float()
    optimizer = torch.optim.AdamW(net.parameters())
    net(X.float()).square().sum().backward()
    optimizer.step()
    checkpoint = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(checkpoint, tmp_path / "model.pt")
    arguments = ["deepen", str(tmp_path / "model.pt"), "--stage", "block1", "--blocks", "+1"]
    arguments += ["--arch", "test_deepen_runs:Named", "--input-shape", "2x4x6x6"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "deeper.pt")])
    assert result.exit_code == 0, result.output
    assert "torch.fx.GraphModule" in result.output
    deeper = fxgrow.load(tmp_path / "deeper.pt", arch="test_deepen_runs:Named")
    torch.testing.assert_close(deeper(X.float()), net(X.float()), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(deeper.parameters())
    optimizer.load_state_dict(torch.load(tmp_path / "deeper.pt")["optimizer"])
    saved = checkpoint["optimizer"]["state"]
    place = [name for name, _ in net.named_parameters()].index("block3.conv1.weight")
    state = optimizer.state[deeper.block4.conv1.weight]
    assert torch.equal(state["exp_avg"], saved[place]["exp_avg"])


def test_a_number_of_blocks_that_the_code_states_does_not_go_into_a_graph():
    net = seeded(Named)
    net.config, net.num_blocks = SimpleNamespace(num_blocks=3), 3
    grown = deepened(net, {"block3": "+1"})
    assert_kept(net, grown)
    assert not grown.plan.modules


def test_stages_of_one_structure_are_a_run_themselves():
    class Isotropic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s1, self.s2 = Stage(2), Stage(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.s2(self.s1(x))

    net = seeded(Isotropic)
    grown = deepened(net, {"s2": "+1"})
    assert_kept(net, grown)
    assert [(block.name, block.like) for block in grown.plan.blocks] == [("s3", "s2")]
    grown = fxgrow.deepen(net, {"s1.b1": "+1", "s2.b2": "+1"}, X)
    assert_kept(net, grown)
    with pytest.raises(fxgrow.PlanError, match="or in one another"):
        plan_deepening(net, {"s2": "+1", "s1.b1": "+1"}, X)


# ── what is no run, or cannot be called ────────────────────────────────────────────────────────


def test_what_is_no_run_is_refused():
    class Between(Named):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block1(x)
            x = self.block2(x + self.stem(x))
            return self.head(self.block3(F.relu(x)).mean((2, 3)))

    class Fork(Named):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block1(x)
            return self.head((self.block2(x) + self.block3(x)).mean((2, 3)))

    class Again(Named):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block2(self.block1(self.block1(x)))
            return self.head(self.block3(x).mean((2, 3)))

    reasons = {
        Between: "block1 and block2 are alike, but no run: what the one gives is not",
        Fork: "block1 and block2 are alike, but no run",
        Again: r"no block of the network can be inserted after block1: block1 runs 2 times",
    }
    for kind, reason in reasons.items():
        with pytest.raises(fxgrow.PlanError, match=reason):
            plan_deepening(seeded(kind), {"block1": "+1"}, X)
    with pytest.raises(fxgrow.PlanError, match="stem is a Conv2d, no list of blocks and no block"):
        plan_deepening(seeded(Named), {"stem": "+1"}, X)
    with pytest.raises(fxgrow.PlanError, match="no layer in a plain chain"):
        plan_deepening(seeded(Named), {"block1": "+1"}, X, "net2deeper")


def test_what_uses_a_block_twice_uses_the_new_one_twice():
    class Skip(Named):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block1(x)
            return self.head((x + self.block3(self.block2(x))).mean((2, 3)))

    net = seeded(Skip)
    # what it does not use would be lost
    with pytest.raises(fxgrow.PlanError, match="Skip does not use scale, which its graph would"):
        plan_deepening(net, {"block1": "+1"}, X)
    del net.stem, net.scale, net.shift
    grown = deepened(net, {"block1": "+1"})
    assert_kept(net, grown)
    assert len(next(n for n in grown.model.graph.nodes if n.target == "block2").users) == 2


def test_what_a_graph_says_before_it_fails_is_not_shown(capfd):
    class Collecting(Named):
        def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
            seen = [] if seen is None else seen  # a tracer takes it for given
            seen.append(x)
            return super().forward(x)

    with pytest.raises(fxgrow.PlanError, match=r"a graph: the network does not run with blocks"):
        plan_deepening(seeded(Collecting), {"block3": "+1"}, X)
    assert capfd.readouterr().err == ""


def test_code_that_no_graph_can_stand_for_is_refused():
    class Branching(Named):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[0] > 0 else -x)

    class Moody(Named):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.1, self.training))

    class Constant(Named):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.tensor(1.0))

    reasons = {
        Branching: r"block4 runs 0 times in a pass.*; nor can it be called in a graph: torch\.fx "
        "cannot trace Branching",
        Moody: "the graph of Moody differs between train and eval mode",
        Constant: "Constant makes a constant, which would be a buffer",
    }
    for kind, reason in reasons.items():
        with pytest.raises(fxgrow.PlanError, match=reason) as caught:
            plan_deepening(seeded(kind), {"block3": "+1"}, X)
        assert "nn.ModuleList that the code iterates over" in caught.value.way_out


def test_blocks_side_by_side_are_refused():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(PlainBlock(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                y = block(x)
            return y

    with pytest.raises(fxgrow.PlanError, match=r"does not call blocks\.1 on what blocks\.0 gives"):
        plan_deepening(seeded(Last), {"blocks.0": "+1"}, X)


def test_a_list_that_code_counts_is_refused():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(PlainBlock(4), PlainBlock(4))

        def forward(self, x: Tensor) -> Tensor:
            for _ in self.blocks:
                x = F.relu(x)
            return self.blocks(x)

    with pytest.raises(fxgrow.PlanError, match="the rest of the network computes") as caught:
        plan_deepening(seeded(Counting), {"blocks": "+1"}, X)
    assert caught.value.message.endswith("or by their number.")


class Late(nn.Module):
    """Blocks of which the second needs what is computed from what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.g1, self.g2, self.g3 = Gated(4, 6), Gated(6), Gated(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.g1(x)
        gate = x.mean((2, 3), keepdim=True)
        return self.g3(self.g2(x, gate), gate)


def test_a_block_before_its_arguments_is_refused():
    with pytest.raises(fxgrow.PlanError, match=r"put in order: .*used before it has been"):
        plan_deepening(seeded(Late), {"g1": "+1"}, X)


def test_blocks_without_a_plain_name_are_refused():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = PlainBlock(4), PlainBlock(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    with pytest.raises(fxgrow.PlanError, match="a block after 'second' has no plain name"):
        plan_deepening(seeded(Words), {"second": "+1"}, X)

    class Taken(Named):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.block4(x))

        def __init__(self) -> None:
            super().__init__()
            self.block4 = nn.Conv2d(4, 4, 1)

    with pytest.raises(fxgrow.PlanError, match="after block3 would be called block4, as another"):
        plan_deepening(seeded(Taken), {"block3": "+1"}, X)


def test_several_runs_in_one_module_are_told_apart():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a1, self.a2, self.mid = PlainBlock(4), PlainBlock(4), nn.Conv2d(4, 4, 1)
            self.b1, self.b2 = PlainBlock(4), PlainBlock(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b2(self.b1(self.mid(self.a2(self.a1(x)))))

    net = nn.Sequential(seeded(Two), nn.Identity(), nn.ReLU())
    with pytest.raises(fxgrow.PlanError, match=r"holds 2 runs.* comes?: a2 or b2"):
        plan_deepening(net[0], {"": "+1"}, X)
    with pytest.raises(fxgrow.PlanError, match=r"no stage '0\.c2'.*Stages: .*0\.a2, 0\.b2"):
        plan_deepening(net, {"0.c2": "+1"}, X)
    with pytest.raises(fxgrow.PlanError, match="Deepen one after the other"):
        plan_deepening(net, {"0.a1": "+1", "0.b1": "+1"}, X)
    once = deepened(net, {"0.a2": "+1"})
    assert_kept(net, once)
    assert_kept(net, deepened(once.model, {"0.b1": "+1"}))


def test_what_calls_its_children_keeps_its_class_beside_a_graph():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block1, self.block2 = PlainBlock(4), PlainBlock(4)
            self.tail = Stage(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.block2(self.block1(x)))

    net = seeded(Mixed)
    for blocks in ({"block2": "+1", "tail": "+2"}, {"tail": "+2", "block2": "+1"}):
        grown = deepened(net, blocks)
        assert_kept(net, grown)
        assert {e.container: e.caller for e in grown.plan.rearrangements} == {"": "", "tail": None}
        assert type(grown.model.tail) is Stage
        assert children(grown.model) == ["block1", "block2", "block3", "tail"]
