"""Which attributes the sizes come from that a network's code fixes.

A size that was repaired is compared with the attributes of the modules that were running. What most
repairs have in common is set and tried first; what does not help is left as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import nn

from fxgrow.grow.sizes.attributes import following
from fxgrow.grow.sizes.literals import Repair
from fxgrow.plan.edits import ModuleEdit

Candidate: TypeAlias = tuple[str, str]  # class, attribute


@dataclass
class Attributes:
    """The attributes of a network's modules that are sizes.

    Attributes:
        model: the network.
    """

    model: nn.Module
    _known: dict[str, dict[int | tuple[int, ...], list[tuple[Candidate, ModuleEdit]]]] = field(
        default_factory=dict
    )

    def of(self, owner: str, size: int | tuple[int, ...]) -> list[tuple[Candidate, ModuleEdit]]:
        """Return the attributes of a module, and of what it holds, that are a size or have it.

        Each comes with an edit that leaves it as it is.
        """
        known = self._known.get(owner)
        if known is None:
            known = self._known[owner] = {}
            for path, holder in _holders(self.model.get_submodule(owner)):
                for attribute, value in _sizes_of(holder):
                    key = (type(holder).__qualname__, attribute)
                    found = (key, ModuleEdit(owner, path + attribute, value, value))
                    for item in dict.fromkeys((value, *_items(value))):
                        known.setdefault(item, []).append(found)
        return known.get(size, [])


def candidates(
    attributes: Attributes,
    repair: Repair,
    without: set[Candidate],
    grown: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[Candidate, ModuleEdit]]:
    """Yield attributes that a wrong size may come from, the most likely first.

    The modules that were running are asked from the innermost outwards, then all that the innermost
    one holds, whose methods it may have called: for an attribute that is all the sizes, for one
    that is a size, then for one of which a size is a small multiple, or from which it may be the
    difference of another (``grown``: sizes of tensors, before and after); their own attributes
    before those of objects that they hold (``self.config``). Where no call was wrong, what compares
    sizes is the code of the modules that were running: an attribute of theirs is a size.
    """
    owners = _owners(attributes.model, repair)

    def having(size: int | tuple[int, ...]) -> list[tuple[Candidate, ModuleEdit]]:
        found = [item for owner in owners for item in attributes.of(owner, size)]
        return [(key, edit) for key, edit in found if key not in without]

    given_all, after_all = (
        tuple(size for size in sizes if size is not None) for sizes in (repair.given, repair.wanted)
    )
    for key, edit in having(given_all):
        if edit.before == repair.given:
            yield key, replace(edit, after=after_all)
    for given, wanted in _multiples(repair):
        for key, edit in sorted(having(given), key=lambda item: "." in item[1].attribute):
            yield key, replace(edit, after=_replaced(edit.before, given, wanted))
    for given, wanted in _wholes(repair, grown):
        for key, edit in having(given):
            yield key, replace(edit, after=_replaced(edit.before, given, wanted))


def _owners(model: nn.Module, repair: Repair) -> list[str]:
    """Return the modules whose attributes a wrong size may come from, the most likely first."""
    names = repair.module.split(".") if repair.module else []
    running = [".".join(names[:depth]) for depth in range(len(names), -1, -1)]
    if not repair.function:
        return running
    inner = [name for name, _ in model.get_submodule(repair.module).named_modules() if name]
    inner.sort(key=lambda name: name.count("."))
    return [*running, *(".".join((*names, name)) for name in inner)]


def _wholes(repair: Repair, grown: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what a size may be a part of, or a difference from, as it is and as it should be.

    ``zeros(n, self.planes - x.shape[1])`` beside x that has grown lacks what ``planes`` does; half
    of it does where there are zeros on both sides, each ``self.planes // 4`` wide.
    """
    for parts in (1, 2, 3, 4):
        for given, wanted in zip(repair.given, repair.wanted, strict=True):
            if given is None or wanted is None or wanted <= given or not repair.function:
                continue
            whole, lacking = (parts * given, parts * wanted), parts * (wanted - given)
            yield from (pair for pair in grown if pair == whole)
            yield from (pair for pair in grown if parts < 3 and pair[1] - pair[0] == lacking)


def _multiples(repair: Repair) -> Iterator[tuple[int, int]]:
    """Yield what each size that grows may be a small multiple of, as it is and as it should be.

    Where none grows, as in a network that is made narrower, those count that shrink.
    """
    pairs = [
        (given, wanted)
        for given, wanted in zip(repair.given, repair.wanted, strict=True)
        if given is not None and wanted is not None and wanted != given
    ]
    pairs = [(given, wanted) for given, wanted in pairs if wanted > given] or pairs
    for multiple in (1, 2, 3, 4) if repair.function else (1,):
        for given, wanted in pairs:
            if given % multiple == wanted % multiple == 0:
                yield given // multiple, wanted // multiple


def _likely(repair: Repair, offer: Mapping[Candidate, ModuleEdit]) -> list[Candidate]:
    """Return which attributes are a size of a repair; where none is, those that it may come from.

    The inputs of a layer with twice as many outputs are half of these, and say nothing of them.
    """
    changing = {a for a, b in zip(repair.given, repair.wanted, strict=True) if a != b}
    itself = [
        key
        for key, edit in offer.items()
        if not changing.isdisjoint(
            edit.before if isinstance(edit.before, tuple) else (edit.before,)
        )
    ]
    return itself or [*offer]


def _grows(repair: Repair) -> bool:
    """Return whether a repair makes any size larger."""
    pairs = zip(repair.given, repair.wanted, strict=True)
    return any(old is not None and new is not None and new > old for old, new in pairs)


def _holders(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield a module, then the objects that it holds, each with its path from there."""
    yield "", module
    for name, held in vars(module).items():
        if not name.startswith("_") and hasattr(held, "__dict__") and not callable(held):
            yield f"{name}.", held


def _items(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else ()


def _sizes_of(holder: object) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """Yield the attributes of an object that are integers or tuples of them.

    Those of a layer that are known to repeat a size of the tensors that it has are no candidates.
    """
    own = (
        (*holder._parameters.values(), *holder._buffers.values())
        if isinstance(holder, nn.Module)
        else ()
    )
    if following(holder) and any(tensor is not None for tensor in own):
        return
    for name, value in vars(holder).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value):
            yield name, tuple(value)


def _replaced(value: object, given: int, wanted: int) -> int | tuple[int, ...]:
    if isinstance(value, tuple):
        return tuple(wanted if item == given else item for item in value)
    return wanted


@dataclass
class Guess:
    """Attributes of one name and class, set because of some calls.

    Attributes:
        made_for: by attribute, the calls whose sizes it may explain.
    """

    made_for: dict[ModuleEdit, set[int]] = field(default_factory=dict)

    @property
    def edits(self) -> list[ModuleEdit]:
        """The attributes."""
        return [*self.made_for]

    @property
    def calls(self) -> set[int]:
        """The calls whose sizes they may explain."""
        return set[int]().union(*self.made_for.values())


@dataclass
class Guesses:
    """What is guessed of the attributes that wrong sizes come from, revised from run to run.

    Attributes:
        model: the network.
        grown: sizes of tensors that change, before and after.
        chosen: what is set now.
        useless: attributes that did not help.
        spent: what did not help of one that did elsewhere.
        wrong: the calls whose sizes were wrong last.
        newest: what was chosen last, the likeliest first.
    """

    model: nn.Module
    grown: Sequence[tuple[int, int]] = ()
    chosen: dict[Candidate, Guess] = field(default_factory=dict)
    useless: set[Candidate] = field(default_factory=set)
    spent: set[ModuleEdit] = field(default_factory=set)
    wrong: set[int] = field(default_factory=set)
    newest: list[Candidate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._attributes = Attributes(self.model)
        self._before: Sequence[Repair] = ()  # what the last choice was made for

    @property
    def edits(self) -> tuple[ModuleEdit, ...]:
        """All attributes that are set."""
        return tuple(edit for guess in self.chosen.values() for edit in guess.edits)

    def revise(self, repairs: Sequence[Repair]) -> bool:
        """Return whether there is something more to try, now that these sizes are wrong.

        Of the candidates for a repair, the one is tried that most repairs have in common. What is
        set and mended none of its calls is useless. Where the last choice mended nothing at all,
        and spoiled what was right, it is alone to blame, and all is as it was before it.
        """
        wrong = {repair.call for repair in repairs}
        if self.newest and wrong > self.wrong:
            self._unset(self.newest)
            return self._choose(self._before)
        self.wrong, self._before = wrong, repairs
        self._unset([key for key, guess in self.chosen.items() if guess.calls <= wrong])
        for guess in self.chosen.values():
            spent = [edit for edit, calls in guess.made_for.items() if calls <= wrong]
            self.spent.update(spent)
            for edit in spent:
                del guess.made_for[edit]
        return self._choose(repairs)

    def take_back(self) -> bool:
        """Return whether there is something more to try, now that the network does not run.

        The last choice is to blame, the least likely of it first.
        """
        if not self.newest:
            return False
        self._unset([self.newest.pop()])
        return bool(self.newest) or self._choose(self._before)

    def _unset(self, keys: Iterable[Candidate]) -> None:
        """Leave attributes as they were from now on: they are useless."""
        for key in keys:
            self.useless.add(key)
            self.chosen.pop(key, None)

    def _choose(self, repairs: Sequence[Repair]) -> bool:
        """Choose what most repairs have in common; return whether there is any choice."""
        growing = [repair for repair in repairs if _grows(repair)]
        # Beside sizes that grow, others (how often to repeat) follow from the attributes of these.
        offers = [(repair, self._offer(repair)) for repair in growing or repairs]
        likely = [(repair, offer, _likely(repair, offer)) for repair, offer in offers if offer]
        votes = Counter(key for *_, keys in likely for key in keys)
        chosen = [
            (max(keys, key=votes.__getitem__), repair, offer) for repair, offer, keys in likely
        ]
        self.newest = sorted(dict.fromkeys(key for key, *_ in chosen), key=lambda key: -votes[key])
        for best, repair, offer in chosen:
            guess = self.chosen.setdefault(best, Guess())
            guess.made_for.setdefault(offer[best], set()).add(repair.call)
        return bool(votes)

    def is_exhausted(self, repair: Repair) -> bool:
        """Return whether a call stays wrong with what should explain it, and nothing else could."""
        guessed = any(repair.call in guess.calls for guess in self.chosen.values())
        return guessed and repair.call in self.wrong and not self._offer(repair)

    def _offer(self, repair: Repair) -> dict[Candidate, ModuleEdit]:
        """Return what a repair may come from and is not set yet, the most likely first."""
        found: dict[Candidate, ModuleEdit] = {}
        for key, edit in candidates(self._attributes, repair, self.useless, self.grown):
            known = self.chosen.get(key)
            is_new = known is None or not ("." in edit.attribute or edit in known.made_for)
            if is_new and edit not in self.spent:
                found.setdefault(key, edit)
        return found
