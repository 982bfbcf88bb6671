"""Model classes of Hugging Face transformers by name, and what of a configuration they are given.

transformers and timm are imported where they are needed. Only classes of the library itself are
found. A configuration may name code, kernels and weights that are fetched and run: what it says of
them is left out, or refused where the model would be another one without it, and nothing is fetched
while a library is :func:`closed`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest import mock

import torch

from fxgrow.errors import SourceError, shown

# Arguments by which timm would fetch weights or read files; fxgrow brings the weights itself.
FETCHING_ARGUMENTS = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "pretrained",
        "pretrained_backbone",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "progress",
        "scriptable",
        "weights",
        "weights_backbone",
    }
)
LARGEST = 1 << 24  # of the whole numbers that are plausible as sizes

# Fields by which transformers runs or fetches code, changes its classes, or reads other files.
_REACHING = frozenset(
    {
        "adapter_kwargs",
        "auto_map",
        "code_revision",
        "configuration_files",
        "custom_generate",
        "custom_pipelines",
        "distributed_config",
        "fusion_config",
        "kernel_config",
        "transformers_weights",
        "trust_remote_code",
        "use_kernels",
    }
)
_QUANTIZED = ("quantization_config", "compression_config")
_NAMES = ("_name_or_path", "name_or_path", "_commit_hash")  # of where it came from, for messages
LABELS = ("id2label", "label2id")  # their keys are not fields
_BACKBONES = ("backbone", "architecture")
# What torch itself computes, by the end of the field's name.
_BUILT_IN = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
_CODE_OF_CLASSES = (types.FunctionType, classmethod, staticmethod, dict, set, tuple)
_UPDATE = "Update transformers. Code that comes with a model is never run."


@dataclass(frozen=True)
class Screened:
    """A configuration without what reaches out of it.

    Attributes:
        written: what a new ``config.json`` says, too.
        used: what a model is built from: of implementations, those alone that are torch's own.
        dropped: the fields that ``written`` lacks.
    """

    written: dict[str, Any]
    used: dict[str, Any]
    dropped: tuple[str, ...]


def screened(config: Mapping[str, Any]) -> Screened:
    """Return a configuration without what would run or fetch code, at any depth.

    Args:
        config: what a ``config.json`` says.

    Raises:
        SourceError: the model is quantized, a part of it is named and not described, or a value is
            one that no model has.
    """
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("transformers")
    screen = _Screen()
    written, used = screen.fields(config, "")
    return Screened(written, used, tuple(screen.dropped))


class _Screen:
    """Walks a configuration.

    Attributes:
        dropped: the fields that are left out, by their places.
    """

    def __init__(self) -> None:
        self.dropped: list[str] = []

    def fields(
        self, config: Mapping[str, Any], place: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields of a configuration to write and those to use."""
        written: dict[str, Any] = {}
        used: dict[str, Any] = {}
        for key, value in config.items():
            name = f"{place}{key}"
            if key in _QUANTIZED and value is not None:
                _refuse(
                    "the model is quantized, says its config",
                    "Give the weights of the float model.",
                )
            if key in _REACHING or _is_code(key):
                if value:
                    self.dropped.append(name)
                else:
                    written[key] = value
            elif "_implementation" in key:
                if _is_plain(value):
                    written[key] = value
                else:
                    self.dropped.append(name)
                if _is_built_in(key, value):
                    used[key] = value
            elif key in _NAMES or key in _QUANTIZED:
                written[key] = value
            elif key in LABELS:
                written[key] = used[key] = value
            elif key == "use_pretrained_backbone":
                written[key], used[key] = value, False
            else:
                _check_field(key, value, name, config)
                written[key], used[key] = self._value(value, name)
        return written, used

    def _value(self, value: Any, place: str) -> tuple[Any, Any]:
        """Return a value to write and one to use."""
        if isinstance(value, dict):
            return self.fields(value, f"{place}.")
        if isinstance(value, list):
            pairs = [self._value(item, place) for item in value]
            return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
            # Classes take a float for what is no size. A list of that length would fill the memory.
            try:
                return value, float(value)
            except OverflowError:
                _refuse(f"{place} has {len(str(value))} digits", "Correct it.")
        return value, value


def _is_code(key: str) -> bool:
    """Return whether a field would take the place of what a configuration's class itself does."""
    transformers: Any = sys.modules.get("transformers")
    if key.startswith("__"):
        return True
    found = inspect.getattr_static(getattr(transformers, "PreTrainedConfig", None), key, None)
    return isinstance(found, _CODE_OF_CLASSES)


def _is_plain(value: object) -> bool:
    """Return whether an implementation is named by a word, and not by where to fetch it."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, bool) or bool(re.fullmatch(r"\w{1,40}", str(value)))


def _is_built_in(key: str, value: object) -> bool:
    """Return whether an implementation is torch's own."""
    if isinstance(value, dict):
        return all(_is_built_in(key, item) for item in value.values())
    return value in _BUILT_IN.get(key.lstrip("_"), ())


def _check_field(key: str, value: object, place: str, config: Mapping[str, Any]) -> None:
    """Refuse a field that names a part to be fetched, or a dtype that is none.

    Raises:
        SourceError: it does.
    """
    if key in ("dtype", "torch_dtype") and value is not None and not _is_dtype(value):
        told = shown(repr(value), 60)
        _refuse(f"{place} is {told}, which is no dtype", 'Write "float32", for example.')
    if key in _BACKBONES and isinstance(value, str):
        described = isinstance(config.get("backbone_config"), dict)
        if ":" in value or ("/" in value and key == "backbone" and not described):
            _refuse(
                f"{place} is {shown(repr(value), 60)}, which would have to be fetched",
                "Write its configuration to config.json: as backbone_config.",
            )
    if key == "model_args" and isinstance(value, dict) and FETCHING_ARGUMENTS & value.keys():
        fetching = min(FETCHING_ARGUMENTS & value.keys())
        _refuse(f"{place}.{fetching} is not the config's to give", "Leave it out.")


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(vars(torch).get(value), torch.dtype)


def _refuse(what: str, way_out: str, name: str = "") -> NoReturn:
    raise SourceError(f"{what}.", name=name, way_out=way_out)


def find_class(name: str) -> Callable[..., object]:
    """Return what builds a class of transformers from the fields of a ``config.json``.

    Args:
        name: of a subclass of ``PreTrainedModel``, such as ``BertForMaskedLM``.

    Returns:
        A function of ``config``, which raises :class:`SourceError` for a model that is quantized
        or of an unknown type.

    Raises:
        SourceError: transformers is not installed, or has no such class.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise SourceError(
            f"{shown(name, 60)} is a class of transformers, which is not installed.",
            name=name,
            way_out="pip install 'fxgrow[transformers]'",
        ) from error
    library = f"transformers {transformers.__version__}"
    found: object = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or not inspect.isclass(getattr(found, "config_class", None)):
        _refuse(f"{library} has no model class {shown(repr(name), 60)}", _UPDATE, name)

    cls: Any = found

    def create(config: Mapping[str, object]) -> object:
        used = screened(config).used
        kind = used.get("model_type")
        if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
            _refuse(f"{library} knows no model type {shown(repr(kind), 60)}", _UPDATE, name)
        return cls(_configured(cls.config_class, used))

    return create


def _configured(kind: Any, used: Mapping[str, object]) -> object:
    """Return a configuration object; ``from_dict`` writes all of it for a log that nobody reads."""
    base: Any = sys.modules["transformers"].PreTrainedConfig
    is_plain = getattr(kind.from_dict, "__func__", None) is base.from_dict.__func__
    return kind(**used) if is_plain else kind.from_dict(used)


class _Offline:
    """While it is entered, by any thread, nothing is fetched from the Hugging Face Hub."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._patches = ExitStack()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._patch("huggingface_hub.constants", "HF_HUB_OFFLINE", True)
                self._patch("transformers.integrations.hub_kernels", "get_kernel", _no_kernel)
                self._patch("transformers.integrations.hub_kernels", "get_kernel_hub", _no_kernel)

    def _patch(self, module: str, name: str, value: object) -> None:
        """Change a module, if it is there: libraries are optional, and have changed."""
        found = sys.modules.get(module)
        if found is not None and hasattr(found, name):
            self._patches.enter_context(mock.patch.object(found, name, value))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._patches.close()


_OFFLINE = _Offline()


def _no_kernel(*_: object, **__: object) -> NoReturn:
    """Stand in for what fetches a kernel; transformers then takes its own code.

    Raises:
        FileNotFoundError: always.
    """
    raise FileNotFoundError("kernels are not fetched")


@contextlib.contextmanager
def closed(library: str) -> Iterator[None]:
    """Keep a library from fetching anything, and from talking, while it builds or loads models."""
    with ExitStack() as stack:
        if library in ("timm", "transformers"):
            stack.enter_context(_OFFLINE)
        if library == "transformers":
            stack.enter_context(quiet())
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: what matters of what it says, fxgrow says."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # an error is raised as well
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
