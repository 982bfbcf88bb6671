"""Plan new blocks: where they come, which block each is like, and what makes it the identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fxgrow.apply import fingerprint, set_attributes
from fxgrow.channels import resolve
from fxgrow.errors import PlanError
from fxgrow.labels.operators import COPIES, operator_name
from fxgrow.labels.propagate import named_tensors
from fxgrow.labels.tape import Operation
from fxgrow.plan.chains import find_unit, reshaped_layer
from fxgrow.plan.depth import attribute_edits
from fxgrow.plan.filling import METHODS
from fxgrow.plan.newblock import NewBlock, tensor_edits
from fxgrow.plan.passing import Recording, any_inside, is_inside, record
from fxgrow.plan.schema import BlockPlan, Plan, Request, Scope
from fxgrow.plan.stages import Stage, child_of, find_stage, inserted, rearrangement
from fxgrow.plan.surgery import ModuleEdit, Rearrangement, TensorEdit
from fxgrow.plan.templates import Templates
from fxgrow.rearrange import new_names, rearranged
from fxgrow.standin import first_line, stand_in
from fxgrow.trace import Traced
from fxgrow.version import __version__


@dataclass(frozen=True)
class _Chosen:
    """A stage with the modules that its new ones are copies of.

    Attributes:
        stage: the stage.
        likes: places of the modules that are copied, in order.
        length: how many of them make a block.
    """

    stage: Stage
    likes: tuple[int, ...]
    length: int = 1


@dataclass(frozen=True)
class _New:
    """A new block by its names.

    Attributes:
        modules: those that it consists of.
        after: the module before it.
        like: what it is a copy of.
    """

    modules: tuple[str, ...]
    after: str
    like: str


def plan_blocks(traced: Traced, request: Request) -> Plan:
    """Return the plan that inserts blocks.

    Args:
        traced: the network, with inputs that it takes.
        request: ``blocks`` and ``method`` decide.

    Raises:
        PlanError: the request is malformed, or a block cannot be inserted as an identity.
    """
    METHODS[request.method]  # an unknown name is refused before any work
    wanted = [find_stage(traced.standin, key, text) for key, text in request.blocks.items()]
    _check(wanted, traced)
    children = [stage.child(place) for stage in wanted for place in range(len(stage.names))]
    before = record(traced, children)
    chosen = [_choose(traced.standin, stage, before, request.method) for stage in wanted]
    return _Insertion(traced, request, before, tuple(chosen)).plan()


def _choose(model: nn.Module, stage: Stage, before: Recording, method: str) -> _Chosen:
    """Return what the new modules of a stage are copies of.

    Raises:
        PlanError: nothing there can be copied.
    """
    if method != "net2deeper":
        return _Chosen(stage, Templates(model, stage, before).likes())
    placed, unit = find_unit(model, stage, before)
    return _Chosen(placed, unit * stage.count, len(unit))


def _check(wanted: Sequence[Stage], traced: Traced) -> None:
    """Refuse stages that overlap or are not followed.

    Raises:
        PlanError: there are two in one list, or one in another, or one outside of what is followed.
    """
    if not wanted:
        raise PlanError("no stage is named.", way_out='Name one: {"layer3": "+2"}.')
    for place, stage in enumerate(wanted):
        if not is_inside(stage.container, traced.module):
            raise PlanError(f"{stage.key} lies outside of {traced.module}, which is followed.")
        for other in wanted[:place]:
            names = sorted((stage.container, other.container), key=len)
            if names[0] == names[1] or is_inside(names[1], names[0]):
                raise PlanError(
                    f"{other.key} and {stage.key} are in one list of modules, or in one another.",
                    name=stage.key,
                    way_out="Deepen one after the other.",
                )


@dataclass(frozen=True)
class _Insertion:
    """Blocks to insert into a network, all at once."""

    traced: Traced
    request: Request
    before: Recording
    chosen: tuple[_Chosen, ...]

    @property
    def rearrangements(self) -> tuple[Rearrangement, ...]:
        return tuple(rearrangement(c.stage, c.likes) for c in self.chosen)

    def news(self) -> Iterator[_New]:
        """Yield the new blocks by their names after the insertion."""
        for part in self.chosen:
            children = inserted(part.stage, part.likes)
            names = [child_of(part.stage.container, name) for name, _, _ in children]
            first = next(place for place, (_, _, new) in enumerate(children) if new)
            for start in range(first, first + len(part.likes), part.length):
                like = child_of(part.stage.container, children[start][1])
                yield _New(tuple(names[start : start + part.length]), names[start - 1], like)

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            PlanError: the network does not run with the blocks, or they are not the identity.
        """
        traced, request = self.traced, self.request
        tensors = named_tensors(traced.standin)
        deeper, modules = self._deeper()
        news = list(self.news())
        watched = [name for new in news for name in (*new.modules, new.after)]
        evaluated = self._recorded(deeper, watched)
        trained = self._in_training(deeper, watched)
        runs = (evaluated,) if trained is None else (evaluated, trained)
        self._check_rest(evaluated, news)
        channels = resolve(evaluated.space)
        names = new_names(tensors, self.rearrangements)
        came_from = {name: old for name, old, new in names if new}
        every = named_tensors(deeper.standin)
        parameters = frozenset(dict(deeper.standin.named_parameters(remove_duplicate=False)))
        edits: dict[str, TensorEdit] = {}
        blocks = []
        aliases: dict[str, str] = {}
        for new in news:
            own = {name: every[name] for name in came_from if any_inside(name, new.modules)}
            first: dict[int, str] = {}
            aliases |= {
                n: known for n, t in own.items() if (known := first.setdefault(id(t), n)) != n
            }
            kept = {name: tensor for name, tensor in own.items() if name not in aliases}
            block = NewBlock(new.modules, new.after, runs, kept, parameters & kept.keys(), channels)
            try:
                filling = METHODS[request.method](block)
            except PlanError as error:
                raise PlanError(
                    f"a block like {new.like} cannot be inserted by {request.method}: "
                    f"{error.message}.",
                    name=new.like,
                    way_out=error.way_out,
                ) from error
            sources = {name: (came_from[name], tensors[came_from[name]]) for name in kept}
            edits |= tensor_edits(block, filling, sources)
            blocks.append(
                BlockPlan(
                    name=new.modules[0],
                    like=new.like,
                    method=request.method,
                    zeroed=filling.zeroed,
                    preserves="exact",
                    reason="; ".join(filling.notes),
                    in_training=filling.in_training,
                    parameters=sum(kept[name].numel() for name in parameters & kept.keys()),
                )
            )
        scope = Scope(traced.module, traced.input_shapes, traced.inferred, traced.tracer)
        batch = traced.input_shapes[0][0] if traced.inferred else 1
        total = sum(p.numel() for p in traced.standin.parameters())
        return Plan(
            request=request,
            groups=(),
            refused=(),
            tensors=edits,
            modules=modules,
            multipliers=(),
            prediction=(),
            norms=(),
            aliases=_renamed_aliases(tensors, names) | aliases,
            source=fingerprint(tensors),
            inputs=scope.inputs,
            inputs_inferred=scope.inputs_inferred,
            tracer=scope.tracer,
            parameters=(total, total + sum(block.parameters for block in blocks)),
            flops=(self.before.tape.flops // batch, evaluated.tape.flops // batch),
            warnings=(),
            fxgrow=__version__,
            submodules=(scope,) if traced.module else (),
            rearrangements=self.rearrangements,
            blocks=tuple(blocks),
        )

    def _deeper(self) -> tuple[Traced, tuple[ModuleEdit, ...]]:
        """Return the network with the new blocks, on meta tensors, and what else must change."""
        old = self.traced.standin
        shapes, modules = self._reshaped_layers()
        for part in self.chosen:
            modules += attribute_edits(old, part.stage, part.likes)
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

    def _recorded(self, deeper: Traced, watched: Sequence[str]) -> Recording:
        """Return a run in eval mode.

        Raises:
            PlanError: the network does not run with the new blocks.
        """
        try:
            return record(deeper, watched)
        except Exception as error:  # a user's forward may raise anything
            raise PlanError(
                f"the network does not run with blocks inserted into "
                f"{', '.join(part.stage.key for part in self.chosen)}: {first_line(error)}.",
                name=self.chosen[0].stage.key,
            ) from error

    def _in_training(self, deeper: Traced, watched: Sequence[str]) -> Recording | None:
        """Return a run in train mode, or None where the inputs are too small for one."""
        try:
            return record(deeper, watched, training=True)
        except Exception:
            return None

    def _check_rest(self, evaluated: Recording, news: Sequence[_New]) -> None:
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
        modules = [name for new in news for name in new.modules]
        if _deeds(evaluated.outside(modules)) != _deeds(self.before.tape.operations):
            stages = ", ".join(part.stage.key for part in self.chosen)
            raise PlanError(
                f"with blocks inserted into {stages}, the rest of the network computes something "
                "else: it does so between the blocks, or by their number.",
                name=self.chosen[0].stage.key,
            )


def _deeds(operations: Sequence[Operation]) -> list[str]:
    """Return the names of operations, but for those that only copy."""
    names = (operator_name(op.target) for op in operations)
    return [name for name in names if name not in COPIES]


def _renamed_aliases(
    tensors: Mapping[str, Tensor], names: Sequence[tuple[str, str, bool]]
) -> dict[str, str]:
    """Return, for each further name of a tied tensor after the insertion, its first name."""
    first: dict[int, str] = {}
    return {
        name: known
        for name, old, new in names
        if not new and (known := first.setdefault(id(tensors[old]), name)) != name
    }
