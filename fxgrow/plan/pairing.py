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

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, overload

from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.norm_tensors import NormTensors
from fxgrow.registry import Registry

if TYPE_CHECKING:
    from torch import Generator, Tensor


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


class Paired(NamedTuple):
    """What :func:`apply_pairing` returns where it is given more than the two weights.

    Attributes:
        writer: shape (h + n, fan_in, …).
        reader: shape (out, h + n, …).
        bias: the writer's, shape (h + n,); None if it was not given.
        norm: that between the two, over h + n channels; None if it was not given.
    """

    writer: Tensor
    reader: Tensor
    bias: Tensor | None
    norm: NormTensors | None


@overload
def apply_pairing(
    writer: Tensor, reader: Tensor, new_rows: Tensor | None, new_columns: Tensor, pairing: str, *,
    bias: None = None, new_bias: None = None, norm: None = None, noise: float = 0.0,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def apply_pairing(
    writer: Tensor, reader: Tensor, new_rows: Tensor | None, new_columns: Tensor, pairing: str, *,
    bias: Tensor, new_bias: Tensor | None = None, norm: NormTensors | None = None,
    noise: float = 0.0, generator: Generator | None = None,
) -> Paired: ...  # fmt: skip


@overload
def apply_pairing(
    writer: Tensor, reader: Tensor, new_rows: Tensor | None, new_columns: Tensor, pairing: str, *,
    bias: Tensor | None = None, new_bias: Tensor | None = None, norm: NormTensors,
    noise: float = 0.0, generator: Generator | None = None,
) -> Paired: ...  # fmt: skip


def apply_pairing(
    writer: Tensor,
    reader: Tensor,
    new_rows: Tensor | None,
    new_columns: Tensor,
    pairing: str,
    *,
    bias: Tensor | None = None,
    new_bias: Tensor | None = None,
    norm: NormTensors | None = None,
    noise: float = 0.0,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor] | Paired:
    """Join old and new weights of a pair of layers, for growth methods that make their own V, Z.

    Args:
        writer: old weights (h, fan_in, …) of the layer that writes the hidden channels.
        reader: old weights (out, h, …) of the layer that reads them.
        new_rows: V of shape (m, fan_in, …), one row per drawn channel; None under ``copy_pair``,
            whose rows are copies of old ones (where there are any).
        new_columns: Z of shape (out, m, …), one column per drawn channel.
        pairing: a registered name.
        bias: the writer's old one, shape (h,).
        new_bias: V's, shape (m,), laid out as V is; zeros if only ``bias`` is given, and None under
            ``copy_pair``.
        norm: that between the two, over h channels (:class:`fxgrow.NormTensors`); new channels
            get weight 1, bias 0, mean 0 and variance 1, and copies the entries of the old ones.
        noise: standard deviation of normal noise on all new columns, relative to theirs; 0 by
            default. Whatever it is, it breaks preservation.
        generator: what the noise is drawn from; None is torch's own.

    Returns:
        The writer (h + n, fan_in, …) and the reader (out, h + n, …), with n = 2m new channels
        under ``vv_z_negz`` and ``copy_pair``, and n = m under the others; ``zero_z`` takes only
        the shape of V. With a bias or a norm, a :class:`Paired` of all.

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

    given = {"writer": writer, "reader": reader, "new_columns": new_columns}
    if missing := [name for name, tensor in given.items() if not hasattr(tensor, "shape")]:
        raise UsageError(
            f"{missing[0]} is {given[missing[0]]!r}, no tensor.",
            way_out="Only new_rows, bias, new_bias and norm may be left out.",
        )
    _check_fit(writer, reader, new_rows, new_columns, bias, new_bias)
    if not (isinstance(noise, (int, float)) and 0 <= noise < math.inf):
        raise UsageError(f"the noise must be a number, 0 or more, not {noise!r}.")
    if norm is not None:
        norm = NormTensors.of(norm)
        norm.check(writer.shape[0])
    layout = _layout_of(pairing, new_columns.shape[1], writer.shape[0])
    sources = list(layout.row_copies)
    copies_rows = bool(PAIRINGS[pairing](2, writer.shape[0], "").row_copies)
    if copies_rows and not (new_rows is None and new_bias is None):
        raise PlanError(
            f"the pairing {pairing!r} copies old rows and biases, and takes no new ones.",
            way_out="Leave out new_rows (None) and new_bias.",
        )

    def joined(old: Tensor, new: Tensor | None) -> Tensor:
        """Return the writer's weight or bias with new entries."""
        if copies_rows:
            return torch.cat([old, old[sources]])
        if new is None or layout.writes_zeros:
            return torch.cat([old, old.new_zeros(len(layout.draws), *old.shape[1:])])
        return torch.cat([old, new[list(layout.draws)]])

    if new_rows is None and not copies_rows:
        none = "" if writer.shape[0] else ", where there is no old one to copy"
        raise PlanError(
            f"the pairing {pairing!r} needs new rows V{none}.", way_out="Give new_rows."
        )
    signs = torch.tensor(layout.column_signs, dtype=reader.dtype, device=reader.device)
    columns = new_columns[:, list(layout.draws)] * signs.view(1, -1, *(1,) * (reader.ndim - 2))
    if noise and columns.numel() > 1:
        drawn = torch.empty_like(columns).normal_(generator=generator)
        columns = columns + noise * columns.std() * drawn
    rows, columns = joined(writer, new_rows), torch.cat([reader, columns], dim=1)
    if bias is None and norm is None:
        return rows, columns
    if norm is not None:
        norm = norm.extended(len(layout.draws), sources or None)
    return Paired(rows, columns, None if bias is None else joined(bias, new_bias), norm)


def _check_fit(
    writer: Tensor,
    reader: Tensor,
    new_rows: Tensor | None,
    new_columns: Tensor,
    bias: Tensor | None,
    new_bias: Tensor | None,
) -> None:
    """Return if all shapes fit together.

    Raises:
        PlanError: they do not.
    """
    rows = writer if new_rows is None else new_rows
    fits = (
        writer.shape[0] == reader.shape[1]
        and rows.shape[1:] == writer.shape[1:]
        and new_columns.shape[:1] + new_columns.shape[2:] == reader.shape[:1] + reader.shape[2:]
        and (new_rows is None or new_columns.shape[1] == rows.shape[0])
    )
    if not fits:
        drawn = None if new_rows is None else tuple(new_rows.shape)
        raise PlanError(
            f"V {drawn} and Z {tuple(new_columns.shape)} do not fit a writer "
            f"{tuple(writer.shape)} and a reader {tuple(reader.shape)}.",
            way_out="V is (m, *writer.shape[1:]), Z is (out, m, *reader.shape[2:]).",
        )
    for name, vector, count in (
        ("bias", bias, writer.shape[0]), ("new_bias", new_bias, new_columns.shape[1])
    ):  # fmt: skip
        if vector is not None and tuple(vector.shape) != (count,):
            raise PlanError(f"{name} has shape {tuple(vector.shape)}, not ({count},).")
    if new_bias is not None and bias is None:
        raise PlanError("there is a new_bias, and no bias that it continues.")


def _layout_of(pairing: str, drawn: int, old: int) -> Layout:
    """Return the layout of new channels of which so many values are drawn.

    Raises:
        PlanError: no pairing of that name, or one that draws nothing.
    """
    rule = PAIRINGS[pairing]
    if rule(1, 1, "").copies:
        raise PlanError(f"the pairing {pairing!r} copies old channels and takes no V and Z.")
    twins = len(set(rule(2 * drawn, old, "").draws)) == drawn  # each drawn value is carried twice
    return rule(2 * drawn if twins else drawn, old, "")
