"""Names of modules may be any text; into the code of a graph none gets but as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from guards import CODE, TEXTS, assert_unchanged, classes, refusal
from networks import max_rel
from torch import Tensor, fx, nn

import fxgrow
from fxgrow.apply.graph import graph_module
from fxgrow.errors import PlanError
from fxgrow.files.models import open_model, write_grown


@pytest.fixture(autouse=True)
def _nothing_changes() -> Iterator[None]:
    before = classes()
    yield
    assert_unchanged(before)


class Keyed(nn.Module):
    """A layer under a key that may be any text but for dots."""

    def __init__(self, key: str, literal: bool) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleDict({key: nn.Linear(5, 8)}), nn.Linear(8, 3)
        self.key, self.literal = key, literal

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layers[self.key](x))
        return self.last(y.view(-1, 8) if self.literal else y)


def keyed(key: str, literal: bool = False) -> nn.Module:
    """Return such a network, always the same."""
    torch.manual_seed(0)
    return Keyed(key, literal).eval()


KEYS_OF_ALL_KINDS = ["3x3-conv", "k=3", "a b", "q'", "é", "{x}", "%s", "a#b", "self", "[0]"]
UNWRITABLE = [
    'a"b', "back\\slash", "new\nline", "class", "None", "\ufb01", "# COUNTER: 1", "\u2028", "end\\",
    TEXTS[0],
]  # fmt: skip
FIVES = torch.randn(4, 5)
ROUTES: dict[str, tuple[bool, dict[str, Any]]] = {
    "code": (False, {}),
    "sizes in code": (True, {}),
    "multipliers": (False, {"rescaling": "default_vt", "compensate": True}),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("key", [*KEYS_OF_ALL_KINDS, *UNWRITABLE], ids=lambda key: ascii(key)[:12])
@pytest.mark.filterwarnings("ignore::fxgrow.FxgrowWarning")
def test_a_name_of_any_text_grows_is_saved_and_loaded_or_refused_where_code_needs_it(
    key: str, route: str, tmp_path: Path
) -> None:
    literal, options = ROUTES[route]
    net, source, out = keyed(key, literal), tmp_path / "net.pt", tmp_path / "out.pt"
    torch.save(net.state_dict(), source)
    arch = {"arch": f"{__name__}:keyed", "arch_arguments": {"key": key, "literal": literal}}
    opened = open_model(source, **arch)
    if key in UNWRITABLE and route != "code":
        with pytest.raises(PlanError, match=r"torch\.fx cannot write the name"):
            fxgrow.widen(opened.model, "2x", FIVES, **options)
        return
    grown = fxgrow.widen(opened.model, "2x", FIVES, **options)
    assert isinstance(grown.model, fx.GraphModule) == (route != "code")
    write_grown(opened, grown, out, inputs=FIVES)
    again = fxgrow.load(out, **arch)
    assert again.get_submodule(f"layers.{key}").out_features == 16
    assert max_rel(net(FIVES), again(FIVES)) < 1e-5
    assert fxgrow.Plan.from_json(grown.plan.to_json()) == grown.plan


class Echo(nn.Module):
    """Tells what it was given besides."""

    def forward(self, x: Tensor, *told: object, **more: object) -> Tensor:
        self.told = (*told, *more.values())
        return x


class Saying(nn.Module):
    """Gives constants to a module."""

    def __init__(self, *told: object, **more: object) -> None:
        super().__init__()
        self.echo, self.told, self.more = Echo(), told, more

    def forward(self, x: Tensor) -> Tensor:
        return self.echo(x, *self.told, **self.more)


class Closed(fx.Tracer):
    """A tracer for which every module is a node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_text_of_constants_stays_text_in_a_graph() -> None:
    told = (*TEXTS[:5], {"a": TEXTS[0]}, [TEXTS[3]], 1.5, None, slice(1, None))
    net = Saying(*told, word=TEXTS[0])
    made = graph_module(net, Closed().trace(net))
    made(torch.ones(1))
    assert [*made.echo.told] == [*told, TEXTS[0]]
    wrong = Saying(**{f"a=exec('{CODE}'), b": 1})
    assert "cannot write" in refusal(lambda: graph_module(wrong, Closed().trace(wrong)))


@pytest.mark.parametrize(
    "text", [f"a=exec('{CODE}')", "a b", "class", ""], ids=["code", "words", "keyword", "nothing"]
)
def test_what_no_module_is_called_gets_into_no_graph(text: str) -> None:
    net = Saying()

    def graph_with(operation: str, target: str) -> fx.Graph:
        graph = fx.Graph()
        x = graph.placeholder(target if operation == "placeholder" else "x")
        if operation != "placeholder":
            x = graph.create_node(operation, target, (x,))
        graph.output(x)
        return graph

    def made(operation: str, target: str) -> str:
        return refusal(lambda: graph_module(net, graph_with(operation, target)))

    for operation in ("placeholder", "call_method", "call_module", "get_attr"):
        assert made(operation, text)
    for target in ("nowhere", "echo.nowhere", "told", "forward", "__class__"):
        assert made("call_module", target)
    node = next(iter(graph_with("call_module", "echo").nodes))
    node.name = text or "a b"
    assert refusal(lambda: graph_module(net, node.graph))
