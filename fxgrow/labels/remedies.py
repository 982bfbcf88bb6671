"""What it would take to free a pinned channel, by the reason for which it is pinned.

A reason is a sentence for people, written by the rule that pins. This is the one table that reads
it again; a test holds it against every reason in :mod:`fxgrow.labels`.
"""

from __future__ import annotations

# A phrase of the reason and what would be needed; the first phrase found counts.
REMEDIES: tuple[tuple[str, str], ...] = (
    ("an output of the network", "nothing to do: fxgrow never changes what the network returns"),
    (" is the same tensor, outside of ", "follow the whole network: no --module"),
    ("no rule for ", "register a rule for the operation: see fxgrow.labels.rules"),
    (
        "tied weights",
        "a parameter of its own on either side: what is written and read by one cannot cancel",
    ),
    (
        "a width of one is broadcast",
        "write the expanded width out: a channel that all others share cannot be told from them",
    ),
    ("added to a product", "nothing: the product is data, whose width no parameter decides"),
    (
        " of fixed width",
        "make that tensor a parameter or a buffer, so that it grows along; or compute its size "
        "from the activation's shape",
    ),
    ("combined with constants", "learn these constants as a parameter, or join them after a layer"),
    ("all its channels are one head", "a second head: heads grow in number, one has no number"),
    (
        "two activations are multiplied over these channels",
        "nothing yet: the product is a sum over all of them, so new ones would add to it; heads "
        "grow by number where the product is batched over heads",
    ),
    (
        "two parameters are multiplied over these channels",
        "store their product as one parameter (fold or merge it) before widening",
    ),
    (
        "mixes all of them",
        "apply it within each channel or over positions: over channels, new ones change its result",
    ),
    (
        "over these positions",
        "nothing: these positions are laid out in space or time, and keep their number",
    ),
    ("looked up by index", "split or slice the channels: what an index picks is data"),
    ("looked up by a mask", "split or slice instead: what a mask picks is data"),
    ("through other strides", "use view, permute or unfold in place of as_strided"),
    ("written over by other channels", "use torch.cat or torch.where in place of an assignment"),
    ("a layer norm over more than the channels", "normalise over the channels alone"),
    ("a group norm without a weight", "give the norm affine=True: its weight tells the groups"),
    ("whose kernel is computed from data", "nothing: channels of such a kernel are activations"),
    (
        "a grouped convolution, ",
        "pass the parameter itself: parametrizations and views of a grouped kernel hide its groups",
    ),
    (
        "not linear in",
        "read with the parameter itself: columns that cancel in it do not cancel in a function of "
        "it",
    ),
    (
        "multiplied by a fixed matrix",
        "make the matrix a parameter or a buffer of a linear layer, so that it can grow",
    ),
    (
        "multiplied by what is no weight of its",
        "read these channels with a parameter of their own",
    ),
    (
        "every head reads these positions alike",
        "nothing: what all heads share keeps its size; the heads themselves can grow",
    ),
    (
        "laid out in one dim with other channels",
        "keep the two sets of channels in dims of their own",
    ),
    ("entries are picked by comparing two dims", "pick positions by slicing or by index"),
    ("cannot move labels", "write it with view, permute, slicing or cat"),
    ("written in place into a part of a tensor", "build the tensor with torch.cat instead"),
)


def remedy_for(reason: str) -> str:
    """Return what would be needed to free what is pinned for ``reason``, or "" if nobody knows.

    Example:
        >>> remedy_for("no rule for aten.logcumsumexp.default (aten.logcumsumexp at encoder)")
        'register a rule for the operation: see fxgrow.labels.rules'
    """
    return next((remedy for phrase, remedy in REMEDIES if phrase in reason), "")
