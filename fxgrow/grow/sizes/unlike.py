"""Code that does at new sizes what it does with none of the present channels."""

from __future__ import annotations

from fxgrow.channels.channels import Channels
from fxgrow.labels.operators import traits_of
from fxgrow.labels.tape import Tape


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


def _reduced(tape: Tape) -> list[str]:
    """Return the operations, other than products, after which data has no channels any more."""
    return [
        op.place
        for op in tape.operations
        if not traits_of(op.target).is_product
        and any(value.layers and not value.is_weight for value in op.inputs)
        and not any(value.layers for value in op.outputs)
    ]
