"""What the Trainer's checkpoints tell of growth, and which weights fit a network."""

from __future__ import annotations

import importlib
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxgrow.errors import shown

STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
OWN_NAMES = (
    "Before training, have them written under the network's own: model.save_pretrained = "
    "functools.partial(model.save_pretrained, save_original_format=False)."
)


def differs(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Return whether weights have other shapes than a network's, or names that it has not."""
    own = model.state_dict(keep_vars=True)
    return any(name not in own or own[name].shape != w.shape for name, w in weights.items())


def has_other_shape(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Return whether a network has a tensor of a name, of another shape."""
    own = model.state_dict(keep_vars=True).get(name)
    return own is not None and own.shape != weight.shape


def foreign(model: nn.Module, names: Iterable[str]) -> str:
    """Return the first of some names of weights that a network has none of, or ""."""
    own = model.state_dict(keep_vars=True)
    return next((name for name in names if name not in own), "")


def own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return what a model of transformers calls tensors that it has written under older names.

    Args:
        model: the model; any other has no such.
        names: of tensors as they were written.

    Returns:
        The model's own names by those, where they differ and no two become one. What transformers
        makes of several tensors, or several of, keeps its name.
    """
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
        every = getattr(model, "_weight_conversions", None)
        every = every or mapping.get_model_conversion_mapping(model)
        renamings = [one for one in every if isinstance(one, loading.WeightRenaming)]
        found = {name: loading.rename_source_key(name, renamings, [])[0] for name in names}
    except (ImportError, AttributeError, TypeError):  # of another version, or no such model
        return {}
    if len(set(found.values())) < len(found):
        return {}
    return {name: own for name, own in found.items() if name != own}


def rename_(model: nn.Module, weights: MutableMapping[str, Tensor], prefix: str = "") -> None:
    """Give weights that are about to be loaded the names that a model has for them, in place.

    Args:
        model: the model.
        weights: a state_dict of it, or of what it is a part of.
        prefix: of its names in there.
    """
    given = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    if not foreign(model, given):
        return
    held = {prefix + name: prefix + own for name, own in own_names(model, given).items()}
    moved = {own: weights.pop(name) for name, own in held.items()}
    weights.update(moved)


class Renaming:
    """Called by a model before it loads weights: under older names, they are taken for its own.

    Args:
        model: the model. Copies of this belong to none, and do nothing.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        if model is not None:
            self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return Renaming, ()

    def __call__(self, weights: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Rename them, in place."""
        del rest
        model = self._model()
        if model is not None:
            rename_(model, weights, prefix)


def renamed(folder: Path, model: nn.Module) -> str:
    """Return what to tell of a checkpoint of one file whose weights have other names, or ""."""
    try:
        with importlib.import_module("safetensors").safe_open(folder / WEIGHTS, "pt") as file:
            names = sorted(file.keys())
            known = own_names(model, names)
            name = foreign(model, [known.get(name, name) for name in names])
    except (ImportError, OSError, ValueError):
        return ""
    told = f"the weights in {folder.name} have names that the network has not ({shown(name)}), so "
    return f"{told}that no run resumes from them. {OWN_NAMES}" if name else ""


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name; -1 if there is none."""
    step = folder.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def progress_of(folder: Path, name: str, part: str) -> Iterator[dict[str, Any]]:
    """Yield what a checkpoint says of a callback, if it says anything."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # no checkpoint, or one that was being written
    held = state.get("stateful_callbacks") if isinstance(state, dict) else None
    progress = progress_in(held, name, part) if isinstance(held, dict) else None
    if progress is not None:
        yield progress


def progress_in(held: Mapping[str, Any], name: str, part: str) -> dict[str, Any] | None:
    """Return what the state of callbacks says of one of them; None if it is not among them."""
    return next((one for one in progresses(held.get(name)) if one["part"] == part), None)


def progresses(several: object) -> Iterator[dict[str, Any]]:
    """Yield how far callbacks of growth have come, of what the Trainer keeps under one name."""
    for one in several if isinstance(several, list) else [several]:
        attributes = one.get("attributes") if isinstance(one, dict) else None
        progress = attributes.get("progress") if isinstance(attributes, dict) else None
        if not isinstance(progress, dict) or not isinstance(progress.get("part"), str):
            continue
        if progress.keys() >= {"done", "growth"}:
            yield progress


def number(key: Any) -> Any:
    """Return a key of a schedule as a number, if it is the text of one."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def is_json(value: object) -> bool:
    """Return whether a value can be written as JSON."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class Regrow:
    """Called by a network before it loads weights. Copies of it do nothing.

    Args:
        callback: whose network it is.
        output: the directory with checkpoints.
        resume: the checkpoint to resume from, if it is known.
    """

    def __init__(self, callback: Any, output: Any, resume: Any) -> None:
        self._callback: Callable[[], Any] = lambda: None
        if callback is not None:
            self._callback = weakref.ref(callback)
        self._output, self._resume = output, resume

    def __reduce__(self) -> tuple[Any, ...]:
        return Regrow, (None, None, None)

    def __call__(self, weights: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Rename what is about to be loaded, and have the network grow to its shapes."""
        del rest
        callback = self._callback()
        model = callback._root() if callback is not None else None
        if callback is not None and model is not None:
            rename_(model, weights, prefix)
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            callback.regrow(own, self._output, self._resume)
