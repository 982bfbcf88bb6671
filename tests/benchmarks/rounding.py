"""Print how faithful grown networks are in the precision that they are used in.

For each network, the largest deviation of the grown network from what the old one computes in
float64, over the old one's own: ratios, of which 1 says that growth costs nothing. Weights are
those that the network begins with, and those of :func:`networks.lived_in`.

Run it with ``python tests/benchmarks/rounding.py``; ``--all`` takes every network, which takes an
hour.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from networks import lived_in

import fxgrow
from fxgrow.errors import FxgrowError, FxgrowWarning

QUICK = ("resnet18", "mobilenet_v3_small", "swin_t")
NETWORKS = (
    "resnet18", "resnet50", "resnet152", "wide_resnet50_2", "mobilenet_v3_small",
    "efficientnet_b0", "densenet121", "convnext_tiny", "swin_t", "vit_b_16",
)  # fmt: skip
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "vt": {"preset": "vt"},
    "v_zero": {"pairing": "v_zero"},
    "zero_z": {"pairing": "zero_z"},
    "replicate": {"pairing": "replicate"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_ROUNDING = 0.03  # in half precision, above which a network is no measure


def network(name: str, weights: str, side: int, example: Tensor) -> nn.Module:
    """Return a network in float32 with weights of a kind."""
    torch.manual_seed(0)
    arguments = {"image_size": side} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, **arguments)
    return lived_in(model, example) if weights == "lived-in" else model.eval()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return a network's outputs in float64."""
    return model(images.to(next(model.parameters()).dtype)).double()


def exact(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a network computes in float64."""
    return outputs(copy.deepcopy(model).double(), images)


def ratio(
    model: nn.Module, images: Tensor, truth: Tensor, own: float, settings: dict[str, str]
) -> str:
    """Return the ratio of one way of growing, or why there is none."""
    try:
        grown, note = fxgrow.widen(model, example_inputs=images[:2], verify=False, **settings), ""  # type: ignore[arg-type]
        if grown.plan.preserves != "exact":
            note = " compensated"
            grown = fxgrow.widen(
                model, example_inputs=images[:2], verify=False, compensate=True, **settings
            )  # type: ignore[arg-type]
    except FxgrowError as error:
        return f"refused: {str(error)[:60]}"
    if grown.plan.preserves != "exact":
        return "not exact"
    return f"{float((outputs(grown.model, images) - truth).abs().max()) / own:.2f}{note}"


def measured(
    name: str, weights: str, dtype: str, options: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """Yield what was done and the ratio."""
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, 3, options.side, options.side)
    images = torch.empty(shape).normal_(generator=generator)
    model = network(name, weights, options.side, images).to(DTYPES[dtype])
    images = images.to(DTYPES[dtype])
    truth = exact(model, images)
    own, size = float((outputs(model, images) - truth).abs().max()), float(truth.abs().max())
    yield "its own", f"{own / size:.1e}" if size else "output 0"
    if not own or (dtype != "float32" and own > MOST_ROUNDING * size):
        return
    for setting in options.settings:
        for where in options.where:
            for width in options.widths:
                told = {**SETTINGS[setting], "where": where, "width": width}
                if options.init:
                    told["init"] = options.init
                yield f"{setting} {where} {width}", ratio(model, images, truth, own, told)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each network, its weights and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=QUICK)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--where", nargs="+", default=["hidden", "all"])
    parser.add_argument("--widths", nargs="+", default=["1.5x", "2x"])
    parser.add_argument("--weights", nargs="+", default=["lived-in", "initial"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--init", default="", help="another init than the default")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FxgrowWarning)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.side} px")
    for name in NETWORKS if options.all else options.networks:
        for weights in options.weights:
            for dtype in options.dtypes:
                start = time.process_time()
                print(f"{name}, {weights}, {dtype}", flush=True)
                for what, found in measured(name, weights, dtype, options):
                    print(f"  {what:24} {found}", flush=True)
                print(f"  {'CPU seconds':24} {time.process_time() - start:.0f}")


if __name__ == "__main__":
    main()
