"""Which modules of a larger network continue which of a smaller one: by their trees alone.

Two siblings have the same tree but for lists of modules that are longer in the larger one. Such a
list is aligned as a sequence: each old module is continued by the first new one that it can become,
in order, and what remains is new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from fxgrow.errors import PlanError
from fxgrow.grow.identity.stages import LISTS, child_of
from fxgrow.grow.widen.planner import eps_attributes

# What a larger layer must have in common with a smaller one that it continues.
_SETTINGS = ("stride", "dilation", "transposed", "output_padding", "padding_mode", "start_dim")


@dataclass(frozen=True)
class Alignment:
    """How the modules of a target continue those of a source.

    Attributes:
        modules: for each module of the target that continues one, the name of that one.
        fresh: the outermost modules of the target that continue none, in order.
    """

    modules: dict[str, str] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()

    def tensors(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
        """Return, for each tensor of the target that continues one, the name of that one.

        Args:
            source: the tensors of the smaller network by name, on meta or not.
            target: those of the larger one.

        Raises:
            PlanError: a tensor of one network has none in the other, or would shrink.
        """
        found = {}
        for name, tensor in target.items():
            owner, _, local = name.rpartition(".")
            if owner not in self.modules:
                continue
            before = child_of(self.modules[owner], local)
            if before not in source:
                raise PlanError(
                    f"the target has {name}, and the source has no {before}.", name=name
                )
            _check_shapes(before, source[before], name, tensor)
            found[name] = before
        missing = next((name for name in source if name not in set(found.values())), None)
        if missing is not None:
            raise PlanError(f"the target has nothing for the source's {missing}.", name=missing)
        return found


def align(source: nn.Module, target: nn.Module) -> Alignment:
    """Return how the modules of a larger network continue those of a smaller one.

    Args:
        source: the smaller network.
        target: the larger one.

    Raises:
        PlanError: they are no siblings; the first module that stands in the way is named.
    """
    modules: dict[str, str] = {}
    fresh: list[str] = []
    problem = _pair(source, target, "", "", modules, fresh)
    if problem is not None:
        raise problem
    return Alignment(modules, tuple(fresh))


def _pair(
    source: nn.Module,
    target: nn.Module,
    before: str,
    after: str,
    modules: dict[str, str],
    fresh: list[str],
) -> PlanError | None:
    """Pair two modules and all in them; return what stands in the way, if anything does."""
    if type_before_parametrizations(source) is not type_before_parametrizations(target):
        kinds = type(source).__name__, type(target).__name__
        return _difference(before, after, f"is a {kinds[0]} in the source, a {kinds[1]} there")
    for setting in _SETTINGS:
        values = getattr(source, setting, None), getattr(target, setting, None)
        if values[0] != values[1]:
            text = f"has {setting} {values[0]} in the source, {values[1]} there"
            return _difference(before, after, text)
    old, new = dict(source.named_children()), dict(target.named_children())
    if old.keys() != new.keys() and not isinstance(target, LISTS):
        lacking = next(iter(old.keys() - new.keys()), None)
        name = lacking or next(iter(new.keys() - old.keys()))
        text = f"has {'no' if lacking else 'a'} {name}, unlike the source's {before or 'network'}"
        return _difference(before, after, text)
    modules[after] = before
    pairs, problem = (
        ({name: name for name in new}, None)
        if old.keys() == new.keys()
        else _subsequence(old, new, before, after)
    )
    for name, child in new.items():
        if name not in pairs:
            fresh.append(child_of(after, name))
            continue
        problem = problem or _pair(
            old[pairs[name]],
            child,
            child_of(before, pairs[name]),
            child_of(after, name),
            modules,
            fresh,
        )
    return problem


def _subsequence(
    old: Mapping[str, nn.Module], new: Mapping[str, nn.Module], before: str, after: str
) -> tuple[dict[str, str], PlanError | None]:
    """Return the first new module that each old one can become, in order."""
    waiting = iter(new.items())
    pairs: dict[str, str] = {}
    for name, module in old.items():
        reasons = []
        for candidate, child in waiting:
            reason = _obstacle(module, child, child_of(before, name), child_of(after, candidate))
            if reason is None:
                pairs[candidate] = name
                break
            reasons.append(reason.reason)
        else:
            text = f"has nothing that the source's {child_of(before, name)} could become"
            why = f": {reasons[0]}" if reasons else ""
            return pairs, _difference(before, after, text + why)
    return pairs, None


def _obstacle(source: nn.Module, target: nn.Module, before: str, after: str) -> PlanError | None:
    """Return why a module cannot grow into another, or None if it can."""
    modules: dict[str, str] = {}
    problem = _pair(source, target, before, after, modules, [])
    if problem is not None:
        return problem
    for name, origin in modules.items():
        inside = (origin.removeprefix(before).strip("."), name.removeprefix(after).strip("."))
        own = [
            dict(module.get_submodule(path).named_parameters(recurse=False))
            for module, path in zip((source, target), inside, strict=True)
        ]
        if own[0].keys() != own[1].keys():
            odd = next(iter(own[0].keys() ^ own[1].keys()))
            return _difference(origin, name, f"has a {odd} in one of them alone")
        for local, small in own[0].items():
            try:
                _check_shapes(child_of(origin, local), small, child_of(name, local), own[1][local])
            except PlanError as error:
                return error
    return None


def _check_shapes(before: str, small: Tensor, after: str, large: Tensor) -> None:
    """Return if one tensor can grow into another.

    Raises:
        PlanError: it is larger somewhere.
    """
    longer = (a > b for a, b in zip(small.shape, large.shape, strict=False))
    if small.ndim != large.ndim or any(longer):
        sizes = ["x".join(map(str, tensor.shape)) or "scalar" for tensor in (small, large)]
        raise PlanError(
            f"{after} would shrink: {before} is {sizes[0]} in the source, and {sizes[1]} there.",
            name=after,
            way_out="Nothing is forgotten only if no tensor of the target is smaller.",
        )


def _difference(before: str, after: str, text: str) -> PlanError:
    name = after or "the network"
    moved = f" (the source's {before})" if before != after else ""
    return PlanError(f"{name}{moved} {text}.", name=after)


def setting_differences(
    source: nn.Module, target: nn.Module, modules: Mapping[str, str]
) -> Sequence[str]:
    """Return what modules that continue others compute with differently, in order.

    Args:
        source: the smaller network.
        target: the larger one.
        modules: as in :class:`Alignment`.
    """
    old, new = eps_attributes(source), eps_attributes(target)
    return [
        f"{after}.{name} is {value:g}, and {old[before][name]:g} in the source"
        for after, before in modules.items()
        for name, value in new.get(after, {}).items()
        if old.get(before, {}).get(name, value) != value
    ]
