"""Whether two objects are the same all through: what was read from a file, and what it should be.

Values of plain types are compared as they are, tensors bit for bit, modules by what they are made
of, and other objects by their classes and attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fxgrow.modules.bits import first_difference, same_bits
from fxgrow.modules.tensors import named_tensors

_APART = ("name_or_path",)  # where transformers read a model from
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


Compared: TypeAlias = Callable[[int], object]


def _nothing(_: int) -> None:
    """Do nothing with the bytes of a tensor that was compared."""


def difference(
    found: object, wanted: object, place: str = "", compared: Compared = _nothing
) -> str:
    """Return where two objects differ first and how, or "" where they do not.

    Args:
        found: what was read.
        wanted: what it should be; both may hold themselves.
        place: where they stand, for the message.
        compared: called with the bytes of each tensor when it was compared.
    """
    return _Comparison(compared).difference(found, wanted, place)


class _Comparison:
    """One comparison, which remembers what it has met."""

    def __init__(self, compared: Compared) -> None:
        self._compared = compared
        self._met: set[tuple[int, int]] = set()
        self._kept: list[object] = []  # so that no other object gets the id of one that was met

    def difference(self, found: Any, wanted: Any, place: str) -> str:
        if found is wanted:
            return ""
        if isinstance(wanted, Tensor):
            told = tensor_difference(found, wanted, place)
            self._compared(wanted.nbytes)
            return told
        pair = (id(found), id(wanted))
        if pair in self._met:
            return ""
        if type(found) is not type(wanted) and not _are_alike(found, wanted):
            return f"{place} is a {type(found).__name__}, not a {type(wanted).__name__}"
        if isinstance(wanted, _PLAIN):
            same = found == wanted or (found != found and wanted != wanted)
            return "" if same else f"{place} is {found!r:.60}, not {wanted!r:.60}"
        self._met.add(pair)
        self._kept += [found, wanted]
        if isinstance(wanted, nn.Module):
            return module_difference(found, wanted, place, self._compared)
        return self._in_parts(found, wanted, place)

    def _in_parts(self, found: Any, wanted: Any, place: str) -> str:
        if isinstance(wanted, np.ndarray):
            same = found.dtype == wanted.dtype and found.shape == wanted.shape
            same = same and found.tobytes() == wanted.tobytes()
            return "" if same else f"{place} holds other numbers"
        if isinstance(wanted, (list, tuple)):
            if len(found) != len(wanted):
                return f"{place} has {len(found)} entries, not {len(wanted)}"
            pairs: Iterator[Any] = enumerate(zip(found, wanted, strict=True))
        elif isinstance(wanted, Mapping):
            if told := keys_difference(list(found), list(wanted), place):
                return told
            pairs = ((key, (found[key], wanted[key])) for key in wanted)
        elif isinstance(wanted, functools.partial):
            pairs = iter([("function", (found.func, wanted.func)),
                          ("keywords", (found.keywords, wanted.keywords))])  # fmt: skip
        elif isinstance(getattr(wanted, "__dict__", None), dict) and vars(wanted):
            return self.difference(vars(found), vars(wanted), place)
        else:
            return "" if _equal(found, wanted) else f"{place} is another {type(wanted).__name__}"
        parts = (self.difference(one, other, _inside(place, key)) for key, (one, other) in pairs)
        return next(filter(None, parts), "")


def tensor_difference(found: object, wanted: Tensor, place: str) -> str:
    """Return how a tensor differs from what it should be, bit for bit, or ""."""
    if not isinstance(found, Tensor):
        return f"{place} is a {type(found).__name__}, not a tensor"
    for what in ("dtype", "shape", "layout"):
        have, want = getattr(found, what), getattr(wanted, what)
        if have != want:
            told = (str(list(have)), str(list(want))) if what == "shape" else (have, want)
            return f"{place} is {told[0]}, not {told[1]}"
    are_parameters = isinstance(found, nn.Parameter) and isinstance(wanted, nn.Parameter)
    if are_parameters and found.requires_grad != wanted.requires_grad:
        return f"{place} is to be trained in one of them alone"
    if wanted.layout is not torch.strided or wanted.is_quantized:
        return ""  # none of the network's weights
    if same_bits(found, wanted.detach().to(found.device)):
        return ""
    at = first_difference(found, wanted)
    return f"{place}{list(at)} is {found[at].item()!r}, not {wanted[at].item()!r}"


def module_difference(
    found: nn.Module, wanted: nn.Module, place: str = "", compared: Compared = _nothing
) -> str:
    """Return how a module differs in what it is made of, its plain attributes or its tensors."""
    if told := structure_difference(found, wanted, modes=True):
        return f"{place} {told}".strip()
    have, want = named_tensors(found), named_tensors(wanted)
    if told := keys_difference(sorted(have), sorted(want), place):
        return told
    for name, tensor in want.items():
        if told := tensor_difference(have[name], tensor, _inside(place, name)):
            return told
        compared(tensor.nbytes)
    return ""


def structure_difference(
    found: nn.Module, wanted: nn.Module, *, modes: bool = False, sizes: bool = True
) -> str:
    """Return how a module differs in what it is made of and in its plain attributes, or "".

    Args:
        found: the module.
        wanted: what it should be like; its tensors are not looked at.
        modes: compare whether modules are in train mode, too.
        sizes: compare whole numbers, too.
    """
    have, want = dict(found.named_modules()), dict(wanted.named_modules())
    if told := keys_difference(list(have), list(want), "the modules"):
        return told
    for name, module in want.items():
        other = have[name]
        shown = name or "the network"
        if type(other) is not type(module) and not _are_alike(other, module):
            return f"{shown} is a {type(other).__name__}, not a {type(module).__name__}"
        mine, theirs = (_plain_attributes(each, modes=modes) for each in (other, module))
        for key in theirs:
            if key in _APART or (not sizes and _is_size(theirs[key])):
                continue
            if key not in mine or not _equal(mine[key], theirs[key]):
                return f"{shown}.{key} is {mine.get(key)!r:.60}, not {theirs[key]!r:.60}"
    return ""


def keys_difference(found: list[Any], wanted: list[Any], place: str) -> str:
    """Return which key is missing, is one too many or stands elsewhere, or ""."""
    where = f" in {place}" if place else ""
    have, should = set(found), set(wanted)
    lacking = [key for key in wanted if key not in have]
    if lacking:
        return f"{lacking[0]!r:.80} is missing{where}"
    more = [key for key in found if key not in should]
    if more:
        return f"{more[0]!r:.80} is one too many{where}"
    return "" if found == wanted else f"the entries stand in another order{where}"


def _plain_attributes(module: nn.Module, *, modes: bool) -> dict[str, object]:
    """Return the attributes of a module that are numbers, words or tuples of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if (isinstance(value, _PLAIN) or _is_plain_list(value))
        and not name.startswith("_")
        and (modes or name != "training")
    }


def _is_size(value: object) -> bool:
    items = value if isinstance(value, (tuple, list)) else [value]
    return all(type(item) is int for item in items)


def _is_plain_list(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(item, _PLAIN) for item in value)


def _are_alike(one: object, other: object) -> bool:
    """Return whether both are modules of one class each of which has another one made of it.

    Graph modules, and those with a parametrization.
    """
    if isinstance(one, nn.Module) and isinstance(other, nn.Module):
        kinds = [type_before_parametrizations(module) for module in (one, other)]
        if is_parametrized(one) and is_parametrized(other) and kinds[0] is kinds[1]:
            return True
    return isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule)


def _equal(one: object, other: object) -> bool:
    try:
        return bool(one == other) or (one != one and other != other)
    except (TypeError, ValueError, RuntimeError):
        return False


def _inside(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)
