"""Refusals of what no configuration describes, which name the groups in the way."""

from __future__ import annotations

import re

from fxgrow.errors import SourceError
from fxgrow.files.fields import Difference
from fxgrow.plan.schema import Plan


class UngovernedError(SourceError):
    """What has grown in a way that no configuration describes.

    Attributes:
        because: the reason alone, as a part of a sentence.
        groups: a glob of the names of the groups in the way; "" if these are not known.
        wider: what else to ask for, so that a configuration describes it; "" if nothing is known.
    """

    because = ""
    groups = ""
    wider = ""


def in_the_way(first: list[Difference], nearest: list[Difference], plan: Plan) -> UngovernedError:
    """Return the refusal that names a tensor whose size no field governs.

    Args:
        first: what is different under the old configuration.
        nearest: what is under the one that comes nearest.
        plan: how the model grew.
    """
    still = [difference for difference in first if difference in nearest]
    shown = (still or first or nearest)[0]
    have, want = ("x".join(map(str, sizes)) or "none" for sizes in (shown.have, shown.want))
    what = "" if shown.is_tensor else " (an attribute)"
    if still or not nearest:
        reason = f"no field of config.json makes {shown.name}{what} {want}, it stays {have}"
    else:
        other = nearest[0]
        now, due = ("x".join(map(str, sizes)) or "none" for sizes in (other.have, other.want))
        reason = (
            f"no field of config.json makes {shown.name}{what} {want} by itself: with it, "
            f"{other.name} would be {now}, not {due}"
        )
    return refusal(reason, shown.name, plan)


def glob_of(name: str) -> str:
    """Return a glob of the groups that are the same in other layers.

    Example:
        >>> glob_of("bert.encoder.layer.0.output.dense")
        'bert.encoder.layer.*.output.dense'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def refusal(reason: str, name: str, plan: Plan, forbidden: str = "") -> UngovernedError:
    """Return the refusal of a plan.

    Args:
        reason: why no configuration describes what it makes.
        name: the tensor in the way; "" if it is not known.
        plan: how the model was to grow.
        forbidden: what its class says against the fields that would describe it.
    """
    layers = {name.rpartition(".")[0], name}
    guilty = next((g.name for g in plan.groups if layers & {*g.writers, *g.readers, g.name}), "")
    glob = glob_of(guilty)
    wider = ""
    if forbidden:
        reason = f"{forbidden}; and {reason}"
        if any(getattr(step.request, "where", "") == "hidden" for step in plan.steps):
            wider = "Let the stream grow too (--where all). "
    leave = f"Leave it out (--exclude '{glob}'), or write" if guilty else "Write"
    error = UngovernedError(
        f"a directory cannot hold this model: {reason}.",
        name=name,
        way_out=f"{wider}{leave} the weights alone, which fxgrow.load reads: -o model.safetensors.",
    )
    error.because, error.groups, error.wider = reason, glob, wider
    return error
