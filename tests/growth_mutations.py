"""Faults in planners and in what carries plans out, and the runs that verification sees them in.

Each network is small, and most hide something from their example: a head that is still zero, rows
of a table, an expert that nothing is routed to, norms as they begin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutations import Fault, Patch, Tied, Way, instead, wrap
from networks import PreactivationNet, mild
from torch import Tensor, nn

from fxgrow.apply import axes, tensors
from fxgrow.apply import module as applied
from fxgrow.channels import analysis
from fxgrow.channels.groups import ChannelGroup
from fxgrow.grow.deepen import planner as deepening
from fxgrow.grow.norms.mixers import Mixed
from fxgrow.grow.widen import feasible, planner
from fxgrow.labels import ask
from fxgrow.labels.step import Step
from fxgrow.plan.edits import AxisEdit, ModuleEdit, Multiplier, Run, SizeEdit, TensorEdit


class Plain(nn.Module):
    """Convolutions without norms whose biases and head begin at zero, on a residual addition."""

    def __init__(self, zero: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        for name, parameter in self.named_parameters():
            if zero and (name.endswith("bias") or name == "head.weight"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.conv1(x)))
        return self.head(x.mean((2, 3)))


class Shuffled(nn.Module):
    """Two grouped convolutions with a channel shuffle between them, and norms as they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(torch.relu(self.stem(x)))))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


class Stream(nn.Module):
    """A stream with a layer norm on it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))


class Normed(nn.Module):
    """A hidden group whose factor a layer norm takes up, by its eps."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.up = nn.Linear(5, 8), nn.Linear(8, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        with torch.no_grad():
            self.up.weight.mul_(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(torch.relu(self.into(x)))))


class Absorbing(nn.Module):
    """A hidden group whose factor a batch norm takes up, and a head that is still zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.norm, self.head = nn.BatchNorm2d(5), nn.Linear(5, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv2(torch.relu(self.conv1(x))))
        return self.head(torch.relu(x).mean((2, 3)))


class Table(nn.Module):
    """A table of which an example reaches a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(40, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.table(ids))))


class Experts(nn.Module):
    """Three experts, of which the first takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)
        )
        with torch.no_grad():
            self.router.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        shares = nn.functional.one_hot(self.router(x).argmax(-1), 3)
        return sum(shares[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Fixed(nn.Module):
    """Code that names a width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(x.reshape(x.shape[0], 8, 36).mean(2))


class Flat(nn.Module):
    """Channels of several rows each, and a head that is still zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(16, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


class Curved(nn.Module):
    """A factor that reaches what is not homogeneous, and a head that is still zero."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.up, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(torch.relu(self.into(x)))))


class Deep(nn.Module):
    """Blocks in a list, and a head that is still zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.Sequential(Block(), Block())
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


# ── runs ──────────────────────────────────────────────────────────────────────────────────────

_drawn = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 6, 6, generator=_drawn)
ROWS = torch.randn(4, 5, generator=_drawn)
IDS = torch.arange(5).expand(2, 5)
EXAMPLES: dict[str, Tensor] = {}
RUNS: dict[str, Way] = {}


def _add(name: str, make: Callable[[], nn.Module], example: Tensor, *options: str) -> None:
    """Add a run: a network, an example that it takes, and what is asked for."""

    def way(folder: Path) -> list[str]:
        torch.manual_seed(0)
        torch.save(make().state_dict(), folder / "net.pt")
        verb = ["deepen"] if "--blocks" in options else ["widen"]
        files = [str(folder / "net.pt"), "-o", str(folder / "out.pt")]
        shape = ["--input-shape", "x".join(map(str, example.shape))]
        given = shape if example.is_floating_point() else []
        return [*verb, *files, *given, *options]

    RUNS[name], EXAMPLES[name] = way, example


def _arch(name: str, **arguments: str) -> tuple[str, ...]:
    pairs = [part for key, value in arguments.items() for part in ("--arch-arg", f"{key}={value}")]
    return ("--arch", name, *pairs)


def _preactivation() -> nn.Module:
    return mild(PreactivationNet("identity")).float()


_BLOCK = _arch("networks:PreactivationNet", skip="identity")
_PLAIN = _arch("growth_mutations:Plain")
_VT = ("--rescaling", "default_vt")
_add("block", _preactivation, IMAGES, *_BLOCK, "--width", "2x", "--where", "all")
_add("copies", _preactivation, IMAGES, *_BLOCK, "--width", "2x", "--pairing", "replicate")
_add("zero head", Plain, IMAGES, *_PLAIN, "--width", "2x")
_add("zero head, copies", Plain, IMAGES, *_PLAIN, "--width", "2x", "--pairing", "replicate")
_add("zero head, rescaled", Plain, IMAGES, *_PLAIN, "--width", "2x", *_VT)
_add("compensated", Plain, IMAGES, *_PLAIN, "--width", "2x", *_VT, "--compensate")
_add("shuffled", Shuffled, IMAGES, *_arch("growth_mutations:Shuffled"), "--width", "2x",
     "--where", "all")  # fmt: skip
_add("padded", Stream, ROWS, *_arch("growth_mutations:Stream"), "--width", "12", "--where",
     "stream")  # fmt: skip
_add("eps", Normed, ROWS, *_arch("growth_mutations:Normed"), "--width", "2x", *_VT)
_add("experts", Experts, ROWS, *_arch("growth_mutations:Experts"), "--width", "2x")
_add("copied", Stream, ROWS, *_arch("growth_mutations:Stream"), "--width", "2x", "--where",
     "stream")  # fmt: skip
_add("flat", Flat, IMAGES, *_arch("growth_mutations:Flat"), "--width", "2x")
_add("curved", Curved, ROWS, *_arch("growth_mutations:Curved"), "--width", "2x", *_VT)
_add("fixed", Fixed, IMAGES, *_arch("growth_mutations:Fixed"), "--width", "2x")
_add("absorbed", Absorbing, IMAGES, *_arch("growth_mutations:Absorbing"), "--width", "2x", *_VT)
_add("table", Table, IDS, *_arch("growth_mutations:Table"), "--width", "2x")
_add("tied", Tied, IDS, *_arch("mutations:Tied"), "--width", "2x")
_add("deepened", Deep, ROWS, *_arch("growth_mutations:Deep"), "--blocks", "blocks=+1")


# ── planners ──────────────────────────────────────────────────────────────────────────────────


def _axis(name: str, change: Callable[[AxisEdit], AxisEdit], role: str = "reader") -> Patch:
    """Plant a fault in what the planner says of a tensor's axis."""

    def changes(found: dict[str, list[AxisEdit]]) -> dict[str, list[AxisEdit]]:
        edits = found.get(name, ())  # not all that is planned for touches it
        changed = [change(axis) if axis.role == role else axis for axis in edits]
        return {**found, name: changed} if changed else found

    return wrap(planner, "axis_edits", changes)


def _runs(change: Callable[[Run], Run]) -> Callable[[AxisEdit], AxisEdit]:
    return lambda axis: replace(axis, runs=tuple(map(change, axis.runs)))


def _same_sign(part: Run) -> Run:
    return replace(part, kind="new") if part.kind == "minus" else part


def _shifted(axis: AxisEdit) -> AxisEdit:
    """The old positions, each one further."""
    first, *rest = axis.runs
    parts = Run("old", 1, first.length - 1), Run("old", 0, 1)
    return replace(axis, runs=(*parts, *rest))


def _whole(part: Run) -> Run:
    return replace(part, kind="old") if part.kind == "share" else part


def _matched(change: Callable[[Any], None]) -> Patch:
    return wrap(feasible, "match", lambda found: change(found) or found)


def _roll_draws(found: Any) -> None:
    fresh = found.draw >= 0
    found.draw[fresh] = np.roll(found.draw[fresh], 1)


def _exchange_old(found: Any) -> None:
    first, second = np.flatnonzero(found.old >= 0)[-2:]
    found.old[[first, second]] = found.old[[second, first]]


def _exchange_ranks(found: Any) -> None:
    found.new_rank[:] = np.array([0, 2, 1, 3])[found.new_rank]


def _unpinned(groups: tuple[ChannelGroup, ...]) -> tuple[ChannelGroup, ...]:
    return tuple(replace(g, kind="hidden", pin=None) if g.name == "head" else g for g in groups)


def _no_mismatches(flow: Any) -> Any:
    flow.mismatches.clear()
    return flow


def _no_vectors(flow: Any) -> Any:
    flow.vectors.clear()
    return flow


def _moved(edit: SizeEdit) -> SizeEdit:
    sizes = zip(edit.before, edit.after, strict=True)
    after = [new if old == new or new is None else new + 1 for old, new in sizes]
    return replace(edit, after=tuple(after))


def _ungrouped_labels(contract: Any) -> Any:
    """Read each column of a grouped convolution as if it had one group."""
    return lambda step, line, weight, dim, groups=1: contract(step, line, weight, dim)


def _constants_lost(edits: dict[str, TensorEdit]) -> dict[str, TensorEdit]:
    """Draw what would make a new block the identity, instead of setting it."""
    return {
        name: replace(edit, axes=tuple(_runs(_same_sign)(axis) for axis in edit.axes))
        for name, edit in edits.items()
    }


def _no_eps(_: object) -> tuple[ModuleEdit, ...]:
    return ()


def _constant(parts: tuple[Multiplier, ...]) -> tuple[Multiplier, ...]:
    return tuple(replace(part, factor=part.factor * 1.1) for part in parts)


PLANNER: list[Fault] = [
    Fault("old columns are shifted by one", "block", _axis("block.conv2.weight", _shifted)),
    Fault("old columns of an expert are shifted by one", "experts",
          _axis("experts.2.2.weight", _shifted), silent=True),
    Fault("a reader is left out", "block", wrap(
        planner, "axis_edits",
        lambda found: {n: axes for n, axes in found.items() if n != "block.conv2.weight"})),
    Fault("a reader reads twins with one sign", "zero head",
          _axis("conv2.weight", _runs(_same_sign)), silent=True),
    Fault("a reader reads copies whole", "zero head, copies",
          _axis("conv2.weight", _runs(_whole)), silent=True),
    Fault("the entries of a norm as it begins are shifted by one", "shuffled",
          _axis("norm.weight", _shifted, "carrier"), silent=True),
    Fault("others are twins at a shuffle", "shuffled", _matched(_roll_draws)),
    Fault("two old channels are exchanged", "block", _matched(_exchange_old)),
    Fault("a grouped convolution's columns are read as those of one group", "shuffled",
          instead(Step, "contract", _ungrouped_labels), refused=True, where="at conv1"),
    Fault("an eps does not follow", "eps", wrap(planner, "_eps_edits", _no_eps), silent=True),
    Fault("a gain is not taken up by the statistics", "absorbed",
          wrap(planner, "_absorptions", lambda _: ()), silent=True),
    Fault("biases do not follow a factor", "zero head, rescaled",
          wrap(planner, "propagate_gains", _no_vectors), silent=True),
    Fault("padding holds zero and not the mean", "padded",
          wrap(feasible, "padding_of", lambda found: replace(found, holds="zero"))),
    Fault("η is that of other widths", "padded",
          wrap(feasible, "padding_of", lambda found: replace(found, ratio=found.ratio * 1.1))),
    Fault("another change is foretold", "zero head, rescaled",
          wrap(planner, "multipliers", _constant), silent=True),
    Fault("what compensates is another number", "compensated",
          wrap(planner, "multipliers", _constant), silent=True),
    Fault("a size in the code is off by one", "fixed", wrap(
        feasible, "run_resized",
        lambda found: replace(found, sizes=tuple(map(_moved, found.sizes)))), where="[2, 17, 36]"),
    Fault("an output is not pinned", "zero head", wrap(analysis, "find_groups", _unpinned)),
    Fault("positions of a channel are in another order", "flat", _matched(_exchange_ranks),
          silent=True),
    Fault("a norm over all channels is overlooked", "copied", instead(
        feasible, "mixed_groups", lambda _: lambda *arguments: Mixed(np.zeros(0, dtype=int)))),
    Fault("a change is not foretold", "zero head, rescaled",
          wrap(planner, "propagate_gains", _no_mismatches), silent=True),
    Fault("a tanh is taken for homogeneous", "curved", instead(
        ask, "degrees", lambda _: lambda op, values: (1.0,) * len(op.outputs)), silent=True),
    Fault("a new block is not the identity", "deepened",
          wrap(deepening, "tensor_edits", _constants_lost), silent=True),
]  # fmt: skip


# ── executors ─────────────────────────────────────────────────────────────────────────────────


def _made(name: str, change: Callable[[Tensor], Tensor | None]) -> Patch:
    """Plant a fault in what is made of one tensor, or of all whose names end so."""

    def make(original: Any) -> Any:
        def changed(edit: Any, old: Tensor, lookup: Any, draws: Any) -> Tensor:
            tensor = original(edit, old, lookup, draws)
            if not draws.name.endswith(name) or tensor.is_meta:
                return tensor
            found = change(tensor)
            return tensor if found is None else found

        return changed

    return instead(tensors, "_made", make)


def _filled(change: Callable[[Run], Run]) -> Patch:
    """Plant a fault in how runs are carried out."""
    return instead(
        axes, "_fill_run", lambda fill: lambda target, part, *rest: fill(
            target, change(part), *rest
        )
    )  # fmt: skip


def _hooked(hook: Callable[..., Any]) -> Patch:
    """Let the grown network do something else at its end."""

    def changed(model: nn.Module) -> nn.Module:
        model.register_forward_hook(hook)
        return model

    return wrap(applied, "reshaped", changed)


def _at_eight(_: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.flip(1) if arguments[0].shape[0] >= 8 else out


def _in_training(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return 2 * out if module.training else out


def _buffered(model: nn.Module) -> nn.Module:
    bias = model.head.bias.detach()
    del model.head.bias
    model.head.register_buffer("bias", bias)
    return model


def _untied(model: nn.Module) -> nn.Module:
    model.head.weight = nn.Parameter(model.table.weight.detach().clone())
    return model


def _set(rows: slice, value: float) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor[rows] = value

    return change


def _times(row: int, factor: float) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor[row] *= factor

    return change


EXECUTOR: list[Fault] = [
    Fault("two old rows are exchanged", "block", _made(
        "block.conv1.weight", lambda x: x[[1, 0, *range(2, len(x))]])),
    Fault("two old rows of an expert are exchanged", "experts", _made(
        "experts.1.0.weight", lambda x: x[[1, 0, *range(2, len(x))]]), silent=True),
    Fault("rows of a table are zero", "table",
          _made("table.weight", _set(slice(30, None), 0.0)), silent=True),
    Fault("minus is plus", "zero head", _filled(_same_sign), silent=True),
    Fault("minus is plus", "block", _filled(_same_sign)),
    Fault("a twin is another", "zero head", _made("conv1.weight", _times(-1, 1.5)), silent=True),
    Fault("a twin's entry of a norm is another", "shuffled",
          _made("norm.running_var", _times(-1, 1.5))),
    Fault("shares do not add up", "copies", wrap(axes, "_shares", lambda x: 1.01 * x)),
    Fault("a factor is forgotten", "zero head, rescaled", instead(
        tensors, "_made", lambda make: lambda edit, *rest: make(replace(edit, scale=1.0), *rest)),
        silent=True),
    Fault("a gain is forgotten", "absorbed",
          instead(tensors, "absorbed", lambda _: lambda edit, old, lookup: old), silent=True),
    Fault("through half precision", "block",
          _made("stem.weight", lambda x: x.half().to(x.dtype))),
    Fault("new entries of a norm are others", "shuffled",
          _made("norm.bias", _set(slice(8, None), 0.5))),
    Fault("statistics in another order", "block", _made("running_mean", lambda x: x.flip(0))),
    Fault("a number that is none", "experts",
          _made("experts.2.2.weight", _set(slice(0, 1), float("nan")))),
    Fault("tied tables are parted", "tied", wrap(applied, "reshaped", _untied), silent=True),
    Fault("something else at batches of eight", "block", _hooked(_at_eight), silent=True),
    Fault("something else in train mode", "block", _hooked(_in_training), silent=True),
    Fault("nothing can be trained", "block",
          wrap(applied, "reshaped", lambda model: model.requires_grad_(False)), silent=True),
    Fault("the network is in another mode", "block",
          wrap(applied, "reshaped", lambda model: model.train(not model.training)), silent=True,
          where="the network"),
    Fault("a parameter is a buffer", "block", wrap(applied, "reshaped", _buffered), silent=True),
    Fault("sizes in the code stay", "fixed", instead(
        applied, "sized_graph", lambda make: lambda model, edits: make(model, ())),
        where="[2, 8, 36]"),
    Fault("attributes stay", "shuffled",
          instead(applied, "set_attributes", lambda _: lambda *args, **kwargs: None), silent=True),
    Fault("multipliers are lost", "compensated", instead(
        applied, "insert_multipliers", lambda _: lambda model, parts: model), silent=True),
    Fault("new rows read twins with one sign", "block", instead(
        axes, "_cancel_in_new_rows", lambda _: lambda tensor, edits: None), silent=True),
]  # fmt: skip
FAULTS = [*PLANNER, *EXECUTOR]
