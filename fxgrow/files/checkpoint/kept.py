"""Objects of a pickle that are passed on without being made: what they are called, and their parts.

Training checkpoints hold settings and states of other libraries: paths, dates, configurations. None
of it is needed to grow weights, so its classes are neither imported nor called. A :class:`Kept`
remembers how a pickle makes an object, and :func:`save_keeping` writes the same again. Only names
on the list are kept, all of them of classes that hold data: what a file asks for beyond that is
not handed on under fxgrow's name.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

_NOTHING = object()
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
# What a pickle calls with plain arguments to make a value.
_CALLED = frozenset(
    {
        *(f"{home}.{name}" for home in ("pathlib", "pathlib._local") for name in _PATHS),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(
            f"numpy.random._pickle.__{name}_ctor"
            for name in ("randomstate", "generator", "bit_generator")
        ),
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
        "builtins.range",
        "builtins.slice",
        "collections.deque",
        "decimal.Decimal",
        "fractions.Fraction",
        "types.SimpleNamespace",
        "uuid.UUID",
    }
)
# Classes of which a pickle makes empty instances, which it then fills.
_MADE = frozenset(
    {
        "addict.addict.Dict",
        "box.box.Box",
        "detectron2.config.config.CfgNode",
        "easydict.EasyDict",
        "fvcore.common.config.CfgNode",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "ml_collections.config_dict.config_dict.ConfigDict",
        "ml_collections.config_dict.config_dict.FrozenConfigDict",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.ConfigDict",
        "munch.Munch",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "torch.amp.grad_scaler.GradScaler",
        "torch.cuda.amp.grad_scaler.GradScaler",
        "uuid.UUID",
        "yacs.config.CfgNode",
    }
)
_MADE_IN = ("omegaconf.", "torchvision.transforms.", "sklearn.preprocessing.")
# Names that stand for themselves.
_VALUES = frozenset(
    {
        *(
            f"builtins.{name}"
            for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")
        ),
        "numpy.ndarray",
        "typing.Any",
    }
)
_VALUES_IN = ("numpy.random.", "torch.optim.")


class KeptError(pickle.PicklingError):
    """An object that only :func:`save_keeping` writes."""


def _refuse(self: object, protocol: object = None) -> NoReturn:
    del self, protocol
    raise KeptError("written by save_keeping alone")


@dataclass(frozen=True)
class Name:
    """What a pickle names, and is not looked up.

    Attributes:
        module: where it would be found.
        name: what it is called there.
    """

    module: str
    name: str

    __reduce_ex__ = _refuse

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def is_called(self) -> bool:
        """Whether a pickle may make an object by calling it."""
        return str(self) in _CALLED

    @property
    def is_made(self) -> bool:
        """Whether a pickle may make empty instances of it."""
        return str(self) in _MADE or str(self).startswith(_MADE_IN)


@dataclass(eq=False)
class Kept:
    """An object that a pickle makes, by what the pickle does for it.

    Attributes:
        name: of its class, or of what is called.
        called: whether that is called, or an empty instance is made.
        arguments: what it is given.
        items: what is appended to it.
        entries: what is set in it, by keys.
        state: what its attributes are set from.
    """

    name: Name
    called: bool
    arguments: tuple[object, ...]
    items: list[object] = field(default_factory=list)
    entries: dict[object, object] = field(default_factory=dict)
    state: object = _NOTHING

    __reduce_ex__ = _refuse

    def extend(self, items: list[object]) -> None:
        """Append to it."""
        self.items.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.entries[key] = value

    def __deepcopy__(self, memo: object) -> Kept:
        return self  # nobody changes it

    @property
    def has_state(self) -> bool:
        """Whether attributes are set."""
        return self.state is not _NOTHING

    @property
    def parts(self) -> list[object]:
        """What it holds."""
        held: list[object] = [self.arguments, self.items, self.entries]
        return [*held, self.state] if self.has_state else held


def kept_name(module: str, name: str) -> Name | None:
    """Return a name that is kept, or None if it is not on the list."""
    found = Name(module, name)
    is_value = str(found) in _VALUES or module.startswith(_VALUES_IN)
    listed = found.is_called or found.is_made or is_value
    plain = all(map(str.isidentifier, (*module.split("."), name)))  # no attribute of anything
    return found if listed and plain else None


_PythonPickler: Any = vars(pickle)["_Pickler"]  # the one in C cannot be extended in this way


class _Pickler(_PythonPickler):  # type: ignore[misc]
    """Writes what any pickler does, and kept objects as they were."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write an object."""
        if type(obj) not in (Name, Kept):
            super().save(obj, save_persistent_id)
        elif id(obj) in self.memo:
            self.write(self.get(self.memo[id(obj)][0]))
        elif type(obj) is Name:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)
        else:
            self._save_kept(obj)

    def _save_kept(self, kept: Kept) -> None:
        self.save(kept.name)
        self.save(kept.arguments)
        self.write(pickle.REDUCE if kept.called else pickle.NEWOBJ)
        self.memoize(kept)
        for parts, code in (
            (kept.items, pickle.APPENDS),
            ([part for pair in kept.entries.items() for part in pair], pickle.SETITEMS),
        ):
            if parts:
                self.write(pickle.MARK)
                for part in parts:
                    self.save(part)
                self.write(code)
        if kept.has_state:
            self.save(kept.state)
            self.write(pickle.BUILD)


def _dump(obj: object, file: Any, protocol: int | None = None) -> None:
    _Pickler(file, protocol).dump(obj)


def save_keeping(save: Callable[..., object]) -> None:
    """Call a function that pickles, with a module to pickle by that writes kept objects.

    Args:
        save: given ``pickle_module``, as ``torch.save`` is.
    """
    save(pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=_Pickler, dump=_dump))
