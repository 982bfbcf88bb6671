"""What a network decides by values, found out once where it cannot be followed without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxgrow.errors import TraceError
from fxgrow.modules.calling import Arguments, call, map_tensors, tensors_in
from fxgrow.modules.decisions import Decision, Replay
from fxgrow.modules.inputs import batches_for
from fxgrow.modules.shadows import record, values_of
from fxgrow.modules.standin import first_line, stand_in
from fxgrow.modules.tensors import named_tensors

Mode = Literal["eval", "train"]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Decided:
    """What a network decides by values, in each mode.

    Attributes:
        model: the user's network; only read.
        module: the submodule of it that is followed, "" for the whole.
        example: the user's inputs; None where they are inferred.
        runs: for each mode, the decisions of each run on values, the plainest first; none where
            shapes are enough.
    """

    model: nn.Module
    module: str = ""
    example: object = None
    runs: dict[Mode, list[Sequence[Decision]]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network's tensors are, or would be."""
        found = (tensor.device for tensor in named_tensors(self.model).values())
        return next((device for device in found if device.type != "meta"), _CPU)

    @property
    def _has_values(self) -> bool:
        return not any(tensor.is_meta for tensor in named_tensors(self.model).values())

    def replay(self, mode: Mode, run: int = 0) -> Replay | None:
        """Return what decides in a run on shapes, None where nothing is to be decided."""
        runs = self.runs.get(mode, ())
        return Replay(runs[run], self.device) if runs else None

    def further(self, mode: Mode) -> list[Replay]:
        """Return what decides in further runs, which take other ways."""
        return [Replay(run, self.device) for run in self.runs.get(mode, ())[1:]]

    def forgotten(self) -> Decided:
        """Return the same without any runs: the inputs are others."""
        return replace(self, runs={})

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
                f"{first_line(error)}."
            ) from error
        self.runs[mode] = [found]

    def explore(self, standin: nn.Module, mode: Mode, inputs: Arguments) -> None:
        """Find out what the network decides where truth values are all true, or all false."""
        run = self._recording(standin, inputs)
        for answer in (True, False):
            try:
                found = run(yes=answer)
            except Exception:  # checks of arguments, loops without an end
                continue
            if found not in self.runs[mode]:
                self.runs[mode].append(found)

    def fault(self, mode: Mode, inputs: Arguments) -> Exception | None:
        """Return what the network itself raises on its inputs; None if it runs, or has no values.

        Args:
            mode: the mode to run it in.
            inputs: on the meta device.
        """
        if not self._has_values:
            return None
        lent = {id(parameter): parameter for parameter in self.model.parameters()}
        model = stand_in(self.model, {}, shared=lent).train(mode == "train")
        try:
            with torch.random.fork_rng(), torch.no_grad():
                real = map_tensors(Tensor.clone, self.real_inputs(inputs))
                call(model.get_submodule(self.module), real)
        except Exception as error:  # a user's forward may raise anything
            return error
        return None

    def _recording(
        self, standin: nn.Module, inputs: Arguments
    ) -> Callable[..., tuple[Decision, ...]]:
        target = standin.get_submodule(self.module)
        values, real = values_of(standin, self.model), self.real_inputs(inputs)

        def run(**how: Any) -> tuple[Decision, ...]:
            return record(target, values, inputs, real, self.device, **how)

        return run

    def real_inputs(self, inputs: Arguments) -> Arguments:
        """Return the inputs with values: the user's, or drawn ones of the same sizes."""
        target = self.model.get_submodule(self.module)
        shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
        return batches_for(target, shapes, False, self.example)[0]
