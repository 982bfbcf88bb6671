"""Networks and honest plans of every kind for them, which tests turn into hostile ones."""

from __future__ import annotations

import enum
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from networks import PlainBlock, PlainResNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxgrow
from fxgrow.api import kernels
from fxgrow.api import widen as api
from fxgrow.api.convert import plan_for_target
from fxgrow.api.deepen import plan_deepening

Made = tuple[nn.Module, fxgrow.Plan]


class Views(nn.Module):
    """Sizes that are literals in code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 8 * 4)
        self.conv = nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(self.fc(x).view(-1, 8, 2, 2)))
        return self.last(y.reshape(x.shape[0], 6, 4).unflatten(2, (2, 2)))


class Words(enum.Enum):
    """There is one of each in a process."""

    ONE, OTHER = "one", "other"


class Settings:
    """What modules are configured by: an object that all of them hold."""

    kind = "settings"

    def __init__(self) -> None:
        self.heads, self.num_layers = 4, 2
        self.layer_types = ["near", "far"]
        self.depths = [2, 1]

    @property
    def total(self) -> int:
        return self.heads

    @total.setter
    def total(self, value: int) -> None:
        raise AssertionError(f"code ran on {value}")


class Heads(nn.Module):
    """A width that its configuration tells."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config, self.up, self.down = config, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).view(*x.shape[:-1], self.config.heads, 2)
        return x + self.down(torch.tanh(y).flatten(-2))


class Decoder(nn.Module):
    """Blocks whose number and kinds its configuration tells, too."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()
        self.layers = nn.ModuleList(Heads(self.config) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in zip(self.config.layer_types, self.layers, strict=True):
            x = layer(x)
        return self.head(x)


class Named(nn.Module):
    """Blocks that are called by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.block1, self.block2 = PlainBlock(4), PlainBlock(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(self.relu(self.stem(x)))))


class Tied(nn.Module):
    """One weight under two names, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(x + self.down(torch.relu(self.up(x) + self.shift)))


def chain() -> nn.Module:
    """Return convolutions with norms, of every kind that an edit knows."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )


IMAGES = torch.randn(2, 3, 6, 6)
ROWS = torch.randn(2, 3, 8)
PHOTOS = torch.randn(2, 3, 32, 32)


def small() -> nn.Module:
    """Return the architecture that records are for."""
    return torchvision.models.mobilenet_v3_small(num_classes=5)


def filters(width: int, groups: int) -> nn.Module:
    """Return a convolution in groups between two others."""
    middle = nn.Conv2d(width, width, 3, groups=groups)
    return nn.Sequential(nn.Conv2d(3, width, 1), middle, nn.ReLU(), nn.Conv2d(width, 3, 1))


def bottlenecks(*blocks: int) -> nn.Module:
    """Return a small ResNet."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, blocks, num_classes=5, width_per_group=4)


def converted(small: nn.Module, large: nn.Module, x: Tensor) -> Made:
    """Return a network and a plan for another architecture."""
    return small.eval(), plan_for_target(small.eval(), large.eval(), x, name="larger")


def twice() -> Made:
    """Return one plan after another."""
    net = PlainResNet()
    first = plan_deepening(net, {"blocks": "+1"}, IMAGES)
    return net, api.plan(net, "+2", IMAGES, after=first)


def planned(
    make: Callable[[], nn.Module], plan: Callable[..., fxgrow.Plan], *args: Any, **more: Any
):
    """Return what makes a network and the plan for it."""

    def made() -> Made:
        torch.manual_seed(0)
        net = make().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return net, plan(net, *args, **more)

    return made


HONEST: dict[str, Callable[[], Made]] = {
    "widen": planned(chain, api.plan, "2x", IMAGES, rescaling="vt_constraint_old_shape"),
    "odd": planned(chain, api.plan, "+1", IMAGES, noise=0.1, seed=3, include=["0", "5"]),
    "replicate": planned(chain, api.plan, "1.5x", IMAGES, pairing="replicate"),
    "silent": planned(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)),
        api.plan, "2x", IMAGES, pairing="zero_z",
    ),
    "mean": planned(
        lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        api.plan, "+3", ROWS,
    ),
    "groups": planned(chain, api.plan, "2x", IMAGES, grouped="count"),
    "compensated": planned(
        PlainResNet, api.plan, "2x", IMAGES, rescaling="default_vt", compensate=True
    ),
    "sizes": planned(Views, api.plan, "2x", torch.randn(3, 5)),
    "configured": planned(Decoder, api.plan, "2x", ROWS),
    "deeper": planned(Decoder, plan_deepening, {"layers": "+1"}, ROWS),
    "chained": planned(chain, plan_deepening, {"5": "+1"}, IMAGES, method="net2deeper"),
    "called": planned(Named, plan_deepening, {"block2": "+2"}, IMAGES),
    "kernels": planned(chain, kernels.plan, {"0": "5", "5": "4"}, IMAGES),
    "unpadded": planned(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="valid"), nn.ReLU()),
        kernels.plan, "5", IMAGES,
    ),
    "tied": planned(Tied, api.plan, "2x", torch.randint(7, (2, 3)), where="all"),
    "parametrised": planned(
        lambda: nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 2)),
        api.plan, "2x", torch.randn(2, 5),
    ),
    "twice": twice,
    "regrouped": lambda: converted(filters(8, 4), filters(16, 2), IMAGES),
    "converted": lambda: converted(bottlenecks(1, 1, 1, 1), bottlenecks(2, 1, 1, 1), PHOTOS),
    "record": planned(small, api.plan, {"features.1*": "+2"}, PHOTOS),
    "deeper record": planned(small, plan_deepening, {"features.5": "+1"}, PHOTOS),
}  # fmt: skip


@functools.cache
def honest(kind: str) -> Made:
    """Return a network and an honest plan for it."""
    return HONEST[kind]()


@functools.cache
def text_of(kind: str) -> str:
    """Return an honest plan as JSON."""
    return honest(kind)[1].to_json()
