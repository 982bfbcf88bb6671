"""Widen ResNets with trained-looking norms by every rescaling, pairing and width; print a table.

    python tests/benchmarks/resnet_sweep.py [ARCH …]

Errors are relative to the largest output, in float64 on float64 weights. ``train`` is the distance
from the old network with batch statistics (the eps-sized part of a gain that a norm absorbed),
``residual`` that from the prediction of it.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from networks import torchvision_model

import fxgrow
from fxgrow.plan.rescaling import RESCALINGS

ARCHITECTURES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d",
)  # fmt: skip


def main() -> None:
    """Print a row for each setting."""
    print(
        "| network | width | rescaling | pairing | groups | refused | eval | train | residual | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or ARCHITECTURES:
        model = torchvision_model(name)
        settings = itertools.product(("2x", "1.5x", "+6"), RESCALINGS, ("vv_z_negz", "v_zero"))
        for width, rescaling, pairing in settings:
            start = time.perf_counter()
            grown = fxgrow.widen(model, width, rescaling=rescaling, pairing=pairing)
            seconds = time.perf_counter() - start
            found = grown.report.verification
            if found.eval is None or found.train is None:
                raise RuntimeError(f"{name} was not verified")
            print(
                f"| {name} | {width} | {rescaling} | {pairing} | {len(grown.plan.groups)} "
                f"| {len(grown.plan.refused)} | {found.eval.float64.max_rel:.1e} "
                f"| {found.train.float64.max_rel:.1e} | {found.train.residual.max_rel:.1e} "
                f"| {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
