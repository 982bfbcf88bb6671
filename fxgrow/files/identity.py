"""Which network the weights in a file belong to, and which of the weights are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fxgrow.errors import PlanError, SourceError
from fxgrow.files.checkpoint import Source
from fxgrow.files.checkpoint.location import Location
from fxgrow.files.checkpoint.matching import Shape, Wanted, is_average, part_of, prefixes
from fxgrow.files.optimizer.order import assigned
from fxgrow.files.records import rebuild
from fxgrow.modules.architectures import Architecture, parse_architecture
from fxgrow.modules.recognition import adjusted, is_likely, recognise
from fxgrow.modules.uninitialised import Limit
from fxgrow.plan.schema import Plan, plans_of

_FEWEST = 10  # tensors of a network that is recognised within another
_MOST_PARTS = 8  # that are compared with what is known


def identified(
    source: Source,
    arch: str | None,
    arguments: Mapping[str, object],
    described: Architecture | None = None,
) -> tuple[Architecture, tuple[Plan, ...], nn.Module, Source]:
    """Find the network that weights belong to: as named, as recorded, or as recognised.

    Args:
        source: the weights.
        arch: what the user calls it; None if the file or its shapes tell.
        arguments: of its builder. Those that shapes tell (``num_classes``) may be left out.
        described: what a file beside the weights says; None if there is none.

    Returns:
        The architecture, the surgeries since, the module that it is now, and the source with the
        module's own weights in the first place.

    Raises:
        SourceError: nothing is named, recorded or recognised, or it cannot be built.
    """
    record = source.record or {}
    plans = plans_of(record)
    if arch is not None:
        architecture = parse_architecture(arch, arguments)
    elif isinstance(record.get("architecture"), Mapping):
        architecture = Architecture.from_dict(record["architecture"], origin=str(source.path))
    else:
        architecture = _recognised(source) if described is None else described
    model, found = _built(source, architecture, plans)
    if arch is not None and not plans and not _fits(found, model):
        better = adjusted(architecture, found.shapes)
        if better is not None and better != architecture:
            architecture = better
            model, found = _built(source, architecture, plans)
    return architecture, plans, model, found


def arranged(source: Source, model: nn.Module) -> Source:
    """Return a source with the weights of a module in the first place, and all copies of them."""
    return source.arranged(Wanted.of(model, _in_order))


def _built(
    source: Source, architecture: Architecture, plans: Sequence[Plan]
) -> tuple[nn.Module, Source]:
    """Return the module that an architecture became, and what of a source belongs to it."""
    limit = Limit.of(source.state_dict) if architecture.origin else None
    model = rebuild(architecture, plans, limit)
    return model, arranged(source, model)


def _in_order(shapes: Sequence[Sequence[Shape]], parameters: Mapping[str, Shape]) -> Sequence[str]:
    """Return the parameters that lists of some shapes are for, or () where that is not clear."""
    try:
        return [name for group in assigned(shapes, parameters) for name in group]
    except PlanError:
        return ()


def _fits(source: Source, model: nn.Module) -> bool:
    shapes = Wanted.of(model)
    have = source.shapes
    return all(have.get(name) == shapes.shapes[name] for name in shapes.needed)


def _recognised(source: Source) -> Architecture:
    """Return the known architecture that weights are of, as they are or under a prefix.

    Raises:
        SourceError: there is none; where all names have a prefix in common, it is told.
    """
    hint = source.path.stem
    try:
        return recognise(source.shapes, hint)
    except SourceError as error:
        problem = error
    tried = 0
    for part in _parts(source.places):
        if tried < _MOST_PARTS and is_likely(part.shapes):
            tried += 1
            try:
                return recognise(part.shapes, hint)
            except SourceError as error:
                problem = problem if "nearest" in problem.message else error
    common = _common(list(source.shapes))
    told = f"{problem.reason}; all names begin with {common!r}." if common else problem.message
    raise SourceError(told, name=problem.name, way_out=problem.way_out)


def _parts(places: Sequence[Location]) -> Iterator[Location]:
    """Yield what lies under prefixes, averages last, then those with more tensors first."""
    parts: list[Location] = []
    for place in places:
        names = [] if isinstance(place.stored, nn.Module) else list(place.state_dict)
        for prefix in prefixes(names):
            if sum(name.startswith(prefix) for name in names) < _FEWEST:
                break  # of those that follow, no more names begin with any
            parts.append(part_of(place, prefix))
    yield from sorted(parts[1:], key=lambda part: (is_average(str(part)), -len(part.state_dict)))


def _common(names: Sequence[str]) -> str:
    """Return the longest prefix that all names have, up to a dot."""
    shared = [p for p in prefixes(names) if all(name.startswith(p) for name in names)]
    return max(shared, key=len, default="")
