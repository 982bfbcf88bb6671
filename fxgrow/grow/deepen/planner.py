"""Plan new blocks: where they come, which block each is like, and what makes it the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fxgrow.apply.module import fingerprint
from fxgrow.apply.rearrange import new_names
from fxgrow.channels.channels import resolve
from fxgrow.errors import PlanError
from fxgrow.grow.deepen.insertion import Chosen, Insertion, Trial
from fxgrow.grow.deepen.runs import around, find_stage
from fxgrow.grow.deepen.templates import Templates
from fxgrow.grow.identity.concrete_run import Recording, any_inside, is_inside, record
from fxgrow.grow.identity.filling import METHODS
from fxgrow.grow.identity.net2deeper import find_unit
from fxgrow.grow.identity.new_block import NewBlock, tensor_edits
from fxgrow.grow.identity.stages import Stage, rearrangement
from fxgrow.labels.trace import Traced
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.requests import Deepen
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import BlockPlan, Scope
from fxgrow.version import __version__


def plan_blocks(traced: Traced, request: Deepen) -> Plan:
    """Return the plan that inserts blocks.

    Args:
        traced: the network, with inputs that it takes.
        request: ``blocks`` and ``method`` decide.

    Raises:
        PlanError: the request is malformed, or a block cannot be inserted as an identity.
    """
    METHODS[request.method]  # an unknown name is refused before any work
    before = record(traced, around(traced.standin, request.blocks))
    wanted = [find_stage(traced, key, text, before) for key, text in request.blocks.items()]
    _check(wanted, traced)
    chosen = [_choose(traced.standin, stage, before, request.method) for stage in wanted]
    return _plan(Insertion(traced, request, before, tuple(chosen)).tried())


def _choose(model: nn.Module, stage: Stage, before: Recording, method: str) -> Chosen:
    """Return what the new modules of a stage are copies of.

    Raises:
        PlanError: nothing there can be copied, or the copy has no plain name.
    """
    if method != "net2deeper":
        likes, length = Templates(model, stage, before).likes(), 1
    else:
        stage, unit = find_unit(model, stage, before)
        likes, length = unit * stage.count, len(unit)
    held = model.get_submodule(stage.container)._modules
    return Chosen(stage, likes, rearrangement(stage, likes, held), length)


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
            if other.container == stage.container or _holds(other, stage) or _holds(stage, other):
                raise PlanError(
                    f"{other.key} and {stage.key} are in one list of modules, or in one another.",
                    name=stage.key,
                    way_out="Deepen one after the other.",
                )


def _holds(stage: Stage, other: Stage) -> bool:
    """Return whether another stage is in a module of a stage."""
    return any(is_inside(other.container, stage.child(place)) for place in range(len(stage.names)))


def _plan(trial: Trial) -> Plan:
    """Return the plan that makes a network with new blocks.

    Raises:
        PlanError: the blocks cannot be the identity.
    """
    insertion, deeper, evaluated = trial.insertion, trial.deeper, trial.evaluated
    traced, request = insertion.traced, insertion.request
    tensors = named_tensors(traced.standin)
    news = list(insertion.news())
    trained = trial.in_training()
    runs = (evaluated,) if trained is None else (evaluated, trained)
    channels = resolve(evaluated.space)
    names = new_names(tensors, insertion.rearrangements)
    came_from = {name: old for name, old, new in names if new}
    every = named_tensors(deeper.standin)
    parameters = frozenset(dict(deeper.standin.named_parameters(remove_duplicate=False)))
    edits: dict[str, TensorEdit] = {}
    blocks = []
    aliases: dict[str, str] = {}
    for new in news:
        own = {name: every[name] for name in came_from if any_inside(name, new.modules)}
        first: dict[int, str] = {}
        aliases |= {n: known for n, t in own.items() if (known := first.setdefault(id(t), n)) != n}
        kept = {name: tensor for name, tensor in own.items() if name not in aliases}
        block = NewBlock(new.modules, new.after, runs, kept, parameters & kept.keys(), channels)
        try:
            filling = METHODS[request.method](block)
        except PlanError as error:
            raise PlanError(
                f"a block like {new.like} cannot be inserted by {request.method}: {error.message}.",
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
    batch = traced.input_shapes[0][0] if traced.inferred else 1
    total = sum(p.numel() for p in traced.standin.parameters())
    return Plan(
        request=request,
        tensors=edits,
        modules=trial.modules,
        aliases=_renamed_aliases(tensors, names) | aliases,
        source=fingerprint(tensors),
        scopes=(Scope.of(traced),),
        parameters=(total, total + sum(block.parameters for block in blocks)),
        flops=(insertion.before.tape.flops // batch, evaluated.tape.flops // batch),
        warnings=tuple(
            f"{edit.caller or 'the result'} is a torch.fx.GraphModule with the same names: its "
            "code calls its blocks by their names, so that new ones are called in its graph"
            for edit in insertion.rearrangements
            if edit.caller is not None
        ),
        fxgrow=__version__,
        rearrangements=insertion.rearrangements,
        blocks=tuple(blocks),
    )


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
