"""Whether new channels take part in training: a flat dict of numbers for any logger.

>>> import torch, fxgrow.training
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> grown = fxgrow.training.grow_(net, "2x")
>>> optimizer, monitor = torch.optim.SGD(net.parameters(), lr=0.1), fxgrow.training.monitor(net)
>>> for step in range(2):
...     net(torch.randn(16, 4)).square().mean().backward()
...     optimizer.step()
...     told = monitor.step()
...     optimizer.zero_grad()
>>> sorted(told)[:4]
['0/cosine/twins', '0/dead/new', '0/dead/old', '0/effective_rank']
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fxgrow.errors import UsageError, warn
from fxgrow.training.followers import unwrapped
from fxgrow.training.history import stages_within
from fxgrow.training.origins import GrownGroup, Positions, grown_groups


def monitor(model: nn.Module, *, every: int = 1, rank: bool = True) -> Monitor:
    """Return what measures the grown parts of a network as it trains.

    Args:
        model: the network, which may grow further.
        every: how many steps lie between measurements. Those between cost nothing; one takes a copy
            of the weights of grown layers the step before.
        rank: whether to compute effective ranks, which takes the most time of all: with a ResNet-18
            one or two seconds for each measurement.

    Raises:
        UsageError: ``every`` is less than 1.
    """
    if type(every) is not int or every < 1:
        raise UsageError(f"every={every!r} is no number of steps.", way_out="Give 1 or more.")
    return Monitor(unwrapped(model), every, rank)


class Monitor:
    """Measures a network after steps of its optimizer; see :func:`monitor`.

    For each channel group that has grown, or block that is new, by its name:

    - ``grad_norm/old``, ``/new``: Frobenius norms of the gradients of what writes and reads old and
      new channels. What both an old and a new channel share counts as new.
    - ``weight_norm``, ``update_norm``: likewise of the weights, and of what the last step changed.
    - ``update_ratio``: that, of the weights; about 1e-3 is usual, far less is not learning, far
      more is not stable.
    - ``cosine/twins``, ``cosine/copies``: the mean cosine between what writes channels that began
      with one value; 1 while they have not parted.
    - ``effective_rank``: e to the entropy of the singular values of what writes the channels (Roy
      and Vetterli 2007), of all and of the old ones alone (``/old``).
    - ``dead/old``, ``/new``: the part of channels whose writers got no gradient at all.
    """

    def __init__(self, model: nn.Module, every: int = 1, rank: bool = True) -> None:
        self._model, self._every, self._rank = model, every, rank
        self._count = 0
        self._growths = -1
        self._groups: list[GrownGroup] = []
        self._before: dict[str, Tensor] = {}
        self._told = False  # whether a lack of gradients was warned of

    def step(self) -> dict[str, float]:
        """Measure, after a step of the optimizer and before gradients are set to zero or None.

        Returns:
            The numbers; none where it is not yet time, or nothing has grown. What updates are
            needed for comes with the second call.
        """
        known = self._growths
        self._follow()
        self._count += 1
        if known == self._growths:  # growth drops gradients, too
            self._check_gradients()
        found = self.measure() if self._count % self._every == 0 else {}
        self._before = {}
        if (self._count + 1) % self._every == 0:
            held = dict(self._model.named_parameters(remove_duplicate=False))
            names = {name for group in self._groups for name in _tensors_of(group)}
            self._before = {name: held[name].detach().clone() for name in sorted(names)}
        return found

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return what can be told now; the updates are those since the last :meth:`step`."""
        self._follow()
        held = dict(self._model.named_parameters(remove_duplicate=False))
        found: dict[str, float] = {}
        for group in self._groups:
            for key, value in self._measured(group, held):
                found[f"{group.name}/{key}"] = value
        return found

    def _check_gradients(self) -> None:
        """Warn, once, if nothing that has grown and is trained has a gradient left."""
        held = dict(self._model.named_parameters(remove_duplicate=False))
        grown = {name for group in self._groups for name in _tensors_of(group)}
        trained = [held[name] for name in grown if held[name].requires_grad]
        if trained and not self._told and all(one.grad is None for one in trained):
            self._told = True
            warn(
                "there are no gradients to measure: call the monitor's step() after the "
                "optimizer's, before zero_grad()."
            )

    def _follow(self) -> None:
        """Look at the network again if it has grown."""
        growths = len(stages_within(self._model))
        if growths != self._growths:
            self._groups, self._growths = grown_groups(self._model), growths
            self._before = {}

    def _measured(
        self, group: GrownGroup, held: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, float]]:
        """Yield what is told of one group."""
        weights = {name: held[name].detach() for name in _tensors_of(group)}
        slopes = {name: grad for name in weights if (grad := held[name].grad) is not None}
        updates = {
            name: weight - self._before[name]
            for name, weight in weights.items()
            if name in self._before and self._before[name].shape == weight.shape
        }
        for part in ("old", "new") if group.writers else ("new",):
            norm = _norm(group, weights, part)
            yield f"weight_norm/{part}", norm
            if slopes:
                yield f"grad_norm/{part}", _norm(group, slopes, part)
            if updates:
                update = _norm(group, updates, part)
                yield f"update_norm/{part}", update
                if norm > 0:
                    yield f"update_ratio/{part}", update / norm
        if not group.writers:
            return
        yield from _cosines(group, weights)
        if slopes:
            yield from _dead(group, slopes)
        if self._rank:
            yield from _ranks(group, weights)


def _tensors_of(group: GrownGroup) -> list[str]:
    return [*dict.fromkeys((*group.writers, *group.readers, *group.fresh))]


def _sides(group: GrownGroup) -> Iterator[tuple[str, int, Positions]]:
    for side in (group.writers, group.readers):
        for name, (dim, positions) in side.items():
            yield name, dim, positions


def _norm(group: GrownGroup, tensors: Mapping[str, Tensor], part: str) -> float:
    """Return the Frobenius norm of the new or the old parts of tensors together."""
    squares = [
        _squares(tensors[name], dim)[_chosen(group, positions, part, tensors[name].device)].sum()
        for name, dim, positions in _sides(group)
        if name in tensors
    ]
    if part == "new":
        squares += [_squares(tensors[n], None) for n in group.fresh if n in tensors]
    return math.sqrt(sum(float(square) for square in squares))


def _squares(tensor: Tensor, dim: int | None) -> Tensor:
    """Return the sum of squares at each position of a dim, shape (size,), or of all."""
    values = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    others = [d for d in range(tensor.dim()) if d != dim]
    return values.square().sum(others) if others else values.square()


def _chosen(group: GrownGroup, positions: Positions, part: str, device: torch.device) -> Tensor:
    """Return which positions the last growth of a group has written, or which it has not."""
    new = positions.growth >= group.growth
    return torch.from_numpy(new if part == "new" else ~new).to(device)


def _rows(group: GrownGroup, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Positions] | None:
    """Return what writes each channel, shape (channels, entries), by the writers of one width."""
    known = [(n, d, p) for n, (d, p) in group.writers.items() if n in tensors]
    if not known:
        return None
    first = known[0][2]
    alike = [
        tensors[name].movedim(dim, 0).flatten(1)
        if tensors[name].dim() > 1
        else tensors[name][:, None]
        for name, dim, positions in known
        if len(positions.like) == len(first.like)
    ]
    return torch.cat([x.float() for x in alike], 1), first


def _cosines(group: GrownGroup, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield the mean cosine between the rows of twins and of copies."""
    made = _rows(group, weights)
    if made is None:
        return
    rows, positions = made
    for name, drawn in (("twins", True), ("copies", False)):
        first, other = positions.alike(drawn=drawn)
        if len(first):
            one, two = rows[torch.from_numpy(first)], rows[torch.from_numpy(other)]
            cosines = nn.functional.cosine_similarity(one, two)
            yield f"cosine/{name}", float(cosines.mean())


def _dead(group: GrownGroup, slopes: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield the part of channels whose writers got no gradient."""
    made = _rows(group, slopes)
    if made is None:
        return
    rows, positions = made
    silent = ~rows.any(1)
    for part in ("old", "new"):
        chosen = silent[_chosen(group, positions, part, silent.device)]
        if len(chosen):
            yield f"dead/{part}", float(chosen.float().mean())


def _ranks(group: GrownGroup, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield the effective rank of what writes the channels, of all and of the old ones."""
    made = _rows(group, {name: x for name, x in weights.items() if x.dim() > 1})  # no biases
    if made is None:
        return
    rows, positions = made
    yield "effective_rank", effective_rank(rows)
    yield "effective_rank/old", effective_rank(rows[_chosen(group, positions, "old", rows.device)])


def effective_rank(matrix: Tensor) -> float:
    """Return e to the entropy of a matrix's singular values, as parts of their sum.

    It is the rank where they are equal, and 1 where one outweighs all others (Roy and Vetterli
    2007, "The effective rank"); 0 of a matrix of zeros.

    Example:
        >>> import torch
        >>> round(effective_rank(torch.eye(5)), 4), effective_rank(torch.zeros(3, 3))
        (5.0, 0.0)
    """
    if not matrix.numel() or not matrix.any() or not matrix.isfinite().all():
        return 0.0
    wide = matrix.detach().to("cpu" if matrix.device.type == "mps" else matrix.device).double()
    wide = wide if len(wide) <= wide.shape[1] else wide.T
    # Squares of singular values are a few times as fast, and precise enough in float64.
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()
    parts = values / values.sum()
    return float(torch.special.entr(parts).sum().exp())
