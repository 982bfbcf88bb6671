"""What users ask for: one request for each verb, with the fields that it uses.

The fields are arguments of the public functions of these names. A request is recorded in its plan,
with its verb as the tag that tells one from another.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypeAlias

Where = Literal["hidden", "stream", "all"]
Grouped = Literal["width", "count"]


@dataclass(frozen=True)
class Drawing:
    """How new weights are drawn.

    Attributes:
        init: name of the law, or names by glob over layers, of which the first match counts.
        output_init: name of that of new rows of writers and their biases; None for ``init``.
        input_init: that of new columns of readers; None for ``init``.
        seed: of the random numbers, with the name of the tensor.
        noise: standard deviation of what is added to new columns, relative to their own.
        split_noise: likewise to the shares of copies, where it sums to zero.
    """

    init: str | dict[str, str] = "copy_rows"
    seed: int = 0
    noise: float = 0.0
    split_noise: float = 0.1
    output_init: str | None = None
    input_init: str | None = None

    @property
    def inits(self) -> tuple[str | dict[str, str], str | None, str | None]:
        """What is said of inits."""
        return self.init, self.output_init, self.input_init


class _Request:
    """What all requests tell."""

    @cached_property
    def drawing(self) -> Drawing:
        """How new weights are drawn; what this request has no field for is at its default."""
        told: dict[str, Any] = {
            entry.name: getattr(self, entry.name, entry.default) for entry in fields(Drawing)
        }
        return Drawing(**told)


@dataclass(frozen=True)
class Widen(_Request):
    """More channels: the arguments of :func:`fxgrow.widen`; see :mod:`fxgrow.plan.by_layer`.

    ``keep`` and ``threshold`` are those of an init from data.
    """

    width: str | dict[str, str]
    rescaling: str | dict[str, str] = "none"
    pairing: str | dict[str, str] = "vv_z_negz"
    init: str | dict[str, str] = "copy_rows"
    where: Where = "hidden"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gain: float | dict[str, float] = 1.0
    noise: float = 0.0
    multiple_of: int = 1
    grouped: Grouped = "width"
    seed: int = 0
    compensate: bool = False
    split_noise: float = 0.1
    module: str = ""
    untie: bool = False
    output_init: str | None = None
    input_init: str | None = None
    budget: str = ""
    keep: int | None = None
    threshold: float = 0.0
    verb: Literal["widen"] = "widen"


@dataclass(frozen=True)
class Deepen(_Request):
    """More blocks: the arguments of :func:`fxgrow.deepen`."""

    blocks: dict[str, str]
    method: str = "r2deeper"
    init: str = "copy_rows"
    seed: int = 0
    module: str = ""
    verb: Literal["deepen"] = "deepen"


@dataclass(frozen=True)
class MorphKernel(_Request):
    """Larger kernels: the arguments of :func:`fxgrow.morph_kernel`."""

    size: str | dict[str, str]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    module: str = ""
    verb: Literal["morph_kernel"] = "morph_kernel"


@dataclass(frozen=True)
class Convert(_Request):
    """Another architecture: the arguments of :func:`fxgrow.convert`, the target by its name."""

    target: str
    pairing: str = "vv_z_negz"
    init: str = "copy_rows"
    seed: int = 0
    split_noise: float = 0.1
    verb: Literal["convert"] = "convert"


@dataclass(frozen=True)
class Untie(_Request):
    """Copies for what reads tied parameters: ``untie`` of :func:`fxgrow.widen`, a step before."""

    module: str = ""
    verb: Literal["untie"] = "untie"


Request: TypeAlias = Widen | Deepen | MorphKernel | Convert | Untie
