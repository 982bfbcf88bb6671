"""Where the rounding of a grown network rises above that of the old one, and what to do about it.

Twins cancel: where what they add is far larger than what the old channels do, the rounding of the
sum is theirs. That shows at the reader where it happens, before the rest of the network spreads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from fxgrow.modules.calling import Arguments, tensors_in
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.standin import stand_in
from fxgrow.plan.schema import Plan
from fxgrow.plan.step import GroupPlan
from fxgrow.verification.cases import Case
from fxgrow.verification.exact import Exact
from fxgrow.verification.forward import in_double, outputs_of

MOST = 10.0  # times its own rounding that a network may round without a word


def told_rounding(made: Plan, case: Case, batch: Arguments, ratio: float) -> str:
    """Return what to say of a network that rounds far more than before.

    Args:
        made: the plan.
        case: the networks.
        batch: what they are run on.
        ratio: how many times more the outputs are off.
    """
    group = _first_risen(made, case, batch)
    where = f", first at what reads {group.name}" if group is not None else ""
    pairings = {group.pairing for step in made.steps for group in step.groups}
    other = "another init (copy_rows)"
    drawing = made.request.drawing
    if (drawing.input_init or drawing.init) == "copy_rows":
        other = "another pairing (v_zero)" if "v_zero" not in pairings else "another rescaling"
    return (
        f"as saved, the grown network is off by {ratio:.0f} times the rounding of the old one"
        f"{where}: new weights are far larger there than old ones. {other.capitalize()} avoids that"
    )


def _first_risen(made: Plan, case: Case, batch: Arguments) -> GroupPlan | None:
    """Return the first group, in the order of execution, whose readers round far more than before.

    What they return is compared where it has the old width.
    """
    groups = {reader: g for step in made.steps for g in step.groups for reader in g.readers}
    native = [stand_in(network.module, {}) for network in (case.before, case.after)]
    exact = Exact(case.before.module, case.before.given)
    seen = []
    for model, arguments in zip(
        (exact.module, *native), (in_double(batch), batch, batch), strict=True
    ):
        with _listening(model, groups.keys()) as results:
            expectation = Expectation(exact=model is exact.module)
            outputs_of(model.get_submodule(case.part), arguments, "eval", expectation)
        seen.append(results)
    doubled, old, new = seen
    for name, wide in doubled.items():
        if [t.shape for t in wide] != [t.shape for t in new.get(name, [])]:
            continue
        if any(_risen(*three) for three in zip(wide, old[name], new[name], strict=True)):
            return groups[name]
    return None


def _risen(wide: Tensor, old: Tensor, new: Tensor) -> bool:
    """Return whether some channel rounds far more than before: a small one hides among large ones.

    Args:
        wide: the values in float64; channels lie in the second dim, or in the last one.
        old: as the old network has them.
        new: as the grown one has them.
    """
    if not wide.is_floating_point() or not wide.ndim:
        return False
    gaps = [(found.double() - wide).abs() for found in (old, new)]
    for dim in {min(1, wide.ndim - 1), wide.ndim - 1}:
        own, grown = (gap.movedim(dim, 0).flatten(1).amax(1) for gap in gaps)
        if bool((grown > MOST * own.clamp(min=torch.finfo(old.dtype).tiny))[own > 0].any()):
            return True
    return False


@contextlib.contextmanager
def _listening(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield what modules return in the runs to come, by their names in the order of execution."""
    results: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())

    def listen_to(name: str) -> None:
        def note(_: nn.Module, __: object, returned: object) -> None:
            results.setdefault(name, [t.detach().clone() for t in tensors_in(returned)])

        handles.append(modules[name].register_forward_hook(note))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in names:
        if name in modules:
            listen_to(name)
    try:
        yield results
    finally:
        for handle in handles:
            handle.remove()
