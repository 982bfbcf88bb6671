"""Run a network at its new sizes, on meta tensors: nothing is assumed about where channels go.

The run goes in step with the one at the present sizes, and sizes that the network's own code fixes
are repaired where they are met (:mod:`fxgrow.grow.sizes.literals`). Most of them come from
attributes, which are then set; where they come from none they are rewritten in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxgrow.channels.analysis import Analysis, CallRecording, Opened
from fxgrow.channels.channels import Channels, resolve
from fxgrow.channels.groups import group_of_channel
from fxgrow.errors import PlanError, TraceError
from fxgrow.grow.obstacle import Obstacle
from fxgrow.grow.sizes.attributes import attribute_edits, misfit
from fxgrow.grow.sizes.conventions import head_edits, norm_edits, size_edits
from fxgrow.grow.sizes.growth import growth_of
from fxgrow.grow.sizes.guesses import Guesses
from fxgrow.grow.sizes.literals import NewShapes, Repair
from fxgrow.grow.sizes.parts import at_larger_images, edits_in_code
from fxgrow.grow.sizes.resize import Sizes
from fxgrow.grow.sizes.swapped import resized
from fxgrow.grow.sizes.unlike import chooses, unlike
from fxgrow.grow.sizes.watching import Watching
from fxgrow.labels.in_code import Sized, change_sizes, sizes_in_code
from fxgrow.labels.layers import support
from fxgrow.labels.propagate import Watch, no_watch
from fxgrow.labels.running import module_of
from fxgrow.labels.sizes import called_by, why_fixed
from fxgrow.labels.tape import Tape
from fxgrow.labels.trace import Traced
from fxgrow.modules.stopped import stopped_at
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import ModuleEdit, SizeEdit

_ROUNDS = 8  # of trying attributes; each costs a run on meta tensors


@dataclass(frozen=True)
class Resized:
    """What a run at new sizes tells.

    Attributes:
        channels: the channels at the new sizes.
        modules: the attributes that had to follow.
        tape: the operations of the run.
        sizes: what has to be rewritten in the network's graph.
    """

    channels: Channels
    modules: tuple[ModuleEdit, ...]
    tape: Tape
    sizes: tuple[SizeEdit, ...] = ()


def run_resized(analysis: Analysis, sizes: Sizes) -> Resized | Obstacle:
    """Run the stand-in's own forward at new sizes, and put it back as it was.

    Attributes that repeat a tensor's size follow it.
    """
    try:
        counts = sizes.convolution_groups | sizes.norm_groups
        follow = tuple(attribute_edits(analysis.traced.standin, sizes.shapes, counts))
    except PlanError as error:  # the modules say other sizes than their tensors have
        return Obstacle.of(error)
    rerun = _Rerun(analysis, sizes, follow)
    found = rerun.find()
    if isinstance(found, Obstacle):
        layer = misfit(analysis.traced.standin, sizes.shapes)
        return found if layer is None else Obstacle(layer[1], layer[0])
    if why := chooses(analysis.tape, found.tape):
        return Obstacle(why)
    standin = analysis.traced.standin
    norms = tuple(norm_edits(standin, analysis.tape, found.tape))
    if found.sizes:  # these were found with attributes as they are
        return replace(found, modules=(*found.modules, *norms))
    more = (
        *norms,
        *head_edits(standin, analysis.groups, sizes.widths, found.modules),
        *size_edits(standin, sizes.shapes, found.modules),
    )
    if more and not rerun.is_unread(found, more):
        more = tuple(edit for edit in more if rerun.is_unread(found, (edit,)))
    return replace(found, modules=(*found.modules, *more))


def run_with(
    analysis: Analysis, sizes: Sizes, found: Resized, more: tuple[ModuleEdit, ...]
) -> Resized | None:
    """Return a run with some more attributes changed, or None if it computes other sizes then.

    Args:
        analysis: of the network.
        sizes: the new sizes.
        found: the run so far, of the network's own code.
        more: the attributes.
    """
    again = _Rerun(analysis, sizes, found.modules)._run((*found.modules, *more))
    if isinstance(again, Obstacle) or _computed(again)[0] != _computed(found)[0]:
        return None
    return again


@dataclass
class _Rerun:
    """Runs of one network at the same new sizes.

    Attributes:
        analysis: of the network.
        sizes: the new sizes.
        follow: the attributes that repeat the size of a tensor.
    """

    analysis: Analysis
    sizes: Sizes
    follow: tuple[ModuleEdit, ...]

    def __post_init__(self) -> None:
        analysis, sizes = self.analysis, self.sizes
        growth = growth_of(analysis.channels, analysis.groups, sizes.widths)
        self._shapes = NewShapes(growth, analysis.channels, sizes.norm_groups)

    def find(self) -> Resized | Obstacle:
        """Run as it is, else with other attributes, else with another graph."""
        watch = Watching(self.analysis.traced, self.analysis.calls, self._shapes)
        found = self._run(self.follow, watch if any(self.analysis.calls) else no_watch)
        if not watch.repairs:
            if isinstance(found, Obstacle):
                return self._checked(found)
            why = self._unlike(found)
            return Obstacle(why) if why else found
        plain = self._run(self.follow)  # labels foretell what most code does, and not all
        if isinstance(plain, Resized) and self._is_sound(plain):
            return plain
        explained = self._with_attributes(watch.repairs)
        if isinstance(explained, Resized):
            return explained
        enclosed = self._enclosed(watch.repairs)
        graph = None if enclosed else self._rewritten(watch.repairs)
        graph = graph or self._in_code(watch)
        return graph or self._fixed([r for r in explained if r in enclosed] or explained)

    def _checked(self, obstacle: Obstacle) -> Resized | Obstacle:
        """Run another graph, or with other attributes where code may have compared sizes."""
        if graph := self._rewritten(()):
            return graph
        explained = self._with_attributes([self._comparison(obstacle)])
        return explained if isinstance(explained, Resized) else obstacle

    def _comparison(self, obstacle: Obstacle) -> Repair:
        """Return the sizes that a module may compare with attributes, which stopped the run."""
        given, wanted = zip(*self._grown(), strict=True) if self._grown() else ((), ())
        return Repair(-1, "", obstacle.name, "", given, wanted)

    def _grown(self) -> list[tuple[int, int]]:
        """Return the sizes of tensors that change, before and after."""
        old = named_tensors(self.analysis.traced.standin)
        pairs = (
            pair
            for name, shape in self.sizes.shapes.items()
            for pair in zip(old[name].shape, shape, strict=True)
        )
        return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]

    def is_unread(self, found: Resized, more: tuple[ModuleEdit, ...]) -> bool:
        """Return whether the network computes the same with some more attributes changed."""
        again = self._run((*found.modules, *more))
        return isinstance(again, Resized) and _computed(again) == _computed(found)

    def _run(
        self,
        edits: tuple[ModuleEdit, ...],
        watch: Watch = no_watch,
        opened: Opened | None = None,
        sizes: tuple[SizeEdit, ...] = (),
    ) -> Resized | Obstacle:
        """Run the stand-in's own forward, or a graph of it, at new sizes."""
        traced = opened.traced if opened else self.analysis.traced
        try:
            with resized(traced.standin, self.sizes.shapes, edits), _in_code(traced, sizes):
                if opened:
                    space, tape = traced.label_graph(opened.graph, watch)
                else:
                    space, tape = traced.label(watch)
        except TraceError as error:
            if error.__cause__ is None:
                return Obstacle.of(error)
            where, why = error.name or "the model", stopped_at(error.__cause__)
            return Obstacle(f"the code of {where} does not run at the new sizes: {why}", error.name)
        return Resized(resolve(space), edits, tape, sizes)

    def _is_sound(self, found: Resized) -> bool:
        """Return whether what holds no channels has its old size, and norms their new groups.

        A size of -1 in the code may have swallowed new channels: as positions, of which there are
        now more. Of runs of different operations, what they do tells.
        """
        counts = found.channels.norm_groups
        if any(counts[weight] != count for weight, count in self.sizes.norm_groups.items()):
            return False
        old, new = self.analysis.tape.operations, found.tape.operations
        if [op.target for op in old] != [op.target for op in new]:
            return not self._unlike(found)
        for before, after in zip(old, new, strict=True):
            for was, becomes in zip(before.outputs, after.outputs, strict=False):
                covered = set[int]().union(*(support(layer) for layer in was.layers))
                ends = enumerate(zip(was.shape, becomes.shape, strict=False))
                if was.layers and any(a != b and dim not in covered for dim, (a, b) in ends):
                    return False
        return True

    def _unlike(self, found: Resized) -> str:
        """Return why new channels are treated as no old one is, "" if they are not."""
        analysis = self.analysis
        return unlike((analysis.channels, analysis.tape), (found.channels, found.tape))

    def _with_attributes(self, repairs: Sequence[Repair]) -> Resized | Sequence[Repair]:
        """Find the attributes that repairs come from; return a run with them, or what is left.

        A call that is still wrong where the attribute is set that should explain it, and that
        nothing else could explain, ends the search: for all modules of its class.
        """
        analysis, wrong, reached, compared = self.analysis, repairs, 0, False
        guesses = Guesses(analysis.traced.standin, self._grown())
        is_open = guesses.revise(wrong)
        for _ in range(_ROUNDS):
            if not is_open:
                break
            watch = Watching(analysis.traced, analysis.calls, self._shapes, guesses.is_exhausted)
            found = self._run((*self.follow, *guesses.edits), watch)
            if isinstance(found, Resized) and not watch.repairs:
                return found
            if (last := watch.stopped) is not None:
                kind = self._kind_of(last)
                wrong = [repair for repair in repairs if self._kind_of(repair) == kind]
                break
            if watch.repairs and (isinstance(found, Resized) or watch.reached > reached):
                wrong, reached = watch.repairs, watch.reached
                is_open = guesses.revise(wrong)
            elif (
                isinstance(found, Obstacle)
                and not watch.repairs
                and wrong[0].function
                and not compared
            ):
                compared, wrong = True, [self._comparison(found)]
                is_open = guesses.revise(wrong)
            else:  # it is of the guesses that it does not run, which nobody asked for
                is_open = guesses.take_back()
        left = {repair.call for repair in wrong}
        return [repair for repair in repairs if repair.call in left] or repairs

    def _kind_of(self, repair: Repair) -> tuple[type[object], str]:
        """Return what class of module called which function: others of it may be explained."""
        module = self.analysis.traced.standin.get_submodule(repair.module)
        return type(module), repair.function

    def _fixed(self, repairs: Sequence[Repair]) -> Obstacle:
        """Return what is in the way where the code fixes sizes that no attribute explains.

        A literal is what it was where it should be another size: that comes from what grows among
        the channels there, whatever else grows.
        """
        calls = [call for run in self.analysis.calls for call in run]
        channels, groups = self.analysis.channels, self.analysis.groups
        group_of = group_of_channel(channels, groups)
        reasons: dict[str, str] = {}
        for repair in repairs:
            call = calls[repair.call]
            sizes = zip(call.sizes, repair.given, repair.wanted, strict=True)
            if any(old == given != wanted for old, given, wanted in sizes):
                layers = [layer for value in call.outputs for layer in value.layers]
                for member in np.unique(group_of[channels.of_layers(layers)]).tolist():
                    if member >= 0 and groups[member].name in self.sizes.widths:
                        reasons.setdefault(groups[member].name, _reason(repair, call.sizes))
        first = _reason(repairs[0], calls[repairs[0].call].sizes)
        return Obstacle(first, repairs[0].module, reasons, certain=bool(reasons))

    def _enclosed(self, repairs: Sequence[Repair]) -> Sequence[Repair]:
        """Return the repairs inside of what is one node of the graph, if there is a graph."""
        graph, inside = self.analysis.traced.graph, self.analysis.traced.module
        if graph is None:
            return ()
        made = {(module_of(node, inside), called_by(node)) for node in graph.nodes}
        return [repair for repair in repairs if (repair.module, repair.function) not in made]

    def _rewritten(self, repairs: Sequence[Repair]) -> Resized | None:
        """Rewrite the sizes that the network's code fixes in its graph, if there is one."""
        opened = self.analysis.opened
        if opened is None:
            return None
        found: Resized | Obstacle | None = None
        if repairs:  # it may make the same calls as the network's own forward
            watch = Watching(opened.traced, self.analysis.calls, self._shapes)
            found = self._run(self.follow, watch, opened)
        if not isinstance(found, Resized) and opened.run is not None:
            growth = self._shapes.growth.among(self.analysis.channels, opened.run.channels)
            shapes = NewShapes(growth, opened.run.channels, self.sizes.norm_groups)
            watch = Watching(opened.traced, opened.run.calls, shapes)
            found = self._run(self.follow, watch, opened)
        if not isinstance(found, Resized) or not watch.repairs_in_eval:
            return None  # without repairs, the network's own forward stays, and does not run
        nodes = {node.name: node for node in opened.graph.nodes}
        needed = watch.repairs_in_eval  # the graph is the same in train mode
        if any(why_fixed(nodes[r.node], r.function, r.given) for r in needed):
            return None
        module = opened.traced.module
        edits = (SizeEdit(r.node, r.function, r.given, r.wanted, module) for r in needed)
        return replace(found, sizes=tuple(edits))

    def _in_code(self, watch: Watching) -> Resized | None:
        """Rewrite the sizes that the code of modules fixes where it makes its calls."""
        runs = [(watch.repairs, watch.sites)]
        for traced in at_larger_images(self.analysis.traced):
            larger = self._watched_at(traced)
            if larger is None:
                break
            runs.append((larger.repairs, larger.sites))
        edits = edits_in_code(runs)
        found = None if edits is None else self._run(self.follow, sizes=edits)
        return found if isinstance(found, Resized) and self._is_sound(found) else None

    def _watched_at(self, traced: Traced) -> Watching | None:
        """Return what is wrong at the new sizes on other inputs, None if these do not run."""
        recording = CallRecording(traced)
        try:
            channels = resolve(traced.follow(recording)[0])
            growth = self._shapes.growth.among(self.analysis.channels, channels)
            shapes = NewShapes(growth, channels, self.sizes.norm_groups)
            watch = Watching(traced, recording.calls, shapes)
            with resized(traced.standin, self.sizes.shapes, self.follow):
                traced.label(watch)
        except TraceError:
            return None
        return watch


def _reason(repair: Repair, before: Sequence[object]) -> str:
    """Return why sizes cannot be as they should be, as far as the code is concerned.

    Args:
        repair: the sizes.
        before: what the code gave at the old sizes.
    """
    code, given, wanted = (
        f"the code of {repair.module or 'the model'}", list(repair.given), list(repair.wanted),
    )  # fmt: skip
    if wanted == list(before):
        return (
            f"{code} takes sizes {given} of {repair.function} from a width that grows, where "
            f"{wanted} are needed as before: what meets them does not grow"
        )
    return f"{code} fixes sizes {given} in {repair.function}, where {wanted} are needed"


def _computed(run: Resized) -> tuple[list[tuple[int, ...]], list[str]]:
    """Return the shapes of all that a run computed, and what it did with which numbers."""
    values = (value for op in run.tape.operations for value in op.outputs)
    return [value.shape for value in values], [done for done, _ in run.channels.noted]


@contextlib.contextmanager
def _in_code(traced: Traced, edits: Sequence[SizeEdit]) -> Iterator[None]:
    """Let the code of modules use other sizes for a while."""
    lines: dict[str, list[Sized]] = {}
    for edit in edits:
        lines.setdefault(edit.module, []).append(Sized(edit.at, edit.before, edit.after))
    modules = [traced.standin.get_submodule(name) for name in lines]
    for module, changed in zip(modules, lines.values(), strict=True):
        change_sizes(module, changed)
    try:
        yield
    finally:
        for module in modules:
            if (held := sizes_in_code(module)) is not None:
                held.tables.pop()
