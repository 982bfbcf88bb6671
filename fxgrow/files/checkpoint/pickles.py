"""A pickle machine that builds plain data and calls nothing but what it is given.

A pickle is a program. Of its opcodes, those that build containers, numbers and texts are carried
out here as Python's own unpickler does; those that touch the world go through a
:class:`Vocabulary`:

- a name (GLOBAL, STACK_GLOBAL) becomes what the vocabulary makes of it, or an error;
- REDUCE calls a :class:`Call`, and nothing else; each checks its arguments;
- NEWOBJ makes an empty instance of a class that the vocabulary knows, without its constructor;
- of a :class:`~fxgrow.files.checkpoint.kept.Name`, both only remember that they were asked for;
- BUILD, APPENDS, SETITEMS and ADDITEMS change objects that this pickle made, and no others;
- everything else (INST, OBJ, EXT, NEWOBJ of a class with arguments) is an error.

Keys of dicts and members of sets are plain, so that hashing them runs nothing and takes no time.
What is built has a bounded number of objects; :mod:`fxgrow.files.checkpoint.extent` says whether
whoever walks through it comes to an end.

Source: Python's ``pickletools``, which documents every opcode.
"""

from __future__ import annotations

import pickle
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fxgrow.files.checkpoint.kept import Kept, Name

MOST_STEPS = 3_000_000  # opcodes; a torchvision module with all its settings has 50,000
_NEWEST = 5
SCALARS = frozenset((bool, int, float, complex, str, bytes, type(None)))
_SIZED = (str, bytes, bytearray, list, tuple, dict)
_SMALL = 1 << 16
_LONGEST_NUMBER = 64  # bytes; states of random generators have 16
_MAPPINGS: frozenset[type] = frozenset((dict, OrderedDict, defaultdict, Counter, Kept))
_LISTS: frozenset[type] = frozenset((list, Kept))
_SETS: frozenset[type] = frozenset((set,))


class PickleError(pickle.UnpicklingError):
    """A pickle that asks for more than plain data."""


class DamagedError(PickleError):
    """A pickle that is none, or not whole."""


class UnknownNameError(PickleError):
    """A pickle that names what is not known to be harmless.

    Attributes:
        name: the name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for {name}")
        self.name = name


@dataclass(frozen=True)
class Call:
    """A function that a pickle may call.

    Attributes:
        name: what the pickle calls it.
        function: what is called instead: it takes the arguments, of any type, checks them, and
            raises whatever it likes.
    """

    name: str
    function: Callable[..., object]


class Vocabulary(Protocol):
    """What a pickle may name."""

    def find(self, module: str, name: str) -> object:
        """Return what a name stands for: a :class:`Call` or a value."""

    def is_class(self, value: object) -> bool:
        """Return whether empty instances of a class may be made."""

    def build(self, instance: Any, state: object) -> None:
        """Give an instance that the pickle made its attributes."""

    def load_persistent(self, identity: object) -> object:
        """Return what stands outside of the pickle: a tensor's memory."""


class Machine:
    """Carries out one pickle.

    Args:
        data: the bytes; there may be more behind the pickle.
        vocabulary: what it may name.
        start: where the pickle begins.

    Attributes:
        position: after :meth:`load`, where the pickle ended.
    """

    def __init__(self, data: bytes, vocabulary: Vocabulary, start: int = 0) -> None:
        self.position = start
        self._data = data
        self._words = vocabulary
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._made: dict[int, Any] = {}  # by id; kept, so that ids are not used again
        self._given = 0  # entries of what was given to functions, which may copy it

    def load(self) -> object:
        """Return what the pickle builds.

        Raises:
            PickleError: it asks for more than plain data, or is no pickle.
        """
        for _ in range(MOST_STEPS):
            code = self._take(1)[0]
            if code == _STOP:
                if self._marks or len(self._stack) != 1:
                    raise DamagedError("it ends in the middle of something")
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise PickleError(f"an opcode {bytes([code])!r} that builds no plain data")
            try:
                step(self)
            except IndexError as error:
                raise DamagedError("it takes more than it has put there") from error
        raise PickleError(f"it has more than {MOST_STEPS:,} steps")

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise DamagedError("it ends too early")
        found = self._data[self.position : end]
        self.position = end
        return found

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position)
        if end < 0:
            raise DamagedError("it ends too early")
        line = self._data[self.position : end]
        self.position = end + 1
        return line.decode("utf-8")

    def _text(self, form: str) -> None:
        text = str(self._take(self._number(form)), "utf-8", "surrogatepass")
        self._stack.append(text)

    def _old_text(self, form: str) -> None:
        """Push a text of Python 2, which are bytes; torch too takes them for UTF-8."""
        length = self._number(form)
        if length < 0:
            raise DamagedError("a text of negative length")
        data = self._take(length)
        try:
            self._stack.append(str(data, "utf-8"))
        except UnicodeDecodeError:  # the bytes of an array, which Latin-1 gives back one by one
            self._stack.append(str(data, "latin-1"))

    def _bytes(self, form: str) -> None:
        self._stack.append(self._take(self._number(form)))

    def _whole(self, form: str) -> None:
        data = self._take(self._number(form))
        if len(data) > _LONGEST_NUMBER:
            raise PickleError(f"a whole number of {len(data)} bytes")
        self._stack.append(int.from_bytes(data, "little", signed=True))

    # ── building ─────────────────────────────────────────────────────────────────────────────

    def _push(self, item: Any) -> None:
        self._stack.append(item)

    def _push_made(self, item: Any) -> None:
        self._made[id(item)] = item
        self._stack.append(item)

    def _own(self, item: Any, kinds: frozenset[type]) -> Any:
        """Return an object if this pickle made it and it is of one of these very types."""
        if id(item) not in self._made or type(item) not in kinds:
            raise PickleError(f"it changes a {type(item).__name__} that is not its own")
        return item

    def _since_mark(self) -> list[Any]:
        found = self._stack
        self._stack = self._marks.pop()
        return found

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:]) if count else ()
        if len(items) < count:
            raise DamagedError("it takes more than it has put there")
        del self._stack[len(self._stack) - count :]
        self._stack.append(items)

    def _append(self, items: list[Any]) -> None:
        self._own(self._stack[-1], _LISTS).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._own(self._stack[-1], _MAPPINGS)
        if len(items) % 2:
            raise DamagedError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[plain_key(key)] = value

    def _add_items(self, items: list[Any]) -> None:
        self._own(self._stack[-1], _SETS).update(map(plain_key, items))

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise DamagedError("it asks for something that it has not kept")
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # ── names and what is done with them ─────────────────────────────────────────────────────

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._stack.append(self._words.find(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("a name that is no text")
        self._stack.append(self._words.find(module, name))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if isinstance(function, Name) and function.is_called and type(arguments) is tuple:
            self._push_made(Kept(function, called=True, arguments=arguments))
            return
        if not isinstance(function, Call):
            raise PickleError(f"it calls {_told(function)}, which is no function that it may call")
        if type(arguments) is not tuple:
            raise PickleError("arguments that are no tuple")
        self._given += sum(len(item) for item in arguments if isinstance(item, _SIZED))
        if self._given > 4 * len(self._data) + _SMALL:
            raise PickleError("it copies the same data again and again")
        try:
            made = function.function(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PickleError(f"{function.name} of arguments that it does not take") from error
        self._push_made(made)

    def _new(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if isinstance(kind, Name) and kind.is_made and type(arguments) is tuple:
            self._push_made(Kept(kind, called=False, arguments=arguments))
            return
        if arguments != () or not self._words.is_class(kind):
            raise PickleError(f"it makes {_told(kind)} with arguments, or of no known class")
        self._push_made(object.__new__(kind))

    def _build(self) -> None:
        state = self._stack.pop()
        instance = self._stack[-1]
        if id(instance) not in self._made:
            raise PickleError(f"it changes {_told(instance)}, which it did not make")
        self._words.build(instance, state)

    def _persistent(self) -> None:
        self._stack.append(self._words.load_persistent(self._stack.pop()))

    def _protocol(self) -> None:
        if self._take(1)[0] > _NEWEST:
            raise PickleError("a pickle protocol that is newer than 5")


def plain_key(key: Any) -> Any:
    """Return a key of a dict or set if it is plain, or a flat tuple of plain ones.

    Raises:
        PickleError: it is not.
    """
    items = key if type(key) is tuple else (key,)
    if len(items) > 16 or not all(type(item) in SCALARS for item in items):
        raise PickleError("a key that is no plain number or text")
    return key


def _told(value: object) -> str:
    """Return what a value is called in messages."""
    if isinstance(value, (Call, Name)):
        return value.name if isinstance(value, Call) else str(value)
    return value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"


_STOP = ord(".")
# One line for each opcode; its name in pickletools stands behind.
_STEPS: dict[int, Callable[[Machine], object]] = {
    ord(code): step
    for code, step in {
        "\x80": Machine._protocol,  # PROTO
        "\x95": lambda m: m._take(8),  # FRAME
        "N": lambda m: m._stack.append(None),  # NONE
        "\x88": lambda m: m._stack.append(True),  # NEWTRUE
        "\x89": lambda m: m._stack.append(False),  # NEWFALSE
        "J": lambda m: m._stack.append(m._number("<i")),  # BININT
        "K": lambda m: m._stack.append(m._number("<B")),  # BININT1
        "M": lambda m: m._stack.append(m._number("<H")),  # BININT2
        "\x8a": lambda m: m._whole("<B"),  # LONG1
        "\x8b": lambda m: m._whole("<I"),  # LONG4
        "G": lambda m: m._stack.append(struct.unpack(">d", m._take(8))[0]),  # BINFLOAT
        "X": lambda m: m._text("<I"),  # BINUNICODE
        "\x8c": lambda m: m._text("<B"),  # SHORT_BINUNICODE
        "\x8d": lambda m: m._text("<Q"),  # BINUNICODE8
        "U": lambda m: m._old_text("<B"),  # SHORT_BINSTRING
        "T": lambda m: m._old_text("<i"),  # BINSTRING
        "B": lambda m: m._bytes("<I"),  # BINBYTES
        "C": lambda m: m._bytes("<B"),  # SHORT_BINBYTES
        "\x8e": lambda m: m._bytes("<Q"),  # BINBYTES8
        "\x96": lambda m: m._stack.append(bytearray(m._take(m._number("<Q")))),  # BYTEARRAY8
        "]": lambda m: m._push_made([]),  # EMPTY_LIST
        "}": lambda m: m._push_made({}),  # EMPTY_DICT
        "\x8f": lambda m: m._push_made(set()),  # EMPTY_SET
        ")": lambda m: m._stack.append(()),  # EMPTY_TUPLE
        "\x85": lambda m: m._tuple(1),  # TUPLE1
        "\x86": lambda m: m._tuple(2),  # TUPLE2
        "\x87": lambda m: m._tuple(3),  # TUPLE3
        "(": Machine._mark,  # MARK
        "t": lambda m: m._push(tuple(m._since_mark())),  # TUPLE
        "l": lambda m: m._push_made(list(m._since_mark())),  # LIST
        "0": lambda m: m._stack.pop(),  # POP
        "1": lambda m: m._since_mark(),  # POP_MARK
        "2": lambda m: m._stack.append(m._stack[-1]),  # DUP
        "a": lambda m: m._append([m._stack.pop()]),  # APPEND
        "e": lambda m: m._append(m._since_mark()),  # APPENDS
        "s": lambda m: m._set_items([m._stack.pop(-2), m._stack.pop()]),  # SETITEM
        "u": lambda m: m._set_items(m._since_mark()),  # SETITEMS
        "\x91": lambda m: m._push(frozenset(map(plain_key, m._since_mark()))),  # FROZENSET
        "\x90": lambda m: m._add_items(m._since_mark()),  # ADDITEMS
        "h": lambda m: m._get(m._number("<B")),  # BINGET
        "j": lambda m: m._get(m._number("<I")),  # LONG_BINGET
        "q": lambda m: m._put(m._number("<B")),  # BINPUT
        "r": lambda m: m._put(m._number("<I")),  # LONG_BINPUT
        "\x94": lambda m: m._put(len(m._memo)),  # MEMOIZE
        "c": Machine._global,  # GLOBAL
        "\x93": Machine._stack_global,  # STACK_GLOBAL
        "R": Machine._reduce,  # REDUCE
        "\x81": Machine._new,  # NEWOBJ
        "b": Machine._build,  # BUILD
        "Q": Machine._persistent,  # BINPERSID
    }.items()
}
