"""What is followed through a call, held against numbers.

*Gain*: with one operand scaled, each result is scaled as the gain rule says. *Padding*: where some
channels hold zeros, or the mean of the others, those of the result hold what the rule says.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxgrow.labels.forest import IntArray
from fxgrow.labels.gains import Absorbed, Gain, GainFlow
from fxgrow.labels.interpreter import interpret
from fxgrow.labels.operators import traits_of
from fxgrow.labels.padding import ChannelTable, Held, Holds, PaddingFlow
from fxgrow.labels.tape import Operation
from fxgrow.labels.validate.checks import SampleCase, UnmatchedError, carried, difference, run
from fxgrow.labels.validate.claims import PARAMETER, Located

_NEW: dict[str, float] = {"zero": 0.0, "one": 1.0}  # how new entries of parameters begin
_HOLDS: tuple[Holds, ...] = ("zero", "mean")
SCALE = 4.0  # exact, and so is its square root


def check_gain(case: SampleCase) -> str:
    """Scale each operand of data in turn; return what is wrong, or ""."""
    names = {f"{PARAMETER} {place}": place for place in range(len(case.operands))}
    for place, x in enumerate(case.operands):
        if case.way[place][0] != "d" or not x.is_floating_point():
            continue
        flow = GainFlow({})
        flow.set(case.labelled.entering[place], Gain(SCALE, frozenset({"scaled"})))
        interpret(case.labelled.operations, flow)
        # Statistics of a batch take a gain up but for their eps: running ones are what is told of.
        if flow.mismatches or (flow.absorbed and any(map(_is_training, case.labelled.operations))):
            continue
        scaled = [SCALE * own if i == place else own for i, own in enumerate(case.operands)]
        for name, factor in flow.vectors.items():
            scaled[names[name]] = factor * scaled[names[name]]
        for norm in flow.absorbed.values():
            _absorb(norm, scaled, names)
        gains = [flow.of(value).scale for value in case.labelled.leaving]
        wanted = [x * gain if gain != 1 else x for x, gain in zip(case.results, gains, strict=True)]
        found = difference(case, wanted, run(case.call, scaled), f"operand {place} × {SCALE:g}")
        if found:
            return found
    return ""


def _is_training(op: Operation) -> bool:
    """Return whether a norm takes the statistics of its batch."""
    place = traits_of(op.target).places.get("training", traits_of(op.target).places.get("train"))
    return place is not None and bool(op.args[place])


def _absorb(norm: Absorbed, operands: list[Tensor], names: dict[str, int]) -> None:
    """Let the statistics of a norm take a gain up, in place: the variance with its eps."""
    if norm.running_mean:
        place, variance = names[norm.running_mean], names[norm.running_var]
        square = norm.gain**2
        operands[place] = norm.gain * operands[place]
        operands[variance] = square * (operands[variance] + norm.eps) - norm.eps


def check_padding(case: SampleCase) -> str:
    """Let some channels hold zeros, or the mean of the others; return what is wrong, or ""."""
    space, roots = case.labelled.space, case.labelled.space.roots()
    roles = tuple(space.roles.get(index, "carrier") for index in range(len(space.axes)))
    table = ChannelTable(tuple(space.axes), roles, np.where(roots > 0, roots, -1))
    for value, layers in zip(case.labelled.entering, case.claims.operands, strict=True):
        for layer in layers:
            members = np.unique(layer.channels)
            if value.is_input and len(layer.dims) == 1 and len(members) > 1 and members[0] > 0:
                for holds in _HOLDS:
                    found = _check_held(case, table, members, holds)
                    if found:
                        return found
    return ""


def _check_held(case: SampleCase, table: ChannelTable, members: IntArray, holds: Holds) -> str:
    """Follow what some channels of a group hold, and see whether they do."""
    flow = _followed(case, table, members, holds)
    if flow is None:
        return ""
    padding = case.random.permutation(members)[: len(members) // 2]
    again = run(case.call, _holding(case, members, padding, flow, holds))
    if not all(bool(x.isfinite().all()) for x in again if x.is_floating_point()):
        return ""  # a root of what is negative, say
    wanted = []
    for x, value, layers in zip(again, case.labelled.leaving, case.claims.results, strict=True):
        held = flow.of(value).what if flow.carries(value) else None
        for layer in layers:
            x = x if held is None else _padded(x, layer, members, padding, held)
        wanted.append(x)
    return difference(case, wanted, again, f"channels that hold {holds}")


def _followed(
    case: SampleCase, table: ChannelTable, members: IntArray, holds: Holds
) -> PaddingFlow | None:
    """Return what becomes of what some channels hold; None where it cannot be followed."""
    axes = [i for i, _ in enumerate(table.axes) if np.isin(table.of_axis(i), members).any()]
    flow = PaddingFlow(table, members, tuple(axes), holds, gradient_later=True)
    for value in filter(flow.carries, case.labelled.entering):
        if not value.dtype.is_floating_point:
            return None
        if value.is_input:
            flow.hold(value, Held(holds))
    interpret(case.labelled.operations, flow)
    return None if flow.refusal else flow


def _holding(
    case: SampleCase, members: IntArray, padding: IntArray, flow: PaddingFlow, holds: Holds
) -> list[Tensor]:
    """Return operands in which some of a group's channels hold what they should."""
    fills = {
        (axis.tensor, axis.dim): holds if index in flow.filled else _NEW.get(fill or "")
        for index, axis in enumerate(flow.table.axes)
        for fill in [case.labelled.space.fills.get(index)]
    }
    operands = []
    entering = case.labelled.entering
    for x, value, layers in zip(case.operands, entering, case.claims.operands, strict=True):
        for layer in layers:
            own = holds if value.is_input else fills.get((value.parameter, layer.dims[0]))
            x = x if own is None else _padded(x, layer, members, padding, own)
        operands.append(x)
    return operands


def _padded(
    x: Tensor, layer: Located, members: IntArray, padding: IntArray, holds: Holds | float
) -> Tensor:
    """Return a tensor in which some channels of a layer hold the mean of the others, or a number.

    Raises:
        UnmatchedError: that cannot be told: the channels are not beside one another, each once.
    """
    mine = np.isin(layer.channels, padding)
    if not mine.any() or not x.is_floating_point():
        return x
    if len(layer.dims) != 1:
        raise UnmatchedError
    value = torch.tensor(0.0 if isinstance(holds, str) else holds, dtype=x.dtype)
    if holds == "mean":
        others = np.flatnonzero(np.isin(layer.channels, members) & ~mine)
        if not len(others) or len(np.unique(layer.channels)) < len(mine):
            raise UnmatchedError
        value = x.index_select(layer.dims[0], torch.from_numpy(others)).mean(layer.dims[0], True)
    return torch.where(carried(layer, mine, x.shape), value, x)
