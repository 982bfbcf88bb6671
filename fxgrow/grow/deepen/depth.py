"""Attributes that tell how many blocks there are, or which place a block has among its like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fxgrow.grow.identity.stages import LISTS, Stage, child_of, inserted, is_index
from fxgrow.plan.edits import ModuleEdit

# num_layers, n_layer, num_hidden_layers, encoder_layers, depths, num_blocks, layer_types…
_DEPTH = re.compile(r"(.*_)?(layers?|blocks?|depths?|layer_types)")
_GENERIC = frozenset(
    {"num", "n", "number", "of", "hidden", "types"}
    | {"layer", "layers", "block", "blocks", "depth", "depths"}
)


def attribute_edits(model: nn.Module, stage: Stage, likes: Sequence[int]) -> Iterator[ModuleEdit]:
    """Yield the edits of attributes that follow the insertion of blocks.

    A number of blocks is an attribute of that name and value, of a module around the list or of a
    configuration that such a module holds. Where it is one among several (``depths``), it is the
    one at the place that its stage has among the others.

    Args:
        model: the network before.
        stage: where the new blocks come.
        likes: the places of the blocks they are copies of.
    """
    yield from _depths(model, stage, likes)
    yield from _indices(model, stage, likes)


def _depths(model: nn.Module, stage: Stage, likes: Sequence[int]) -> Iterator[ModuleEdit]:
    """Yield the numbers of blocks, and the lists with an entry for each block."""
    path = stage.container.split(".") if stage.container else []
    place = _place(model, path)
    sources = [stage.names.index(child.source) for child in inserted(stage, likes)]
    done: set[int] = set()
    for length in range(len(path) + 1):  # what is held by several belongs to the outermost
        owner = ".".join(path[:length])
        for prefix, holder in _holders(model.get_submodule(owner)):
            if id(holder) in done:
                continue
            done.add(id(holder))
            for name, before in _about(vars(holder), owner, stage.container).items():
                after = _deeper(before, len(stage.names), place, sources)
                if after is not None:
                    before = tuple(before) if isinstance(before, list) else before
                    yield ModuleEdit(owner, prefix + name, before, after)


def _about(attributes: Mapping[str, object], owner: str, container: str) -> dict[str, Any]:
    """Return the attributes that tell of the blocks in a list, by their names.

    Where one names the list (``num_decoder_layers``), it alone counts, unless they are those of a
    module that it names, too; one that names another list does not count.
    """
    found = {name: value for name, value in attributes.items() if _DEPTH.fullmatch(name)}
    told = {name: set(name.split("_")) - _GENERIC for name in found}
    named = {name for name, words in told.items() if words and all(w in container for w in words)}
    above = any(word not in owner for name in named for word in told[name])
    return {
        name: value
        for name, value in found.items()
        if name in named or (not told[name] and not (above and isinstance(value, int)))
    }


def _deeper(before: object, old: int, place: int, sources: Sequence[int]) -> Any:
    """Return what an attribute becomes, or None if it does not tell the number of blocks."""
    if type(before) is int:
        return len(sources) if before == old else None
    if not isinstance(before, (list, tuple)) or not before:
        return None
    if all(type(item) is int for item in before) and place < len(before) and before[place] == old:
        return (*before[:place], len(sources), *before[place + 1 :])
    if len(before) == old and all(type(item) is str for item in before):  # a kind for each block
        return tuple(before[source] for source in sources)
    return None


def _place(model: nn.Module, path: Sequence[str]) -> int:
    """Return the place of a list among the parts of the innermost list around it; 0 if in none."""
    for length in range(len(path) - 1, -1, -1):
        around = model.get_submodule(".".join(path[:length]))
        if isinstance(around, LISTS):
            return [*around._modules].index(path[length])
    return 0


def _holders(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield a module and the objects that it holds, with the start of their attributes' names."""
    yield "", module
    for name, value in vars(module).items():
        if is_shared_object(value):
            yield f"{name}.", value


def is_shared_object(value: object) -> bool:
    """Return whether a value is an object of a class of the user's, such as a configuration."""
    return hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, Tensor))


def _indices(model: nn.Module, stage: Stage, likes: Sequence[int]) -> Iterator[ModuleEdit]:
    """Yield the places of blocks that they hold themselves."""
    blocks = [model.get_submodule(stage.child(place)) for place in range(len(stage.names))]
    offset = _offset(blocks)
    if offset is None:
        return
    for place, child in enumerate(inserted(stage, likes)):
        block = blocks[stage.names.index(child.source)]
        for inner, module in block.named_modules():
            for attribute, value in vars(module).items():
                if is_index(attribute) and type(value) is int and value != place + offset:
                    owner = child_of(stage.container, child.name) + (f".{inner}" if inner else "")
                    yield ModuleEdit(owner, attribute, value, place + offset)


def _offset(blocks: Sequence[nn.Module]) -> int | None:
    """Return by what the places that blocks hold exceed their own; None if they hold none."""
    found = {
        value - place
        for place, block in enumerate(blocks)
        for module in block.modules()
        for attribute, value in vars(module).items()
        if is_index(attribute) and type(value) is int
    }
    return found.pop() if len(found) == 1 else None
