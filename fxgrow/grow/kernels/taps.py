"""Where the taps of a larger kernel go, so that the old ones read what they read before.

Along one dim, with kernel K, stride s, dilation d and l positions of padding on the left, tap k of
output o reads position o·s + k·d − l. With a new taps on the left, tap k becomes k + a, so it reads
the same if the padding becomes l + a·d; and with b new taps on the right, there are as many outputs
as before if the right becomes r + b·d. A transposed convolution writes where another reads, and
crops by its padding p: p + a·d again, and d·(a − b) more for its output padding.

What the new taps read does not matter, because they are zero. So the padding may hold zeros, or
the input reflected, replicated or wrapped around, as long as it still can (a reflection needs an
input longer than the padding, wrapping around one that is not shorter). The kernels of T. Wei
et al., Network Morphism, ICML 2016, grow in the same way: by zeros around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from fxgrow.errors import UsageError

PerDim: TypeAlias = tuple[int, ...]  # a number for each dim of space
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_SIZE = re.compile(r"\+?\d+(x\+?\d+)*")
_FORMS = 'Give a size ("5"), one for each dim ("5x3"), or an increment ("+2").'


@dataclass(frozen=True)
class Convolution:
    """The settings of a convolution, a number for each dim of space.

    Attributes:
        kernel, stride, dilation: as of ``torch.nn.Conv2d``.
        padding: likewise, or ``"same"`` or ``"valid"``.
        output_padding: of a transposed convolution.
        transposed: whether it is one.
        padding_mode: what the padding holds.
    """

    kernel: PerDim
    stride: PerDim
    dilation: PerDim
    padding: PerDim | str
    output_padding: PerDim
    transposed: bool = False
    padding_mode: PaddingMode = "zeros"

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """The padding before and after the input, for each dim."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        if isinstance(self.padding, str):
            return tuple((0, 0) for _ in self.kernel)
        return tuple((size, size) for size in self.padding)

    @property
    def least_input(self) -> PerDim:
        """The smallest input that the padding can be made of, for each dim."""
        longest = [max(sides) for sides in self.sides]
        more = {"reflect": 1, "circular": 0}.get(self.padding_mode)
        return tuple(1 if more is None else max(1, side + more) for side in longest)


@dataclass(frozen=True)
class Enlarged:
    """A convolution with a larger kernel that computes the same.

    Attributes:
        convolution: its settings.
        before: the number of new taps before the old ones, for each dim.
    """

    convolution: Convolution
    before: PerDim


def new_kernel(size: str, old: PerDim) -> PerDim | str:
    """Return the kernel that a specification asks for, given the present one.

    Or why it cannot be: it is for another number of dims, or asks for less than there is.

    Args:
        size: ``"5"``, ``"5x3"`` (one for each dim), ``"+2"`` or ``"+2x+0"``.
        old: the present kernel.

    Raises:
        UsageError: the specification is malformed.

    Example:
        >>> new_kernel("5", (3, 3)), new_kernel("5x3", (3, 3)), new_kernel("+2", (1, 7))
        ((5, 5), (5, 3), (3, 9))
    """
    check_size(size)
    parts = size.strip().split("x")
    if len(parts) not in (1, len(old)):
        return f"the size {size} has {len(parts)} numbers and the kernel {told(old)} has {len(old)}"
    parts = parts * len(old) if len(parts) == 1 else parts
    asked = tuple(
        int(part) + (present if part.startswith("+") else 0)
        for part, present in zip(parts, old, strict=True)
    )
    if any(new < present for new, present in zip(asked, old, strict=True)):
        return f"a kernel of {told(old)} would shrink to {told(asked)}"
    return asked


def check_size(size: str) -> None:
    """Return if a specification can be read.

    Raises:
        UsageError: it cannot.
    """
    if _SIZE.fullmatch(size.strip()) is None:
        raise UsageError(f"the kernel size {size!r} cannot be read.", way_out=_FORMS)


def enlarged(old: Convolution, kernel: PerDim) -> Enlarged | str:
    """Return the convolution with a larger kernel that computes the same.

    Or why there is none: the padding that it takes cannot be had; the nearest kernels are named.

    Args:
        old: the convolution as it is.
        kernel: the new kernel; nowhere smaller.

    Example:
        >>> conv = Convolution((3,), (1,), (1,), (1,), (0,))
        >>> enlarged(conv, (7,)).convolution.padding, enlarged(conv, (7,)).before
        ((3,), (2,))
        >>> enlarged(conv, (4,)).convolution.padding, enlarged(conv, (4,)).before
        ('same', (0,))
    """
    for new in _candidates(old, kernel):
        before = _taps_before(old, new)
        if before is not None:
            return Enlarged(new, before)
    return (
        f"from {told(old.kernel)} to {told(kernel)}, one side gets a tap more than the other and "
        "must be padded more, which this layer's settings cannot express. "
        f"Sizes that work: {_nearest(old, kernel)}"
    )


def _candidates(old: Convolution, kernel: PerDim) -> Iterator[Convolution]:
    """Yield settings for a kernel that may do; those nearest to the old ones first."""
    if old.transposed:
        yield _transposed_candidate(old, kernel)
        return
    if old.padding != "same":
        halves = [(new - has) // 2 for new, has in zip(kernel, old.kernel, strict=True)]
        yield replace(old, kernel=kernel, padding=_padded(old, halves))
    if all(stride == 1 for stride in old.stride):
        yield replace(old, kernel=kernel, padding="same")


def _transposed_candidate(old: Convolution, kernel: PerDim) -> Convolution:
    """Return settings of a transposed convolution for a kernel that may do."""
    before, output_padding = [], []
    for new, has, dilation, present in zip(
        kernel, old.kernel, old.dilation, old.output_padding, strict=True
    ):
        more = new - has
        # Of an odd number, one is left: to the right where it can replace output padding
        taps = more // 2 if present >= dilation else (more + 1) // 2
        before.append(taps)
        output_padding.append(present + dilation * (2 * taps - more))
    return replace(
        old, kernel=kernel, padding=_padded(old, before), output_padding=tuple(output_padding)
    )


def _padded(old: Convolution, taps: list[int]) -> PerDim:
    """Return the padding, the same on both sides, that goes with new taps on the left."""
    return tuple(
        left + dilation * count
        for (left, _), dilation, count in zip(old.sides, old.dilation, taps, strict=True)
    )


def _taps_before(old: Convolution, new: Convolution) -> PerDim | None:
    """Return how many taps to put before the old ones, or None if that does not compute the same.

    Example:
        >>> old = Convolution((3,), (2,), (1,), (1,), (0,))
        >>> _taps_before(old, replace(old, kernel=(5,), padding=(2,)))
        (1,)
        >>> _taps_before(old, replace(old, kernel=(4,), padding=(1,)))  # an output less
    """
    found = []
    limits = zip(old.stride, old.dilation, new.output_padding, strict=True)
    if old.transposed and any(not 0 <= have < max(s, d) for s, d, have in limits):
        return None
    for dim, dilation in enumerate(old.dilation):
        more = new.kernel[dim] - old.kernel[dim]
        left, right = (
            after - before for after, before in zip(new.sides[dim], old.sides[dim], strict=True)
        )
        longer = old.output_padding[dim] - new.output_padding[dim]
        taps, rest = divmod(left, dilation)
        if rest or not 0 <= taps <= more or left + right + longer != dilation * more:
            return None
        found.append(taps)
    return tuple(found)


def _nearest(old: Convolution, kernel: PerDim) -> str:
    """Return the kernels next to one, all of whose differences are even: these always work."""
    odd = [(new - present) % 2 for new, present in zip(kernel, old.kernel, strict=True)]
    near = [
        tuple(size + step * differs for size, differs in zip(kernel, odd, strict=True))
        for step in (-1, 1)
    ]
    return " or ".join(told(sizes) for sizes in near if sizes != old.kernel)


def told(sizes: PerDim | str) -> str:
    """Return sizes as messages and tables tell them.

    Example:
        >>> told((5, 5)), told((5, 3)), told("same")
        ('5x5', '5x3', 'same')
    """
    return sizes if isinstance(sizes, str) else "x".join(map(str, sizes))
