"""Grow trained PyTorch networks without changing what they compute.

>>> import torch, fxgrow
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> fxgrow.widen(net, "2x").model[0].out_features
16

Names are imported when they are first used, so that ``import fxgrow`` and the command line's
``--help`` do not load torch.

The rooms, from the bottom up: a user's module (:mod:`~fxgrow.modules`), the labels of its channels
(:mod:`~fxgrow.labels`), what belongs together (:mod:`~fxgrow.channels`), plans as data
(:mod:`~fxgrow.plan`), what carries them out (:mod:`~fxgrow.apply`), the planners
(:mod:`~fxgrow.grow`), the judge (:mod:`~fxgrow.verification`), the public functions
(:mod:`~fxgrow.api`), what is on disk (:mod:`~fxgrow.files`), growth in training
(:mod:`~fxgrow.training`), the command line (:mod:`~fxgrow.cli`).
A room imports those below it alone. A command goes through them so: load, trace, label, find the
groups, plan, apply, verify, save.

Glossary:
    label: an integer for each position of a parameter's axis, which flows through the operations.
    label layer: a tensor of labels with the shape of the tensor it is for, for each set of dims in
        which channels lie.
    channel: all positions that carry one feature; labels that were unified.
    channel group: channels that must change width together. Torch-Pruning (Fang et al. 2023):
        dependency group.
    writer, reader: a parameter's axis that produces a group's channels, or contracts them.
    carrier: the axis of a parameter with an entry for each channel that passes: that of a norm, or
        of a depthwise kernel.
    mixer: an operation whose result depends on a set of channels as a whole: a LayerNorm.
    hidden, stream, pinned: a group inside a block; carried by a residual addition; of fixed width,
        for a reason (*pin*).
    tied channels: channels that only go together, such as those of one group of a GroupNorm.
    plan, edit: what a surgery is, as data; what happens to one tensor, attribute or graph.
    V, Z: new rows of writers and new columns of readers (R2WiderR; Yuan et al. 2023).
    pairing: how new channels cancel where they are read: (V, V) and (Z, −Z) above all (ibid.).
    twins: two new channels with one value, read with opposite signs (ibid.).
    rescaling: what happens to old weights; variance transfer, VT (Yuan et al. 2023).
    α, β: the factors that a rescaling puts on a group's writers and readers (ibid.).
    init: what fills V and Z.
    function-preserving: of a surgery after which the network computes the same (Chen et al. 2015,
        Net2Net).
    gain: the factor by which an activation of the grown network differs from the old one's.
    homogeneous: f(s·x) = s^d·f(x) for every s > 0, so that a gain passes.
    padding channels: new channels beyond whole copies of the old ones, which hold the mean of
        these, or zero, so that a norm over them stays (LEMON, Wang et al. 2023: non-divisible).
    η: what the standard deviation of such a norm becomes of the old one (ibid.).
    zero channels: new channels that their writers write as zeros (NetMorph, Wei et al. 2016).
    channel assignment: which old channel each new one continues, copies or joins.
    silenced: of channels that one parameter both writes and reads (tied), that the weight of a norm
        before the reader is zero for new ones, and split over copies.
    submodule: a part of a network that is followed by itself, where the whole cannot be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxgrow.lazy import imported_late
from fxgrow.version import __version__ as __version__

if TYPE_CHECKING:
    from fxgrow.api.convert import convert as convert
    from fxgrow.api.deepen import deepen as deepen
    from fxgrow.api.inspection import inspect as inspect
    from fxgrow.api.kernels import morph_kernel as morph_kernel
    from fxgrow.api.report.data import Growth as Growth
    from fxgrow.api.report.data import Inspection as Inspection
    from fxgrow.api.report.data import Report as Report
    from fxgrow.api.widen import Grown as Grown
    from fxgrow.api.widen import widen as widen
    from fxgrow.errors import FxgrowError as FxgrowError
    from fxgrow.errors import FxgrowWarning as FxgrowWarning
    from fxgrow.errors import NotPreservedError as NotPreservedError
    from fxgrow.errors import PlanError as PlanError
    from fxgrow.errors import SourceError as SourceError
    from fxgrow.errors import TraceError as TraceError
    from fxgrow.errors import UnsupportedOperationError as UnsupportedOperationError
    from fxgrow.errors import VerificationError as VerificationError
    from fxgrow.files.models import load as load
    from fxgrow.files.models import open_model as open_model
    from fxgrow.files.models import save as save
    from fxgrow.files.models import write_grown as write_grown
    from fxgrow.files.optimizer.growth import grow_optimizer_ as grow_optimizer_
    from fxgrow.grow.data import GradMax as GradMax
    from fxgrow.grow.data import Tiny as Tiny
    from fxgrow.plan.init import inits as inits
    from fxgrow.plan.init import register_init as register_init
    from fxgrow.plan.norm_tensors import NormTensors as NormTensors
    from fxgrow.plan.paired import apply_pairing as apply_pairing
    from fxgrow.plan.rescaling import apply_rescaling as apply_rescaling
    from fxgrow.plan.schema import Plan as Plan
    from fxgrow.verification.findings import Verification as Verification
    from fxgrow.verification.measure import verify as verify

_HOMES: dict[str, str] = {
    **dict.fromkeys(("Grown", "widen"), "fxgrow.api.widen"),
    **dict.fromkeys(("GradMax", "Tiny"), "fxgrow.grow.data"),
    **dict.fromkeys(
        (
            "FxgrowError",
            "FxgrowWarning",
            "NotPreservedError",
            "PlanError",
            "SourceError",
            "TraceError",
            "UnsupportedOperationError",
            "VerificationError",
        ),
        "fxgrow.errors",
    ),
    "inspect": "fxgrow.api.inspection",
    "convert": "fxgrow.api.convert",
    **dict.fromkeys(("load", "open_model", "save", "write_grown"), "fxgrow.files.models"),
    "morph_kernel": "fxgrow.api.kernels",
    **dict.fromkeys(("inits", "register_init"), "fxgrow.plan.init"),
    "NormTensors": "fxgrow.plan.norm_tensors",
    "apply_pairing": "fxgrow.plan.paired",
    "apply_rescaling": "fxgrow.plan.rescaling",
    "deepen": "fxgrow.api.deepen",
    "grow_optimizer_": "fxgrow.files.optimizer.growth",
    "Plan": "fxgrow.plan.schema",
    **dict.fromkeys(("Growth", "Inspection", "Report"), "fxgrow.api.report.data"),
    "Verification": "fxgrow.verification.findings",
    "verify": "fxgrow.verification.measure",
}

__all__ = ["__version__", *sorted(_HOMES)]
__getattr__ = imported_late(__name__, _HOMES, ("training",))


def __dir__() -> list[str]:
    return sorted(__all__)
