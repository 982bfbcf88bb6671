"""What of a ``torch.export`` archive may be loaded, and an archive of that alone.

``torch.export.load`` unpickles, imports, evaluates expressions and generates code, and reads zips
in its own way. So it never sees a file that is not trusted: the file's members are checked here
one by one, and what they say is written anew into an archive in memory, which is loaded.

- Tensors (weights, constants, example inputs) are plain memory with a shape inside it.
- Names are names; operations are those of ATen that compute and check what they get
  (:mod:`fxgrow.files.checkpoint.operations`), and arithmetic on sizes; expressions are arithmetic
  in sizes and small numbers; how arguments are nested is told by lists and dicts.
- Whatever torch keeps for people to read (stack traces, where a node came from, guards) is left
  out; so is everything else that no computation needs.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fxgrow.errors import SourceError, one_line
from fxgrow.files.checkpoint.archive import Archive, read_archive
from fxgrow.files.checkpoint.operations import is_safe
from fxgrow.files.checkpoint.reading import Readable, parse_json, reading
from fxgrow.files.checkpoint.unpickling import load_untrusted

_MODEL, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_PAYLOADS = {
    "data/weights/model_weights_config.json": "data/weights/weight_",
    "data/constants/model_constants_config.json": "data/constants/tensor_",
}
OLDER_MODEL = "serialized_exported_program.json"  # torch before 2.8: no folder, tensors pickled
_OLDER_TENSORS = tuple(f"serialized_{n}.pt" for n in ("state_dict", "constants", "example_inputs"))
_MARKS = re.compile(r"archive_format|archive_version|byteorder|\.data/\w+")
_MEMBERS = re.compile(r"extra/[\w.]+|data/(weights/weight|constants/tensor)_\d+")
_MOST_MARK = 4096  # bytes of a mark, such as the version
_MOST_GRAPH = 256 << 20  # bytes of a graph
NAME = re.compile(r"[\w.+:-]*")  # of parameters, among others
_WORD = re.compile(r"\w*")  # of what becomes a variable in code
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_\w+|math\.\w+"  # see is_safe
    r"|torch\.ops\.higher_order\.wrap_with_set_grad_enabled"  # around a graph, which is checked
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge)"
)
_SIZE = r"Symbol\('[a-z]+\d*'(, [a-z]+=(True|False))*\)|\b[suz]\d+\b"
# Powers of sizes alone, so that no number becomes too large to be written.
_EXPRESSION = re.compile(
    rf"(Pow\(({_SIZE}), Integer\(-?\d\)\)|({_SIZE})\*\*\d\b|{_SIZE}|(?<!\*)\*(?!\*)|[-+/(),<> .]|=="
    r"|\b\d{1,15}\b|\b(Integer|Float|Rational|Add|Mul|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv"
    r"|CleanDiv|True|False)\b)*"
)
_MOST_EXPRESSION = 2000  # characters
_PLAIN = (Tensor, nn.Parameter, bool, int, float, str, type(None), torch.dtype)
_STACK = re.compile(r"[\w.,;:()<>\[\] @/-]*")  # names of modules and of their classes
_PATTERNS = {
    "target": _TARGET, "expr_str": _EXPRESSION, "name": _WORD, "forward_arg_names": _WORD,
    "nn_module_stack": _STACK,
    "as_string": re.compile(r"[^\x00-\x1f]*"),
}  # fmt: skip
# What a graph says of itself that no computation needs.
_LEFT_OUT = {"guards_code": [], "treespec_namedtuple_fields": {}, "torch_version": ""}
_SPECS = ("in_spec", "out_spec")
_OPERATOR = "as_operator"  # an argument that is called: only graphs, which are checked, may be


class _NotPlainError(Exception):
    """A part of an archive that torch might execute."""


def checked_program(file: Readable, archive: Archive | None = None) -> io.BytesIO:
    """Return an archive with what a program's file holds, made of what was checked alone.

    Args:
        file: the program.
        archive: what lies where in it, if that is known.

    Raises:
        SourceError: the file is damaged, or the first part that is not plain is named.
    """
    archive = read_archive(file) if archive is None else archive
    checked = io.BytesIO()
    with reading(file.path), zipfile.ZipFile(checked, "w") as written:
        try:
            for name, data in _parts(file, archive):
                written.writestr(zipfile.ZipInfo(f"{archive.folder and 'model/'}{name}"), data)
        except _NotPlainError as error:
            _refuse(file, str(error))
    checked.seek(0)
    return checked


def _parts(file: Readable, archive: Archive) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each member of the checked archive."""
    if not archive.folder:
        yield from _older_parts(file, archive)
        return
    for name in archive.members:
        if _MARKS.fullmatch(name):
            mark = archive.part(file, name)
            yield name, mark.read(0, min(mark.size, _MOST_MARK))
        elif name not in (_MODEL, _INPUTS, *_PAYLOADS) and not _MEMBERS.fullmatch(name):
            raise _NotPlainError(f"the member {name!r}")
    yield _MODEL, _graph(file, archive, _MODEL)
    for config, prefix in _PAYLOADS.items():
        found = parse_json(archive.read(file, config), file.path)
        payloads = _payloads(archive, found, prefix)
        yield config, _dumped({"config": payloads})
        for member in dict.fromkeys(_path(prefix, payload) for payload in payloads.values()):
            yield member, archive.read(file, member)
    yield _INPUTS, _tensors(file, archive, _INPUTS)


def _older_parts(file: Readable, archive: Archive) -> Iterator[tuple[str, bytes]]:
    """Yield the parts of an archive as ``torch.export`` wrote it before torch 2.8."""
    for name in archive.members:
        if name == "version":
            mark = archive.part(file, name)
            yield name, mark.read(0, min(mark.size, _MOST_MARK))
        elif name not in (OLDER_MODEL, *_OLDER_TENSORS):
            raise _NotPlainError(f"the member {name!r}")
    yield OLDER_MODEL, _graph(file, archive, OLDER_MODEL)
    for name in _OLDER_TENSORS:
        yield name, _tensors(file, archive, name)


def _graph(file: Readable, archive: Archive, name: str) -> bytes:
    """Return a member that is a graph, if it is plain."""
    graph = archive.part(file, name)
    if graph.size > _MOST_GRAPH:
        raise _NotPlainError("a graph of more than 256 MB")
    return _dumped(_plain(parse_json(graph.read(0, graph.size), file.path)))


def _tensors(file: Readable, archive: Archive, name: str) -> bytes:
    """Return a member that ``torch.save`` wrote, saved anew, if it is plain tensors."""
    what = "weights" if "state" in name else "constants" if "const" in name else "example inputs"
    problem = _NotPlainError(f"{what} that are no plain tensors")
    try:
        pending: list[Any] = [loaded := load_untrusted(archive.part(file, name))]
    except SourceError as error:
        raise problem from error
    while pending:
        item = pending.pop()
        if type(item) in (dict, OrderedDict):
            pending += item.values()
        elif type(item) in (list, tuple):
            pending += item
        elif type(item) not in _PLAIN:
            raise problem
    saved = io.BytesIO()
    torch.save(loaded, saved)
    return saved.getvalue()


def _dumped(data: object) -> bytes:
    return json.dumps(data).encode()


def _path(prefix: str, payload: Mapping[str, Any]) -> str:
    """Return the member that a payload lies in."""
    return f"{prefix.rpartition('/')[0]}/{payload['path_name']}"


def _payloads(archive: Archive, found: Any, prefix: str) -> dict[str, Any]:
    """Return what an archive says of its tensors, if it is no more than their memory holds."""
    payloads: dict[str, Any] = _plain(found["config"])
    for name, payload in payloads.items():
        member = _path(prefix, payload)
        if payload["use_pickle"] or not re.fullmatch(rf"{re.escape(prefix)}\d+", member):
            raise _NotPlainError(f"a pickled tensor {name!r}")
        if member not in archive.members:
            raise ValueError(f"there is no {member}")
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"{name} has no size")
        if math.prod(sizes) > archive.members[member].length:
            raise ValueError(f"{name} is larger than what the file holds of it")
    return payloads


def _plain(item: Any, key: str = "") -> Any:
    """Return JSON of an archive without what no computation needs, if the rest is plain.

    Args:
        item: a part of it.
        key: under which it stands.

    Raises:
        _NotPlainError: a name or a text is not plain.
    """
    if isinstance(item, dict):
        if key == "metadata":
            stack = item.get(
                "nn_module_stack"
            )  # of where a node came from, if it says that plainly
            plain = isinstance(stack, str) and _STACK.fullmatch(stack)
            item = {"nn_module_stack": stack} if plain else {}
        if key == "custom_obj_values" and item:
            raise _NotPlainError("an object that is no tensor")
        return {_text(name): _entry(name, value) for name, value in item.items()}
    if isinstance(item, list):
        return [_plain(value, key) for value in item]
    return _text(item, key) if isinstance(item, str) else item


def _entry(name: str, value: Any) -> Any:
    """Return what stands under a name; see :func:`_plain`."""
    if name == _OPERATOR:
        raise _NotPlainError(f"an operator among the arguments of another one, {value!r}")
    if name in _LEFT_OUT:
        return _LEFT_OUT[name]
    return _plain_spec(value) if name in _SPECS else _plain(value, name)


def _text(text: str, key: str = "") -> str:
    """Return a text if it is plain for where it stands.

    Raises:
        _NotPlainError: it is not.
    """
    long = key == "expr_str" and len(text) > _MOST_EXPRESSION
    known = _PATTERNS.get(key, NAME).fullmatch(text) is not None
    if known and key == "target" and text.startswith("torch.ops.aten."):
        known = is_safe(text)
    if long or not known:
        kind = {"target": "operation", "expr_str": "expression"}.get(key, "name")
        raise _NotPlainError(f"the {kind} {text!r}")
    return text


def _plain_spec(text: Any) -> str:
    """Return how arguments are nested, as torch dumps it, if it names no code.

    torch imports what a context with a dict in it names.
    """

    def plain(spec: Any) -> Any:
        context = None if spec["context"] is None else json.loads(spec["context"])
        items = context if isinstance(context, list) else [context]
        if not all(isinstance(item, (str, int, type(None))) for item in items):
            raise _NotPlainError("arguments nested in something else than lists and dicts")
        for item in (spec["type"], *items):
            _plain(item)
        return {
            "type": spec["type"],
            "context": None if spec["context"] is None else json.dumps(context),
            "children_spec": [plain(child) for child in spec["children_spec"]],
        }

    version, spec = json.loads(text)
    return json.dumps([int(version), plain(spec)])


def _refuse(file: Readable, what: str) -> NoReturn:
    """Refuse a program.

    Raises:
        SourceError: always.
    """
    raise SourceError(
        f"{file.path} is a torch.export program with {one_line(what, 200)}, which loading "
        "it might execute, so it was not loaded.",
        name=str(file.path),
        way_out="If you trust the file, pass --trust-pickle, which executes whatever it holds.",
    )
