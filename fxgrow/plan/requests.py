"""What users ask for: one request for each verb, with the fields that it uses.

The fields are arguments of the public functions of these names. A request is recorded in its plan,
with its verb as the tag that tells one from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Where = Literal["hidden", "stream", "all"]
Grouped = Literal["width", "count"]


@dataclass(frozen=True)
class Drawing:
    """How new weights are drawn.

    Attributes:
        init: name of the law.
        seed: of the random numbers, with the name of the tensor.
        noise: relative standard deviation of what is added to the new columns of twins.
        split_noise: likewise to the shares of copies, where it sums to zero.
    """

    init: str = "copy_uniform"
    seed: int = 0
    noise: float = 0.0
    split_noise: float = 0.1


@dataclass(frozen=True)
class Widen:
    """More channels: the arguments of :func:`fxgrow.widen`."""

    width: str | dict[str, str]
    rescaling: str = "none"
    pairing: str = "vv_z_negz"
    init: str = "copy_uniform"
    where: Where = "hidden"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gain: float = 1.0
    noise: float = 0.0
    multiple_of: int = 1
    grouped: Grouped = "width"
    seed: int = 0
    compensate: bool = False
    split_noise: float = 0.1
    module: str = ""
    verb: Literal["widen"] = "widen"

    @property
    def drawing(self) -> Drawing:
        """How new weights are drawn."""
        return Drawing(self.init, self.seed, self.noise, self.split_noise)


@dataclass(frozen=True)
class Deepen:
    """More blocks: the arguments of :func:`fxgrow.deepen`."""

    blocks: dict[str, str]
    method: str = "r2deeper"
    init: str = "copy_uniform"
    seed: int = 0
    module: str = ""
    verb: Literal["deepen"] = "deepen"

    @property
    def drawing(self) -> Drawing:
        """How new weights are drawn."""
        return Drawing(self.init, self.seed)


@dataclass(frozen=True)
class MorphKernel:
    """Larger kernels: the arguments of :func:`fxgrow.morph_kernel`."""

    size: str | dict[str, str]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    module: str = ""
    verb: Literal["morph_kernel"] = "morph_kernel"

    @property
    def drawing(self) -> Drawing:
        """How new weights are drawn; new taps are zero."""
        return Drawing()


@dataclass(frozen=True)
class Convert:
    """Another architecture: the arguments of :func:`fxgrow.convert`, the target by its name."""

    target: str
    pairing: str = "vv_z_negz"
    init: str = "copy_uniform"
    seed: int = 0
    split_noise: float = 0.1
    verb: Literal["convert"] = "convert"

    @property
    def drawing(self) -> Drawing:
        """How new weights are drawn."""
        return Drawing(self.init, self.seed, split_noise=self.split_noise)


Request: TypeAlias = Widen | Deepen | MorphKernel | Convert
