"""``torch.export`` programs (``.pt2``): a graph of operations with its weights.

What is loaded unasked is an archive of what :mod:`fxgrow.files.checkpoint.programs` checked;
anything else needs ``--trust-pickle``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxgrow.errors import SourceError
from fxgrow.files.checkpoint.formats import FORMATS, Candidate, Contents, FileFormat
from fxgrow.files.checkpoint.programs import NAME, OLDER_MODEL, checked_program
from fxgrow.files.checkpoint.reading import reading
from fxgrow.modules.calling import Arguments, call
from fxgrow.modules.standin import stand_in

# Before torch 2.9 programs do not guard their inputs, and cannot be told not to.
_UNGUARDED: dict[str, Any] = (
    {"check_guards": False}
    if "check_guards" in signature(ExportedProgram.module).parameters
    else {}
)


class _Program(FileFormat):
    name = "pt2"
    suffixes = (".pt2",)

    def sniff(self, found: Candidate) -> bool:
        marks = {"archive_format", "models/model.json", OLDER_MODEL}
        return not marks.isdisjoint(found.members)

    def read(self, found: Candidate, *, trust_pickle: bool) -> Contents:
        path = found.path
        archive = path if trust_pickle else checked_program(found.file, found.archive)
        with reading(path), _quiet():
            program = torch.export.load(archive)
            module = program.module(**_UNGUARDED)
        return Contents(module, inputs=_inputs(program), dynamic=_dynamic(program))

    def write(self, contents: Contents, path: Path) -> None:
        module = contents.data
        if not isinstance(module, nn.Module) or contents.inputs is None:
            raise ValueError("a program is exported from a module and its inputs")
        for name in module.state_dict():
            if not NAME.fullmatch(name):
                raise SourceError(
                    f"a program cannot hold a parameter called {name!r}.",
                    name=name,
                    way_out="Write its weights: -o model.pt or -o model.safetensors.",
                )
        with _quiet():
            torch.export.save(_exported(module, contents.inputs, contents.dynamic), path)


FORMATS.register(_Program.name)(_Program())


def _exported(
    module: nn.Module, inputs: Arguments, dynamic: tuple[frozenset[int], ...] | None
) -> ExportedProgram:
    """Export a module.

    Args:
        module: in eval mode.
        inputs: what it is run on.
        dynamic: for each input tensor the dims whose size may vary; None asks for the first of
            each, where the computation allows it.

    Raises:
        SourceError: it cannot be exported.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    varying = iter(dynamic or ())

    def dims(leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        found = range(min(1, leaf.ndim)) if dynamic is None else sorted(next(varying, ()))
        return dict.fromkeys(found, Dim.AUTO) or None

    shapes = pytree.tree_map(dims, inputs)
    attempts = [shapes] if dynamic is not None else [shapes, None]
    problem: Exception | None = None
    for dynamic_shapes in attempts:
        try:
            return torch.export.export(
                module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
        except Exception as error:  # export raises what it likes
            problem = error
    refuse_first_run(module, set_by_data(module, inputs))
    reason = str(problem).strip().splitlines()
    raise SourceError(
        f"torch.export cannot export this network: {reason[0] if reason else problem!r}.",
        way_out="Write its weights: -o model.pt or -o model.safetensors.",
    ) from problem


def set_by_data(module: nn.Module, inputs: Arguments) -> str:
    """Return a tensor of a module that a run in eval mode sets; "" if there is none."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = stand_in(module, {name: tensor.clone() for name, tensor in before.items()}).eval()
    with torch.no_grad():
        call(network, inputs)
    after = network.state_dict()
    return next((name for name, was in before.items() if not torch.equal(after[name], was)), "")


def refuse_first_run(module: nn.Module, name: str) -> None:
    """Return if there is no tensor that the first run of a module sets.

    Raises:
        SourceError: there is: a program would set it at each run, or never.
    """
    if name:
        raise SourceError(
            f"a program cannot hold this {type(module).__name__}: its first run sets {name} by the "
            "data that it sees, and later ones do not, which no program tells apart.",
            name=name,
            way_out="Run the network once on data before it grows, or write its weights: "
            "-o model.pt.",
        )


def _inputs(program: ExportedProgram) -> Arguments | None:
    """Return the example inputs that a program was exported with, if it has any."""
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    if not kwargs:
        return tuple(args)
    signature = program.module_call_graph[0].signature
    names = list(signature.forward_arg_names or ()) if signature is not None else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _dynamic(program: ExportedProgram) -> tuple[frozenset[int], ...]:
    """Return, for each tensor that a program takes, the dims whose size may vary."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in names]
    return tuple(
        frozenset(dim for dim, size in enumerate(value.shape) if not isinstance(size, int))
        for value in values
        if isinstance(value, Tensor)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.export logs and warns of on the way; errors say what matters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
