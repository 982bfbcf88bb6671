"""Names are followed through the steps of a plan as the modules themselves go through them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.apply.rearrange import rearranged
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import Child, Rearrangement
from fxgrow.plan.names import NameOrigin, module_origins, tensor_origins
from fxgrow.plan.schema import Plan
from fxgrow.training import deepen_


class Block(nn.Module):
    """A block that holds its place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.layer_idx = place
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of what it gets and its branch."""
        return x + self.b(torch.relu(self.a(x)))


def build() -> nn.Sequential:
    """Return blocks in a list in a list."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(place) for place in range(3)))
    return nn.Sequential(nn.Linear(4, 6), blocks, nn.Linear(6, 2)).double()


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return a plan of three steps: wider, and twice deeper in the middle."""
    x = torch.randn(5, 4).double()
    wide = fxgrow.widen(build(), "2x", x)
    deep = fxgrow.deepen(build(), {"1.0": "+1"}, x, after=wide.plan)
    return fxgrow.deepen(build(), {"1.1": "+1"}, x, after=deep.plan).plan


def at_random(rng: random.Random, model: nn.Module) -> Rearrangement:
    """Return a rearrangement of one of the lists of a model, with copies among what it holds."""
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.Sequential)]
    container = rng.choice(lists)
    sources: list[tuple[str, bool]] = []
    for name in model.get_submodule(container)._modules:
        sources.append((name, False))
        sources += [(name, True)] * (rng.random() < 0.4)
    children = tuple(Child(str(i), source, new) for i, (source, new) in enumerate(sources))
    return Rearrangement(container, children)


@pytest.mark.parametrize("seed", range(20))
def test_names_go_where_modules_and_tensors_go(plan: Plan, seed: int) -> None:
    """The oracle is the executor: what is old is the same object, what is new a copy of it."""
    rng = random.Random(seed)
    before = after = build()
    steps = []
    for _ in range(3):
        edit = at_random(rng, after)
        steps.append(replace(plan.steps[0], rearrangements=(edit,)))
        after, _ = rearranged(after, [edit])
    layers = {n: m for n, m in before.named_modules() if isinstance(m, nn.Linear)}
    origins = module_origins(dict(before.named_modules()), steps)
    assert list(origins) == [name for name, _ in after.named_modules()]
    for name, module in after.named_modules():
        if isinstance(module, nn.Linear):
            assert origins[name].new == (module is not layers[origins[name].name])
    old = named_tensors(before)
    tensors = tensor_origins(old, steps)
    assert list(tensors) == list(named_tensors(after))
    for name, tensor in named_tensors(after).items():
        assert tensor.shape == old[tensors[name].name].shape
        assert tensors[name].new == tensor.is_meta == (tensor is not old[tensors[name].name])
        assert tensors[name].new == origins[name.rpartition(".")[0]].new


@pytest.mark.parametrize("origins", [tensor_origins, module_origins])
def test_steps_compose(plan: Plan, origins) -> None:
    """No step changes nothing, and steps can be taken one part after the other."""
    names = list(named_tensors(build()))
    assert origins(names, ()) == {name: NameOrigin(name, False) for name in names}
    whole = origins(names, plan.steps)
    for cut in range(len(plan.steps) + 1):
        first = origins(names, plan.steps[:cut])
        rest = origins(first, plan.steps[cut:])
        assert whole == {
            name: NameOrigin(first[old].name, new or first[old].new)
            for name, (old, new) in rest.items()
        }


def test_what_is_like_something_new_is_new(plan: Plan) -> None:
    """A copy of a copy comes from the first network's block, and is no old block of it."""
    names = tensor_origins(named_tensors(build()), plan.steps)
    assert names["1.1.a.weight"] == names["1.2.a.weight"] == ("1.0.a.weight", True)
    assert names["1.3.a.weight"] == ("1.1.a.weight", False)


def test_blocks_in_the_middle_move_the_places_that_blocks_hold() -> None:
    """In place as in a copy: a step names the modules that it edits as they are called after it."""
    x, net = torch.randn(5, 4).double(), build()
    for stage in ("1.0", "1.1"):
        deepen_(net, {stage: "+1"}, x)
        assert [block.layer_idx for block in net[1]] == list(range(len(net[1])))
