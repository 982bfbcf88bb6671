"""Models from files and grown models to files.

A file of weights says nothing of the network they belong to, so what fxgrow writes carries a
*record* beside them: the architecture by name, and the plans that were carried out since, oldest
first. From these :func:`load` rebuilds the module on shapes alone and puts the weights in.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fxgrow.api.widen import Grown
from fxgrow.errors import FxgrowError
from fxgrow.files.beside import left_beside
from fxgrow.files.checkpoint import load_source, save_source
from fxgrow.files.checkpoint.foreign import refuse_foreign_output
from fxgrow.files.checkpoint.formats import Contents
from fxgrow.files.checkpoint.location import RECORD_KEY
from fxgrow.files.checkpoint.reading import naming
from fxgrow.files.checkpoint.saving import TENSORS_ONLY, output_format
from fxgrow.files.checkpoint.writing import write_file
from fxgrow.files.copies import left_behind, stale_settings
from fxgrow.files.identity import arranged, identified
from fxgrow.files.opened import OpenedModel as OpenedModel
from fxgrow.files.optimizer import grow_state_dict
from fxgrow.files.optimizer.checking import check_optimizer
from fxgrow.files.pickled import check_pickled
from fxgrow.files.pretrained import (
    architecture_of,
    example_inputs,
    is_pretrained,
    open_pretrained,
    reaching,
)
from fxgrow.files.records import put_weights, rebuilt_difference, record_of
from fxgrow.files.reread import Judged, check_written, containers_copied
from fxgrow.files.targets import inputs_of, judged_of, target_of
from fxgrow.files.written import check_program
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.exclusive import exclusive
from fxgrow.modules.recognition import recognise
from fxgrow.plan.names import tensor_origins
from fxgrow.plan.schema import Plan


@exclusive
def open_model(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_arguments: Mapping[str, object] | None = None,
    trust_pickle: bool = False,
) -> OpenedModel:
    """Read a file and return its model, ready to use.

    Args:
        path: a state_dict, a training checkpoint or a pickled module (``.pt``), safetensors (a
            file, or the index of several), a ``torch.export`` program (``.pt2``), or the directory
            of a model of transformers.
        arch: the architecture, where it cannot be recognised from names and shapes:
            ``resnet50``, ``torchvision:…``, ``timm:…`` or ``package.module:callable``.
        arch_arguments: its keyword arguments.
        trust_pickle: let a pickle execute code; classes outside torch and torchvision need it.

    Raises:
        SourceError: the file cannot be read, or no architecture fits its weights.
    """
    with naming(Path(path)):
        source = load_source(path, trust_pickle=trust_pickle)
        notes = list(source.warnings)
        if source.model is not None:
            module, source = source.model, arranged(source, source.model)
            return OpenedModel(source, module, None, (), list(source.warnings), source.inputs)
        named = None
        if source.config is not None and arch is None:
            named = architecture_of(source.path, source.config)
        if named is not None and is_pretrained(named):
            architecture = named
            model, source, more = open_pretrained(source, architecture)
            return OpenedModel(
                source, model, architecture, (), [*notes, *more], example_inputs(model)
            )
        architecture, plans, model, source = identified(
            source, arch, dict(arch_arguments or {}), named
        )
        notes = list(source.warnings)
        put_weights(model, source, architecture)
        if not is_pretrained(architecture):
            return OpenedModel(source, model, architecture, plans, notes)
        notes += reaching(architecture.arguments["config"], source.path)  # type: ignore[arg-type]
        return OpenedModel(source, model, architecture, plans, notes, example_inputs(model))


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_arguments: Mapping[str, object] | None = None,
    trust_pickle: bool = False,
) -> nn.Module:
    """Return the model in a file, whatever fxgrow wrote included; see :func:`open_model`.

    A module built from a state_dict is in eval mode; call ``.train()`` to go on training.

    Raises:
        SourceError: the file cannot be read, or no architecture fits its weights.
    """
    opened = open_model(path, arch=arch, arch_arguments=arch_arguments, trust_pickle=trust_pickle)
    return opened.model


@exclusive
def write_grown(
    opened: OpenedModel,
    grown: Grown,
    out: str | Path,
    *,
    inputs: object = None,
    force: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> list[str]:
    """Write a grown model to a file of the same kind as the one it was read from.

    Args:
        opened: the file's old model.
        grown: what became of it.
        out: the file or directory to write; its suffix may ask for another format.
        inputs: the example inputs that it was verified on, for what is run once more.
        force: overwrite ``out``; the source itself is never written to.
        tell: called with the name of each thing that grew with the weights: a moving average, an
            optimizer's state.

    Returns:
        What the user should know, one sentence each.

    Raises:
        SourceError: ``out`` cannot be written, or its format cannot hold the grown model; nothing
            is left behind.
        VerificationError: what was written is not the grown model when it is read again.
    """
    out, source = Path(out), opened.source
    file_format = output_format(source, out, configured=is_pretrained(opened.architecture))
    judged = judged_of(opened, grown)
    target = target_of(opened, grown, judged, file_format, inputs)
    notes = list(target.notes)

    def optimizer(saved: dict[str, Any], place: str) -> dict[str, Any]:
        changed, found = grow_state_dict(grown.plan, saved, opened.model, grown.model)
        check_optimizer(grown.plan, saved, changed, opened.model, grown.model, found)
        judged.optimizers[id(saved)] = containers_copied(changed)
        if changed["state"]:
            tell(f"the optimizer's state in {place!r}")
        notes.extend(f"the optimizer in {place!r}: {note}" for note in found)
        return changed

    written = save_source(
        source, target.weights, out, record=record_of(opened.architecture, judged.plans),
        model=grown.model if source.model is not None or file_format == "pt2" else None,
        optimizer=optimizer, config=target.config, inputs=target.inputs, check=target.check,
        force=force,
    )  # fmt: skip
    if source.kind == "checkpoint" and file_format not in TENSORS_ONLY:
        for place in source.copies:
            tell(f"the weights in {place!r}")
        notes += left_behind(source, opened.model, grown.model, grown.plan)
        notes += stale_settings(source, grown.plan)
    if file_format == "directory" and (folder := source._contents.folder) is not None:
        notes += left_beside(folder, opened.model, grown.model, grown.plan)
    return notes + written


def _recognised(
    shapes: Mapping[str, tuple[int, ...]], plans: Sequence[Plan], model: nn.Module
) -> Architecture | None:
    """Return the known architecture that became a module; None if there is none.

    One of the same shapes that computes otherwise (another activation, another eps) is none.
    """
    try:
        found = recognise(shapes)
        return None if rebuilt_difference(found, plans, model) else found
    except FxgrowError:
        return None


@exclusive
def save(grown: Grown, path: str | Path, *, force: bool = False) -> None:
    """Write a model grown in Python, so that :func:`load` gives it back.

    If the network it grew from is a known torchvision architecture, its state_dict is written
    (``.safetensors``, or anything else for ``torch.save``) with the record to rebuild it. Any
    other module is pickled whole, which loads without fxgrow where its class can be imported.
    ``.pt2`` asks for a ``torch.export`` program, and :func:`write_grown` writes directories.

    Args:
        grown: the result of :func:`fxgrow.widen`, ``deepen``, ``morph_kernel`` or ``convert``.
        path: the file to write.
        force: overwrite it if it exists.

    Raises:
        SourceError: the file cannot be written, or the module can neither be named nor pickled.
        VerificationError: what was written is not the grown model when it is read again.
    """
    out = Path(path)
    refuse_foreign_output(out)
    if out.suffix == ".pt2":
        inputs = inputs_of(grown, grown.model, None)
        check = functools.partial(check_program, grown=grown.model, inputs=inputs)
        program = Contents(grown.model, inputs=inputs)
        write_file(program, out, "pt2", source=None, force=force, check=check)
        return
    state_dict = grown.model.state_dict()
    plans = () if grown.plan.names else grown.plan.steps  # a conversion ends in an architecture
    source = grown.plan.steps[0].source
    origins = tensor_origins(source, grown.plan.steps)
    before = {old: source[old][0] for new, (old, _) in origins.items() if new in state_dict}
    shapes = before if plans else {name: tuple(t.shape) for name, t in state_dict.items()}
    architecture = _recognised(shapes, plans, grown.model)
    target = "safetensors" if out.suffix == ".safetensors" else "torch"
    if architecture is None:
        check_pickled(grown.model, out, target)
    contents = Contents(state_dict)
    if architecture is None:
        contents = Contents(grown.model)
    elif target == "torch":
        vars(state_dict)["_metadata"][RECORD_KEY] = record_of(architecture, plans)
    else:
        tensors = {name: tensor.contiguous().clone() for name, tensor in state_dict.items()}
        header = {"format": "pt", RECORD_KEY: json.dumps(record_of(architecture, plans))}
        contents = Contents(tensors, header)
    check = functools.partial(check_written, judged=Judged(grown.model, architecture, plans))
    write_file(contents, out, target, source=None, force=force, check=check)
