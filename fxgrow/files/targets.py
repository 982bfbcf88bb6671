"""The kinds of files that a grown model is written to: what each holds, and how it is checked.

A file of weights, a checkpoint or a pickled module; a ``torch.export`` program; a directory whose
``config.json`` transformers or timm builds the network from; one of timm's for which there is no
such name.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from fxgrow.api.widen import Grown
from fxgrow.errors import SourceError
from fxgrow.files.checkpoint import Source
from fxgrow.files.checkpoint.writing import Check
from fxgrow.files.copies import grown_copies
from fxgrow.files.fitting import config_of
from fxgrow.files.opened import OpenedModel
from fxgrow.files.pretrained import is_of_timm, is_pretrained, stored, timm_config, untied
from fxgrow.files.reread import Judged, check_written
from fxgrow.files.written import check_directory, check_program, check_timm
from fxgrow.modules.calling import Arguments
from fxgrow.modules.inputs import batches_for
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.names import tensor_origins

_PICKLED_GRAPH = (
    "the grown module is a GraphModule: torch.load(weights_only=False) reads it, fxgrow only with "
    "--trust-pickle. Widen a state_dict to avoid that."
)
_NO_NAME = (
    "config.json is left out: timm has no architecture of {}. fxgrow.load reads the "
    "directory, by the record in its weights."
)


@dataclass(frozen=True)
class Target:
    """What is written of a grown model, and how it is judged once it lies there.

    Attributes:
        weights: new weights for each set that the source holds, the network's own first.
        check: looks at what was written before it takes its name.
        config: the ``config.json`` of a directory.
        inputs: what a program is exported with, and what is run once more.
        notes: what the user should know, one sentence each.
    """

    weights: list[Mapping[str, Tensor]]
    check: Check
    config: dict[str, Any] | None = None
    inputs: Arguments | None = None
    notes: tuple[str, ...] = ()


def target_of(
    opened: OpenedModel, grown: Grown, judged: Judged, file_format: str, inputs: object
) -> Target:
    """Return what is written.

    Args:
        opened: the file's old model.
        grown: what became of it.
        judged: what a file must give back.
        file_format: that of the output.
        inputs: the example inputs that the model was verified on; None for those of the source.

    Raises:
        SourceError: the output cannot hold the grown model.
    """
    given = opened.inputs if inputs is None else inputs
    is_known, config = is_pretrained(opened.architecture), opened.source.config
    if file_format == "pt2":
        return _program(opened, grown, judged, given)
    if file_format != "directory" or not (is_known or config is not None):
        return _weights(opened, grown, judged, file_format)
    if is_known or not is_of_timm(config):
        return _described(opened, grown, given)
    if _is_built_by_timm(opened):
        return _built_by_timm(opened, grown, judged, given)
    what = f"the name {opened.architecture}" if opened.converted else "these widths"
    return replace(_weights(opened, grown, judged, file_format), notes=(_NO_NAME.format(what),))


def _weights(opened: OpenedModel, grown: Grown, judged: Judged, file_format: str) -> Target:
    """Return a file of weights, a checkpoint or a pickled module."""
    source, model = opened.source, grown.model
    pickled = source.model is not None and source.format != "pt2"
    whole = pickled and file_format.startswith("torch")
    has_graph = whole and any(isinstance(module, fx.GraphModule) for module in model.modules())
    return Target(
        _grown_weights(source, grown, judged),
        functools.partial(check_written, judged=judged),
        notes=(_PICKLED_GRAPH,) if has_graph else (),
    )


def _program(opened: OpenedModel, grown: Grown, judged: Judged, given: object) -> Target:
    """Return a ``torch.export`` program."""
    inputs = inputs_of(grown, opened.model, given)
    check = functools.partial(check_program, grown=grown.model, inputs=inputs)
    return Target(_grown_weights(opened.source, grown, judged), check, inputs=inputs)


def _described(opened: OpenedModel, grown: Grown, given: object) -> Target:
    """Return a directory that transformers reads.

    Raises:
        SourceError: no configuration describes the model.
    """
    inputs, architecture = inputs_of(grown, opened.model, given), opened.architecture
    if architecture is None or not is_pretrained(architecture) or opened.plans:
        raise SourceError(
            f"no config.json describes what {opened.source.path} has become.",
            name=str(opened.source.path),
            way_out="Write the weights alone: -o model.safetensors.",
        )
    named: Any = architecture.arguments["config"]
    config = dict(named)
    if not opened.converted:
        config = config_of(architecture, grown.plan, grown.model, inputs)
    check = functools.partial(
        check_directory, grown=grown.model, inputs=inputs, config=config, kept=named,
        folder=opened.source._contents.folder,
    )  # fmt: skip
    return Target([stored(grown.model, untied(grown.model))], check, config, inputs)


def _built_by_timm(opened: OpenedModel, grown: Grown, judged: Judged, given: object) -> Target:
    """Return a directory that timm reads: of a network as timm builds it."""
    inputs, source = inputs_of(grown, opened.model, given), opened.source
    config = timm_config(source.config or {}, opened.architecture, grown.model)  # type: ignore[arg-type]
    check = functools.partial(
        check_timm, grown=grown.model, inputs=inputs, config=config, folder=source._contents.folder
    )
    return Target(_grown_weights(source, grown, judged), check, config, inputs)


def _is_built_by_timm(opened: OpenedModel) -> bool:
    """Return whether what is written is a network of timm's as it is built."""
    named = opened.architecture is not None and opened.architecture.name.startswith("timm:")
    return named and opened.converted


def judged_of(opened: OpenedModel, grown: Grown) -> Judged:
    """Return what the file must give back.

    Raises:
        VerificationError: a moving average is not as the plan lays it out.
    """
    source, plan = opened.source, grown.plan
    first, copies = source.state_dict, grown_copies(source, plan, grown.init)
    origins = tensor_origins(named_tensors(opened.model), plan.steps)
    held = {name for name, origin in origins.items() if origin.name in first}
    absent = {name for name in grown.model.state_dict() if name not in held}
    plans = () if opened.converted else (*opened.plans, *plan.steps)
    return Judged(grown.model, opened.architecture, plans, source, copies, absent)


def _grown_weights(source: Source, grown: Grown, judged: Judged) -> list[Mapping[str, Tensor]]:
    """Return what becomes of each of a source's state_dicts, the network's own first."""
    first, new = source.state_dict, grown.model.state_dict()
    origins = tensor_origins(first, grown.plan.steps).items()
    own = OrderedDict((n, new[n] if n in new else first[old]) for n, (old, _) in origins)
    return [own, *judged.copies]


def inputs_of(grown: Grown, model: nn.Module, example_inputs: object) -> Arguments:
    """Return inputs to run a grown network on once more.

    Raises:
        SourceError: it was not the whole network that was followed, so its inputs are not known.
    """
    scope = grown.plan.scopes[0]
    if scope.module and example_inputs is None:
        raise SourceError(
            "only parts of this network could be followed, so its inputs are not known.",
            way_out="Write its weights: -o model.pt or -o model.safetensors.",
        )
    return batches_for(model, scope.inputs, scope.inputs_inferred, example_inputs)[0]
