"""Messages name what their reader can give: options on the command line, arguments in Python.

They are written with options (``--where all``), which are told from prose by their form. Unless the
command line is what is running, :func:`worded` has them name the arguments instead
(``where="all"``), wherever a message is raised, warned of or printed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

_in_options: ContextVar[bool] = ContextVar("in_options", default=False)

_WORD = r"[\w.*+:/-]*[\w*]"
_BY_LAYER = rf"{_WORD}=[\w:.+]*\w"
# What stands behind an option, where that is its value and not the sentence that goes on.
_VALUES = {
    "arch": r"[\w.]+:\w+",
    "arch-arg": r"\w+=\w+",
    "exclude": r"'[^']*'",
    "include": r"'[^']*'",
    "input-shape": r"\d+(?:x\d+)*(?::\w+)?",
    "pairing": rf"'{_BY_LAYER}'|[a-z_]+(?<!_)\b",
    "preset": r"\w+",
    "rescaling": rf"'{_BY_LAYER}'|(?!or\b|and\b|there\b)[a-z]\w*",
    "where": r"(?:all|hidden|stream)\b",
    "width": rf"'{_BY_LAYER}'|\+?\d[\d.]*x?",
}
_NAMES = {"arch-arg": "arch_arguments", "input-shape": "example_inputs"}  # others with _ for -
_FLAGS = {
    "compensate": "compensate=True",
    "force": "force=True",
    "no-verify": "verify=False",
    "strict": "strict=True",
    "trust-pickle": "trust_pickle=True",
    "untie": "untie=True",
}
_DATA = {"tiny": "Tiny", "gradmax": "GradMax"}

_COMMAND = r"`fxgrow (?P<command>\w+)`"  # the name of one alone
_CODE = r"`[^`]*`"  # which stays as it is
_FROM_DATA = r"--init (?P<init>tiny|gradmax) --data \w+\.pt"
_OUT = r"(?<![\w-])-o\b(?: (?P<out>\w+\.\w+))?"
_GIVEN = "|".join(
    rf"--{name} (?:{value})(?: (?:\(and \d+ more\) )?--{name} (?:{value}))*"
    for name, value in _VALUES.items()
)
_BARE = "|".join((*_FLAGS, *sorted(_VALUES, key=len, reverse=True), "module", "init", "data"))
_PATTERN = re.compile(
    rf"{_COMMAND}|{_CODE}|{_FROM_DATA}|{_OUT}|(?P<given>{_GIVEN})|--(?P<bare>{_BARE})(?![\w-])"
)


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """Have messages name options, as the command line does."""
    token = _in_options.set(True)
    try:
        yield
    finally:
        _in_options.reset(token)


def worded(text: str) -> str:
    """Return a message that names options, for whoever reads it: in Python, with arguments.

    Example:
        >>> worded("Use --rescaling none, or --compensate.")
        'Use rescaling="none", or compensate=True.'
        >>> worded("Give --input-shape 1x3x8x8 (or leave it out: --exclude 'layer1.*').")
        'Give example_inputs=torch.randn(1, 3, 8, 8) (or leave it out: exclude="layer1.*").'
        >>> worded("--rescaling 'fc=none' --rescaling '*=default_vt'")
        'rescaling={"fc": "none", "*": "default_vt"}'
        >>> with in_options():
        ...     worded("Use --where all.")
        'Use --where all.'
    """
    return text if _in_options.get() else _PATTERN.sub(_argument, text)


def _argument(found: re.Match[str]) -> str:
    """Return the argument that stands for an option."""
    if command := found["command"]:
        return f"`fxgrow.{command}`"
    if init := found["init"]:
        return f"init=fxgrow.{_DATA[init]}(loss_fn, batches)"
    if given := found["given"]:
        return _given(given)
    if name := found["bare"]:
        return _FLAGS.get(name) or _name(name)
    if found[0].startswith("-o"):
        return f'out="{found["out"]}"' if found["out"] else "out"
    return found[0]


def _given(text: str) -> str:
    """Return an argument and its value, from an option that is given once or more."""
    option = text.removeprefix("--").partition(" ")[0]
    values = re.findall(rf"--{option} ({_VALUES[option]})", text)
    more = "".join(re.findall(r" \(and \d+ more\)", text))
    plain = [value.strip("'") for value in values]
    return f"{_name(option)}={_value(option, plain)}{more}"


def _value(option: str, values: list[str]) -> str:
    """Return the values of an option as Python has them."""
    if option == "input-shape":
        shape, _, dtype = values[0].partition(":")
        sizes = ", ".join(shape.split("x"))
        return f"torch.zeros({sizes}, dtype=torch.{dtype})" if dtype else f"torch.randn({sizes})"
    if option == "arch-arg" or "=" in values[0]:
        pairs = (value.rpartition("=") for value in values)
        quote = (lambda value: value) if option == "arch-arg" else '"{}"'.format
        return "{" + ", ".join(f'"{key}": {quote(value)}' for key, _, value in pairs) + "}"
    return f'"{values[0]}"' if len(values) == 1 else repr(values)


def _name(option: str) -> str:
    """Return what an option is called in Python."""
    return _NAMES.get(option, option.replace("-", "_"))
