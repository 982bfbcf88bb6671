"""Grow a small residual network twice while it trains, from Python.

The task is to tell noisy waves of four shapes apart. Each growth happens in the middle of training
and costs nothing: the loss goes on from where it was, and so does the optimizer.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone uses

from fxgrow.training import grow_


class Block(nn.Module):
    """A residual block over a sequence."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, hidden, 5, padding=2, bias=False)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.conv2 = nn.Conv1d(hidden, channels, 5, padding=2, bias=False)
        self.norm2 = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, length) to the same shape."""
        return x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))


class Network(nn.Module):
    """A stem, three blocks that start narrow, and a head."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 5, padding=2)
        self.blocks = nn.Sequential(*(Block(16, hidden) for _ in range(3)))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 1, length) to logits (n, 4)."""
        return self.head(torch.relu(self.blocks(self.stem(x))).mean(2))


def waves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy waves (n, 1, 64) and which of four shapes each has."""
    time = torch.linspace(0, 6.28, 64) * torch.randint(2, 5, (count, 1), generator=generator)
    phase = time + 6.28 * torch.rand(count, 1, generator=generator)
    sine = torch.sin(phase)
    shapes = torch.stack([sine, sine.sign(), sine.abs() * 2 - 1, torch.asin(0.99 * sine)])
    labels = torch.randint(4, (count,), generator=generator)
    noise = 0.3 * torch.randn(count, 64, generator=generator)
    return (shapes[labels, torch.arange(count)] + noise).unsqueeze(1), labels


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, generator: torch.Generator
) -> float:
    """Train for some steps and return the mean loss of the last ten."""
    losses = []
    model.train()
    for _ in range(steps):
        images, labels = waves(128, generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main(steps: int = 150) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    held_out, labels = waves(1024, generator)

    def held_out_loss(model: nn.Module) -> float:
        with torch.no_grad():
            return F.cross_entropy(model.eval()(held_out), labels).item()

    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for width in ("2x", "+16", None):
        loss = train(model, optimizer, steps, generator)
        hidden = model.blocks[0].conv1.out_channels
        print(f"hidden width {hidden:2}: loss {loss:.4f}, held out {held_out_loss(model):.4f}")
        if width is None:
            break
        before = held_out_loss(model)
        grow_(model, width, held_out[:8], optimizer=optimizer, rescaling="default_vt", strict=True)
        print(f"  widened by {width}: held out {held_out_loss(model):.4f}")
        if abs(held_out_loss(model) - before) > 1e-4:
            sys.exit("widening changed the function")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
