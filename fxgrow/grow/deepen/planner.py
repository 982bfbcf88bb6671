"""Plan new blocks: where they come, which block each is like, and what makes it the identity."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from fxgrow.channels.channels import resolve
from fxgrow.errors import PlanError
from fxgrow.grow.deepen.insertion import Chosen, Insertion, New, Trial
from fxgrow.grow.deepen.runs import around, find_stage
from fxgrow.grow.deepen.templates import Templates
from fxgrow.grow.identity.concrete_run import Recording, any_inside, is_inside, record
from fxgrow.grow.identity.filling import METHODS
from fxgrow.grow.identity.net2deeper import find_unit
from fxgrow.grow.identity.new_block import NewBlock, block_plan, tensor_edits
from fxgrow.grow.identity.stages import Stage, rearrangement
from fxgrow.labels.trace import Traced
from fxgrow.modules.tensors import aliases_of, named_tensors
from fxgrow.plan.edits import TensorEdit
from fxgrow.plan.fingerprint import fingerprint
from fxgrow.plan.names import new_names
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
            raise PlanError(
                f"{stage.key} lies outside of {traced.module}, which alone is followed"
                + (": no inputs could be inferred for the whole." if traced.inferred else "."),
                name=stage.key,
                way_out="Give --input-shape." if traced.inferred else "Follow the whole network.",
            )
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
    insertion, evaluated = trial.insertion, trial.evaluated
    traced, request = insertion.traced, insertion.request
    tensors = named_tensors(traced.standin)
    came_from = {
        name: old for name, old, new in new_names(tensors, insertion.rearrangements) if new
    }
    aliases = aliases_of(named_tensors(trial.deeper.standin))
    edits: dict[str, TensorEdit] = {}
    blocks: list[BlockPlan] = []
    for new, block in _new_blocks(trial, came_from.keys() - aliases.keys()):
        try:
            filling = METHODS[request.method](block)
        except PlanError as error:
            raise PlanError(
                f"a block like {new.like} cannot be inserted by {request.method}: {error.message}.",
                name=new.like,
                way_out=error.way_out,
            ) from error
        sources = {name: (came_from[name], tensors[came_from[name]]) for name in block.tensors}
        edits |= tensor_edits(block, filling, sources)
        blocks.append(block_plan(block, new.like, request.method, filling))
    batch = traced.input_shapes[0][0] if traced.inferred else 1
    total = sum(p.numel() for p in traced.standin.parameters())
    return Plan(
        request=request,
        tensors=edits,
        modules=trial.modules,
        aliases=aliases,
        source=fingerprint(traced.standin, ()),
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


def _new_blocks(trial: Trial, fresh: Collection[str]) -> Iterator[tuple[New, NewBlock]]:
    """Yield the new blocks of a network that has them.

    Args:
        trial: the network.
        fresh: the names of all new tensors, tied ones under their first.
    """
    standin, trained = trial.deeper.standin, trial.in_training()
    runs = (trial.evaluated,) if trained is None else (trial.evaluated, trained)
    channels = resolve(trial.evaluated.space)
    tensors = {name: tensor for name, tensor in named_tensors(standin).items() if name in fresh}
    parameters = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    for new in trial.insertion.news():
        own = {name: tensor for name, tensor in tensors.items() if any_inside(name, new.modules)}
        kept = frozenset(parameters & own.keys())
        yield new, NewBlock(new.modules, new.after, runs, own, kept, channels)
