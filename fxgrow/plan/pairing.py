"""Pairing: how the new channels of a group cancel in whatever reads them.

One rule makes every pairing preserving: at each reader, the new columns that read one value sum to
zero, or the value is zero. A pairing says, for n new channels of one kind, which drawn row each of
them writes (V) and with which sign each reader reads its drawn column (Z), or which old channel
each of them copies, or copies the row of:

====================  ==============  =================  ==========================================
pairing               new rows        new columns        source
====================  ==============  =================  ==========================================
``vv_z_negz``         V, V            Z, −Z              R2WiderR, eq. 8–13; Yuan et al. 2023
``v_zero``            V               0                  NetMorph (Wei et al. 2016), one side zero
``zero_z``            0               Z                  NetMorph, the other side zero
``replicate``         copies of old   the old column     Net2WiderNet (Chen et al. 2016), eq. 6
                      rows            split over copies
``replicate_random``  the same, of old rows drawn        the same, where old channels are drawn at
                      at random                          random, as in the paper
``copy_pair``         copies of old   Z, −Z              R2R (appendix F): the hybrid of the two
                      rows, twice
``none``              V               Z                  random padding; does not preserve
====================  ==============  =================  ==========================================

An odd number of new channels under ``vv_z_negz`` leaves one without a twin: it is read by zeros.
Under ``zero_z`` new channels must be zero wherever they are read, which is followed through the
operations between: see :mod:`fxgrow.grow.norms.zero_channels`.
This module needs no torch, so the command line can list the names without loading it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from fxgrow.registry import Registry


@dataclass(frozen=True)
class Layout:
    """What n new channels of one kind write and how they are read.

    Attributes:
        draws: for each new channel the index of the drawn row (and column) it uses; twins share.
        column_signs: for each new channel +1, −1 or 0: the sign of its column at every reader.
        copies: for each new channel the old one, by its place among those of its kind, that it
            copies; empty if new channels are drawn.
        writes_zeros: whether the new rows are zeros instead of what is drawn.
        row_copies: for each new channel the old one, by its place among those of its kind, whose
            row it copies, with all that belongs to its value, while its column is drawn; empty if
            rows are drawn.
    """

    draws: tuple[int, ...]
    column_signs: tuple[int, ...]
    copies: tuple[int, ...] = ()
    writes_zeros: bool = False
    row_copies: tuple[int, ...] = ()

    @property
    def preserving(self) -> bool:
        """Whether every drawn value is zero, or the signs of the columns that read it sum to it."""
        if self.writes_zeros:
            return True
        sums: dict[int, int] = {}
        for draw, sign in zip(self.draws, self.column_signs, strict=True):
            sums[draw] = sums.get(draw, 0) + sign
        return not any(sums.values())


# A function of the numbers of new and of old channels of one kind, and of what chance depends on.
Pairing: TypeAlias = Callable[[int, int, str], Layout]
PAIRINGS: Registry[Pairing] = Registry("pairing")


@PAIRINGS.register("vv_z_negz")
def vv_z_negz(count: int, old: int = 0, seed: str = "") -> Layout:
    """Twins: the same new row twice, read with opposite signs.

    Example:
        >>> layout = vv_z_negz(5)
        >>> layout.draws, layout.column_signs
        ((0, 1, 0, 1, 2), (1, 1, -1, -1, 0))
    """
    del old, seed
    half = count // 2
    lone = count % 2
    return Layout(
        draws=(*range(half), *range(half), *range(half, half + lone)),
        column_signs=(1,) * half + (-1,) * half + (0,) * lone,
    )


@PAIRINGS.register("v_zero")
def v_zero(count: int, old: int = 0, seed: str = "") -> Layout:
    """New rows that nothing reads yet."""
    del old, seed
    return Layout(draws=tuple(range(count)), column_signs=(0,) * count)


@PAIRINGS.register("zero_z")
def zero_z(count: int, old: int = 0, seed: str = "") -> Layout:
    """New columns that read nothing yet."""
    del old, seed
    return Layout(draws=tuple(range(count)), column_signs=(1,) * count, writes_zeros=True)


@PAIRINGS.register("replicate")
def replicate(count: int, old: int = 1, seed: str = "") -> Layout:
    """Copies of the old channels, round-robin; where there is none to copy, as ``v_zero``.

    Example:
        >>> replicate(5, old=3).copies
        (0, 1, 2, 0, 1)
    """
    if not old:
        return v_zero(count, old, seed)
    return Layout((), (), tuple(index % old for index in range(count)))


@PAIRINGS.register("replicate_random")
def replicate_random(count: int, old: int = 1, seed: str = "") -> Layout:
    """Copies of old channels drawn at random, with replacement; else as ``replicate``.

    Example:
        >>> replicate_random(5, old=3, seed="a") == replicate_random(5, old=3, seed="a")
        True
    """
    if not old:
        return v_zero(count, old, seed)
    chance = random.Random(seed)  # a text is hashed the same way in every process
    return Layout((), (), tuple(chance.randrange(old) for _ in range(count)))


@PAIRINGS.register("copy_pair")
def copy_pair(count: int, old: int = 1, seed: str = "") -> Layout:
    """Twins that are copies of an old row, round-robin; else as ``vv_z_negz``.

    Example:
        >>> copy_pair(5, old=2).row_copies
        (0, 1, 0, 1, 0)
    """
    twins = vv_z_negz(count, old, seed)
    if not old:
        return twins
    return replace(twins, row_copies=tuple(draw % old for draw in twins.draws))


@PAIRINGS.register("none")
def none(count: int, old: int = 0, seed: str = "") -> Layout:
    """New rows and new columns, independent: the baseline that changes the function."""
    del old, seed
    return Layout(draws=tuple(range(count)), column_signs=(1,) * count)


def drawing(pairing: Pairing) -> Pairing:
    """Return a pairing, or twins instead of one that copies, writes zeros or does not cancel."""
    layout = pairing(2, 1, "")
    own = layout.preserving and not (layout.copies or layout.writes_zeros or layout.row_copies)
    return pairing if own else vv_z_negz


def seeded(pairing: Pairing, seed: int) -> Pairing:
    """Return a pairing whose chance depends on a seed besides."""
    return lambda count, old, name: pairing(count, old, f"{seed} {name}")


def cancels(pairing: str) -> bool:
    """Return whether a pairing's new channels cancel in their readers, told by its layout.

    Raises:
        PlanError: no pairing of that name.

    Example:
        >>> cancels("vv_z_negz"), cancels("none")
        (True, False)
    """
    return PAIRINGS[pairing](2, 1, "").preserving
