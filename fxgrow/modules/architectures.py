"""Architectures by name: parse them, build them without weights, recognise them in a state_dict.

The only module that knows what architectures there are. Names are those of the libraries that
define them (``torchvision:resnet50``, ``timm:resnet50d``) or the user's own code
(``package.module:callable``).
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fxgrow.errors import SourceError, UsageError, one_line, shown
from fxgrow.modules.huggingface import FETCHING_ARGUMENTS, LARGEST, closed, find_class
from fxgrow.modules.uninitialised import ExceededError, Limit, build_uninitialised

_NO_ARGUMENTS: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True)
class Architecture:
    """A network without its weights: whose it is, what it is called, and what it is built with.

    Attributes:
        name: ``"torchvision:NAME"``, ``"timm:NAME"``, ``"transformers:CLASS"`` (whose only argument
            is a ``config``) or ``"package.module:callable"``.
        arguments: keyword arguments of the builder, in JSON's types (a tuple becomes a list).
        origin: the file that names it, which is not trusted; "" if the user does.

    Raises:
        SourceError: an argument is not JSON-able, asks the builder for pretrained weights, or is a
            number from a file that no network has.

    Example:
        >>> tiny = Architecture("torchvision:resnet18", {"num_classes": 10})
        >>> tiny.build().fc
        Linear(in_features=512, out_features=10, bias=True)
        >>> Architecture.from_dict(tiny.to_dict()) == tiny
        True
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict, hash=False)
    origin: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        forbidden = sorted(FETCHING_ARGUMENTS.intersection(self.arguments))
        if forbidden:
            raise self._refusal(
                f"the argument {forbidden[0]!r} of {self.name} is not fxgrow's to give",
                "Leave it out: weights come from SOURCE.",
            )
        try:
            plain = json.loads(json.dumps(dict(self.arguments)))
            largest = max(_whole_numbers(plain), key=abs, default=0)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._refusal(
                f"the arguments of {self.name} must be numbers, texts, lists or the like: {error}",
                "Write a function that builds the model, and name it module:function.",
            ) from error
        # The fields of a config.json are looked at where they are used.
        if self.origin and abs(largest) > LARGEST and not self.name.startswith("transformers:"):
            raise self._refusal(
                f"{self.name} has an argument of {shown(str(largest), 20)}, which is no size",
                "Name the architecture with --arch.",
            )
        object.__setattr__(self, "arguments", plain)

    def _refusal(self, what: str, way_out: str) -> SourceError:
        """Return an error that names the file, if there is one, in one line of some length."""
        where = f"{self.origin}: " if self.origin else ""
        text = one_line(what, 400).rstrip(".")
        return SourceError(f"{where}{text}.", name=self.name, way_out=way_out)

    def __str__(self) -> str:
        values = {k: "…" if isinstance(v, dict) else repr(v) for k, v in self.arguments.items()}
        arguments = ", ".join(f"{key}={shown(value, 80)}" for key, value in values.items())
        return f"{self.name}({arguments})" if arguments else self.name

    @property
    def is_code(self) -> bool:
        """Whether the name is code outside of the libraries that fxgrow knows."""
        return self.name.partition(":")[0] not in _LIBRARIES

    @property
    def defaults(self) -> dict[str, int]:
        """The builder's parameters whose defaults are whole numbers."""
        try:
            parameters = inspect.signature(_find_builder(self.name)).parameters.values()
        except (TypeError, ValueError):  # written in C
            return {}
        return {p.name: p.default for p in parameters if type(p.default) is int}

    def build(self, device: str | torch.device = "meta", limit: Limit | None = None) -> nn.Module:
        """Build the network, in train mode and without any pretrained weights.

        On ``"meta"``, parameters and buffers have shapes only. On a real device the network is
        *not* built on meta and filled in afterwards, which would lose what its constructor
        computed: only its parameters skip initialisation and hold undefined values until weights
        are loaded; buffers and constants, persistent or not, are right.

        Args:
            device: where the parameters and buffers are.
            limit: how much building it may take; None for all that there is, or for the default if
                a file names the architecture.

        Returns:
            A new module.

        Raises:
            SourceError: there is no such architecture, its builder fails, or it exceeds its limit.
        """
        try:
            built = self._build(device, Limit() if limit is None and self.origin else limit)
        except ExceededError as error:
            raise self._refusal(
                f"{self.name} asks for {error}",
                "If that is right, build the model and give it to fxgrow in Python.",
            ) from error
        except SourceError as error:
            if not self.origin or self.origin in error.message:
                raise
            raise self._refusal(error.message, error.way_out) from error
        except Exception as error:  # a builder is other people's code and may raise anything
            raise self._refusal(
                f"{self} cannot be built: {type(error).__name__}: {error}",
                "Check what it says of that." if self.origin else "Check --arch-arg.",
            ) from error
        if not isinstance(built, nn.Module):
            raise self._refusal(
                f"{self.name} returns {type(built).__name__}, not a torch.nn.Module",
                "Name a class or a function that returns the model.",
            )
        return built

    def _build(self, device: str | torch.device, limit: Limit | None) -> object:
        """Return what the builder returns."""
        builder = _find_builder(self.name)
        arguments = dict(self.arguments)
        if self.name.startswith("torchvision:"):
            arguments["weights"] = None
            if "weights_backbone" in inspect.signature(builder).parameters:
                arguments["weights_backbone"] = None
        elif self.name.startswith("timm:"):
            arguments["pretrained"] = False
        with closed(self.name.partition(":")[0]):
            return build_uninitialised(lambda: builder(**arguments), device, limit)

    def to_dict(self) -> dict[str, object]:
        """Return the architecture as JSON-able data."""
        return {"name": self.name, "arguments": dict(self.arguments)}

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, trust_code: bool = False, origin: str = "the record"
    ) -> Architecture:
        """Make an architecture from what :meth:`to_dict` returned.

        Args:
            data: ``{"name": str, "arguments": dict}``.
            trust_code: accept ``package.module:callable``. Off by default, because data read from
                a file would otherwise name any function of any module, to be called by ``build``.
            origin: the file that the data are from; building is limited for what it says.

        Raises:
            SourceError: ``data`` has another form, or names user code without ``trust_code``.
        """
        name, arguments = data.get("name"), data.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise SourceError(
                f"{origin} lacks the name or the arguments of its architecture.",
                name=origin,
                way_out="Name the architecture with --arch.",
            )
        told = shown(name, 80)
        if name.partition(":")[0] not in _LIBRARIES and not trust_code:
            raise SourceError(
                f"{origin} names {told} as its architecture, which is code outside of "
                f"{' and '.join(_LIBRARIES)}.",
                name=name,
                way_out=f"If you trust it, name it yourself: --arch {told}.",
            )
        return cls(name, arguments, origin)


def _whole_numbers(value: object) -> Iterator[int]:
    """Yield the whole numbers in what JSON holds."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(item)
    elif isinstance(value, int):
        yield value


def parse_architecture(spec: str, arguments: Mapping[str, object] = _NO_ARGUMENTS) -> Architecture:
    """Find the architecture that ``spec`` names.

    Args:
        spec: ``resnet50`` (torchvision's, else timm's if that is installed), ``torchvision:NAME``,
            ``timm:NAME``, or ``package.module:callable``, which is imported: it is the user's code.
        arguments: keyword arguments for its builder.

    Returns:
        The architecture under its full name.

    Raises:
        SourceError: there is no such architecture; the way out names the closest ones.

    Example:
        >>> parse_architecture("resnet50").name
        'torchvision:resnet50'
    """
    prefix, colon, name = spec.partition(":")
    if not colon:
        prefix, name = "torchvision", spec
        if spec not in _torchvision_names() and spec in _timm_names(required=False):
            prefix = "timm"
    full = f"{prefix}:{name}"
    _find_builder(full)
    return Architecture(full, arguments)


def larger_relative(
    source: Architecture | None, spec: str, arguments: Mapping[str, object] = _NO_ARGUMENTS
) -> Architecture:
    """Find the architecture that ``spec`` names, with the arguments of another where it has them.

    Args:
        source: the other (its ``num_classes``, say); None if it is not known.
        spec: as for :func:`parse_architecture`.
        arguments: keyword arguments for the builder, which come before the other's.

    Raises:
        SourceError: there is no such architecture.
    """
    named = parse_architecture(spec, arguments)
    if source is None or source.name.partition(":")[0] != named.name.partition(":")[0]:
        return named
    return Architecture(named.name, {**source.arguments, **arguments}, source.origin)


def relatives(architecture: Architecture) -> list[str]:
    """Return the other architectures of torchvision that are defined in the same module.

    Example:
        >>> relatives(Architecture("torchvision:alexnet"))
        []
        >>> relatives(Architecture("torchvision:vgg11"))[:2]
        ['vgg11_bn', 'vgg13']
    """
    library, _, name = architecture.name.partition(":")
    if library != "torchvision":
        return []
    home = _find_builder(architecture.name).__module__
    return [
        other
        for other in torchvision_names()
        if other != name and _find_builder(f"torchvision:{other}").__module__ == home
    ]


def parse_arguments(pairs: Sequence[str]) -> dict[str, object]:
    """Read ``KEY=VALUE`` pairs; a value that is no Python literal is a text.

    Raises:
        UsageError: a pair has no ``=``, its key is no identifier, or a key is given twice.

    Example:
        >>> parse_arguments(["num_classes=10", "norm=none", "size=(8, 8)"])
        {'num_classes': 10, 'norm': 'none', 'size': (8, 8)}
    """
    arguments: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"the architecture argument {pair!r} is not of the form KEY=VALUE.",
                way_out="For example: --arch-arg num_classes=10.",
            )
        if key in arguments:
            raise UsageError(
                f"the architecture argument {key!r} is given twice.", way_out="Give it once."
            )
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[key] = text
    return arguments


def torchvision_names() -> list[str]:
    """Return torchvision's model names in its own order, without the quantized ones."""
    return [name for name in _torchvision_names() if not name.startswith("quantized_")]


def _torchvision_names() -> list[str]:
    from torchvision.models import list_models

    names: list[str] = list_models()
    return names


def _timm_names(required: bool) -> list[str]:
    try:
        timm: Any = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if not required:
            return []
        raise SourceError("timm is not installed.", way_out="pip install timm") from error
    return list(timm.list_models())


def _find_builder(full: str) -> Callable[..., object]:
    """Return the callable behind a full name, or raise with the closest names as the way out."""
    prefix, _, name = full.partition(":")
    find = _LIBRARIES.get(prefix)
    return _find_user_code(prefix, name) if find is None else find(name)


def _find_torchvision(name: str) -> Callable[..., object]:
    from torchvision.models import get_model_builder

    if name not in _torchvision_names():
        raise _unknown(name, "torchvision", torchvision_names(), _timm_names(required=False))
    builder: Callable[..., object] = get_model_builder(name)
    return builder


def _find_timm(name: str) -> Callable[..., object]:
    names = _timm_names(required=True)  # create_model itself would also take hubs and folders
    if name not in names:
        raise _unknown(name, "timm", names)
    timm: Any = importlib.import_module("timm")
    return functools.partial(timm.create_model, name)


def _unknown(
    name: str, library: str, known: Sequence[str], of_timm: Sequence[str] = ()
) -> SourceError:
    module, _, own = name.rpartition(".")
    near = 0.8 if module else 0.5  # a path to code is like any name by chance
    tagged = module in known or module in of_timm  # timm's names of trained weights
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=near)
    others = difflib.get_close_matches(name, of_timm, n=3, cutoff=1.0 if close else near)
    close = [module] if tagged else [*(f"timm:{other}" for other in others), *close]
    ways_out = []
    if not (tagged or (close and not module)):
        ways_out.append(
            f"Name your own as {module or 'package.module'}:{own if module else 'callable'}."
        )
    if close:
        ways_out.append(f"Did you mean {', '.join(close)}?")
    return SourceError(f"{library} has no model {name!r}.", name=name, way_out=" ".join(ways_out))


def _find_user_code(module_name: str, attribute: str) -> Callable[..., object]:
    full = f"{module_name}:{attribute}"
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # a console script does not look where the user stands
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise SourceError(
            f"{module_name!r} of {full} cannot be imported: {type(error).__name__}: {error}.",
            name=full,
            way_out="Write torchvision:NAME, timm:NAME or package.module:callable.",
        ) from error
    for part in attribute.split("."):
        names = dir(found)
        found = getattr(found, part, None)
        if found is None:
            raise _unknown(part, module_name, names)
    if not callable(found) or isinstance(found, nn.Module):
        raise SourceError(
            f"{full} is not a class or a function but {type(found).__name__}.",
            name=full,
            way_out="Name a class or a function that returns the model.",
        )
    return found


_LIBRARIES: dict[str, Callable[[str], Callable[..., object]]] = {
    "torchvision": _find_torchvision,
    "timm": _find_timm,
    "transformers": find_class,
}
