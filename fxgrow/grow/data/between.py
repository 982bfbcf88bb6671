"""What lies between the layers of a pair: whether it treats each channel by itself.

It is read off the operations that ran, in their order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.labels.operators import operator_name, traits_of
from fxgrow.labels.tape import Operation, Value


def problems_between(
    analysis: Analysis, group: ChannelGroup, model: nn.Module, over: str
) -> Iterator[str]:
    """Yield why what lies between the layers does not treat each channel by itself.

    Args:
        analysis: of the network.
        group: between them.
        model: the network itself.
        over: the one norm over all channels that may lie there, or "".
    """
    (writer,) = group.writers
    operations = analysis.tape.operations
    for layer in (writer, *group.readers):
        used = [op for op in operations if f"{layer}.weight" in op.parameters]
        if sum(any(not value.is_weight for value in op.outputs) for op in used) != 1:
            yield f"{layer} is used more than once"
    between = _Between(model, group, analysis.mixers_of(group), over)
    for op in operations:
        if op.module == writer:
            between.begin(op)
        elif op.module not in group.readers and between.takes(op):
            yield from between.problems(op)
            between.go_on(op)
        elif between.takes_early(op):
            yield f"{op.module} reads them before {over}, a norm over all of them"


@dataclass
class _Between:
    """What lies between the layers of a group, followed operation by operation.

    Attributes:
        model: the network.
        group: between the layers.
        mixers: operations that depend on several of its channels together.
        over: the one norm over all channels that may be among these, or "".
        passed: values that come from the writer, by their numbers.
        early: of these, what ``over`` does not lie before.
    """

    model: nn.Module
    group: ChannelGroup
    mixers: Collection[str]
    over: str
    passed: set[int] = field(default_factory=set)
    early: set[int] = field(default_factory=set)

    def begin(self, op: Operation) -> None:
        """Go on from what the writer puts out."""
        self.passed |= {value.index for value in op.outputs if not value.is_weight}
        self.early |= self.passed if self.over else set()

    def takes(self, op: Operation) -> bool:
        """Return whether an operation takes what comes from the writer."""
        return any(value.index in self.passed for value in op.inputs)

    def takes_early(self, op: Operation) -> bool:
        """Return whether it takes some of that which has not been normalised yet."""
        return any(value.index in self.early for value in op.inputs)

    def problems(self, op: Operation) -> Iterator[str]:
        """Yield why an operation does not treat each channel by itself."""
        is_carrier = op.module in self.group.carriers
        # One over positions divides by their deviation, which small numbers do not show.
        is_norm = "norm" in op.name and not is_carrier
        mixes = _mixes(op, self.mixers) and op.module != self.over
        by_itself = is_carrier and is_depthwise(self.model, op.module)
        if mixes or is_norm or not _is_alone(op, self.passed, is_product=by_itself):
            where = f" at {op.module}" if op.module else ""
            yield f"{op.name}{where} lies between the layers{_why(op, self.mixers)}"

    def go_on(self, op: Operation) -> None:
        """Go on from what an operation puts out."""
        made = {value.index for value in op.outputs}
        if op.module != self.over and self.takes_early(op):
            self.early |= made
        self.passed |= made


def _mixes(op: Operation, mixers: Collection[str]) -> bool:
    """Return whether an operation is one of those that depend on several channels together."""
    return f"{operator_name(op.target)}{op.place.removeprefix(op.name)}" in mixers


def _why(op: Operation, mixers: Collection[str]) -> str:
    """Return what to say besides of a group norm; "" of anything else."""
    if not (_mixes(op, mixers) and op.name == "native_group_norm"):
        return ""
    return (
        ": its mean and deviation are also over positions, so that no new channel leaves them as "
        "they are (choose another init)"
    )


def norm_over(analysis: Analysis, group: ChannelGroup, model: nn.Module) -> str:
    """Return the name of the one module that normalises over all channels of a group; "" if none.

    It has a weight for each channel, and a bias at most besides.
    """
    mixers = analysis.mixers_of(group)
    found = {op.module for op in analysis.operations_of(group) if _mixes(op, mixers)}
    if len(found) != 1 or not {*found} <= {*group.carriers}:
        return ""
    (name,) = found
    module = model.get_submodule(name)
    tensors = {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}
    is_known = "weight" in tensors and {*tensors} <= {"weight", "bias"}
    is_known = is_known and all(tensor.ndim == 1 for tensor in tensors.values())
    return name if is_known and not isinstance(module, (nn.GroupNorm, _BatchNorm)) else ""


def _is_alone(op: Operation, passed: set[int], *, is_product: bool = False) -> bool:
    """Return whether an operation depends on what the writer puts out, and on weights, alone.

    Args:
        op: the operation.
        passed: values that come from the writer.
        is_product: whether it may be a product.
    """
    random = torch.Tag.nondeterministic_seeded in op.target.tags
    others: list[Value] = [value for value in op.inputs if value.index not in passed]
    mixes = not is_product and (op.is_product or traits_of(op.target).is_product)
    return not (random or mixes) and all(value.is_weight for value in others)


def is_depthwise(model: nn.Module, name: str) -> bool:
    """Return whether a layer is a convolution of each channel by itself, into one."""
    layer = dict(model.named_modules()).get(name)
    return (
        isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and layer.groups == layer.in_channels == layer.out_channels
        and "weight" in layer._parameters  # a parametrized one is computed
    )
