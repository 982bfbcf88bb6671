"""Recognise a torchvision architecture from the names and shapes of its weights.

Building every architecture to compare takes ten seconds, so ``architecture_index.json`` (written
by ``python -m fxgrow.modules.recognition`` when a new torchvision brings new models) holds a
*sketch* of each: the smallest hashes of its set of features, a feature being a tensor's name, or
its name with its shape. Two sketches estimate how much two networks have in common (bottom-k
MinHash: among the k smallest hashes of both together, the share that is in both). That gives only
the *order* in which candidates are built: an answer is always a network that was built and found
to have every name and every shape, and a torchvision newer than the index is served by building
what the index does not know.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

from fxgrow.errors import FxgrowWarning, SourceError, listed, shown
from fxgrow.modules.architectures import Architecture, torchvision_names

Shape = tuple[int, ...]

INDEX_FILE = "architecture_index.json"
_SKETCH_SIZE = 32
_LIKELY = 0.25  # a network that differs only in its head shares far more than this
_MAX_BUILT = 6
# Builders' default numbers of classes: heads have a multiple of them as outputs.
_DEFAULT_CLASSES = (1000, 91, 21, 400, 2)
_DEFAULT_KEYPOINTS = 17
_DEFAULT_IMAGE_SIZE = 224
_NAME_IT = (
    "Name the architecture with --arch (and --arch-arg): torchvision:NAME, timm:NAME, or "
    "package.module:callable for a class or function of your own."
)
_SHOWN = 3
_HEADS = 16  # more tensors of another shape than heads have are no matter of arguments


@dataclass(frozen=True)
class _Differences:
    """What separates the weights of a file from those of an architecture."""

    missing: dict[str, Shape]  # the architecture has them, the file does not
    unexpected: dict[str, Shape]  # the other way round
    mismatched: dict[str, tuple[Shape, Shape]]  # name -> (the file's shape, the architecture's)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    def __str__(self) -> str:
        parts = [
            _list_some("missing", [f"{n} {_text(s)}" for n, s in self.missing.items()]),
            _list_some("unexpected", [f"{n} {_text(s)}" for n, s in self.unexpected.items()]),
            _list_some(
                "of another shape",
                [f"{n} {_text(s)} for {_text(t)}" for n, (s, t) in self.mismatched.items()],
            ),
        ]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class _Fit:
    """An architecture with the arguments that bring it closest to the wanted shapes."""

    architecture: Architecture
    differences: _Differences
    description: str  # the module's repr, which shows settings that leave no trace in shapes


def recognise(shapes: Mapping[str, Shape], hint: str = "") -> Architecture:
    """Find the torchvision architecture whose state_dict has these names and shapes.

    The numbers of classes and keypoints, a vision transformer's image size and the presence of
    auxiliary heads are found too, and are arguments of the result where they are not the builder's
    defaults. What leaves no trace in shapes (dropout, ``transform_input``) stays at its default.
    ``num_batches_tracked`` is not asked for: old checkpoints lack it. Quantized architectures are
    never chosen.

    Args:
        shapes: name -> shape of every tensor of the state_dict.
        hint: a text that may hold the architecture's name, such as the file's. It decides between
            architectures that fit equally well, and nothing else.

    Returns:
        An architecture that was built and has exactly these names and shapes.

    Raises:
        SourceError: none fits; the text names the nearest one and the first differences.

    Warns:
        FxgrowWarning: several fit exactly, compute differently, and the hint names none of them.
    """
    wanted = _comparable({name: tuple(shape) for name, shape in shapes.items()})
    nearest: _Fit | None = None
    for name in _candidates(wanted, hint):
        fit = _fit(Architecture(f"torchvision:{name}"), wanted)
        if not fit.differences:
            return _choose([fit, *_twins(name, wanted)], hint)
        if nearest is None or len(fit.differences) < len(nearest.differences):
            nearest = fit
    if nearest is None or len(nearest.differences) > len(wanted) / 2:
        foreign = [f"{shown(name, 80)} {_text(wanted[name])}" for name in _foreign(wanted)]
        raise SourceError(
            "no torchvision architecture has these weights, and none is near: "
            f"{_list_some('among them are', foreign) or 'they are none'}.",
            way_out=_NAME_IT,
        )
    raise SourceError(
        f"no torchvision architecture has these weights. The nearest is {nearest.architecture}: "
        f"{nearest.differences}.",
        name=nearest.architecture.name,
        way_out=_NAME_IT,
    )


def is_likely(shapes: Mapping[str, Shape]) -> bool:
    """Return whether any torchvision architecture has much in common with names and shapes."""
    mine = frozenset(sketch(_comparable(shapes)))
    known = _index()
    return any(_similarity(mine, one) >= _LIKELY for one in known.values()) or any(
        name not in known for name in torchvision_names()
    )


def adjusted(architecture: Architecture, shapes: Mapping[str, Shape]) -> Architecture | None:
    """Return an architecture with those arguments under which it has the given shapes, or None.

    Args:
        architecture: the arguments that it has are kept.
        shapes: name -> shape of every tensor of the state_dict; there may be more.
    """
    wanted = _comparable({name: tuple(shape) for name, shape in shapes.items()})
    fit = _fit(architecture, wanted)
    return None if fit.differences.missing or fit.differences.mismatched else fit.architecture


def sketch(shapes: Mapping[str, Shape]) -> list[str]:
    """Return the smallest hashes of the names and the (name, shape) pairs, sorted.

    Complexity: one hash for each name and each pair.
    """
    wanted = _comparable(shapes)
    features = [*wanted, *(f"{name} {_text(shape)}" for name, shape in wanted.items())]
    hashes = {hashlib.blake2b(text.encode(), digest_size=4).hexdigest() for text in features}
    return sorted(hashes)[:_SKETCH_SIZE]


def build_index() -> dict[str, str]:
    """Build every architecture of the installed torchvision and return name -> joined sketch."""
    built = {name: Architecture(f"torchvision:{name}") for name in torchvision_names()}
    return {name: " ".join(sketch(_shapes_of(one)[0])) for name, one in built.items()}


@lru_cache(maxsize=1)
def _index() -> dict[str, frozenset[str]]:
    text = resources.files("fxgrow.modules").joinpath(INDEX_FILE).read_text(encoding="utf-8")
    return {name: frozenset(hashes.split()) for name, hashes in json.loads(text).items()}


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Estimate the Jaccard similarity of two feature sets from their sketches."""
    smallest = sorted(one | other)[:_SKETCH_SIZE]
    return sum(item in one and item in other for item in smallest) / max(1, len(smallest))


def _candidates(wanted: Mapping[str, Shape], hint: str) -> Iterator[str]:
    """Yield names to try: likely ones, then those the index lacks."""
    mine, index, names = frozenset(sketch(wanted)), _index(), torchvision_names()
    score = {name: _similarity(mine, index[name]) for name in names if name in index}
    hinted = _hinted(names, hint)
    ranked = sorted(score, key=lambda name: (-score[name], name != hinted, names.index(name)))
    likely = [name for name in ranked if score[name] >= _LIKELY][:_MAX_BUILT]
    yield from likely
    yield from (name for name in names if name not in index)


def _foreign(wanted: Mapping[str, Shape]) -> list[str]:
    """Return the names that the architecture with most in common lacks; all if none has any."""
    mine, index = frozenset(sketch(wanted)), _index()
    known = [name for name in torchvision_names() if name in index]
    best = max(known, key=lambda name: _similarity(mine, index[name]), default=None)
    if best is None or not _similarity(mine, index[best]):
        return [*wanted]
    built, _ = _shapes_of(Architecture(f"torchvision:{best}"))
    return [name for name in wanted if name not in built] or [*wanted]


def _twins(name: str, wanted: Mapping[str, Shape]) -> list[_Fit]:
    """Return the exact fits among the other architectures with the same sketch."""
    index = _index()
    same = [n for n in torchvision_names() if n != name and index.get(n) == index.get(name, ())]
    fits = (_fit(Architecture(f"torchvision:{n}"), wanted) for n in same)
    return [fit for fit in fits if not fit.differences]


def _choose(fits: list[_Fit], hint: str) -> Architecture:
    """Choose by the hint, else the first; say so where the others compute something else."""
    by_name = {fit.architecture.name.partition(":")[2]: fit for fit in fits}
    hinted = _hinted(list(by_name), hint)
    if hinted:
        return by_name[hinted].architecture
    first = fits[0]
    others = [fit.architecture for fit in fits[1:] if fit.description != first.description]
    if others:
        listed = ", ".join(str(other) for other in others)
        warnings.warn(
            f"the weights fit {first.architecture} and {listed}, which compute differently; "
            f"{first.architecture} was chosen. Name the architecture with --arch.",
            FxgrowWarning,
            stacklevel=3,
        )
    return first.architecture


def _hinted(names: list[str], hint: str) -> str:
    """Return the longest name that occurs in ``hint``, or ""."""
    return max((name for name in names if name in hint.lower()), key=len, default="")


def _fit(architecture: Architecture, wanted: Mapping[str, Shape]) -> _Fit:
    """Build an architecture and adjust its arguments as long as that brings it nearer."""
    given = architecture.arguments.keys()
    best = _attempt(architecture, wanted)
    improved = True
    while best.differences and improved:
        improved = False
        for proposal in _propose(best.differences, architecture):
            if not given.isdisjoint(proposal):
                continue
            arguments = {**best.architecture.arguments, **proposal}
            try:
                attempt = _attempt(replace(architecture, arguments=arguments), wanted)
            except SourceError:  # a builder without that argument
                continue
            if len(attempt.differences) < len(best.differences):
                best, improved = attempt, True
                break
    return best


def _attempt(architecture: Architecture, wanted: Mapping[str, Shape]) -> _Fit:
    shapes, description = _shapes_of(architecture)
    built = _comparable(shapes)
    differences = _Differences(
        missing={n: s for n, s in built.items() if n not in wanted},
        unexpected={n: s for n, s in wanted.items() if n not in built},
        mismatched={n: (wanted[n], s) for n, s in built.items() if n in wanted and wanted[n] != s},
    )
    return _Fit(architecture, differences, description)


def _shapes_of(architecture: Architecture) -> tuple[dict[str, Shape], str]:
    module = architecture.build()
    return {n: tuple(t.shape) for n, t in module.state_dict().items()}, repr(module)


def _comparable(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {n: s for n, s in shapes.items() if not n.endswith("num_batches_tracked")}


def _propose(differences: _Differences, architecture: Architecture) -> Iterator[dict[str, object]]:
    """Yield arguments that may explain differences, most telling first."""
    if any(name.lower().startswith("aux") for name in differences.missing):
        yield {"aux_logits": False}
    if any(name.startswith("aux_classifier.") for name in differences.unexpected):
        yield {"aux_loss": True}
    seen: list[dict[str, object]] = []
    few = list(differences.mismatched.values()) if len(differences.mismatched) <= _HEADS else []
    for have, expected in few[:_SHOWN]:
        dims = [d for d, (a, b) in enumerate(zip(have, expected, strict=False)) if a != b]
        if len(have) != len(expected) or len(dims) != 1:
            continue
        sizes = (have[dims[0]], expected[dims[0]])
        defaults = architecture.defaults.items()
        explained = [*_explain(*sizes)]
        explained += [{name: sizes[0]} for name, default in defaults if default == sizes[1]]
        for proposal in explained:
            if proposal not in seen:
                seen.append(proposal)
                yield proposal


def _explain(have: int, expected: int) -> Iterator[dict[str, object]]:
    """Yield arguments that may make a dim of size ``expected`` by default one of size ``have``."""
    if expected == _DEFAULT_KEYPOINTS:
        yield {"num_keypoints": have}
    for classes in _DEFAULT_CLASSES:  # a head has classes x (boxes, anchors, 1) outputs
        if expected % classes == 0 and have % (expected // classes) == 0:
            yield {"num_classes": have // (expected // classes)}
    side, default_side = math.isqrt(max(have - 1, 0)), math.isqrt(expected - 1)
    if side**2 == have - 1 and default_side**2 == expected - 1 and default_side:
        pixels = _DEFAULT_IMAGE_SIZE * side // default_side  # a token for each patch
        yield {"image_size": pixels}
        yield {"img_size": pixels}


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _list_some(what: str, items: list[str]) -> str:
    if not items:
        return ""
    return f"{what} {listed(items, _SHOWN)}"


if __name__ == "__main__":
    _target = Path(__file__).with_name(INDEX_FILE)
    _target.write_text(json.dumps(build_index(), indent=0) + "\n", encoding="utf-8")
