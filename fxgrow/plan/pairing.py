"""Pairing: how the new channels of a group cancel in whatever reads them.

One rule makes every pairing preserving: at each reader, the new columns that read one value sum to
zero, or the value is zero. A pairing says, for n new channels of one kind, which drawn row each of
them writes (V) and with which sign each reader reads its drawn column (Z), or which old channel
each of them copies:

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from fxgrow.errors import PlanError
from fxgrow.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What n new channels of one kind write and how they are read.

    Attributes:
        draws: for each new channel the index of the drawn row (and column) it uses; twins share.
        column_signs: for each new channel +1, −1 or 0: the sign of its column at every reader.
        copies: for each new channel the old one, by its place among those of its kind, that it
            copies; empty if new channels are drawn.
        writes_zeros: whether the new rows are zeros instead of what is drawn.
    """

    draws: tuple[int, ...]
    column_signs: tuple[int, ...]
    copies: tuple[int, ...] = ()
    writes_zeros: bool = False

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
        >>> vv_z_negz(5)
        Layout(draws=(0, 1, 0, 1, 2), column_signs=(1, 1, -1, -1, 0), copies=(), writes_zeros=False)
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


@PAIRINGS.register("none")
def none(count: int, old: int = 0, seed: str = "") -> Layout:
    """New rows and new columns, independent: the baseline that changes the function."""
    del old, seed
    return Layout(draws=tuple(range(count)), column_signs=(1,) * count)


def drawing(pairing: Pairing) -> Pairing:
    """Return a pairing, or twins instead of one that copies, writes zeros or does not cancel."""
    layout = pairing(2, 1, "")
    own = layout.preserving and not layout.copies and not layout.writes_zeros
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


def apply_pairing(
    writer: Tensor, reader: Tensor, new_rows: Tensor, new_columns: Tensor, pairing: str
) -> tuple[Tensor, Tensor]:
    """Join old and new weights of a pair of layers, for growth methods that make their own V, Z.

    Args:
        writer: old weights (h, fan_in, …) of the layer that writes the hidden channels.
        reader: old weights (out, h, …) of the layer that reads them.
        new_rows: V of shape (m, fan_in, …), one row per drawn channel.
        new_columns: Z of shape (out, m, …), one column per drawn channel.
        pairing: a registered name.

    Returns:
        The writer (h + n, fan_in, …) and the reader (out, h + n, …), with n = 2m new channels
        under ``vv_z_negz`` and n = m under the others; ``zero_z`` takes only the shape of V.

    Raises:
        PlanError: no pairing of that name, or shapes that do not fit together.

    Example:
        >>> import torch
        >>> w, r = torch.ones(1, 2), torch.ones(3, 1)
        >>> w2, r2 = apply_pairing(w, r, torch.zeros(1, 2), torch.full((3, 1), 5.0), "vv_z_negz")
        >>> w2.shape, r2[0].tolist()
        (torch.Size([3, 2]), [1.0, 5.0, -5.0])
    """
    import torch

    count = new_rows.shape[0]
    fits = (
        writer.shape[0] == reader.shape[1]
        and new_rows.shape[1:] == writer.shape[1:]
        and new_columns.shape[:1] + new_columns.shape[2:] == reader.shape[:1] + reader.shape[2:]
        and new_columns.shape[1] == count
    )
    if not fits:
        raise PlanError(
            f"V {tuple(new_rows.shape)} and Z {tuple(new_columns.shape)} do not fit a writer "
            f"{tuple(writer.shape)} and a reader {tuple(reader.shape)}.",
            way_out="V is (m, *writer.shape[1:]), Z is (out, m, *reader.shape[2:]).",
        )
    rule = PAIRINGS[pairing]
    if rule(1, 1, "").copies:
        raise PlanError(f"the pairing {pairing!r} copies old channels and takes no V and Z.")
    twins = len(set(rule(2 * count, 0, "").draws)) == count  # each drawn value is carried twice
    layout = rule(2 * count if twins else count, 0, "")
    draws = torch.tensor(layout.draws, device=writer.device)
    signs = torch.tensor(layout.column_signs, dtype=reader.dtype, device=reader.device)
    shaped = signs.view(1, -1, *(1,) * (reader.ndim - 2))
    columns = new_columns.index_select(1, draws.to(reader.device)) * shaped
    rows = new_rows.index_select(0, draws)
    rows = torch.zeros_like(rows) if layout.writes_zeros else rows
    return torch.cat([writer, rows]), torch.cat([reader, columns], dim=1)
