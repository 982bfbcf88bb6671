"""Whether an optimizer's state_dict has become what it should: told from old and new values.

What an optimizer keeps is seen by no output. So it is looked at here, by code that shares nothing
with what grows it: the rules are those of :mod:`fxgrow.files.optimizer.state`, read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from fxgrow.errors import PlanError, VerificationError
from fxgrow.files.comparison import difference
from fxgrow.files.optimizer.buffers import BUFFERS, Buffer, State, is_counter
from fxgrow.files.optimizer.order import names_by_group
from fxgrow.modules.bits import pieces
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import AxisEdit, TensorEdit
from fxgrow.plan.names import names_after, tensor_origins
from fxgrow.plan.schema import Plan
from fxgrow.verification.places import along, back
from fxgrow.verification.positions import close, regrouped

_CONTINUE = ("old", "share")
_TINY = 1e-30  # below it, a mean may vanish


def check_optimizer(
    plan: Plan,
    saved: Mapping[str, Any],
    grown: Mapping[str, Any],
    before: nn.Module,
    after: nn.Module,
    notes: Sequence[str],
) -> None:
    """Return if an optimizer's state_dict is the old one as a plan makes it grow.

    Args:
        plan: the plan.
        saved: the old state_dict.
        grown: the new one.
        before: the old network.
        after: the grown network.
        notes: what the user is told; what is lost must be among it.

    Raises:
        VerificationError: a setting differs, or a parameter's state is not its own.
    """
    mine, theirs = (_without_parts(each) for each in (grown, saved))
    _refuse_if(difference(mine, theirs))
    have, want = (_settings(each["param_groups"]) for each in (grown, saved))
    _refuse_if(difference(have, want, "the settings of its groups"))
    try:
        old_groups = names_by_group(saved, _shapes(before))
    except PlanError:
        if grown["state"] or (saved["state"] and not notes):
            _refuse("its state is kept, though nobody knows which parameter is which")
        return
    origins = tensor_origins(named_tensors(before), plan.steps)
    new_name = {origin.name: name for name, origin in origins.items() if not origin.new}
    new_groups = _new_groups(grown, old_groups, new_name, after)
    if new_groups is None:
        return
    check = _StateCheck(plan, named_tensors(before))
    for index, (old_names, new_names) in enumerate(zip(old_groups, new_groups, strict=True)):
        keys = dict(zip(old_names, saved["param_groups"][index]["params"], strict=True))
        new_keys = dict(zip(new_names, grown["param_groups"][index]["params"], strict=True))
        for name, key in keys.items():
            now = new_name.get(name, name)
            if now not in new_keys:
                _refuse(f"{now} is no longer in its group {index}")
            old, new = saved["state"].get(key), grown["state"].get(new_keys[now])
            if old is None and new is not None:
                _refuse(f"{now} has a state, and {name} had none")
            if old is not None and new is None and not notes:
                _refuse(f"the state of {now} is lost")
            if old is not None and new is not None:
                check.check(name, now, old, new)


def _without_parts(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state_dict says beside its state and its groups."""
    return {key: v for key, v in saved.items() if key not in ("state", "param_groups")}


def _settings(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what groups say apart from their parameters."""
    apart = ("params", "param_names")
    return [{k: v for k, v in group.items() if k not in apart} for group in groups]


def _new_groups(
    grown: Mapping[str, Any],
    old_groups: Sequence[Sequence[str]],
    new_name: Mapping[str, str],
    after: nn.Module,
) -> list[list[str]] | None:
    """Return the names in each new group; None where the state_dict does not tell."""
    sizes = [len(group["params"]) for group in grown["param_groups"]]
    if sizes != list(map(len, old_groups)):
        try:
            return names_by_group(grown, _shapes(after))
        except PlanError:
            return None
    place = {name: index for index, (name, _) in enumerate(after.named_parameters())}
    was = {new: index for index, new in enumerate(new_name.values())}
    found = []
    for group in old_groups:
        names = [new_name.get(name, name) for name in group]
        in_order = all(was.get(a, 0) <= was.get(b, 0) for a, b in itertools.pairwise(names))
        found.append(sorted(names, key=lambda n: place.get(n, 0)) if in_order else names)
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class _Continued:
    """What a buffer should hold where it continues the old one.

    Attributes:
        values: in float64 where they were multiplied; without meaning elsewhere.
        known: where it does.
    """

    values: Tensor
    known: Tensor


class _StateCheck:
    """Compares the states of parameters.

    Args:
        plan: the plan.
        tensors: the old network's parameters and buffers.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        self._plan, self._tensors = plan, tensors

    def check(self, name: str, now: str, old: State, new: State) -> None:
        """Compare what an optimizer keeps for one parameter.

        Args:
            name: its old name.
            now: its new one.
            old: what was kept.
            new: what is kept now.

        Raises:
            VerificationError: it is not the old as the plan makes it grow.
        """
        if old.keys() != new.keys():
            _refuse(f"it keeps other buffers for {now}")
        for key, value in old.items():
            if is_counter(value) or key not in BUFFERS:
                _refuse_if(difference(new[key], value, f"{key} of {now}"))
                continue
            rule = BUFFERS[key](old, key)
            wanted = self._continued(name, rule)
            if wanted is None or rule.values is not value:  # factors of a matrix, not its entries
                continue
            have = new[key]
            if have.shape != wanted.values.shape or have.dtype != value.dtype:
                _refuse(f"{key} of {now} is {have.dtype} of {tuple(have.shape)}")
            sizes = rule.fresh == "mean" and _are_sizes(value)
            for rows in pieces(have):
                _check_rows(have[rows], wanted, rows, f"{key} of {now}", sizes=sizes, rule=rule)

    def _continued(self, name: str, rule: Buffer) -> _Continued | None:
        """Return what a buffer should hold, or None where a later step takes up a gain."""
        found = _Continued(rule.values, torch.ones_like(rule.values, dtype=torch.bool))
        names = list(self._tensors)
        for index, step in enumerate(self._plan.steps):
            moved = names_after(names, step)
            after = next((n for n, before, new in moved if before == name and not new), name)
            edit = step.tensors.get(step.aliases.get(after, after))
            names, name = [n for n, _, _ in moved], after
            if edit is None:
                continue
            factor = self._factor(edit) if edit.absorption is None or index == 0 else None
            if factor is None or tuple(found.values.shape) != edit.shape:
                return None
            values = found.values
            if bool((factor != 1).any()) and rule.degree:
                values = values.double() * factor ** (-rule.degree)
            found = _grown(edit, values, found.known, rule.degree)
        return found

    def _factor(self, edit: TensorEdit) -> Tensor:
        """Return what the old weights are multiplied by, of one entry or of their shape."""
        factor = torch.tensor(edit.scale, dtype=torch.float64)
        taken = edit.absorption
        if taken is None:
            return factor
        shifted = self._tensors[taken.variance].detach().double() + taken.eps
        lost = taken.gain**2 * shifted < taken.eps
        correction = taken.eps**0.5 / (taken.gain * shifted.sqrt())
        return factor * torch.where(lost, correction, torch.ones_like(correction))


def _grown(edit: TensorEdit, values: Tensor, known: Tensor, degree: int) -> _Continued:
    """Return a buffer after one edit: old numbers where old positions are, and shares of copies."""
    values, known = regrouped(values, edit.groups), regrouped(known, edit.groups)
    for axis in edit.axes:
        (values, dim), (known, _) = along(values, axis), along(known, axis)
        source, share = _sources(axis)
        if not values.shape[dim]:  # of an empty layer nothing goes on
            shape = [*values.shape[:dim], len(source), *values.shape[dim + 1 :]]
            values, _ = back(values.new_zeros(shape), axis), 0
            known = back(known.new_zeros(shape), axis)
            continue
        index = torch.from_numpy(source.clip(min=0))
        shape = [1] * values.ndim
        shape[dim] = -1
        goes_on = torch.from_numpy(source >= 0).view(shape)
        values = values.index_select(dim, index)
        if (share != 1).any():
            values = values.double() * torch.from_numpy(share**degree).view(shape)
        known = known.index_select(dim, index) & goes_on
        values, known = back(values, axis), back(known, axis)
    return _Continued(values, known)


def _sources(axis: AxisEdit) -> tuple[Any, Any]:
    """Return the old position that each new one continues (-1: none), and its share of gradients.

    Whatever reads copies of a channel has the gradients of the old columns; whatever writes or
    scales them shares these.
    """
    spans = [
        np.arange(run.length) + run.start if run.kind in _CONTINUE else np.full(run.length, -1)
        for run in axis.runs
    ]
    source = np.concatenate(spans)
    share = np.ones(len(source))
    if axis.role != "reader":
        copied = source >= 0
        share[copied] = 1 / np.bincount(source[copied])[source[copied]]
    return source, share


def _check_rows(
    have: Tensor, wanted: _Continued, rows: slice, what: str, *, sizes: bool, rule: Buffer
) -> None:
    """Compare some rows of a buffer.

    Args:
        have: the rows.
        wanted: what the whole should hold.
        rows: which they are.
        what: the buffer, for messages.
        sizes: new weights begin with sizes above zero.
        rule: what new weights begin with.

    Raises:
        VerificationError: old numbers do not go on, or new weights begin with something else.
    """
    want, known = wanted.values[rows], wanted.known[rows]
    if not bool(((have == want) | ~known).all()):
        right = close(have, want.double()) | ~known
        if not bool(right.all()):
            _refuse(f"{what} does not go on with its old numbers")
    wrong = have != 0 if rule.fresh == "zero" else ~torch.isfinite(have)
    wrong = have <= 0 if sizes else wrong
    if bool((wrong & ~known).any()):
        _refuse(f"{what} does not begin with the {rule.fresh} for new weights")


def _are_sizes(old: Tensor) -> bool:
    """Return whether old numbers are sizes whose mean is one too."""
    return bool(torch.isfinite(old).all() and (old >= 0).all() and old.double().mean() > _TINY)


def _refuse_if(how: str) -> None:
    if how:
        _refuse(how)


def _refuse(how: str) -> NoReturn:
    """Refuse an optimizer's state.

    Raises:
        VerificationError: always.
    """
    raise VerificationError(
        f"the optimizer's state has not become what it should: {how}.",
        way_out="That is a fault of fxgrow: please report it. Without the optimizer it will do.",
    )
