"""What a checkpoint holds of a network's weights beside the network's own: grown, or told of."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxgrow.apply.module import apply_to_state_dict
from fxgrow.errors import shown
from fxgrow.files.checkpoint import Source
from fxgrow.files.checkpoint.kept import Kept
from fxgrow.files.checkpoint.location import Keys
from fxgrow.files.checkpoint.matching import Shape, is_weight, walk
from fxgrow.files.checkpoint.weights import is_optimizer
from fxgrow.plan.init import Init
from fxgrow.plan.names import tensor_origins
from fxgrow.plan.schema import Plan
from fxgrow.verification.layout import check_layout

_MOST_TOLD = 5  # places
_SETTINGS = ("hyper_parameters", "hparams", "config", "cfg", "args", "model_args", "model_kwargs")
_WIDTH = re.compile(
    r"(?<!batch_)(?<!image_)(?<!img_)(?<!vocab_)(?<!patch_)(?<!crop_)(?<!kernel_)"
    r"(width|dim|dims|hidden|channels|features|size|sizes|units|planes|filters|ff|mlp|embd|inner|"
    r"model)$"
)
_SHORT = re.compile(r"(?<![a-zA-Z])(h|d|c|w|ch|nh|nf|ngf|ndf|base)$")  # among settings alone


def grown_copies(source: Source, plan: Plan, init: Init | None) -> list[OrderedDict[str, Tensor]]:
    """Return what becomes of the further sets of a source's weights, such as moving averages.

    Args:
        source: the source; its first set is the network's own.
        plan: how the network grows.
        init: what fills new weights, where that is code of the user's.

    Raises:
        VerificationError: one of them is not as the plan lays it out.
    """
    first, *others = source.state_dicts
    return [_grown(plan, init, first, old) for old in others]


def _grown(
    plan: Plan, init: Init | None, first: Mapping[str, Tensor], old: Mapping[str, Tensor]
) -> OrderedDict[str, Tensor]:
    """Return one set after growth; what it lacks of the network's tensors it lacks again."""
    own = [name for name in first if name in old]
    whole = {**{name: old.get(name, tensor) for name, tensor in first.items()}, **old}
    new = apply_to_state_dict(plan, whole, init, first)
    check_layout(plan, whole, new)
    former = {name: origin.name for name, origin in tensor_origins(whole, plan.steps).items()}
    names = [name for name in new if former.get(name, name) in old]
    if list(old) != own:  # in lists by groups, say; what is new comes last
        place = {name: index for index, name in enumerate(old)}
        names.sort(key=lambda name: place.get(name, len(place)))
    return OrderedDict((name, new[name]) for name in names)


def left_behind(source: Source, before: nn.Module, after: nn.Module, plan: Plan) -> list[str]:
    """Return what to know of tensors in a checkpoint that have the old shape of what has grown.

    Args:
        source: the checkpoint.
        before: the old network.
        after: the grown one.
        plan: how it grew.
    """
    changed = {shape: name for name, shape in reversed(grown_shapes(before, after, plan).items())}
    found: dict[str, list[str]] = {}
    for keys, item in _others(source):
        if (shape := _shape(item)) in changed:
            place = ".".join(map(str, keys[:-1])) or str(keys[-1])
            found.setdefault(place, []).append(f"{changed[shape]} {'x'.join(map(str, shape))}")
    notes = []
    for place, names in list(found.items())[:_MOST_TOLD]:
        number = f"{len(names)} tensors" if len(names) > 1 else "a tensor"
        notes.append(
            f"{shown(place, 80)!r} in {source.path} holds {number} of shapes that have grown in "
            f"the network (such as {names[0]}), and is left as it is: what it means is not known."
        )
    if len(found) > _MOST_TOLD:
        notes.append(f"so do {len(found) - _MOST_TOLD} more entries of {source.path}.")
    return notes


def grown_shapes(before: nn.Module, after: nn.Module, plan: Plan) -> dict[str, Shape]:
    """Return the old names and the old shapes of the tensors whose shapes a plan changes.

    Args:
        before: the old network.
        after: the grown one.
        plan: how it grew.
    """
    old = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}
    new = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
    origins = tensor_origins(old, plan.steps).items()
    return {was: old[was] for name, (was, _) in origins if new.get(name) != old[was]}


def stale_settings(source: Source, plan: Plan) -> list[str]:
    """Return what to know of settings in a checkpoint that name widths which have grown.

    Args:
        source: the checkpoint.
        plan: how the network grew.
    """
    grown = {group.width[0]: group.width[1] for step in plan.steps for group in step.groups}
    data: Any = source._contents.data
    held = [key for key in data if str(key) in _SETTINGS] if isinstance(data, Mapping) else []
    told_alone = [] if not isinstance(data, Mapping) else [
        ((key,), value) for key, value in data.items() if _WIDTH.search(str(key))
    ]  # fmt: skip
    inside = [
        ((key, *keys), value)
        for key in held
        for keys, value in walk(_plain(data[key]))
        if keys and (_WIDTH.search(str(keys[-1])) or _SHORT.search(str(keys[-1])))
    ]
    found = [
        f"{'.'.join(map(str, keys))} is {value}"
        for keys, value in (*told_alone, *inside)
        if _is_old_width(value, grown)
    ]
    if not found:
        return []
    told = ", ".join(found[:_MOST_TOLD])
    return [
        f"{source.path} has settings that may name widths which have grown: {shown(told, 300)}. "
        "They are left as they are; fxgrow.load goes by its record."
    ]


def _plain(settings: object) -> object:
    """Return settings as containers: of a kept object or a namespace, its parts."""
    if isinstance(settings, Kept):
        return [settings.entries, settings.items]
    return vars(settings) if hasattr(settings, "__dict__") else settings


def _is_old_width(value: object, grown: Mapping[int, int]) -> bool:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return any(type(item) is int and grown.get(item, item) != item for item in items)


def _others(source: Source) -> Iterator[tuple[Keys, object]]:
    """Yield the tensors and arrays in a checkpoint that are none of the weights it is known for."""
    by_name = [each for each in source._locations if each.is_by_name]
    taken = {(*each.keys, name) for each in by_name for name in each.stored_names.values()}
    whole = [each.keys for each in source._locations if not each.is_by_name]
    whole += [each.keys for each in source.places if each.is_of_layers]  # told of when it was read
    for keys, item in numbers_in(source._contents.data):
        if keys not in taken and not any(keys[: len(place)] == place for place in whole):
            yield keys, item


def numbers_in(data: object, *, optimizers: bool = False) -> Iterator[tuple[Keys, object]]:
    """Yield the tensors and arrays in what was saved with their places.

    Args:
        data: what was saved.
        optimizers: whether those of optimizers' states are asked for, too.

    Raises:
        ValueError: there are too many entries to look at.
    """
    seen: set[int] = set()
    waiting: list[tuple[Keys, object]] = [((), data)]
    while waiting:
        start, item = waiting.pop()
        for inner, each in walk(item):
            keys = (*start, *inner)
            if isinstance(each, nn.Module):
                yield from (((*keys, name), tensor) for name, tensor in each.state_dict().items())
            elif is_weight(each):
                yield keys, each
            elif optimizers and isinstance(each, Mapping) and is_optimizer(each):
                waiting.append(((*keys, "state"), each["state"]))
            elif id(each) not in seen and isinstance(getattr(each, "__dict__", None), dict):
                seen.add(id(each))
                waiting.append((keys, vars(each)))


def _shape(item: Any) -> Shape:
    return tuple(getattr(item, "shape", ()))
