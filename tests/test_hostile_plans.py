"""Plans are hostile until checked: nothing that one says runs code or breaks anything else.

Honest plans of every kind are changed field by field and carried out, on the network that they are
for and as a record in a file of weights. Each is refused in one line, or does no harm.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from guards import FLAG, TEXTS, Classes, assert_unchanged, classes, refusal
from honest import HONEST, Decoder, Words, honest, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgrow
from fxgrow.api import widen as api
from fxgrow.apply.module import apply_to_state_dict, remade, set_attributes
from fxgrow.cli.run import read_plan
from fxgrow.plan.edits import ModuleEdit
from fxgrow.plan.schema import plans_of

Data = dict[str, Any]


@pytest.mark.parametrize("kind", HONEST)
def test_every_kind_of_plan_survives_json_and_makes_the_same(kind: str) -> None:
    net, plan = honest(kind)
    again = fxgrow.Plan.from_json(text_of(kind))
    assert again == plan
    one, other = (apply_to_state_dict(p, net.state_dict()) for p in (plan, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    if not plan.names:
        made = again.apply(net).state_dict()
        assert all(torch.equal(made[name], one[name]) for name in made)


# ── carrying plans out ─────────────────────────────────────────────────────────────────────────


@functools.cache
def classes_before() -> Classes:
    """Return what classes held before any plan was hostile."""
    for kind in HONEST:
        honest(kind)
    return classes()


@pytest.fixture(autouse=True)
def _nothing_changes() -> Iterator[None]:
    before = classes_before()
    assert nn.Linear in before
    assert len(before) > 300
    yield
    assert_unchanged(before)


@functools.cache
def state_of(kind: str) -> dict[str, Tensor]:
    """Return a network's tensors as they were before any plan was carried out."""
    return {name: tensor.clone() for name, tensor in honest(kind)[0].state_dict().items()}


def attributes(net: nn.Module) -> list[tuple[str, str]]:
    """Return all that the modules of a network hold besides tensors and modules, as text."""
    return [
        (name, str({key: value for key, value in vars(module).items() if key[0] != "_"}))
        for name, module in net.named_modules()
    ]


def carried_out(kind: str, data: object) -> str:
    """Return why a plan is refused when it is read and carried out; its network stays as it is."""
    net, _ = honest(kind)
    before, held = state_of(kind), attributes(net)
    reason = refusal(lambda: fxgrow.Plan.from_json(json.dumps(data)).apply(net))
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert attributes(net) == held
    return reason


def loaded(data: object, folder: Path, state: dict[str, Tensor] | None = None) -> str:
    """Return why a file of weights is refused in whose record a plan is."""
    state = OrderedDict({"weight": torch.ones(1)} if state is None else state)
    vars(state)["_metadata"] = OrderedDict(
        _fxgrow={
            "schema": 1,
            "fxgrow": fxgrow.__version__,
            "architecture": {"name": "torchvision:mobilenet_v3_small",
                             "arguments": {"num_classes": 5}},
            "plans": [data],
        }
    )  # fmt: skip
    path = folder / "weights.pt"
    torch.save(state, path)
    return refusal(lambda: fxgrow.load(path))


# ── every field, with what should not be in it ─────────────────────────────────────────────────

Where = tuple[str | int, ...]  # "*" is the first of several

WORDS: dict[str, list[Where]] = {
    "widen": [
        ("request", "init"), ("request", "pairing"), ("request", "rescaling"),
        ("request", "where"), ("request", "grouped"), ("groups", 0, "kind"),
        ("groups", 0, "preserves"), ("scopes", 0, "module"), ("scopes", 0, "tracer"),
        ("request", "verb"), ("modules", 0, "module"),
        ("modules", 0, "attribute"), ("modules", 0, "after"), ("prediction", 0, "producer"),
        ("prediction", 0, "consumer"), ("prediction", 0, "module"),
        ("tensors", "1.weight", "absorption", "variance"), ("tensors", "1.weight", "source"),
        ("tensors", "1.weight", "fill"), ("tensors", "1.weight", "absorption", "part"),
        ("tensors", "0.weight", "axes", 0, "role"), ("source", "0.weight", 1),
        ("tensors", "0.weight", "axes", 0, "runs", 0, "kind"),
    ],
    "compensated": [("multipliers", 0, key) for key in ("producer", "consumer", "module")],
    "sizes": [("sizes", 0, key) for key in ("node", "function", "module")],
    "deeper": [
        ("request", "method"), ("blocks", 0, "method"), ("modules", 0, "attribute"),
        ("modules", 1, "after", 2), ("rearrangements", 0, "container"),
        *(("rearrangements", 0, "children", 2, key) for key in ("name", "source")),
    ],
    "called": [
        ("rearrangements", 0, "container"), ("rearrangements", 0, "caller"),
        *(("rearrangements", 0, "children", place, key)
          for place in (0, 4) for key in ("name", "source")),
    ],
    "tied": [("aliases", "*")],
    "converted": [("names", "*"), ("tensors", "*", "source")],
    "twice": [("after", 0, "rearrangements", 0, "children", 2, "name")],
    "deeper record": [("rearrangements", 0, "children", 7, "name")],
}  # fmt: skip
KEYS: dict[str, list[Where]] = {
    "widen": [("source",), ("tensors",), (), ("request",), ("tensors", "*")],
    "tied": [("aliases",)],
    "converted": [("names",)],
    "deeper": [("rearrangements", 0), ("rearrangements", 0, "children", 0)],
}


def spot(data: Any, where: Where) -> Any:
    """Return a part of a plan's data."""
    for key in where:
        data = data[next(iter(data)) if key == "*" and isinstance(data, dict) else key]
    return data


def changed(kind: str, where: Where, value: object) -> Data:
    """Return an honest plan's data with another value at one place."""
    data: Data = json.loads(text_of(kind))
    *path, last = where
    holder = spot(data, tuple(path))
    holder[next(iter(holder)) if last == "*" else last] = value
    return data


def listed(fields: dict[str, list[Where]]) -> list[Any]:
    """Return fields as the parameters of a test."""
    return [
        pytest.param(kind, where, id=f"{kind}: {'.'.join(map(str, where)) or 'itself'}")
        for kind, places in fields.items()
        for where in places
    ]


@pytest.mark.parametrize(("kind", "where"), listed(WORDS))
def test_text_that_is_no_name_is_refused_or_does_no_harm(
    kind: str, where: Where, tmp_path: Path
) -> None:
    for text in TEXTS:
        carried_out(kind, changed(kind, where, text))
    assert loaded(changed(kind, where, TEXTS[0]), tmp_path)


@pytest.mark.parametrize(("kind", "where"), listed(KEYS))
def test_a_field_or_a_name_that_is_not_known_is_refused(
    kind: str, where: Where, tmp_path: Path
) -> None:
    for text in TEXTS:
        data: Data = json.loads(text_of(kind))
        holder = spot(data, where)
        holder[text] = next(iter(holder.values()))
        assert carried_out(kind, data)
    assert loaded(data, tmp_path)


NUMBERS: dict[str, list[Where]] = {
    "odd": [
        ("request", "gain"), ("request", "noise"), ("request", "split_noise"),
        ("request", "multiple_of"), ("request", "seed"), ("parameters", 1), ("flops", 0),
        ("scopes", 0, "inputs", 0, 0), ("groups", 0, "width", 1), ("groups", 0, "gain"),
        ("source", "0.weight", 0, 1), ("tensors", "5.weight", "scale"),
        ("tensors", "5.weight", "fan_in"),
        ("tensors", "5.weight", "shape", 0), ("tensors", "5.weight", "new_shape", 1),
        ("tensors", "5.weight", "groups", 0), ("tensors", "5.weight", "groups", 1),
        ("tensors", "5.weight", "axes", 0, "dim"), ("tensors", "5.weight", "axes", 0, "groups"),
        ("tensors", "5.weight", "axes", 0, "runs", 1, "start"),
        ("tensors", "5.weight", "axes", 0, "runs", 1, "length"), ("modules", 0, "after"),
        ("modules", 0, "before"), ("schema",),
    ],
    "widen": [
        ("tensors", "1.weight", "absorption", "gain"), ("prediction", 0, "factor"),
        ("tensors", "1.weight", "absorption", "eps"),
        ("tensors", "1.running_var", "absorption", "gain"),
    ],
    "compensated": [("multipliers", 0, "factor")],
    "sizes": [("sizes", 0, "before", 1), ("sizes", 0, "after", 1)],
    "kernels": [("kernels", 0, "after", 0), ("modules", 0, "after", 0)],
    "deeper": [("modules", 2, "after", 0), ("blocks", 0, "parameters")],
}  # fmt: skip
NOT_NUMBERS = [
    None, True, "1", "NaN", [], {}, [1], float("nan"), float("inf"), -float("inf"), 10**400,
]  # fmt: skip
ODD_NUMBERS = [2**70, -(2**70), 2**33, -1, 0, 1e-40, 1e40, 0.5]


@pytest.mark.parametrize(("kind", "where"), listed(NUMBERS))
def test_numbers_that_are_none_are_refused_and_others_do_no_harm(
    kind: str, where: Where, tmp_path: Path
) -> None:
    for number in NOT_NUMBERS:
        assert carried_out(kind, changed(kind, where, number)), number
    for number in ODD_NUMBERS:
        carried_out(kind, changed(kind, where, number))
    assert loaded(changed(kind, where, 10**400), tmp_path)


LISTS: dict[str, list[Where]] = {
    "widen": [
        (key,)
        for key in ("groups", "refused", "tensors", "modules", "prediction", "aliases",
                    "source", "scopes", "warnings", "blocks", "after", "names",
                    "parameters", "request")
    ],
    "odd": [
        ("tensors", "5.weight", "axes"), ("tensors", "5.weight", "axes", 0, "runs"),
        ("tensors", "5.weight", "shape"), ("request", "include"),
    ],
    "deeper": [("rearrangements",), ("rearrangements", 0, "children"), ("modules", 1, "after")],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "where"), listed(LISTS))
def test_what_is_no_list_and_what_has_more_entries_than_occur_is_refused(
    kind: str, where: Where, tmp_path: Path
) -> None:
    for value in (None, 1, "text", [{}], [None], {"a": None}, [[[[]]]]):
        assert carried_out(kind, changed(kind, where, value)), value
    present = spot(json.loads(text_of(kind)), where)
    some = next(iter(present), "x") if isinstance(present, list) else "x"
    for many in ([some] * ((1 << 20) + 1), dict.fromkeys(range((1 << 20) + 1), some)):
        data = changed(kind, where, many)
        assert "entries" in refusal(lambda data=data: fxgrow.Plan.from_dict(data))
    assert loaded(changed(kind, where, [None]), tmp_path)


def test_more_globs_than_are_tried_are_refused_before_they_are_read() -> None:
    """Each of them would be tried against each tensor."""
    for part in ("width", "include", "exclude", "pairing"):
        globs = [f"layer{number}" for number in range((1 << 12) + 1)]
        many = dict.fromkeys(globs, "2x") if part in ("width", "pairing") else globs
        data = changed("widen", ("request", part), many)
        assert f"request.{part}" in refusal(lambda data=data: fxgrow.Plan.from_dict(data))


# ── plans of the right types that say what no planner says ─────────────────────────────────────

Change = Callable[[Data], object]


def put(*where: str | int, to: object) -> Change:
    """Return what puts a value somewhere."""
    return lambda data: spot(data, where[:-1]).__setitem__(where[-1], to)


def edit(attribute: str, before: object, after: object, module: str = "") -> Change:
    """Return what adds the edit of an attribute."""
    entry = {"module": module, "attribute": attribute, "before": before, "after": after}
    return lambda data: data["modules"].append(entry)


def runs(*entries: tuple[str, int, int]) -> Change:
    """Return what lays the first axis of a tensor of 4 x 4 x 3 x 3 out otherwise."""
    made = [{"kind": kind, "start": start, "length": length} for kind, start, length in entries]
    return put("tensors", "5.weight", "axes", 0, "runs", to=made)


def children(*entries: tuple[str, str, bool], place: int = 0) -> Change:
    """Return what has a module hold others."""
    made = [{"name": name, "source": source, "new": new} for name, source, new in entries]
    return put("rearrangements", place, "children", to=made)


def nested(levels: int) -> Change:
    """Return what puts plans into plans."""

    def change(data: Data) -> None:
        for _ in range(levels):
            data["after"] = [copy.deepcopy(data)]

    return change


BLOCKS = [("stem", "stem", False), ("relu", "relu", False), ("block1", "block1", False),
          ("block2", "block2", False), ("head", "head", False)]  # fmt: skip
WEIGHT = ("tensors", "5.weight")
IMPOSSIBLE: dict[str, tuple[str, Change, str]] = {
    "runs beyond the old": ("odd", runs(("old", 0, 4), ("borrowed", 4, 1)), "positions"),
    "runs from before the old": ("odd", runs(("old", -1, 4), ("zero", 0, 1)), "positions"),
    "runs of a negative length": ("odd", runs(("old", 0, 6), ("zero", 0, -1)), "positions"),
    "runs of more than was drawn": ("odd", runs(("old", 0, 4), ("new", 9, 1)), "positions"),
    "runs that overflow": ("odd", runs(("old", 0, 4), ("new", 2**62, 2**62)), "positions"),
    "too few runs": ("odd", runs(("old", 0, 4)), "new_shape"),
    "runs without end": ("odd", runs(("old", 0, 4), ("zero", 0, 2**62)), "new_shape"),
    "more than fits into memory": (
        "widen",
        lambda d: d["tensors"]["5.weight"].update(
            new_shape=[1 << 31, 1 << 31, 3, 3],
            axes=[{**axis, "runs": [{"kind": "zero", "start": 0, "length": 1 << 31}]}
                  for axis in d["tensors"]["5.weight"]["axes"]]),
        "fit into memory"),
    "a dim twice": ("widen", put(*WEIGHT, "axes", 1, "dim", to=1), "named twice"),
    "a dim beyond": ("odd", put(*WEIGHT, "axes", 0, "dim", to=4), "no dim"),
    "a dim from the end": ("odd", put(*WEIGHT, "axes", 0, "dim", to=-1), "no dim"),
    "groups that do not divide": ("widen", put(*WEIGHT, "axes", 0, "groups", to=3), "has not 3"),
    "groups of rows": ("odd", put(*WEIGHT, "axes", 0, "groups", to=2), "has not 2"),
    "no groups": ("odd", put(*WEIGHT, "groups", to=[0, 1]), "numbers of groups"),
    "groups of a vector": ("odd", put("tensors", "5.bias", "groups", to=[2, 1]), "has not 2"),
    "another shape": ("odd", put(*WEIGHT, "new_shape", to=[6, 4, 3, 3]), "axes make"),
    "fewer dims": ("odd", put(*WEIGHT, "new_shape", to=[5]), "axes make"),
    "a shape of another source": ("odd", put(*WEIGHT, "shape", to=[4, 4, 1, 1]), "plan's source"),
    "a source that is not there": ("odd", put(*WEIGHT, "source", to="6.weight"), "or of none"),
    "a source of another shape": ("odd", put(*WEIGHT, "source", to="0.weight"), "plan's source"),
    "a tensor that is not there": (
        "odd", lambda d: d["tensors"].__setitem__("9", d["tensors"]["5.bias"]), "or of none"),
    "an identity without a diagonal": (
        "odd", put("tensors", "5.bias", "fill", to="identity"), "fill"),
    "a fill and runs": ("odd", put(*WEIGHT, "fill", to="constant"), "fill"),
    "drawn whole numbers": (
        "odd",
        lambda d: d["tensors"].__setitem__(
            "1.num_batches_tracked",
            d["tensors"]["5.bias"] | {"shape": [], "new_shape": [], "axes": [], "absorption":
            {"part": "weight", "gain": 1.0, "eps": 1.0, "variance": "1.num_batches_tracked"}}),
        "int64"),
    "a dtype that is none": ("odd", put("source", "5.weight", 1, to="nn"), "no dtype"),
    "a norm without variance": (
        "widen", put("tensors", "1.weight", "absorption", "variance", to="1.running_mean"),
        "no running_var"),
    "a variance of another shape": (
        "widen", put("tensors", "1.weight", "absorption", "variance", to="7.bias"),
        "no running_var"),
    "negative noise": ("odd", put("request", "noise", to=-0.1), "noise"),
    "no gain": ("odd", put("request", "gain", to=0.0), "gain"),
    "inputs without end": ("odd", put("scopes", 0, "inputs", to=[[1 << 14, 1 << 14]]), "too large"),
    "many large inputs": ("odd", put("scopes", 0, "inputs", to=[[1 << 26]] * 3), "too large"),
    "nothing that was followed": ("odd", put("scopes", to=[]), "nothing was followed"),
    "a part that is not there": ("odd", put("scopes", 0, "module", to="x"), "'x'"),
    "the request of another verb": ("odd", put("request", "verb", to="deepen"), "blocks"),
    "a request without a verb": ("odd", lambda d: d["request"].pop("verb"), "verb"),
    "a conversion without names": ("converted", put("names", to={}), "names"),
    "a step of an earlier schema": ("twice", put("after", 0, "schema", to=1), "after.0.schema"),
    "a module that is not there": ("compensated", put("multipliers", 0, "module", to="x"), "'x'"),
    "a factor of zero": ("compensated", put("multipliers", 0, "factor", to=0.0), "factor"),
    "an edge that is not there": ("compensated", put("multipliers", 0, "consumer", to="x"), "edge"),
    "a node that is not there": ("sizes", put("sizes", 0, "node", to="nowhere"), "no node"),
    "a call of another function": (
        "sizes", put("sizes", 0, "function", to="expand"), "fixed inside"),
    "a call without sizes": ("sizes", put("sizes", 0, "function", to="relu"), "takes no sizes"),
    "more sizes than before": ("sizes", put("sizes", 0, "after", to=[-1, 16, 2, 2, 2]), "after"),
    "other sizes before": ("sizes", put("sizes", 0, "before", to=[-1, 7, 2, 2]), "expects"),
    "more sizes than there are": (
        "sizes",
        lambda d: d["sizes"][0].update(before=[1] * 5, after=[2] * 5),
        "as a whole"),
    "sizes without end": ("sizes", put("sizes", 0, "after", to=[-1, 2**40, 2, 2]), "too large"),
    "plans in plans": ("odd", nested(2), "nothing before it"),
    "plans in plans in plans": ("odd", nested(9), "too deeply"),
    "many plans": ("odd", lambda d: d.update(after=[{**d, "after": []}] * 64), "64"),
    "nothing that grows": ("odd", put("groups", to=[]), "nothing is said to grow"),
    "a tensor for another alias": (
        "tied", put("aliases", "head.weight", to="up.weight"), "not like"),
    "an alias of itself": ("tied", put("aliases", "head.weight", to="head.weight"), "two names"),
    "aliases in a circle": (
        "tied", put("aliases", to={"head.weight": "table.weight", "table.weight": "head.weight"}),
        "two names"),
    "an alias that is listed": (
        "tied", lambda d: d["aliases"].update({"up.bias": "shift"}), "two names"),
    "names of nothing": ("converted", put("names", "fc.weight", to="nothing"), "no tensor"),
    "new names of nothing": ("converted", put("names", "fc.weight", to=""), "nothing makes"),
    "names for one that is no conversion": ("odd", put("names", to={"a": "0.bias"}), "names"),
    "a container that is not there": (
        "called", put("rearrangements", 0, "container", to="x"), "'x'"),
    "a container without tensors": (
        "called", put("rearrangements", 0, "container", to="relu"), "'relu'"),
    "a container twice": (
        "called", lambda d: d["rearrangements"].append(d["rearrangements"][0]), "rearranged twice"),
    "a container in what is copied": (
        "called",
        lambda d: d["rearrangements"].append(
            {"container": "block2", "caller": None, "children": []}),
        "rearranged twice, or"),
    "a caller beside": ("called", put("rearrangements", 0, "caller", to="block1"), "does not hold"),
    "a child twice": ("called", children(*BLOCKS, ("block2", "block2", True)), "named twice"),
    "a source twice": ("called", children(*BLOCKS, ("block3", "block2", False)), "named twice"),
    "a child lost": ("called", children(*BLOCKS[:-1]), "missing"),
    "a child of none": ("called", children(*BLOCKS, ("block3", "block9", True)), "was called"),
    "a new child of a new one": (
        "called", children(*BLOCKS, ("block3", "block2", True), ("block4", "block3", True)),
        "was called"),
    "a child that nothing makes": (
        "called", children(*BLOCKS, ("block9", "block1", True)), "tensors"),
    "a child called anew": (
        "called", children(*BLOCKS[:-1], ("tail", "head", False)), "another number"),
    "a child of a child": ("called", children(*BLOCKS, ("block2.conv9", "block2", True)), "number"),
    "too many children": (
        "called", children(*BLOCKS, *((f"relu{i}", "relu", True) for i in range(1 << 14))),
        "more than"),
    "another child without tensors": (
        "called", lambda d: d["rearrangements"][0]["children"].pop(1), "it holds relu"),
    "an attribute of the class": ("deeper", edit("kind", 1, 2), "no plain attribute"),
    "an attribute of a configuration's class": ("deeper", edit("config.kind", 1, 2), "no plain"),
    "a property": ("deeper", edit("config.total", 4, 5), "no plain attribute"),
    "a method": ("deeper", edit("forward", 1, 2), "no plain attribute"),
    "a module": ("deeper", edit("head", 1, 2), "no plain attribute"),
    "an attribute of a module's module": (
        "deeper", edit("head.in_features", 8, 9), "configuration"),
    "an attribute of a class": ("deeper", edit("config.__class__", 1, 2), "plain attribute"),
    "an attribute of a dict": ("deeper", edit("_modules.head", 1, 2), "configuration"),
    "an attribute two steps away": ("deeper", edit("config.a.b", 1, 2), "plain attribute"),
    "an attribute that is not there": ("deeper", edit("width", 1, 2), "no plain attribute"),
    "another value before": ("deeper", edit("config.heads", 5, 6), "the plan expects 5"),
    "a flag": ("deeper", edit("training", 0, 7), "the plan expects 0"),
    "a fraction for a whole number": ("deeper", edit("config.heads", 4, 4.5), "cannot become"),
    "a fraction before": ("deeper", edit("config.heads", 4.0, 4.5), "the plan expects 4.0"),
    "a text for a number": ("deeper", edit("config.heads", 4, "same"), "cannot become"),
    "another text": ("deeper", edit("config.layer_types", ["near"], ["else"]), "cannot become"),
    "more numbers": ("deeper", edit("config.depths", [2, 1], [2, 1, 1]), "cannot become"),
    "numbers for texts": ("deeper", edit("config.layer_types", [1, 2], [1, 3]), "the plan expects"),
    "an attribute of a module that is not there": ("deeper", edit("p", 1, 2, "x"), "no module x"),
    "an attribute of what is no module": ("deeper", edit("p", 1, 2, "config"), "no module config"),
    "a number without end": ("deeper", edit("config.heads", 4, 2**40), "cannot become"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "why"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_no_planner_says_is_refused_and_told(
    kind: str, change: Change, why: str, tmp_path: Path
) -> None:
    data = json.loads(text_of(kind))
    change(data)
    assert why in carried_out(kind, data)
    assert loaded(data, tmp_path)


# ── at random ──────────────────────────────────────────────────────────────────────────────────

VALUES = [*TEXTS[:-2], *NOT_NUMBERS, *ODD_NUMBERS, 1, 2, 3, 4, 5, 8, 16, 1.0, 2.0, "0", "5",
          "relu9", "block1", "config.heads", "same", "old", "new", "share", "zeros"]  # fmt: skip


def places(data: Any, start: Where = ()) -> Iterator[Where]:
    """Yield every place in a plan's data."""
    if not isinstance(data, (dict, list)):
        return
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*start, key)
        yield from places(value, (*start, key))


def disturb(data: Data, chance: Random) -> None:
    """Change something in a plan's data: a value, or by another part, or without or twice."""
    every = list(places(data))
    *path, last = chance.choice(every)
    holder = spot(data, tuple(path))
    present = holder[last]
    change = chance.randrange(6)
    if change == 0:
        holder[last] = chance.choice(VALUES)
    elif change == 1:
        holder[last] = copy.deepcopy(spot(data, chance.choice(every)))
    elif change == 2:
        del holder[last]
    elif change == 3 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(present))  # type: ignore[arg-type]
    elif change == 3:
        holder[str(chance.choice(VALUES))] = holder.pop(last)
    elif type(present) in (int, float):
        holder[last] = present + chance.choice([-2, -1, 1, 2, present])
    elif isinstance(present, str):
        holder[last] = chance.choice(TEXTS)


@settings(max_examples=150, deadline=None, database=None)
@given(kind=st.sampled_from(list(HONEST)), times=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_change_to_a_plan_is_refused_or_does_no_harm(kind: str, times: int, seed: int) -> None:
    data, chance = json.loads(text_of(kind)), Random(seed)
    for _ in range(times):
        disturb(data, chance)
    carried_out(kind, data)
    state = honest(kind)[0].state_dict()
    refusal(lambda: apply_to_state_dict(fxgrow.Plan.from_dict(data), state))
    if "record" in kind:
        with TemporaryDirectory() as folder:
            loaded(data, Path(folder), state)
    assert_unchanged(classes_before())


# ── data that is no plan, and files that are none ──────────────────────────────────────────────


@pytest.mark.parametrize("data", [None, 1, "{}", [], [{"schema": 2}], {1, 2}, torch.ones(2), b"{}"])
def test_what_is_no_mapping_is_no_plan(data: Any) -> None:
    assert "a plan is a mapping" in refusal(lambda: fxgrow.Plan.from_dict(data))


@pytest.mark.parametrize(
    "schema", [None, True, "1", 2.0, [1], {}, 3, torch.ones(3), float("nan"), "x" * 10_000, "\n"]
)
def test_a_schema_of_another_type_or_number_is_refused(schema: object) -> None:
    data = {**json.loads(text_of("odd")), "schema": schema}
    assert "schema" in refusal(lambda: fxgrow.Plan.from_dict(data))


@pytest.mark.parametrize("value", [torch.ones(2), {1, 2}, object(), b"text", nn.Linear(1, 1)])
def test_what_no_json_holds_is_refused(value: object) -> None:
    assert "other than JSON" in refusal(
        lambda: fxgrow.Plan.from_dict(changed("odd", ("warnings",), [value]))
    )


def test_data_in_itself_is_refused() -> None:
    data: Data = json.loads(text_of("odd"))
    data["after"].append(data)
    assert "nested too deeply" in refusal(lambda: fxgrow.Plan.from_dict(data))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"schema": 2, "after": ' + "[" * 200_000, None])
def test_text_that_is_nested_without_end_is_refused(text: Any) -> None:
    assert refusal(lambda: fxgrow.Plan.from_json(text))


def test_a_file_that_is_no_plan_is_refused_at_once(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert "does not exist" in refusal(lambda: read_plan(plan))
    assert "is a directory" in refusal(lambda: read_plan(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refusal(lambda: read_plan(tmp_path / "pipe"))
    assert "a device" in refusal(lambda: read_plan(Path("/dev/zero")))
    for text in ("", "{", "[" * 200_000, "\xff\xfe", "[]", "{}", '{"schema": NaN}'):
        plan.write_text(text, encoding="latin1")
        assert refusal(lambda: read_plan(plan)), text
    os.truncate(plan, 1 << 40)  # without a byte on the disk
    assert "more than fxgrow reads" in refusal(lambda: read_plan(plan))
    plan.write_text(text_of("odd"))
    assert read_plan(plan) == honest("odd")[1]


def test_a_record_holds_a_list_of_plans_that_make_modules() -> None:
    one = json.loads(text_of("twice"))
    assert plans_of({}) == ()
    assert plans_of({"plans": [one]}) == honest("twice")[1].steps
    for found in (None, 1, "text", one, [one] * 33, [None] * 65, [[]]):
        assert refusal(lambda found=found: plans_of({"plans": found}))
    net, plan = honest("twice")
    for step in plan.steps:
        net = remade(step, net)
    assert {n: t.shape for n, t in net.state_dict().items()} == {
        n: t.shape for n, t in plan.apply(honest("twice")[0]).state_dict().items()
    }
    other, wider = honest("converted"), honest("widen")[1]
    assert "no module" in refusal(lambda: remade(other[1], other[0]))
    assert "another network" in refusal(lambda: remade(wider, honest("called")[0]))


def test_code_of_a_plans_own_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fxgrow_evil.py").write_text(f"open({str(FLAG)!r}, 'w').write('')")
    monkeypatch.syspath_prepend(tmp_path)
    for init in ("fxgrow_evil:fill", "fxgrow_evil:NamedInit"):
        data = changed("odd", ("request", "init"), init)
        net, plan = honest("odd")[0], fxgrow.Plan.from_dict(data)
        assert "not run unasked" in refusal(lambda plan=plan, net=net: plan.apply(net, like=net))
        assert "not run unasked" in refusal(lambda plan=plan, net=net: api.carry_out(plan, net))
        assert "not run unasked" in carried_out("odd", data)
        for kind in ("record", "deeper record"):
            loaded(changed(kind, ("request", "init"), init), tmp_path, state_of(kind))
    assert "fxgrow_evil" not in sys.modules


# ── what is checked again where a plan is carried out ──────────────────────────────────────────


def test_a_plan_that_nobody_checked_gets_no_text_into_code() -> None:
    net, plan = honest("called")
    (edit,) = plan.rearrangements
    for text in (TEXTS[0], TEXTS[3], "", "lambda", "forward", "a.b"):
        named = [replace(child, name=text) if child.name == "block3" else child
                 for child in edit.children]  # fmt: skip
        hostile = replace(plan, rearrangements=(replace(edit, children=tuple(named)),))
        assert refusal(lambda hostile=hostile: hostile.apply(net))


def test_a_new_module_takes_the_place_of_nothing_else() -> None:
    net = copy.deepcopy(honest("called")[0])
    net.block3 = 7
    assert "something else" in refusal(lambda: honest("called")[1].apply(net))


def test_a_tensor_that_is_not_there_or_cannot_hold_it_is_named() -> None:
    net, plan = honest("widen")
    whole = dict(net.state_dict())
    without = {name: tensor for name, tensor in whole.items() if name != "1.running_var"}
    assert "1.running_var" in refusal(lambda: apply_to_state_dict(plan, without))
    assert "0.weight" in refusal(lambda: plan.apply(net, like=nn.Module()))
    net, plan = honest("odd")
    deeper, plan_deeper = honest("deeper")
    nothing = replace(plan_deeper, tensors={})  # of which nobody checked that it makes what is new
    assert "nothing makes" in refusal(lambda: apply_to_state_dict(nothing, deeper.state_dict()))
    numbers = {name: tensor.long() for name, tensor in net.state_dict().items()}
    assert "5.weight cannot be made" in refusal(lambda: apply_to_state_dict(plan, numbers))


def test_what_several_modules_hold_of_the_process_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    vars(net[1])["log"] = logging.getLogger("fxgrow.hostile")
    vars(net[1])["word"] = Words.ONE
    for attribute, before in (("log.level", 0), ("word._sort_order_", 0)):
        data = api.plan(net, "2x", torch.ones(1, 5)).to_dict()
        edit(attribute, before, 50, "1")(data)
        plan = fxgrow.Plan.from_dict(data)
        assert "configuration of its own" in refusal(lambda plan=plan: plan.apply(net))
    assert logging.getLogger("fxgrow.hostile").level == 0


def test_attributes_are_set_together_or_not_at_all() -> None:
    net = Decoder()
    more = ModuleEdit("", "config.heads", 4, 8), ModuleEdit("", "config.depths", (2, 1), (3, 1))
    other = ModuleEdit("", "config.depths", (2, 1), (2, 2))
    for wrong in (ModuleEdit("", "config.total", 4, 5), ModuleEdit("x", "a", 1, 2)):
        assert refusal(lambda wrong=wrong: set_attributes(net, (*more, wrong)))
        assert (net.config.heads, net.config.depths) == (4, [2, 1])
    set_attributes(net, (*more, more[0], other))  # of a stage each, and of modules that share it
    assert (net.config.heads, net.config.depths) == (8, [3, 2])
    set_attributes(net, (*more, more[0], other), back=True)
    assert (net.config.heads, net.config.depths) == (4, [2, 1])
    vars(net.config)["total"] = 4
    assert "no plain attribute" in refusal(
        lambda: set_attributes(net, (ModuleEdit("", "config.total", 4, 5),))
    )


@pytest.mark.parametrize("spread", [False, True])
def test_more_groups_than_any_network_has_are_refused_before_they_are_read(spread: bool) -> None:
    data: Any = changed("widen", ("warnings",), [])
    many, data["groups"] = 70_000, data["groups"][:1]
    if spread:  # over several steps
        step = {**data, "groups": data["groups"] * (many // 10)}
        data["after"] = [step] * 10
    else:
        data["groups"] = data["groups"] * many
    start = time.process_time()
    with pytest.raises(
        fxgrow.PlanError, match=r"groups is wrong: it has 70\d+ entries in all steps"
    ):
        fxgrow.Plan.from_dict(data)
    assert time.process_time() - start < 0.5  # seconds; each group took 45 microseconds
