"""The edits a plan is made of: what happens to tensors, attributes, graphs and lists of modules.

Plain, frozen data without tensors. The planners make them, :mod:`fxgrow.apply` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxgrow.labels.space import Normed, Role

Fill = Literal["", "identity", "constant"]
AxisRole = Role | Literal["kernel"]
RunKind = Literal["old", "share", "borrowed", "new", "minus", "zero", "one", "mean"]


@dataclass(frozen=True)
class Run:
    """A run of consecutive new positions of an axis.

    Attributes:
        kind: ``old``: copies of the old positions from ``start`` on; ``share``: the old positions
            divided by the number of shares each has in the axis, plus noise that sums to zero
            over them; ``borrowed``: copies of the old positions from ``start`` on, for channels
            that continue none of them; ``new`` / ``minus``: the freshly drawn slices from
            ``start`` on, or their negatives; ``zero`` / ``one``; ``mean``: the mean of all old
            positions.
        start: first old position, or first drawn slice.
        length: number of positions.
    """

    kind: RunKind
    start: int
    length: int


@dataclass(frozen=True)
class AxisEdit:
    """How one dim of a tensor grows.

    Attributes:
        dim: the dim.
        role: what it is to the channels, or ``kernel`` for a dim of a kernel in space. Readers
            grow before writers, so that new rows are whole.
        groups: the axis is read as (groups, positions per group): a grouped convolution's input.
        runs: what the new positions hold, in order.
    """

    dim: int
    role: AxisRole
    groups: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Absorption:
    """How a norm's tensor takes up a gain s of its input, exactly in eval mode.

    running_mean is multiplied by s, running_var becomes s²·(running_var + eps) − eps; where that
    is negative it becomes 0 and the weight is multiplied by √eps / (s·√(running_var + eps)).

    Attributes:
        part: which of the norm's tensors this is.
        gain: s.
        eps: the norm's eps.
        variance: fully qualified name of its running_var.
    """

    part: Literal["weight", "running_mean", "running_var"]
    gain: float
    eps: float
    variance: str


@dataclass(frozen=True)
class TensorEdit:
    """How one parameter or buffer changes.

    Attributes:
        shape, new_shape: before and after.
        scale: factor on the old values.
        axes: the dims that grow, readers first.
        fan_in: of the layer after growth, for the init.
        absorption: what a norm's tensor takes up first, or None.
        source: name of the old tensor that it is made from; "" for its own name. Where every
            entry is new, that is the tensor whose law the init takes.
        fill: what all of a new tensor holds where no run can say it: ``identity`` is 1 on the
            diagonal of its first two dims, in the middle of a kernel, and 0 elsewhere;
            ``constant`` is ``scale`` everywhere.
        groups: of the convolution whose weight this is, before and after. Where they differ, the
            old groups are first put into the new ones, in order and as few as will do in each,
            with zeros between them; ``axes`` are those of what this makes.
        offset: what the network adds to it before it is used (a norm's 1 + weight). All of the
            above is done to the sum, from which it is subtracted again.
        normed: the weight that this is a part of, its direction or its length. ``axes`` of a
            direction are the weight's, and ``scale`` of a length is; the length takes besides what
            keeps the weight's old entries while new ones count in the norm.
    """

    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    scale: float = 1.0
    axes: tuple[AxisEdit, ...] = ()
    fan_in: int = 1
    absorption: Absorption | None = None
    source: str = ""
    fill: Fill = ""
    groups: tuple[int, int] = (1, 1)
    offset: float = 0.0
    normed: Normed | None = None


@dataclass(frozen=True)
class Child:
    """A module that another one holds.

    Attributes:
        name: its name there, after the surgery; that of a module there, but for the number at its
            end.
        source: the name of the old module that it is, or, if it is new, that it is a copy of.
        new: whether it is new. Its tensors then all have an edit, under their new names.
    """

    name: str
    source: str
    new: bool = False


@dataclass(frozen=True)
class Rearrangement:
    """Other modules in a module: new ones among the old, which may change their names.

    Attributes:
        container: fully qualified name of the module that holds them (an ``nn.Sequential``, or any
            other).
        children: all its modules, in order. What a new one gets is what the one before it gives.
        caller: the module in whose fx graph each new one is called after the one before it; it
            becomes a GraphModule. None where the code calls whatever the container holds.
    """

    container: str
    children: tuple[Child, ...]
    caller: str | None = None


@dataclass(frozen=True)
class ModuleEdit:
    """An attribute of a module that must follow its tensors (``out_channels``, ``groups``…).

    One of an object that the module holds is dotted: ``config.num_attention_heads``. Both values
    are of one kind, but for the padding of a convolution, which may be told by a word.
    """

    module: str
    attribute: str
    before: bool | int | float | str | tuple[int, ...] | tuple[str, ...]
    after: bool | int | float | str | tuple[int, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Multiplier:
    """A scalar on one edge of the fx graph.

    Attributes:
        producer, consumer: names of the fx nodes at the ends of the edge.
        factor: what the value is multiplied by on its way.
        module: the submodule whose graph this is; "" for the whole network's.
    """

    producer: str
    consumer: str
    factor: float
    module: str = ""


@dataclass(frozen=True)
class SizeEdit:
    """Sizes in a call of the network's own code, rewritten in its graph or where it is made.

    Attributes:
        node: name of the fx node.
        function: what it calls (``view``).
        before, after: the sizes among its arguments; None where a slice has no bound.
        module: the submodule whose graph this is; "" for the whole network's.
        at: the line of code that makes the call, and which call of it (``#1``) if they differ,
            where the module has no graph; ``node`` is "".
    """

    node: str
    function: str
    before: tuple[int | None, ...]
    after: tuple[int | None, ...]
    module: str = ""
    at: str = ""


@dataclass(frozen=True)
class NormGain:
    """A norm that absorbs a gain exactly in eval mode, and up to its eps in train mode.

    In train mode it computes what the old network would compute with eps / gain².
    """

    module: str
    gain: float
