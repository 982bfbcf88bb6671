"""Why channels cannot change width: a closed set of kinds, with a sentence and a remedy each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class PinKind(Enum):
    """What pins channels, and what it would take to free them.

    Attributes:
        sentence: why; a pin's details take the place of the braces, in order.
        remedy: what would be needed.
    """

    OUTPUT = (
        "an output of the network",
        "nothing to do: fxgrow never changes what the network returns",
    )
    OUTSIDE = ("{} is the same tensor, outside of {}", "follow the whole network: no --module")
    NO_RULE = (
        "no rule for {}",
        'register a rule for the operation: see "Add an operation" in the README',
    )
    TIED = (
        "{} both {} and reads them, and {} (tied weights)",
        "a parameter of its own on either side (--untie): what is written and read by one cannot "
        "cancel, unless the weight of a norm before it silences what is new",
    )
    BOTH_SIDES = (
        "{} is made into one weight, along what that writes and along what it reads",
        "nothing yet: an entry of it more would be one of the weight, and no row or column; give "
        "the weight a parameter of its own",
    )
    BACKWARD = (
        "{} reads them, and again, backwards, for a gradient that is taken in the forward",
        "nothing yet: what autograd computes in a forward is not followed; take the gradient "
        "outside of it",
    )
    BROADCAST = (
        "a width of one is broadcast here",
        "write the expanded width out: a channel that all others share cannot be told from them",
    )
    SINGLE = (
        "of one channel or none, and {}",
        "write the network so that it runs with more channels there",
    )
    NOT_RUN = (
        "torch does not run {}",
        "one channel: a layer of one grows as any other",
    )
    FIXED = (
        "{} of fixed width",
        "nothing where that tensor is made of inputs; else make it a parameter or a buffer, so "
        "that it grows along, or compute its size from the activation's shape; set a state that a "
        "forward left to zeros",
    )
    CONSTANTS = (
        "combined with constants in part of its channels",
        "learn these constants as a parameter, or join them after a layer",
    )
    ONE_HEAD = (
        "all its channels are one head",
        "a second head: heads grow in number, one has no number",
    )
    EVERY_HEAD = (
        "every head, or matrix of a batch, reads these positions alike",
        "nothing: what all of them share keeps its size; heads can grow in number",
    )
    ACTIVATIONS = (
        "two activations are multiplied over these channels",
        "nothing yet: the product is a sum over all of them, so new ones would add to it; heads "
        "grow by number where the product is batched over heads",
    )
    PARAMETERS = (
        "two parameters are multiplied over these channels",
        "store their product as one parameter (fold or merge it) before widening",
    )
    CURVED = (
        "read by a weight that is not linear in {}",
        "read with the parameter itself: columns that cancel in it do not cancel in a function of "
        "it",
    )
    COMPUTED = (
        "the weight of {} is computed by {}, which all its entries have a part in: take that off "
        "first by {}, grow, and put it on again",
        "nothing: what is put on again later acts on the grown weight",
    )
    MIXED = (
        "{} over the channels mixes all of them",
        "apply it within each channel or over positions: over channels, new ones change its result",
    )
    POSITIONS = (
        "{} over these positions",
        "nothing: these positions are laid out in space or time, and keep their number",
    )
    LOOKED_UP = (
        "looked up by {}",
        "split or slice the channels: what an index or a mask picks is data",
    )
    LAYOUT = ("{} cannot move labels", "write it with view, permute, slicing or cat")
    OVERWRITTEN = (
        "written over in part or by other channels",
        "use torch.cat or torch.where in place of an assignment",
    )
    ONE_DIM = (
        "laid out in one dim with other channels",
        "keep the two sets of channels in dims of their own",
    )
    EMPTY = (
        "nothing is computed of them on these inputs",
        "give example inputs for which all of it is computed",
    )
    NOISE = (
        "noise is drawn for each of its channels",
        "draw it before the layer that writes them, one number for all of them, or into a buffer, "
        "outside of the forward: noise of new channels would not cancel",
    )
    LAYER_NORM = ("a layer norm over more than the channels", "normalise over the channels alone")
    GROUP_NORM = (
        "a group norm without a weight, whose groups cannot be told",
        "give the norm affine=True: its weight tells the groups",
    )
    KERNEL = (
        "a convolution whose kernel is computed from data",
        "nothing: channels of such a kernel are activations",
    )
    GROUPED = (
        "a grouped convolution, {}",
        "pass the parameter itself: parametrizations and views of a grouped kernel hide its groups",
    )

    def __init__(self, sentence: str, remedy: str) -> None:
        self.sentence = sentence
        self.remedy = remedy


@dataclass(frozen=True)
class Pin:
    """Why some channels cannot change width.

    Attributes:
        kind: what pins them.
        place: the operation that does, as ``"aten.cumsum at layer1.0"``; "" if it is none.
        details: what fills the kind's sentence.

    Example:
        >>> str(Pin(PinKind.MIXED, "aten.cumsum at layer1.0", ("cumsum",)))
        'cumsum over the channels mixes all of them (aten.cumsum at layer1.0)'
    """

    kind: PinKind
    place: str = ""
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        asked = self.kind.sentence.count("{}")
        if asked != len(self.details):
            raise ValueError(f"{self.kind} takes {asked} details, not {len(self.details)}")

    def __str__(self) -> str:
        text = self.kind.sentence.format(*self.details)
        return f"{text} ({self.place})" if self.place else text

    @property
    def remedy(self) -> str:
        """What would be needed to free the channels."""
        return self.kind.remedy
