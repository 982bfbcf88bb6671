"""Certificates: a grown network follows the narrow one through training, or is told not to."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
import fxgrow.training
from fxgrow.errors import PlanError

COPIES: dict[str, Any] = {"pairing": "replicate", "split_noise": 0.0}


class Residual(nn.Module):
    """Two blocks with batch norms between a stem and a head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A transformer of one layer over tokens."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.first(x)
        q, k, v = (
            layer(y).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return self.head(self.last(x)).transpose(1, 2)


class Tied(Attention):
    """Likewise, with the weight of its embedding for the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Recurrent(nn.Module):
    """An LSTM of two layers over a row as a sequence of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, 3)
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.lstm(self.first(rows.unsqueeze(2)))[0][:, -1])


def in_groups() -> nn.Module:
    """Return a network with a grouped and a depthwise convolution."""
    body = [nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2, bias=False)]
    body += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False)]
    body += [nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)]
    return nn.Sequential(*body, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))


def perceptron() -> nn.Module:
    """Return a network of two hidden layers."""
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def images() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(4)]


def tokens() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(11, (4, 5)), torch.randint(11, (4, 5))) for _ in range(4)]


def rows() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 5), torch.randint(3, (16,))) for _ in range(4)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "perceptron": (perceptron, rows),
    "residual": (Residual, images),
    "transformer": (Attention, tokens),
    "tied": (Tied, tokens),
    "recurrent": (Recurrent, rows),
    "in groups": (in_groups, images),
}
OPTIM = torch.optim
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(OPTIM.SGD, lr=0.05, weight_decay=1e-3),
    "momentum": functools.partial(OPTIM.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "nesterov": functools.partial(
        OPTIM.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3, nesterov=True
    ),
    "adam": functools.partial(OPTIM.Adam, lr=1e-3),
    "adam, decay": functools.partial(OPTIM.Adam, lr=1e-3, weight_decay=1e-2),
    "adamw": functools.partial(OPTIM.AdamW, lr=1e-3, weight_decay=0.1),
    "amsgrad": functools.partial(OPTIM.Adam, lr=1e-3, amsgrad=True, weight_decay=1e-2),
    "amsgrad, apart": functools.partial(OPTIM.AdamW, lr=1e-3, amsgrad=True, weight_decay=0.1),
    "rmsprop": functools.partial(OPTIM.RMSprop, lr=1e-3, weight_decay=1e-3),
    "centered": functools.partial(OPTIM.RMSprop, lr=1e-3, momentum=0.9, centered=True),
}
LOSS = nn.functional.cross_entropy


def case(name: str, width: str = "2x", **options: Any) -> tuple[nn.Module, fxgrow.Grown, Any]:
    """Return a network, what it grows to, and batches."""
    torch.manual_seed(0)
    make, data = NETWORKS[name]
    model, batches = make(), data()
    return model, fxgrow.widen(model, width, batches[0][0], **{**COPIES, **options}), batches


@pytest.mark.parametrize("grown_at", [0, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_copies_follow(name: str, grown_at: int) -> None:
    model, grown, batches = case(name, "3x", where="all")
    before = copy.deepcopy(model.state_dict())
    certificate = fxgrow.training.certify(
        model, grown, LOSS, batches, optimizer=OPTIMIZERS["adamw"], steps=15, grown_at=grown_at
    )
    assert len(certificate.deviations) == 15
    assert certificate.follows
    assert certificate.worst < 1e-12
    assert "follows the narrow network" in str(certificate)
    assert "one unit off, larger of both" in str(certificate)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_unchanged_rates_depart(name: str) -> None:
    model, grown, batches = case(name)
    certificate = fxgrow.training.certify(
        model, grown, LOSS, batches, optimizer=OPTIMIZERS["momentum"], steps=15, lr="none"
    )
    assert certificate.departs_at is not None
    assert certificate.worst > 1e-3
    assert "departs from the narrow network" in str(certificate)


def test_a_growth_in_place_is_certified_by_a_copy_of_before() -> None:
    torch.manual_seed(0)
    model, batches = perceptron(), rows()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    LOSS(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    narrow, own = copy.deepcopy((model, optimizer))
    grown = fxgrow.training.grow_(model, "2x", optimizer=optimizer, lr="width", **COPIES)
    certificate = fxgrow.training.certify(narrow, grown, LOSS, batches, optimizer=own, steps=10)
    assert (certificate.lr, certificate.optimizer, certificate.follows) == ("width", "AdamW", True)
    with pytest.raises(PlanError, match="narrow one is lost"):
        fxgrow.training.certify(model, grown, LOSS, batches, optimizer=optimizer)


def test_clipped_gradients_follow() -> None:
    model, grown, batches = case("residual", where="all")
    certificate = fxgrow.training.certify(
        model, grown, LOSS, batches, optimizer=OPTIMIZERS["sgd"], steps=10, max_norm=0.1
    )
    assert certificate.follows


def test_what_nothing_can_follow_is_refused_by_name() -> None:
    model, grown, batches = case("perceptron")
    certify = functools.partial(fxgrow.training.certify, model, grown, LOSS, batches)
    with pytest.raises(PlanError, match="Adafactor"):
        certify(optimizer=OPTIM.Adafactor)
    with pytest.raises(PlanError, match="diverges"):
        certify(optimizer=functools.partial(OPTIM.SGD, lr=1e308))
    model.append(nn.Dropout(0.5))
    with pytest.raises(PlanError, match=r"5 drops at random \(p=0.5\)"):
        fxgrow.training.certify(
            model, fxgrow.widen(model, "2x", **COPIES), LOSS, batches, optimizer=OPTIMIZERS["sgd"]
        )


def test_drawn_groups_are_refused_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 4)
    ).append(nn.Flatten())
    batches = images()
    grown = fxgrow.widen(model, "2x", batches[0][0], where="all", grouped="count", **COPIES)
    with pytest.raises(PlanError, match=r'grouped="count"'):
        fxgrow.training.certify(model, grown, LOSS, batches, optimizer=OPTIMIZERS["sgd"])


def test_noise_on_the_split_lets_copies_part() -> None:
    found = []
    for size in (0.0, 1e-3, 1e-1):
        model, grown, batches = case("perceptron", split_noise=size)
        found.append(
            fxgrow.training.certify(
                model, grown, LOSS, batches, optimizer=OPTIMIZERS["momentum"], steps=15
            ).worst
        )
    assert found[0] < 1e-12 < found[1] < found[2]


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_all_of_these_follow_for_200_steps(name: str) -> None:
    for where, width in itertools.product(("hidden", "all"), ("2x", "3x")):
        model, grown, batches = case(name, width, where=where)
        for key, grown_at in itertools.product(OPTIMIZERS, (0, 20)):
            certificate = fxgrow.training.certify(
                model, grown, LOSS, batches, optimizer=OPTIMIZERS[key], grown_at=grown_at
            )
            assert certificate.follows, (name, where, width, key, grown_at, certificate.worst)
