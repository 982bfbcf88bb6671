"""From a model to something that can be run on meta tensors and read as an fx graph.

``torch.fx.symbolic_trace`` changes the model it traces, so what is traced is a stand-in: the same
module tree with every parameter and buffer on the meta device. The user's model is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx, nn

from fxgrow.errors import TooLargeError, TraceError
from fxgrow.labels.decided import Decided, Mode
from fxgrow.labels.graphs import symbolic_trace
from fxgrow.labels.parts import pin_shared, unused
from fxgrow.labels.propagate import MOST_ENTRIES, Place, Watch, no_watch, propagate
from fxgrow.labels.running import Interpreter, Listing, running_modules
from fxgrow.labels.space import LabelSpace
from fxgrow.labels.tape import Tape
from fxgrow.labels.training import TrainRun, run_in_training
from fxgrow.modules.calling import Arguments, call, on_meta, tensors_in
from fxgrow.modules.decisions import Decider
from fxgrow.modules.draws import Chance, same_chance
from fxgrow.modules.inputs import inputs_in_training, nothing_fits, possible_inputs
from fxgrow.modules.standin import first_line, in_eval_mode, keeping_state, set_training, stand_in
from fxgrow.modules.tensors import scalar_buffers, zero_buffers

Tracer = Literal["torch.fx", "dispatch"]
_MOST_INFERRED = 2**26  # entries of a tensor on small inputs of our own


@dataclass
class Traced:
    """A model on meta tensors, and inputs it accepts.

    Attributes:
        standin: the module tree with meta parameters and buffers; fxgrow's own, free to change.
        inputs: arguments that run through it, tensors on meta; if they are to be inferred, none
            before :meth:`follow` has found them.
        inferred: whether the inputs are inferred from the first layer.
        module: the submodule that is followed, by its fully qualified name; "" for the whole. Names
            of tensors and modules are those in the whole all the same.
        decided: what the network decides by values.
        zeros: buffers that no state_dict holds and that are zeros; they may change width.
        scalars: the values of buffers without dims that no state_dict holds.
        begins: during a run, whether it is the first of the network at these sizes.
        exploring: whether what it decides is still to be found out.
        at: during a run, returns the fx node and the module that are running; after a failure,
            those that failed.
        unused: parameters that took part in no run that was labelled.
    """

    standin: nn.Module
    inputs: Arguments
    inferred: bool
    decided: Decided
    module: str = ""
    begins: bool = True
    exploring: bool = False
    zeros: frozenset[str] = frozenset()
    scalars: Mapping[str, float] = field(default_factory=dict)
    at: Callable[[], Place] = lambda: ("", "")
    unused: tuple[str, ...] = ()
    _by_chance: set[Mode] = field(default_factory=set)
    _differs: bool | None = None
    _trained: TrainRun | Exception | None = None

    @cached_property
    def _symbolic(self) -> tuple[fx.Graph | None, str]:
        """The fx graph, and why there is none."""
        try:
            return symbolic_trace(self.target), ""
        except Exception as error:  # a user's forward may raise anything
            return None, first_line(error)

    @property
    def graph(self) -> fx.Graph | None:
        """The fx graph over the target's submodules, or None; traced when first asked for.

        Labels flow through the network's own ``forward``. The graph is what multipliers are
        inserted into, and what tells the order of execution before anything is run.
        """
        return self._symbolic[0]

    @cached_property
    def untraceable(self) -> str:
        """Why there is no graph that runs on the inputs, or ""."""
        return self._run_of_graph[1]

    @property
    def nodes(self) -> tuple[tuple[str, str], ...]:
        """The operations that the graph runs, in order, by name, and the node of each."""
        return self._run_of_graph[0]

    @cached_property
    def _run_of_graph(self) -> tuple[tuple[tuple[str, str], ...], str]:
        """The operations of the graph with their nodes, or why there are none."""
        graph, reason = self._symbolic
        if graph is None:
            return (), reason
        interpreter = Interpreter(self.target, graph, self.module)
        listing = Listing(interpreter.place, self.decided.replay("eval"))
        try:
            with keeping_state(self.standin), same_chance(), torch.no_grad(), listing:
                call(interpreter.run_on, self.inputs)
        except Exception as error:  # control flow may have taken another branch
            return (), f"its graph does not run: {first_line(error)}"
        return tuple(listing.found), ""

    @property
    def tracer(self) -> Tracer:
        """What traces the computation: ``torch.fx``, or the dispatcher alone."""
        return "dispatch" if self.untraceable else "torch.fx"

    @property
    def target(self) -> nn.Module:
        """What is run: the stand-in, or the submodule of it that is followed."""
        return self.standin.get_submodule(self.module)

    @property
    def _named(self) -> frozenset[str]:
        """The buffers that no state_dict holds and that are followed all the same."""
        return self.zeros | self.scalars.keys()

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the input tensors, in order."""
        return _shapes(self.inputs)

    @property
    def _told_shapes(self) -> str:
        return ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)

    def follow(self, watch: Watch = no_watch) -> tuple[LabelSpace, Tape]:
        """Label a run on the inputs, or on the first possible ones that fit.

        Args:
            watch: sees each run from above; see :func:`fxgrow.labels.propagate.propagate`.

        Raises:
            TraceError: the run failed, or nothing fits.
        """
        if not self.inferred:
            return self._label_deciding(watch)
        problems: list[str] = []
        try:
            for arguments in possible_inputs(self.target, self._get_graph):
                self.inputs, self.decided = arguments, self.decided.forgotten()
                try:
                    return self._label_deciding(watch)
                except TooLargeError:
                    raise
                except TraceError as error:
                    problems.append(error.message)
        except (TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
            problems.append(f"{first_line(error)}.")  # a layer tells sizes that cannot be
        raise nothing_fits(self.target, self._get_graph, problems)

    def _label_deciding(self, watch: Watch) -> tuple[LabelSpace, Tape]:
        """Label a run, after one on values if it looks at some."""
        self.exploring = True
        try:
            return self.label(watch)
        except TooLargeError:
            raise
        except TraceError as error:
            if "eval" in self.decided.runs or not self._may_decide(error, "eval"):
                raise
            self._find_out("eval")
            return self.label(watch)
        finally:
            self.exploring = False

    def _may_decide(self, error: Exception, mode: Mode) -> bool:
        """Return whether a run failed that might do so for want of values alone."""
        cause = error.__cause__ or error
        if isinstance(cause, NotImplementedError) or "meta" in str(cause).lower():
            return True
        return not self.inferred and self.decided.fault(mode, self.inputs) is None

    def _decides_in_training(self, error: Exception) -> bool:
        """Find out what the network decides in train mode, if it failed there for want of that."""
        if not self.exploring or "train" in self.decided.runs:
            return False
        if not self._may_decide(error, "train"):
            return False
        try:
            self._find_out("train")
        except TraceError:  # what failed says more
            return False
        return True

    def _find_out(self, mode: Mode) -> None:
        """Find out what the network decides by values.

        Raises:
            TraceError: it does not run on its inputs, or nobody can follow what it does.
        """
        self.decided.find_out(self.standin, mode, self.inputs, f"inputs of {self._told_shapes}")

    def _get_graph(self) -> fx.Graph | None:
        return self.graph

    def label_graph(self, graph: fx.Graph, watch: Watch = no_watch) -> tuple[LabelSpace, Tape]:
        """Run a graph of the target node by node under the labeller.

        Args:
            graph: over the target's submodules.
            watch: sees the run from above; see :func:`fxgrow.labels.propagate.propagate`.

        Raises:
            TraceError: the run failed.
        """
        interpreter = Interpreter(self.target, graph, self.module)
        self.at = interpreter.place
        return self._run(interpreter.run_on, watch)

    def label(self, watch: Watch = no_watch) -> tuple[LabelSpace, Tape]:
        """Run the stand-in's own ``forward`` under the labeller, as its sizes are now.

        Args:
            watch: sees the run from above; see :func:`fxgrow.labels.propagate.propagate`.

        Raises:
            TraceError: the run failed.
        """
        stack: list[str] = []
        self.at = lambda: ("", stack[-1] if stack else "")
        with running_modules(self.standin, stack):
            return self._run(self.target, watch)

    def _run(self, run: Callable[..., Any], watch: Watch) -> tuple[LabelSpace, Tape]:
        """Label a run in eval mode, and one in train mode if that uses further parameters."""
        try:
            if self._differs is None:  # before labels, for code that keeps what it makes
                self._trained = self._run_in_training()
                in_eval_mode(self.standin)
            space, tape = self._in_eval_mode(run, watch)
            more = self._unused(space) or self._adds_in_training(tape)
            complete = not more or self._label_training(space, watch)
            if not complete:
                return self._run(run, watch)
            self._label_by_chance(run, space, watch)
            self.unused = tuple(self._unused(space))
        except TraceError:
            raise
        except Exception as error:  # a user's forward may raise anything
            node, module = self.at()
            where = f" at {module or node}" if module or node else ""
            told = f"on inputs of {self._told_shapes}"
            if "eval" in self.decided.runs:
                problem = f"the model runs {told}, and cannot be followed there{where}"
            else:
                problem = f"the model does not run {told}{where}"
            blame = not self.inferred and "eval" not in self.decided.runs
            raise TraceError(
                f"{problem}: {first_line(error)}.",
                name=module or node,
                way_out="Give inputs that it takes." if blame else "",
            ) from error
        finally:
            in_eval_mode(self.standin)
        pin_shared(space, self.standin, self.module)
        return space, tape

    def _in_eval_mode(self, run: Callable[..., Any], watch: Watch) -> tuple[LabelSpace, Tape]:
        """Label a run in eval mode, and others that take other ways where it leaves parts out."""
        self.begins = True
        space, tape = self._labelled(run, None, watch, self.decided.replay("eval"))
        self.begins = False
        if tape.by_chance:
            self._by_chance.add("eval")
        if self.exploring and "eval" in self.decided.runs:
            self._explore("eval", space, by_chance=False)
        for decider, chance in self.decided.further("eval", by_chance=False):
            self._labelled(run, space, watch, decider, chance)
        return space, tape

    def _explore(self, mode: Mode, space: LabelSpace, *, by_chance: bool) -> None:
        """Find ways on which the network uses what it has left out so far, if that is anything."""
        if left := {*self._unused(space).values()}:
            self.decided.explore(self.standin, mode, self.inputs, left, by_chance=by_chance)

    def _label_by_chance(self, run: Callable[..., Any], space: LabelSpace, watch: Watch) -> None:
        """Label runs with other masks, which use other parts of the network."""
        modes: dict[Mode, Callable[..., Any]] = {"eval": run, "train": self.target}
        for mode, called in modes.items():
            set_training(self.target, mode=mode == "train")
            if self.exploring and mode in self._by_chance:
                self._explore(mode, space, by_chance=True)
            for decider, chance in self.decided.further(mode, by_chance=True):
                self._labelled(called, space, watch, decider, chance)

    def _labelled(
        self,
        run: Callable[..., Any],
        space: LabelSpace | None,
        watch: Watch,
        decider: Decider | None,
        chance: Chance = "spread",
    ) -> tuple[LabelSpace, Tape]:
        """Label a run of the network in the mode that it is in."""
        most = _MOST_INFERRED if self.inferred else MOST_ENTRIES
        with keeping_state(self.standin):
            return propagate(
                run, self.standin, self.inputs, place=self.at, watch=watch, zeros=self._named,
                most=most, space=space, decider=decider, chance=chance,
            )  # fmt: skip

    def _label_training(self, space: LabelSpace, watch: Watch) -> bool:
        """Label what train mode adds, or find inputs for it and return False to begin again."""
        stack: list[str] = []
        try:
            target = self.target
            set_training(target, mode=True)
            with running_modules(self.standin, stack), keeping_state(self.standin):
                _, tape = propagate(
                    target, self.standin, self.inputs, space=space, watch=watch, zeros=self._named,
                    place=lambda: ("", stack[-1] if stack else ""),
                    decider=self.decided.replay("train"),
                )  # fmt: skip
            if tape.by_chance:
                self._by_chance.add("train")
        except Exception as error:
            if self._decides_in_training(error):
                return False
            if not self.inferred:
                raise TraceError(
                    f"in train mode, where it uses further parameters, the model does not run on "
                    f"inputs of {self._told_shapes}: {first_line(error)}.",
                    way_out="Give larger inputs: its auxiliary heads must follow the rest.",
                ) from error
            larger = inputs_in_training(self.target, self._get_graph, self.input_shapes)
            if not larger:
                raise
            self.inputs, self.decided = larger, self.decided.forgotten()
            return False
        return True

    def _run_in_training(self) -> TrainRun | Exception:
        decider = self.decided.replay("train")
        return run_in_training(self.standin, self.target, self.inputs, decider)

    def _adds_in_training(self, tape: Tape) -> bool:
        """Return whether train mode draws noise or returns something besides."""
        if self._differs is None:
            ran = self._trained
            if isinstance(ran, Exception) and self._decides_in_training(ran):
                ran = self._run_in_training()
            self._differs = isinstance(ran, TrainRun) and ran.adds_to(tape)
        return self._differs

    def _unused(self, space: LabelSpace) -> dict[str, int]:
        return unused(space, self.standin, self.module)


def trace(model: nn.Module, example_inputs: object = None, module: str = "") -> Traced:
    """Trace a model, or one submodule of it, without touching it.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None infers
            them from the first layer.
        module: the submodule to trace, by its fully qualified name; the inputs are then its.

    Returns:
        The traced model. Where ``torch.fx`` cannot follow the control flow, the computation still
        is, at dispatch level, without a graph to rewrite.

    Raises:
        TraceError: the model cannot be copied.
    """
    standin = in_eval_mode(stand_in(model))
    inferred = example_inputs is None
    inputs = () if inferred else on_meta(example_inputs)
    decided, scalars = Decided(model, module, example_inputs), scalar_buffers(model)
    zeros = zero_buffers(model) - scalars.keys()
    return Traced(standin, inputs, inferred, decided, module, zeros=zeros, scalars=scalars)


def _shapes(inputs: Arguments) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(inputs))
