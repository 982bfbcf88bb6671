"""New blocks in a network: under which names, called by what, and whether all else stays the same.

Nothing is known here of what the blocks hold: the network runs with them on meta tensors.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from fxgrow.apply.module import set_attributes
from fxgrow.apply.rearrange import rearranged
from fxgrow.errors import PlanError
from fxgrow.grow.deepen.depth import attribute_edits
from fxgrow.grow.identity.concrete_run import Recording, is_inside, record
from fxgrow.grow.identity.net2deeper import reshaped_layer
from fxgrow.grow.identity.stages import Stage, child_of, inserted
from fxgrow.labels.operators import COPIES, operator_name
from fxgrow.labels.tape import Operation
from fxgrow.labels.trace import Traced
from fxgrow.modules.standin import first_line, stand_in
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import ModuleEdit, Rearrangement
from fxgrow.plan.requests import Deepen


@dataclass(frozen=True)
class Chosen:
    """A stage with the modules that its new ones are copies of.

    Attributes:
        stage: the stage.
        likes: places of the modules that are copied, in order.
        edit: the module that holds the stage with the new modules in it.
        length: how many of them make a block.
    """

    stage: Stage
    likes: tuple[int, ...]
    edit: Rearrangement
    length: int = 1


@dataclass(frozen=True)
class New:
    """A new block by its names.

    Attributes:
        modules: those that it consists of.
        after: the module before it.
        like: what it is a copy of.
    """

    modules: tuple[str, ...]
    after: str
    like: str


@dataclass(frozen=True)
class Insertion:
    """Blocks to insert into a network, all at once."""

    traced: Traced
    request: Deepen
    before: Recording
    chosen: tuple[Chosen, ...]

    @property
    def rearrangements(self) -> tuple[Rearrangement, ...]:
        """One for each stage."""
        return tuple(part.edit for part in self.chosen)

    def tried(self) -> Trial:
        """Return the network with the new blocks called: by its code or, if need be, in graphs.

        Raises:
            PlanError: neither runs with the blocks as the network did without.
        """
        if isinstance(self._outcome, Trial):
            return self._outcome
        chosen = tuple(
            part if self._runs_with(part) else self._in_graph(part) for part in self.chosen
        )
        if chosen == self.chosen:
            raise self._outcome
        through = replace(self, chosen=chosen)._outcome
        if isinstance(through, Trial):
            return through
        raise PlanError(
            f"{self._outcome.reason}; nor can it be called in a graph: {through.reason}.",
            name=self._outcome.name,
            way_out="Put the blocks into an nn.ModuleList that the code iterates over.",
        ) from through

    @cached_property
    def _outcome(self) -> Trial | PlanError:
        """What came of running the network with the blocks."""
        try:
            return self._run()
        except PlanError as error:
            return error

    def _runs_with(self, part: Chosen) -> bool:
        """Return whether the network runs with the new blocks of one stage of several."""
        alone = replace(self, chosen=(part,))
        return len(self.chosen) > 1 and isinstance(alone._outcome, Trial)

    def _in_graph(self, part: Chosen) -> Chosen:
        """Return a stage whose new blocks are called in the graph of the module that ran the old.

        An ``nn.Sequential`` calls whatever it holds: a graph of it would do no more.
        """
        path = part.stage.container.split(".") if part.stage.container else []
        owners = [".".join(path[:length]) for length in range(len(path), -1, -1)]
        caller = next((name for name in owners if self.before.passages.get(name)), "")
        module = self.traced.standin.get_submodule(caller)
        if isinstance(module, nn.Sequential):
            return part
        return replace(part, edit=replace(part.edit, caller=caller))

    def news(self) -> Iterator[New]:
        """Yield the new blocks by their names after the insertion."""
        for part in self.chosen:
            children = inserted(part.stage, part.likes)
            names = [child_of(part.stage.container, name) for name, _, _ in children]
            first = next(place for place, (_, _, new) in enumerate(children) if new)
            for start in range(first, first + len(part.likes), part.length):
                like = child_of(part.stage.container, children[start][1])
                yield New(tuple(names[start : start + part.length]), names[start - 1], like)

    def _run(self) -> Trial:
        """Return the network with the new blocks and a run of it in eval mode.

        Raises:
            PlanError: the network does not run with the blocks, or not as it did.
        """
        deeper, modules = self._deeper()
        evaluated = self._recorded(deeper)
        self._check_rest(evaluated, list(self.news()))
        return Trial(self, deeper, modules, evaluated)

    @property
    def watched(self) -> list[str]:
        """The new modules, and those before them."""
        return [name for new in self.news() for name in (*new.modules, new.after)]

    def _deeper(self) -> tuple[Traced, tuple[ModuleEdit, ...]]:
        """Return the network with the new blocks, on meta tensors, and what else must change."""
        old = self.traced.standin
        shapes, modules = self._reshaped_layers()
        for part in self.chosen:
            modules += [
                edit
                for edit in attribute_edits(old, part.stage, part.likes)
                if not _in_graph(edit, part)
            ]
        view = rearranged(old, self.rearrangements)
        tensors = named_tensors(view)
        standin = stand_in(view, {n: tensors[n].new_empty(shape) for n, shape in shapes.items()})
        set_attributes(standin, tuple(modules))
        deeper = replace(self.traced, standin=standin, inferred=False)
        return deeper, tuple(modules)

    def _reshaped_layers(self) -> tuple[dict[str, tuple[int, ...]], list[ModuleEdit]]:
        """Return the shapes of new layers that take another width than the layers they are like."""
        shapes: dict[str, tuple[int, ...]] = {}
        modules: list[ModuleEdit] = []
        for part in self.chosen if self.request.method == "net2deeper" else ():
            for local, source, new in inserted(part.stage, part.likes):
                if not new:
                    continue
                name = child_of(part.stage.container, local)
                like = child_of(part.stage.container, source)
                own, edits = reshaped_layer(self.traced.standin.get_submodule(like), name)
                shapes |= {f"{name}.{tensor}": shape for tensor, shape in own.items()}
                modules += edits
        return shapes, modules

    def _recorded(self, deeper: Traced) -> Recording:
        """Return a run in eval mode.

        Raises:
            PlanError: the network does not run with the new blocks.
        """
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a GraphModule prints what fails in it
                return record(deeper, self.watched)
        except Exception as error:  # a user's forward may raise anything
            raise PlanError(
                f"the network does not run with blocks inserted into "
                f"{', '.join(part.stage.key for part in self.chosen)}: {first_line(error)}.",
                name=self.chosen[0].stage.key,
            ) from error

    def _check_rest(self, evaluated: Recording, news: Sequence[New]) -> None:
        """Check that the new blocks run once, and that all else does what it did.

        Raises:
            PlanError: it does not.
        """
        for new in news:
            for name in (new.after, *new.modules):
                times = len(evaluated.passages[name])
                if times != 1:
                    raise PlanError(
                        f"{name} runs {times} times in a pass"
                        + (
                            "; the network finds its blocks in another way than by their list."
                            if name in new.modules
                            else "."
                        ),
                        name=name,
                    )
            self._check_place(evaluated, new)
        modules = [name for new in news for name in new.modules]
        if _deeds(evaluated.outside(modules)) != _deeds(self.before.tape.operations):
            stages = ", ".join(part.stage.key for part in self.chosen)
            raise PlanError(
                f"with blocks inserted into {stages}, the rest of the network computes something "
                "else: it does so between the blocks, or by their number.",
                name=self.chosen[0].stage.key,
            )

    def _check_place(self, evaluated: Recording, new: New) -> None:
        """Check that a new block gets what the one before it gives, and that its result is used.

        Raises:
            PlanError: it does not, or is not.
        """
        inputs, outputs = evaluated.ends(new.modules)
        given = evaluated.passages[new.after][0].outputs
        used = {v.index for op in evaluated.outside(new.modules) for v in op.inputs}
        used |= {value.index for value in evaluated.tape.outputs}
        arrives = given and given[0].index in {value.index for value in inputs}
        if not arrives or not used & {value.index for value in outputs}:
            raise PlanError(
                f"the network does not call {new.modules[0]} on what {new.after} gives, or does "
                "not use what it returns.",
                name=new.modules[0],
            )


@dataclass(frozen=True)
class Trial:
    """A network with new blocks in it.

    Attributes:
        insertion: which blocks.
        deeper: the network, on meta tensors.
        modules: attributes that had to follow.
        evaluated: a run in eval mode.
    """

    insertion: Insertion
    deeper: Traced
    modules: tuple[ModuleEdit, ...]
    evaluated: Recording

    def in_training(self) -> Recording | None:
        """Return a run in train mode, or None where the inputs are too small for one."""
        try:
            return record(self.deeper, self.insertion.watched, training=True)
        except Exception:
            return None


def _in_graph(edit: ModuleEdit, part: Chosen) -> bool:
    """Return whether an attribute is that of a module whose code becomes a graph."""
    caller = part.edit.caller
    rewritten = caller is not None and is_inside(edit.module, caller)
    return rewritten and is_inside(part.stage.container, edit.module)


def _deeds(operations: Sequence[Operation]) -> list[str]:
    """Return the names of operations, but for those that only copy."""
    names = (operator_name(op.target) for op in operations)
    return [name for name in names if name not in COPIES]
