"""Find the weights inside a saved object, and put new ones in the same places.

Training checkpoints wrap a state_dict in dicts under many names, its tensors under prefixes of the
wrappers that trained it (``module.`` of DataParallel, ``_orig_mod.`` of ``torch.compile``), and
often a second time as a moving average. A :class:`Location` remembers one such place.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from fxgrow.files.checkpoint.location import (
    Keys,
    Location,
    like,
    unwrapped,
    versions,
)

OptimizerChange: TypeAlias = Callable[[dict[str, Any], str], dict[str, Any]]

_WRAPPERS = ("module.", "_orig_mod.")
_EXTRA_STATE = "_extra_state"
_AVERAGED = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts beside its module
# Where checkpoints keep weights, the usual places first.
_PREFERRED = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "weights",
    "params",
    "module",
    "ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
)
_DEPTH = 3
_MOST_ENTRIES = 3_000_000
_MOST_PLACES = 64  # with weights, optimizers among them


def find_locations(saved: object) -> list[Location]:
    """Find all weights in a saved object, the model's own first.

    Args:
        saved: a module, a state_dict, or a dict that holds some within three levels.

    Returns:
        One location for each: layers first, then in order of preference of their names, then as
        saved.

    Raises:
        ValueError: there are too many places to look at.
    """

    def rank(location: Location) -> tuple[bool, int, list[int]]:
        return not location.is_of_layers, len(location.keys), _rank(location.keys)

    found = list(itertools.islice(_search(saved, (), [_MOST_ENTRIES]), _MOST_PLACES + 1))
    if len(found) > _MOST_PLACES:
        raise ValueError(f"it has weights in more than {_MOST_PLACES} places")
    return sorted(found, key=rank)


def bare_names(names: Sequence[str]) -> list[str]:
    """Return names of parameters or buffers without what wrappers put into all of them.

    Example:
        >>> bare_names(["module.0.weight", "module._orig_mod.1.weight"])
        ['0.weight', '1.weight']
    """
    prefix = _prefix(list(names))
    return [unwrapped(name[len(prefix) :]) for name in names]


def bare_module(module: nn.Module) -> nn.Module:
    """Return the model inside a ``DataParallel``, or the module itself."""
    return cast(nn.Module, module.module) if isinstance(module, nn.DataParallel) else module


def rewrap(stored: nn.Module, module: nn.Module) -> nn.Module:
    """Return ``module`` wrapped as ``stored`` is; ``stored`` itself is left alone."""
    if not isinstance(stored, nn.DataParallel):
        return module
    wrapper = object.__new__(type(stored))  # its constructor would look for GPUs
    wrapper.__dict__ = {**vars(stored), "_modules": {"module": module}}
    return wrapper


def keep_ties(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Let tensors that were one tensor in ``old`` be one tensor in the result, if still equal.

    Tensors that only share a part of a larger storage get a storage of their own, which is what
    is written to the file.

    Returns:
        The tensors, and the names of those that were tied and are no longer equal.
    """
    first: dict[object, str] = {}
    kept: OrderedDict[str, Tensor] = OrderedDict()
    parted: list[str] = []
    users = Counter(_storage(tensor) for tensor in new.values())
    for name, tensor in new.items():
        tensor = tensor.detach()
        alone = users[_storage(tensor)] == 1
        if alone and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        if not tensor.numel():  # its memory may be where that of another begins
            tensor = torch.empty_like(tensor)
        identity = _identity(old[name]) if name in old else None
        kept[name] = tensor
        if identity is None or first.setdefault(identity, name) == name:
            continue
        leader = kept[first[identity]]
        if leader.dtype == tensor.dtype and torch.equal(leader, tensor):
            kept[name] = leader
        else:
            parted.append(name)
    return kept, parted


@dataclass(frozen=True)
class Unshared:
    """Tensors of which no two share memory.

    Attributes:
        tensors: the tensors, contiguous; a tied one is the same object under each name.
        ties: for each further name of a tensor, its first name.
        copied: names of those that shared a part of their memory with another.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str]
    copied: list[str]


def unshared(tensors: Mapping[str, Tensor]) -> Unshared:
    """Return contiguous tensors of which no two share memory, unless they are one tensor."""
    first: dict[object, str] = {}
    taken: set[int] = set()
    result = Unshared({}, {}, [])
    for name, tensor in tensors.items():
        pointer, identity = _storage(tensor), _identity(tensor)
        same = name if identity is None else first.setdefault(identity, name)
        if same != name:
            result.ties[name] = same
            result.tensors[name] = result.tensors[same]
        elif pointer in taken and tensor.numel():
            result.copied.append(name)
            result.tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        else:
            result.tensors[name] = tensor.detach().contiguous()
        if tensor.numel():
            taken.add(pointer)
    return result


def replaced(saved: object, replacements: Mapping[Keys, object], keys: Keys = ()) -> object:
    """Return a copy of nested dicts and lists with some entries exchanged; all else is shared."""
    if keys in replacements:
        return replacements[keys]
    if not any(at[: len(keys)] == keys for at in replacements):
        return saved
    if isinstance(saved, Mapping):
        changed = {key: replaced(value, replacements, (*keys, key)) for key, value in saved.items()}
        return like(saved, changed)
    if type(saved) in (list, tuple):
        items = cast("list[object] | tuple[object, ...]", saved)
        return type(items)(replaced(v, replacements, (*keys, i)) for i, v in enumerate(items))
    return saved


def with_optimizers(saved: object, change: OptimizerChange) -> object:
    """Exchange whatever looks like an optimizer's state_dict, three levels down.

    Args:
        saved: nested dicts and lists; left alone.
        change: given such a state_dict and its dotted place, returns what takes its place.

    Returns:
        A copy of the dicts and lists around optimizers, and all else as it is.
    """
    return _exchanged(saved, change, (), {})


def _exchanged(
    saved: object, change: OptimizerChange, keys: Keys, done: dict[tuple[int, int], object]
) -> object:
    """Return a part with its optimizers exchanged; ``done`` holds those parts that are known."""
    place = (id(saved), len(keys))
    if len(keys) > _DEPTH:
        return saved
    if place not in done:
        done[place] = saved
        if isinstance(saved, dict) and is_optimizer(saved):
            done[place] = like(saved, change(saved, ".".join(map(str, keys))))
        elif isinstance(saved, dict):
            changed = {k: _exchanged(v, change, (*keys, str(k)), done) for k, v in saved.items()}
            if any(changed[k] is not saved[k] for k in saved):
                done[place] = like(saved, changed)
        elif type(saved) in (list, tuple):
            items = cast("list[object] | tuple[object, ...]", saved)
            new = [_exchanged(v, change, (*keys, str(i)), done) for i, v in enumerate(items)]
            if any(one is not other for one, other in zip(new, items, strict=True)):
                done[place] = type(items)(new)
    return done[place]


def is_optimizer(saved: Mapping[Any, object]) -> bool:
    """Tell whether a dict has the form of ``torch.optim.Optimizer.state_dict()``."""
    return "param_groups" in saved and isinstance(saved.get("state"), dict)


def _search(saved: object, keys: Keys, left: list[int]) -> Iterator[Location]:
    """Yield the places with weights in an object; ``left`` counts the entries to look at."""
    if isinstance(saved, nn.Module):
        yield Location(keys, saved, _tensors_of(bare_module(saved)))
    elif isinstance(saved, Mapping):
        left[0] -= len(saved)  # the same dict may stand in many places
        if left[0] < 0:
            raise ValueError("its dicts have too many entries")
        if _is_state_dict(saved):
            yield _locate(keys, saved)
        elif len(keys) < _DEPTH and not is_optimizer(saved):
            for key, value in saved.items():
                if isinstance(key, str):
                    yield from _search(value, (*keys, key), left)


def _tensors_of(module: nn.Module) -> OrderedDict[str, Tensor]:
    """Return a module's state_dict without extra state that is no tensor."""
    whole = module.state_dict()
    tensors = OrderedDict((name, t) for name, t in whole.items() if isinstance(t, Tensor))
    vars(tensors)["_metadata"] = getattr(whole, "_metadata", OrderedDict())
    return tensors


def _rank(keys: Keys) -> list[int]:
    return [_PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED) for key in keys]


def _is_state_dict(saved: Mapping[Any, object]) -> bool:
    """Tell weights from other dicts: tensors under text names, and hardly anything else."""
    names = [name for name in saved if not str(name).endswith(_EXTRA_STATE)]
    tensors = sum(isinstance(saved[name], Tensor) for name in names)
    plain = all(
        isinstance(saved[name], (Tensor, int, float, str, bytes, type(None))) for name in names
    )
    named = all(isinstance(name, str) for name in saved)
    return named and plain and tensors > 0 and 2 * tensors >= len(names)


def _locate(keys: Keys, stored: Mapping[str, object]) -> Location:
    names = [name for name, value in stored.items() if isinstance(value, Tensor)]
    prefix = _prefix([name for name in names if name != _AVERAGED])
    bare_names = {
        unwrapped(name[len(prefix) :]): name for name in names if not prefix or name != _AVERAGED
    }
    state_dict = OrderedDict((bare, cast(Tensor, stored[n])) for bare, n in bare_names.items())
    if (found := versions(stored, prefix)) is not None:
        vars(state_dict)["_metadata"] = found
    return Location(keys, stored, state_dict, bare_names, prefix)


def _prefix(names: list[str]) -> str:
    """Return the wrappers' prefix that all names have, such as ``"module._orig_mod."``."""
    prefix = ""
    while names:
        wrapper = next((w for w in _WRAPPERS if all(n.startswith(prefix + w) for n in names)), "")
        if not wrapper:
            break
        prefix += wrapper
    return prefix


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _identity(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what two tensors have in common if and only if they are the same memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (str(tensor.device), tensor.data_ptr(), *layout)
