"""Attributes that nobody read in the forward that was followed, and that must tell the truth.

A forward that says ``view(n, l, -1, self.head_dim)`` runs at any number of heads, so nothing shows
that ``self.num_heads`` repeats it; other methods of the module may rely on it. These few names say
what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fxgrow.channels.groups import ChannelGroup
from fxgrow.grow.sizes.attributes import following
from fxgrow.labels.tape import Operation, Tape
from fxgrow.plan.edits import ModuleEdit

# num_heads, n_head, num_key_value_heads…; but dim_head and size_per_head are sizes.
_HEADS = re.compile(r"(?!.*(dim|size|width)).*heads?$")
# Which dim of a layer's own matrices these repeat, as those of torch's layers do.
_SIDES = {"out_features": 0, "in_features": 1, "out_channels": 0, "in_channels": 1}
# Of norms that normalise each channel, or groups of them, alike without any tensor of their own.
_OF_NORMS: dict[type[nn.Module], str] = {_NormBase: "num_features", nn.GroupNorm: "num_channels"}
_ALL_HEADS = ("all_head_size", "inner_dim", "inner_size", "split_size")


def head_edits(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    known: Sequence[ModuleEdit],
) -> Iterator[ModuleEdit]:
    """Yield the numbers of heads and sizes of all heads that grow with a group.

    Args:
        model: the network, at its old sizes.
        groups: all channel groups; those with several rows to a channel are heads.
        widths: new width of each group that grows, by name.
        known: edits that are made already.
    """
    done = {(edit.module, edit.attribute) for edit in known}
    for group in groups:
        heads, width = len(group.channels), widths.get(group.name, group.width)
        if heads == group.followed or width == group.width:
            continue
        for owner in dict.fromkeys(writer.rpartition(".")[0] for writer in group.writers):
            for name, before in vars(model.get_submodule(owner)).items():
                if type(before) is not int or (owner, name) in done:
                    continue
                if (_HEADS.match(name) or name in _ALL_HEADS) and before % heads == 0:
                    done.add((owner, name))
                    yield ModuleEdit(owner, name, before, before * width // group.width)


def size_edits(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], known: Sequence[ModuleEdit]
) -> Iterator[ModuleEdit]:
    """Yield what a layer of the user's own says of how many numbers it takes and gives.

    A method that draws its noise anew, or fills its weights, relies on that.

    Args:
        model: the network, at its old sizes.
        shapes: new shape of each tensor that changes, by name.
        known: edits that are made already.
    """
    done = {(edit.module, edit.attribute) for edit in known}
    modules = dict(model.named_modules())
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        module = modules.get(owner)
        # A first state lies in a list of some; torch's own layers say by themselves what is which.
        if module is None or following(module) is not None:
            continue
        own = {**module._parameters, **module._buffers}
        matrices = {name: x for name, x in own.items() if x is not None and x.ndim > 1}
        for attribute, dim in _SIDES.items():
            before = vars(module).get(attribute)
            if type(before) is not int or (owner, attribute) in done:
                continue
            full = {name: f"{owner}.{name}" if owner else name for name in matrices}
            sizes = {x.shape[dim] for x in matrices.values()}
            after = {shapes.get(full[n], x.shape)[dim] for n, x in matrices.items()}
            if sizes == {before} and len(after) == 1 and after != sizes:
                yield ModuleEdit(owner, attribute, before, *after)


def norm_edits(model: nn.Module, old: Tape, new: Tape) -> Iterator[ModuleEdit]:
    """Yield over how many channels norms are that have no tensors, as what comes in tells.

    torch warns of an InstanceNorm that is told another number than it gets.

    Args:
        model: the network, at its old sizes.
        old: its operations, at its old sizes.
        new: the same, at its new ones.
    """
    if [op.target for op in old.operations] != [op.target for op in new.operations]:
        return
    sizes: dict[str, set[tuple[int, int]]] = {}
    for before, after in zip(old.operations, new.operations, strict=True):
        if _enters(before, old):
            shapes = before.inputs[0].shape, after.inputs[0].shape
            sizes.setdefault(before.module, set()).update(zip(*shapes, strict=False))
    for owner, found in sizes.items():
        module = model.get_submodule(owner)
        name = next((name for cls, name in _OF_NORMS.items() if isinstance(module, cls)), "")
        if name and not any(True for _ in (*module.parameters(), *module.buffers())):
            grown = {pair for pair in found if pair[0] != pair[1]}
            if len(grown) == 1 and (pair := grown.pop())[0] == getattr(module, name):
                yield ModuleEdit(owner, name, *pair)


def _enters(operation: Operation, tape: Tape) -> bool:
    """Return whether what an operation takes first comes from outside of the module that runs."""
    if not operation.inputs:
        return False
    made = operation.inputs[0].producer
    return made is None or tape.operations[made].module != operation.module
