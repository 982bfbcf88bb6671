"""From texts on the command line to arguments of the API. Needs no torch until it makes inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxgrow.cli.options import INIT_NAMES
from fxgrow.errors import UsageError
from fxgrow.plan.by_layer import values_in
from fxgrow.plan.requests import Deepen, MorphKernel, Request, Widen

if TYPE_CHECKING:
    from fxgrow.files.models import OpenedModel
    from fxgrow.plan.schema import Plan

REPORT_SUFFIXES = (".json", ".html")
DTYPES = ("int64", "int32", "bool", "float32", "float64", "float16", "bfloat16")
_SHORT = {"long": "int64", "int": "int64", "float": "float32", "double": "float64"}


def parse_widths(texts: Sequence[str], option: str = "width") -> str | dict[str, str]:
    """Read ``--width`` (or ``--size``): one for all, or ``GLOB=WIDTH`` pairs, in order.

    Raises:
        UsageError: a glob is given twice, or more than one width for all.

    Example:
        >>> parse_widths(["2x"]), parse_widths(["layer1.*=2x", "+8"])
        ('2x', {'layer1.*': '2x', '*': '+8'})
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    widths: dict[str, str] = {}
    for text in texts:
        glob, equals, width = text.rpartition("=")
        glob = glob if equals else "*"
        if glob in widths:
            raise UsageError(
                f"there are two {option}s for {glob!r}.",
                name=glob,
                way_out=f"Give one, or use globs: --{option} 'layer1.*={width}' --{option} …",
            )
        widths[glob] = width
    return widths


def parse_by_layer(texts: Sequence[str] | None, option: str) -> str | dict[str, str] | None:
    """Read an option that may differ from layer to layer: one for all, or ``GLOB=VALUE`` pairs.

    Returns:
        None where it is not given.

    Raises:
        UsageError: a glob is given twice, or more than one value for all.

    Example:
        >>> parse_by_layer(["layer4.*=default_vt", "none"], "rescaling"), parse_by_layer(None, "")
        ({'layer4.*': 'default_vt', '*': 'none'}, None)
    """
    return parse_widths(texts, option) if texts else None


def check_names(inits: str | Mapping[str, str] | None, own: Sequence[str] = ()) -> None:
    """Return if there are inits of the names that are given; without torch where there are.

    Args:
        inits: one for all, or by layer; None for none.
        own: names that the command line knows besides.

    Raises:
        UsageError: there is no init of a name.
    """
    for name in () if inits is None else values_in(inits):
        if name not in (*own, *INIT_NAMES) and ":" not in name:
            from fxgrow.plan.init import find_init

            find_init(name)


def check_word(option: str, word: str, known: Sequence[str]) -> None:
    """Return if an option has one of the words that it may have.

    Raises:
        UsageError: it has not.
    """
    if word not in known:
        raise UsageError(f"{option} is {word!r}.", way_out=f"Known: {', '.join(known)}.")


def width_label(width: str | Mapping[str, str]) -> str:
    """Return what a default output is called after.

    Example:
        >>> width_label("2x"), width_label({"layer1.*": "2x", "*": "+8"})
        ('2x', 'layer1.*=2x *=+8')
    """
    if isinstance(width, str):
        return width
    return " ".join(f"{glob}={text}" for glob, text in width.items())


def plan_label(plan: Plan) -> str:
    """Return what the default output of a plan is called after: what each step asks for."""
    return " ".join(filter(None, (_asked(step.request) for step in plan.steps)))


def _asked(request: Request) -> str:
    match request:
        case Widen():
            return request.budget or width_label(request.width)
        case Deepen():
            return width_label(request.blocks)
        case MorphKernel():
            return kernel_label(request.size)
    return ""  # a conversion is called after its target, where it is carried out


def kernel_label(size: str | Mapping[str, str]) -> str:
    """Return what a default output with larger kernels is called after.

    Example:
        >>> kernel_label("5"), kernel_label({"layer1.*": "+2"}), kernel_label("")
        ('kernel 5', 'kernel layer1.*=+2', '')
    """
    return f"kernel {width_label(size)}" if size else ""


@dataclass(frozen=True)
class InputShape:
    """The shape of an input, and the dtype of its values: "" for that of the model."""

    sizes: tuple[int, ...]
    dtype: str = ""


def parse_shapes(texts: Sequence[str]) -> list[InputShape]:
    """Read ``--input-shape``.

    Raises:
        UsageError: a text is no shape, or names no dtype.

    Example:
        >>> parse_shapes(["1x3x224x224", "2x16:int64"])
        [InputShape(sizes=(1, 3, 224, 224), dtype=''), InputShape(sizes=(2, 16), dtype='int64')]
    """
    shapes = []
    for text in texts:
        shape, _, dtype = text.strip().lower().partition(":")
        sizes = shape.strip("()[] ").replace(",", "x").replace(" ", "").split("x")
        dtype = _SHORT.get(dtype.strip(), dtype.strip())
        if not all(_is_size(size) for size in sizes) or dtype not in ("", *DTYPES):
            raise UsageError(
                f"the input shape {text!r} cannot be read.",
                name=text,
                way_out="Write sizes joined by x, batch first: --input-shape 1x3x224x224; for "
                f"token ids: 1x16:int64 (known: {', '.join(DTYPES)}).",
            )
        shapes.append(InputShape(tuple(int(size) for size in sizes), dtype))
    return shapes


def inputs_of(shapes: Sequence[InputShape], opened: OpenedModel) -> object:
    """Return meta tensors of the given shapes, in a model's dtype unless they name another.

    Without shapes, what its file tells. Verification draws the values. Two sizes for a network that
    begins with an embedding are those of token ids.
    """
    import torch

    if not shapes:
        return opened.inputs
    floating = (p.dtype for p in opened.model.parameters() if p.is_floating_point())
    own = next(floating, torch.float32)
    layers = (module for module in opened.model.modules() if hasattr(module, "weight"))
    takes_ids = isinstance(next(layers, None), torch.nn.Embedding)
    dtypes = [getattr(torch, shape.dtype) if shape.dtype else own for shape in shapes]
    if takes_ids and not shapes[0].dtype and len(shapes[0].sizes) == 2:
        dtypes[0] = torch.int64
    pairs = zip(shapes, dtypes, strict=True)
    return tuple(torch.empty(each.sizes, dtype=dtype, device="meta") for each, dtype in pairs)


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0
