"""Code that does at new sizes what it does with none of the present channels."""

from __future__ import annotations

from fxgrow.channels.channels import Channels
from fxgrow.labels.operators import operator_name, traits_of
from fxgrow.labels.tape import Operation, Tape


def unlike(old: tuple[Channels, Tape], new: tuple[Channels, Tape]) -> str:
    """Return what is done with new channels as with no old one, as a reason; "" if nothing is.

    Of a width twice as large, ``split(4, 1)`` makes twice as many parts: as well, if all parts are
    treated alike, and not if each has a number of its own, or if their means are added up.

    Args:
        old: the channels and the operations of a run at the present sizes.
        new: those at the new ones.
    """
    before, after = ([done for done, _ in channels.noted] for channels, _ in (old, new))
    known = {*before}
    more = [done for done in after if done not in known] if len(after) > len(before) else []
    more += _reduced(new[1])[len(_reduced(old[1])) :]
    if not more:
        return ""
    return (
        "the code computes more at the new sizes, and not the same as of the present channels "
        f"({more[0]})"
    )


def chooses(old: Tape, new: Tape) -> str:
    """Return which parameter the code takes in place of another at new sizes; "" if none.

    A function is kept where the same tensors make it: ``table[x.shape[1]]`` is another number.

    Args:
        old: the operations of a run at the present sizes.
        new: those at the new ones.
    """
    if [op.target for op in old.operations] != [op.target for op in new.operations]:
        return ""
    for before, after in zip(old.operations, new.operations, strict=True):
        was, becomes = before.parameters, after.parameters
        if was != becomes and was and becomes:
            return (
                f"the code chooses a parameter by a width: {after.place} takes "
                f"{' and '.join(becomes)} at the new sizes, where it takes {' and '.join(was)} "
                "at the present ones"
            )
        if (
            was
            and operator_name(before.target) == "aten.select"
            and _entry(before) != _entry(after)
        ):
            same = before.inputs[0].shape == after.inputs[0].shape
            if same and before.inputs[0].is_weight:
                return (
                    f"the code chooses an entry of {' and '.join(was)} by a width: "
                    f"{_entry(after)[-1]} at the new sizes, where it takes {_entry(before)[-1]} at "
                    "the present ones"
                )
    return ""


def _entry(op: Operation) -> tuple[object, ...]:
    """Return along which dim an operation selects, and what."""
    return op.args[1:]


def _reduced(tape: Tape) -> list[str]:
    """Return the operations, other than products, after which data has no channels any more."""
    return [
        op.place
        for op in tape.operations
        if not traits_of(op.target).is_product
        and any(value.layers and not value.is_weight for value in op.inputs)
        and not any(value.layers for value in op.outputs)
    ]
