"""What a network decides by values, found out once where it cannot be followed without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fxgrow.errors import TraceError
from fxgrow.modules.calling import Arguments, call, map_tensors, tensors_in
from fxgrow.modules.decisions import Decision, Replay
from fxgrow.modules.draws import OTHERS, Chance
from fxgrow.modules.inputs import batches_for
from fxgrow.modules.shadows import Shadows, record, values_of
from fxgrow.modules.standin import first_line, stand_in
from fxgrow.modules.tensors import named_tensors

Mode = Literal["eval", "train"]
_CPU = torch.device("cpu")


_MOST_NUMBERS = 64  # that are tried, and how many in a row that show nothing new
_PATIENCE = {"number": 4, "chance": 8}


class Way(NamedTuple):
    """A further way through a network.

    Attributes:
        decisions: what it decides there; None where shapes are enough.
        chance: what masks are made of.
    """

    decisions: Sequence[Decision] | None
    chance: Chance = "spread"


@dataclass(frozen=True)
class Decided:
    """What a network decides by values, in each mode.

    Attributes:
        model: the user's network; only read.
        module: the submodule of it that is followed, "" for the whole.
        example: the user's inputs; None where they are inferred.
        runs: for each mode, the decisions of a run on values; none where shapes are enough.
        ways: for each mode, further ways, on which it may use other parts.
    """

    model: nn.Module
    module: str = ""
    example: object = None
    runs: dict[Mode, Sequence[Decision]] = field(default_factory=dict)
    ways: dict[Mode, list[Way]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network's tensors are, or would be."""
        found = (tensor.device for tensor in named_tensors(self.model).values())
        return next((device for device in found if device.type != "meta"), _CPU)

    @property
    def _has_values(self) -> bool:
        return not any(tensor.is_meta for tensor in named_tensors(self.model).values())

    def replay(self, mode: Mode) -> Replay | None:
        """Return what decides in a run on shapes, None where nothing is to be decided."""
        return self._replayed(self.runs.get(mode))

    def _replayed(self, decisions: Sequence[Decision] | None) -> Replay | None:
        return None if decisions is None else Replay(decisions, self.device)

    def further(self, mode: Mode, *, by_chance: bool) -> list[tuple[Replay | None, Chance]]:
        """Return what decides in further runs, and what their masks are made of.

        Args:
            mode: the mode.
            by_chance: those with other masks, or those with other decisions alone.
        """
        ways = (w for w in self.ways.get(mode, ()) if (w.chance != "spread") == by_chance)
        return [(self._replayed(way.decisions), way.chance) for way in ways]

    def forgotten(self) -> Decided:
        """Return the same without any runs: the inputs are others."""
        return replace(self, runs={}, ways={})

    def find_out(self, standin: nn.Module, mode: Mode, inputs: Arguments, told: str) -> None:
        """Run the network on values beside its shapes, and keep what it decides.

        Args:
            standin: the network on the meta device, at its own sizes.
            mode: the mode that what is followed is in.
            inputs: on the meta device.
            told: what to call them.

        Raises:
            TraceError: it does not run on its inputs, or nobody can follow what it does.
        """
        try:
            run = self._recording(standin, inputs)
            try:
                found = run()
            except Exception:  # what goes on where there is nothing may not fit together
                found = run(finds=False)
        except Exception as error:  # a user's forward may raise anything
            fault = self.fault(mode, inputs)
            if fault is not None:
                raise TraceError(
                    f"the model does not run on {told}: {first_line(fault)}.",
                    way_out="" if self.example is None else "Give inputs that it takes.",
                ) from fault
            known = f"the model runs on {told}, and " if self._has_values else ""
            raise TraceError(
                f"{known}what it decides by values there cannot be told beforehand: "
                f"{_reason(error)}.",
                way_out=error.way_out if isinstance(error, TraceError) else "",
            ) from error
        self.runs[mode] = found.decisions

    def explore(
        self, standin: nn.Module, mode: Mode, inputs: Arguments, left: set[int], *, by_chance: bool
    ) -> None:
        """Find further ways through the network, on which it uses what it has left out so far.

        Args:
            standin: the network on the meta device, at its own sizes, in the mode.
            mode: the mode.
            inputs: on the meta device.
            left: ids of the tensors of ``standin`` that have taken no part.
            by_chance: try other masks; else other truth values and numbers that Python looks at.
        """
        run = self._recording(standin, inputs)
        first: list[dict[str, Any]] = [{"yes": True}, {"yes": False}]
        if by_chance:
            first = [{"chance": chance} for chance in OTHERS]
        for how in first:
            self._try(run, mode, left, **how)
        idle, kind = 0, "chance" if by_chance else "number"
        for number in range(_MOST_NUMBERS):
            if not left or idle == _PATIENCE[kind]:
                break
            idle = 0 if self._try(run, mode, left, **{kind: number}) else idle + 1

    def _try(self, run: Callable[..., Shadows], mode: Mode, left: set[int], **how: Any) -> bool:
        """Keep a way that can be gone and shows something new; return whether it does."""
        try:
            found = run(**how)
        except Exception:  # checks of arguments, loops without an end
            return False
        shows = bool(left & found.met)
        left -= found.met
        decisions = found.decisions if found.decisions or mode in self.runs else None
        if shows or "yes" in how:
            self.ways.setdefault(mode, []).append(Way(decisions, how.get("chance", "spread")))
        return shows

    def fault(self, mode: Mode, inputs: Arguments) -> Exception | None:
        """Return what the network itself raises on its inputs; None if it runs, or has no values.

        Args:
            mode: the mode to run it in.
            inputs: on the meta device.
        """
        if not self._has_values:
            return None
        model = stand_in(self.model, {}).train(mode == "train")
        try:
            with torch.random.fork_rng(), torch.no_grad():
                real = map_tensors(Tensor.clone, self.real_inputs(inputs))
                call(model.get_submodule(self.module), real)
        except Exception as error:  # a user's forward may raise anything
            return error
        return None

    def _recording(self, standin: nn.Module, inputs: Arguments) -> Callable[..., Shadows]:
        target = standin.get_submodule(self.module)
        values, real = values_of(standin, self.model), self.real_inputs(inputs)

        def run(**how: Any) -> Shadows:
            return record(target, values, inputs, real, self.device, **how)

        return run

    def real_inputs(self, inputs: Arguments) -> Arguments:
        """Return the inputs with values: the user's, or drawn ones of the same sizes."""
        target = self.model.get_submodule(self.module)
        shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
        return batches_for(target, shapes, False, self.example)[0]


def _reason(error: Exception) -> str:
    """Return why decisions cannot be told, in words that are no numbers of Python's own."""
    if isinstance(error, KeyError) or "truth value of an array" in str(error):
        return "the values leave torch (tolist, numpy), and what becomes of them cannot be replayed"
    return error.message.rstrip(".") if isinstance(error, TraceError) else first_line(error)
