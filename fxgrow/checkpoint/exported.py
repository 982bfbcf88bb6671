"""``torch.export`` programs (``.pt2``): a graph of operations with its weights.

``torch.export.load`` unpickles, evaluates expressions and generates code, so an archive is looked
at first. It is loaded unasked only if it holds plain tensors, known members, names that are names,
expressions that are arithmetic, and operations of ATen; that leaves nothing that could run code of
the file's own. Anything else needs ``--trust-pickle``.
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxgrow.checkpoint.formats import (
    FORMATS,
    Contents,
    FileFormat,
    members,
)
from fxgrow.checkpoint.reading import refuse_damaged
from fxgrow.errors import SourceError
from fxgrow.labels.tape import Arguments

_MEMBERS = re.compile(
    r"models/model\.json|archive_format|archive_version|byteorder|\.data/\w+|extra/[\w.]+"
    r"|data/sample_inputs/model\.pt|data/(weights/weight|constants/tensor)_\d+"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json"
)
_NAME = re.compile(r"[\w.+:-]*")
_TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge)"
)
_EXPRESSION = re.compile(
    r"([-+*/(),=<> .]|\d+|'[a-z]+\d*'|\b[suz]\d+\b|\b(Symbol|Integer|Float|Rational|Add|Mul|Pow|Max"
    r"|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|positive|nonnegative|integer|True|False)\b)*"
)
# Texts that are kept or shown, and neither evaluated nor written into code. fxgrow does not run
# the guards, which are code.
_TEXTS = frozenset(
    {"stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom",
     "in_spec", "out_spec", "as_string", "guards_code"}
)  # fmt: skip


class _Program(FileFormat):
    name = "pt2"
    suffixes = (".pt2",)

    def sniff(self, path: Path, head: bytes) -> bool:
        marks = {"archive_format", "models/model.json", "serialized_exported_program.json"}
        return not marks.isdisjoint(members(path, head))

    def read(self, path: Path, *, trust_pickle: bool) -> Contents:
        if not trust_pickle:
            _check(path)
        try:
            with _quiet():
                program = torch.export.load(path)
                module = program.module(check_guards=False)
        except Exception as error:  # a damaged or crafted archive may raise anything
            refuse_damaged(path, str(error), error)
        return Contents(module, inputs=_inputs(program), dynamic=_dynamic(program))

    def write(self, contents: Contents, path: Path) -> None:
        module = contents.data
        if not isinstance(module, nn.Module) or contents.inputs is None:
            raise ValueError("a program is exported from a module and its inputs")
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
            return torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic_shapes)
        except Exception as error:  # export raises what it likes
            problem = error
    reason = str(problem).strip().splitlines()
    raise SourceError(
        f"torch.export cannot export this network: {reason[0] if reason else problem!r}.",
        way_out="Write its weights: -o model.pt or -o model.safetensors.",
    ) from problem


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


def _check(path: Path) -> None:
    """Return if loading an archive can run nothing but what torch itself defines.

    Raises:
        SourceError: it might; the first part that is not plain is named.
    """
    with zipfile.ZipFile(path) as archive:
        for full in archive.namelist():
            member = full.partition("/")[2]
            if not _MEMBERS.fullmatch(member):
                _refuse(path, f"the member {full!r}")
            if member.endswith(".json"):
                problem = next(_problems(_json(path, archive.read(full))), "")
                if problem:
                    _refuse(path, problem)
            elif member.endswith(".pt"):
                try:
                    torch.load(io.BytesIO(archive.read(full)), weights_only=True)
                except Exception as error:
                    _refuse(path, f"example inputs that are no plain tensors ({error})")


def _json(path: Path, data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError as error:
        refuse_damaged(path, str(error), error)


def _problems(item: object, key: str = "") -> Iterator[str]:
    """Yield what is not plain in the JSON of an archive, by where it stands."""
    if isinstance(item, Mapping):
        for name, value in item.items():
            if not _NAME.fullmatch(name):
                yield f"the name {name!r}"
            yield from _problems(value, name)
    elif isinstance(item, list):
        for value in item:
            yield from _problems(value, key)
    elif key == "use_pickle" and item:
        yield "a pickled tensor"
    elif isinstance(item, str) and key not in _TEXTS:
        known = {"target": _TARGET, "expr_str": _EXPRESSION}.get(key, _NAME)
        if not known.fullmatch(item):
            kind = {"target": "operation", "expr_str": "expression"}.get(key, "name")
            yield f"the {kind} {item!r}"


def _refuse(path: Path, what: str) -> None:
    raise SourceError(
        f"{path} is a torch.export program with {' '.join(what.split())[:200]}, which loading it "
        "might execute, so it was not loaded.",
        name=str(path),
        way_out="If you trust the file, pass --trust-pickle, which executes whatever it holds.",
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
