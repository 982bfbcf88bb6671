"""Pairing of tensors: old and new weights of two layers, joined as a pairing lays them out."""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch
from torch import Generator, Tensor

from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.norm_tensors import NormTensors
from fxgrow.plan.pairing import PAIRINGS, Layout


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
    _check_given(writer, reader, new_columns, noise)
    _check_fit(writer, reader, new_rows, new_columns, bias, new_bias)
    if norm is not None:
        norm = NormTensors.of(norm)
        norm.check(writer.shape[0])
    layout = _layout_of(pairing, new_columns.shape[1], writer.shape[0])
    copies = _copies_rows(pairing, writer, new_rows, new_bias)
    rows = _joined(writer, new_rows, layout, copies=copies)
    new = _laid_out(new_columns, layout, reader, noise, generator)
    columns = torch.cat([reader, new], dim=1)
    if bias is None and norm is None:
        return rows, columns
    joined = None if bias is None else _joined(bias, new_bias, layout, copies=copies)
    if norm is not None:
        norm = norm.extended(len(layout.draws), list(layout.row_copies) or None)
    return Paired(rows, columns, joined, norm)


def _check_given(writer: object, reader: object, new_columns: object, noise: object) -> None:
    """Return if what may not be left out is there, and the noise is a number.

    Raises:
        UsageError: one of the two is not so.
    """
    given = {"writer": writer, "reader": reader, "new_columns": new_columns}
    if missing := [name for name, tensor in given.items() if not hasattr(tensor, "shape")]:
        raise UsageError(
            f"{missing[0]} is {given[missing[0]]!r}, no tensor.",
            way_out="Only new_rows, bias, new_bias and norm may be left out.",
        )
    if not (isinstance(noise, (int, float)) and 0 <= noise < math.inf):
        raise UsageError(f"the noise must be a number, 0 or more, not {noise!r}.")


def _copies_rows(
    pairing: str, writer: Tensor, new_rows: Tensor | None, new_bias: Tensor | None
) -> bool:
    """Return whether a pairing copies old rows, if there are new ones only where it does not.

    Raises:
        PlanError: there are none where it needs some, or some where it takes none.
    """
    copies = bool(PAIRINGS[pairing](2, writer.shape[0], "").row_copies)
    if copies and not (new_rows is None and new_bias is None):
        raise PlanError(
            f"the pairing {pairing!r} copies old rows and biases, and takes no new ones.",
            way_out="Leave out new_rows (None) and new_bias.",
        )
    if new_rows is None and not copies:
        why = "" if writer.shape[0] else ", where there is no old one to copy"
        raise PlanError(f"the pairing {pairing!r} needs new rows V{why}.", way_out="Give new_rows.")
    return copies


def _joined(old: Tensor, new: Tensor | None, layout: Layout, *, copies: bool) -> Tensor:
    """Return a writer's weight or bias with new entries, which are copies of old ones or not."""
    if copies:
        return torch.cat([old, old[list(layout.row_copies)]])
    if new is None or layout.writes_zeros:
        return torch.cat([old, old.new_zeros(len(layout.draws), *old.shape[1:])])
    return torch.cat([old, new[list(layout.draws)]])


def _laid_out(
    new_columns: Tensor, layout: Layout, reader: Tensor, noise: float, generator: Generator | None
) -> Tensor:
    """Return Z for each new channel that a reader takes, with its sign and noise."""
    signs = torch.tensor(layout.column_signs, dtype=reader.dtype, device=reader.device)
    drawn = new_columns[:, list(layout.draws)]
    columns = drawn * signs.view(1, -1, *(1,) * (reader.ndim - 2))
    if noise and columns.numel() > 1:
        normal = torch.empty_like(columns).normal_(generator=generator)
        columns = columns + noise * columns.std() * normal
    return columns


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
