"""Networks that the tests share: real ones made to look trained, and small ones of each kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgrow.modules.uninitialised import build_uninitialised


def trained_looking(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm statistics and weights as they occur in trained networks, in place.

    Variances from 1e-8 to 1e3, means, and weights of both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                count = module.num_features
                exponents = torch.rand(count, generator=generator) * 11 - 8
                module.running_var.copy_(10**exponents)
                module.running_mean.normal_(0, 1, generator=generator)
                module.weight.normal_(0, 1, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model


def lived_in(
    model: nn.Module, example: Tensor, seed: int = 0, *, batches: int = 4, nearly_dead: float = 1e-4
) -> nn.Module:
    """Give a network weights as training leaves them, and statistics that fit its data, in place.

    One output in sixteen of each layer and one channel in sixteen of each norm is nearly dead;
    norms have weights from 0.2 to 2 and biases; what begins at zero or nearly there (heads, layer
    scales) has left it.

    Args:
        model: the network, left in eval mode.
        example: an input; normal numbers of its shape are what the statistics are taken from.
        seed: of the numbers.
        batches: how many inputs the statistics are taken from.
        nearly_dead: what the weights of nearly dead channels are multiplied by.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            normal = parameter.new_empty(parameter.shape).normal_(generator=generator)
            if isinstance(owner, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                uniform = torch.rand(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(0.2 * normal if name.endswith("bias") else 0.2 + 1.8 * uniform)
            elif parameter.abs().max() < 1e-3:
                parameter.copy_(0.02 * normal if parameter.ndim == 2 else 0.2 + 0.1 * normal)
            if name.endswith("bias") or parameter.ndim > 4 or parameter.squeeze().ndim == 0:
                continue
            outputs = 1 if isinstance(owner, nn.modules.conv._ConvTransposeNd) else 0
            rows = parameter.transpose(0, outputs)
            if len(rows) >= 16:
                dead = torch.randperm(len(rows), generator=generator)[: len(rows) // 16]
                rows[dead.to(rows.device)] *= nearly_dead
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.reset_running_stats()
                norms.append((module, module.momentum))
                module.momentum = None  # the mean over all batches
        model.train()
        for _ in range(batches if norms else 0):
            model(example.new_empty(example.shape).normal_(generator=generator))
        for module, momentum in norms:
            module.momentum = momentum
    return model.eval()


def plain_mlp(classes: int = 2, width: int = 8) -> nn.Module:
    """Return a small network whose architecture is named, not recognised."""
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)
    )


def mild(model: nn.Module) -> nn.Module:
    """Return the network in float64, with every part of it contributing to the output."""
    model = model.double().eval()
    for parameter in model.parameters():
        if not parameter.any():  # a head that starts at zero would make every output zero
            nn.init.normal_(parameter, 0.0, 0.02)
        elif parameter.abs().max() < 1e-3 and not parameter.var(correction=0):  # a layer scale
            nn.init.uniform_(parameter, 0.1, 0.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def torchvision_model(name: str, **arguments: object) -> nn.Module:
    """Return a torchvision network in float64 and eval mode with trained-looking norms."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, **arguments)
    return trained_looking(model).double().eval()


class PlainBlock(nn.Module):
    """conv → activation → conv without a norm, on the identity."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.activation(self.conv1(x)))


class PlainResNet(nn.Module):
    """A small residual network without norms."""

    def __init__(
        self, width: int = 6, blocks: int = 2, activation: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(PlainBlock(width, activation) for _ in range(blocks)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PreactivationBlock(nn.Module):
    """norm → act → conv → norm → act → conv, with an identity, projection or slice/pad skip."""

    def __init__(self, width: int, out: int, skip: str) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = skip
        if skip == "projection":
            self.project = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        if self.skip == "projection":
            shortcut = self.project(y)
        elif self.skip == "slice/pad":
            missing = self.conv2.out_channels - self.conv1.in_channels
            shortcut = F.pad(x, (0, 0, 0, 0, 0, missing))
        else:
            shortcut = x
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


class PreactivationNet(nn.Module):
    """A stem, one pre-activation block with the given skip path, and a head."""

    def __init__(self, skip: str) -> None:
        super().__init__()
        out = 4 if skip == "identity" else 6
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = PreactivationBlock(4, out, skip)
        self.norm = nn.BatchNorm2d(out)
        self.head = nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.block(self.stem(x)))).mean((2, 3)))


def small_resnet(**arguments: object) -> nn.Module:
    """Return a ResNet of torchvision's classes with one block a stage and few channels."""
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5, **arguments)
    return trained_looking(model)


def max_rel(before: Tensor, after: Tensor) -> float:
    """Return max |after - before| / max |before|."""
    return ((after - before).abs().max() / before.abs().max()).item()


def quick(name: str) -> nn.Module:
    """Return a torchvision network with uninitialised weights, for tests of structure alone."""
    model = build_uninitialised(lambda: torchvision.models.get_model(name), "meta")
    if not isinstance(model, nn.Module):
        raise TypeError(name)
    return model


def small_images() -> Tensor:
    """Return images small enough that a whole verification takes a fraction of a second."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 40, 33, dtype=torch.float64, generator=generator)
