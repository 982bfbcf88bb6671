"""Compare a network with what a plan makes of it, in float64, in eval mode and in train mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from networks import max_rel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.modules.calling import Arguments, call, map_tensors, tensors_in
from fxgrow.modules.expectation import Expectation
from fxgrow.modules.inputs import batches_for
from fxgrow.modules.tensors import named_tensors
from fxgrow.plan.schema import Plan
from fxgrow.verification import weights
from fxgrow.verification.exact import Exact

_IMAGE = 96  # side of the image that detectors are compared on
_KEYPOINTS = 17
_LARGE = 10**6  # numbers in a batch


@dataclass(frozen=True)
class Comparison:
    """How far a grown network is from the original.

    Attributes:
        inputs: what they were compared on.
        evaluated, trained: max_rel in eval mode and in train mode; dropout is off in both.
    """

    inputs: str
    evaluated: float
    trained: float


def filled(model: nn.Module) -> nn.Module:
    """Return the network in float64, filled so that every part of it contributes to the output.

    Weights keep the size of what passes; norms, layer scales and biases are different in each
    channel.
    """
    torch.manual_seed(0)
    model = model.double()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, math.sqrt(2 * len(parameter) / parameter.numel()))
        elif "bias" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def settle(model: nn.Module, arguments: Arguments) -> None:
    """Give batch norms the statistics of a run, in place, as training would.

    With any others the signal dies out within ten layers, and the outputs of eval mode hardly
    depend on the inputs.
    """
    norms: list[Any] = [
        norm
        for norm in model.modules()
        if isinstance(norm, _BatchNorm) and norm.running_var is not None
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the latest batch alone
    _outputs(model.train(), arguments)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))  # of dead channels
    model.eval()


def abridged(model: nn.Module) -> tuple[int, int]:
    """Leave out blocks like the two before them, in place; return how many, and of how many.

    A block that has the class and the shapes of its two predecessors in a sequence teaches nothing
    that these do not. Two are kept, because some networks alternate (Swin's windows).
    """
    left_out = total = 0
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential):
            continue
        kinds = [_kind(child) for child in parent]
        names = [name for name, _ in parent.named_children()]
        for index, name in enumerate(names):
            if not kinds[index]:
                continue
            total += 1
            if index > 1 and kinds[index] == kinds[index - 1] == kinds[index - 2]:
                delattr(parent, name)
                left_out += 1
    return left_out, total


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Return what two alike blocks have in common; nothing for what has no weights."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())
    return (type(module), shapes) if shapes else ()


def compared(
    model: nn.Module, plan: Plan, most_batches: int = 2, example_inputs: object = None
) -> Comparison:
    """Return how far a network in float64 is from what a plan makes of it.

    Where only parts of it were followed, these are compared, and so is the whole: a detector, on
    an image and its targets.

    Args:
        model: the network; its running statistics move, and the sizes it resizes images to.
        plan: made for it.
        most_batches: to compare on; for 0, parts are not compared by themselves, but in the whole.
        example_inputs: inputs of the whole; None takes those of the plan.
    """
    inputs: dict[str, Sequence[Arguments]] = {}
    for scope in plan.scopes:
        part = model.get_submodule(scope.module)
        if scope.module and not most_batches:
            continue
        found = batches_for(part, scope.inputs, scope.inputs_inferred, example_inputs)
        most = max(1, most_batches)
        inputs[scope.module] = [map_tensors(_smaller, batch) for batch in found[:most]]
    if "" not in inputs:
        _accept_small_images(model)
        inputs[""] = [_images_and_targets()]
    settle(model, inputs[""][0])
    grown = _grown_in_double(plan, model)
    told, evaluated, trained = [], 0.0, 0.0
    for name, batches in inputs.items():
        before, after = model.get_submodule(name), grown.get_submodule(name)
        shapes = "; ".join(_shapes(batches))
        told.append(f"{name or 'the whole'} {shapes}" if len(inputs) > 1 else shapes)
        for arguments in batches:
            evaluated = max(evaluated, _difference(before, after, arguments, training=False))
            trained = max(trained, _difference(before, after, arguments, training=True))
    return Comparison(", ".join(told), evaluated, trained)


def _grown_in_double(plan: Plan, model: nn.Module) -> nn.Module:
    """Return what a plan makes of a network of another dtype than it was made for, in float64."""
    single = plan.apply(copy.deepcopy(model).float())
    names, written = named_tensors(model), named_tensors(single)
    made = weights.grown(plan, weights.own(model), names, None, written, lift=False)
    return Exact(single, made).module


def _smaller(tensor: Tensor) -> Tensor:
    """Return the first of several videos; whole batches of images."""
    return tensor[:1] if tensor.numel() > _LARGE else tensor


def _difference(
    before: nn.Module, after: nn.Module, arguments: Arguments, *, training: bool
) -> float:
    """Return max_rel over the outputs; infinite where they are of different sizes or not finite."""
    old, new = (_outputs(network.train(training), arguments) for network in (before, after))
    if not old or [t.shape for t in old] != [t.shape for t in new]:
        return math.inf
    found = [max_rel(*pair) for pair in zip(old, new, strict=True)]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def _outputs(network: nn.Module, arguments: Arguments) -> list[Tensor]:
    """Return the floating-point outputs of a network, as mathematics has them.

    What is drawn at random all the same (detectors sample boxes to learn) is drawn alike each time.
    """
    torch.manual_seed(0)
    with torch.no_grad(), Expectation(exact=True):
        outputs = [*tensors_in(call(network, arguments))]
    return [tensor for tensor in outputs if tensor.is_floating_point() and tensor.numel()]


def _accept_small_images(detector: nn.Module) -> None:
    """Let a detector keep an image as small as it is, and return boxes it is unsure of."""
    transform = detector.transform
    if transform.fixed_size is None:
        transform.min_size, transform.max_size = (_IMAGE,), _IMAGE
    for part in (detector, getattr(detector, "roi_heads", detector)):
        part.score_thresh = 0.0  # random weights are sure of nothing


def _images_and_targets() -> Arguments:
    """Return two images and what is to be found in them."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, _IMAGE, _IMAGE, dtype=torch.float64, generator=generator)
    boxes = torch.tensor([[8.0, 8.0, 56.0, 64.0], [30.0, 20.0, 90.0, 88.0]], dtype=torch.float64)
    masks = torch.zeros(2, _IMAGE, _IMAGE, dtype=torch.uint8)
    masks[:, 30:50, 30:50] = 1
    keypoints = torch.full((2, _KEYPOINTS, 3), 40.0)  # float32: another type is refused
    keypoints[..., 2] = 1  # visible
    labels = torch.ones(2, dtype=torch.long)
    target = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}
    return [image, image.flip(-1)], [target, target]


def _shapes(batches: Sequence[Arguments]) -> Iterator[str]:
    for batch in batches:
        images: list[Tensor] = [t for t in tensors_in(batch) if t.ndim >= 2][:3]
        shapes = list(dict.fromkeys("x".join(map(str, t.shape)) for t in images))
        yield shapes[0]
