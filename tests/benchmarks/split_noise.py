"""How far noise on the split takes a grown network from the narrow one: a table.

Run: python tests/benchmarks/split_noise.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_certificate import LOSS, NETWORKS, OPTIMIZERS, case

import fxgrow.training


def main() -> None:
    """Print the deviations after 1, 20 and 100 steps, for each network, size and optimizer."""
    torch.set_num_threads(1)
    for name in NETWORKS:
        for size in (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1):
            for optimizer in ("momentum", "adamw"):
                model, grown, batches = case(name, split_noise=size)
                deviations = fxgrow.training.certify(
                    model, grown, LOSS, batches, optimizer=OPTIMIZERS[optimizer], steps=100
                ).deviations
                shown = "  ".join(f"{deviations[step - 1].wide:.1e}" for step in (1, 20, 100))
                print(f"{name:12}  {size:7g}  {optimizer:9}  {shown}", flush=True)


if __name__ == "__main__":
    main()
