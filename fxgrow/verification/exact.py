"""Networks in float64 whose parameters are made when the forward asks for them, and dropped after.

A float64 network is twice the size of the one that is judged, and there are two of them. Here a
module tree holds none of its weights: each access to a parameter makes it, whoever reads it (a
module its own, a module one below it, a function that is given it), so that a run needs the memory
of a few at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fxgrow.modules.added_hooks import HookNote
from fxgrow.modules.calling import tensors_in
from fxgrow.modules.standin import stand_in
from fxgrow.modules.states import itself, mapped
from fxgrow.modules.tensors import aliases_of, named_tensors

# Returns a tensor of a network by name: floating-point ones in float64, others as they are.
Weights: TypeAlias = Callable[[str], Tensor]

_OWN = frozenset(vars(nn.Module()))  # attributes of every module
_SMALL = 1 << 20  # bytes; what is smaller is kept


class Exact:
    """A float64 copy of a network.

    Attributes:
        module: the copy. Its parameters are constants without gradients, made when they are asked
            for; what it changes in its buffers is undone by :meth:`reset`.
        used: the names of parameters that were asked for so far.
    """

    def __init__(self, module: nn.Module, weights: Weights) -> None:
        """Copy a network.

        Args:
            module: what the copy is of; only read.
            weights: of the copy, by the names in ``module``.
        """
        self.used: set[str] = set()
        self._weights = weights
        self._kept: dict[str, Tensor] = {}
        self._last: tuple[str, Tensor] | None = None  # for modules that look at a weight first
        tensors = named_tensors(module)
        self._first = {name: name for name in tensors} | aliases_of(tensors)
        eager = _held_elsewhere(module, tensors)
        self.used |= eager
        self.module = stand_in(
            module,
            {
                name: (
                    weights(name)
                    if name in eager or not isinstance(tensor, nn.Parameter)
                    else torch.empty(0, device="meta").expand(0)
                )
                for name, tensor in tensors.items()
                if name == self._first[name]
            },
        )
        for prefix, inner in self.module.named_modules(remove_duplicate=False):
            self._lend(inner, prefix, eager)
        self._attributes = _attributes_of(self.module)
        self._buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        self._held = [
            (inner, dict(inner._buffers))
            for inner in self.module.modules()
            if isinstance(inner._buffers, dict)  # scripted modules have others, of their own
        ]
        self._hooks = HookNote(self.module.modules())
        self._settled: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Give buffers, small parameters and attributes the values that they had at first."""
        self._kept = {name: nn.Parameter(x.clone(), False) for name, x in self._settled.items()}
        self._last = None
        registered = {id(buffer) for buffer, _ in self._buffers}

        def anew(tensor: Tensor) -> Tensor:
            return tensor if id(tensor) in registered else tensor.clone()

        for inner, attributes in self._attributes:
            for key in vars(inner).keys() - attributes.keys() - _OWN:
                del inner.__dict__[key]  # the forward has set it
            for key, value in attributes.items():
                inner.__dict__[key] = mapped(value, anew)
        self._hooks.remove_added()
        for inner, buffers in self._held:
            inner._buffers.clear()
            inner._buffers.update(buffers)  # a forward may have replaced some by others
        for buffer, value in self._buffers:
            buffer.copy_(value)

    def settle(self) -> None:
        """Keep the values that buffers and small parameters have now for those at first."""
        self._settled = {name: tensor.detach().clone() for name, tensor in self._kept.items()}
        self._buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        self._attributes = _attributes_of(self.module)

    def parameter(self, name: str) -> Tensor:
        """Return a parameter by its first name."""
        self.used.add(name)
        if name in self._kept:
            return self._kept[name]
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        self._last = None  # before the next one is made
        with _disable_current_modes():  # the forward is watched, not how weights are made
            found = nn.Parameter(self._weights(name), requires_grad=False)
        if found.nbytes <= _SMALL:
            self._kept[name] = found
        else:
            self._last = name, found
        return found

    def twin(self) -> Exact:
        """Return what lends the same weights to a copy of the module, as they are now."""
        found = copy.copy(self)
        found._kept = {name: nn.Parameter(x.clone(), False) for name, x in self._kept.items()}
        found._last = None
        return found

    def _lend(self, inner: nn.Module, prefix: str, eager: set[str]) -> None:
        """Have a module ask for its parameters here."""
        names = {
            local: self._first[f"{prefix}.{local}" if prefix else local]
            for local, held in inner._parameters.items()
            if held is not None
        }
        if names and not eager.intersection(names.values()):
            inner._parameters = cast(
                "dict[str, nn.Parameter | None]", _Lent(inner._parameters, names, self)
            )


class _Lent(dict[str, Tensor | None]):
    """The parameters of a module, each made when it is asked for, unless it was set since."""

    def __init__(
        self, held: Mapping[str, Tensor | None], names: Mapping[str, str], exact: Exact
    ) -> None:
        super().__init__(held)
        self._names = dict(names)
        self._exact = exact

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lent:
        """Return the same for a copy of the module, where whatever is set since is copied."""
        exact = memo.setdefault(id(self._exact), self._exact.twin())
        held = {local: super(_Lent, self).__getitem__(local) for local in self}
        own = {
            local: copy.deepcopy(x, memo) for local, x in held.items() if local not in self._names
        }
        return _Lent({**held, **own}, self._names, exact)

    def __getitem__(self, local: str) -> Tensor | None:
        name = self._names.get(local)
        return super().__getitem__(local) if name is None else self._exact.parameter(name)

    def __setitem__(self, local: str, value: Tensor | None) -> None:
        name = self._names.get(local)
        if name is None or self._exact._kept.get(name) is not value:
            self._names.pop(local, None)
            super().__setitem__(local, value)

    def get(self, local: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        return self[local] if local in self else default  # noqa: SIM401 (that would be this)

    def __iter__(self) -> Iterator[str]:  # so that dict(…) and {**…} ask for the values
        return super().__iter__()

    def copy(self) -> dict[str, Tensor | None]:
        return dict(self)

    def items(self) -> Iterator[tuple[str, Tensor | None]]:  # type: ignore[override]
        return ((local, self[local]) for local in self)

    def values(self) -> Iterator[Tensor | None]:  # type: ignore[override]
        return (self[local] for local in self)


def _attributes_of(module: nn.Module) -> list[tuple[nn.Module, dict[str, object]]]:
    """Return the attributes of modules, and put tensors that none of them registers in float64.

    A forward may keep a state there, or a table.
    """
    known = {id(buffer) for buffer in module.buffers()}  # parameters are no plain tensors
    found = []

    def doubled(tensor: Tensor) -> Tensor:
        floats = tensor.is_floating_point() and id(tensor) not in known
        return tensor.double() if floats else tensor

    for inner in module.modules():
        own = {key: value for key, value in vars(inner).items() if key not in _OWN}
        for key, value in own.items():
            held = inner.__dict__[key] = mapped(value, doubled)
            own[key] = mapped(held, itself)  # a forward may change what a list holds
        found.append((inner, own))
    return found


def _held_elsewhere(module: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of parameters that modules keep in attributes besides (recurrent layers).

    So are the others of such modules, which the forward may make those of (weight norm's hook).
    """
    names = {id(tensor): name for name, tensor in reversed([*tensors.items()])}
    found = set()
    for inner in module.modules():
        for key, value in vars(inner).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                found |= {names[id(t)] for t in tensors_in(value) if id(t) in names}
    own = [{names[id(p)] for p in inner.parameters(recurse=False)} for inner in module.modules()]
    while more := set[str]().union(*(held for held in own if held & found)) - found:
        found |= more
    return found
