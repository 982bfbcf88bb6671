"""Which architectures become which larger ones, measured: one row for each pair.

    python tests/benchmarks/siblings.py [PAIR]... [--max-parameters 1e8]

A PAIR is SOURCE:TARGET, both names of torchvision. The largest relative deviation of the output in
float64 is told for eval and train mode, or why the pair is refused.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import nn

import fxgrow
from fxgrow.modules.architectures import parse_architecture

PAIRS = """
resnet18:resnet34 resnet50:resnet101 resnet101:resnet152 resnet50:wide_resnet50_2
resnet101:wide_resnet101_2 resnext50_32x4d:resnext101_32x8d
resnext101_32x8d:resnext101_64x4d vgg11:vgg13 vgg13:vgg16 vgg16:vgg19 vgg11_bn:vgg13_bn
vgg13_bn:vgg16_bn vgg16_bn:vgg19_bn densenet121:densenet169 densenet169:densenet201
densenet121:densenet161 shufflenet_v2_x0_5:shufflenet_v2_x1_0
shufflenet_v2_x1_0:shufflenet_v2_x1_5 shufflenet_v2_x1_5:shufflenet_v2_x2_0
mnasnet0_5:mnasnet0_75 mnasnet0_75:mnasnet1_0 mnasnet1_0:mnasnet1_3
efficientnet_b0:efficientnet_b1 efficientnet_b1:efficientnet_b2
efficientnet_b2:efficientnet_b3 efficientnet_b3:efficientnet_b4
efficientnet_b4:efficientnet_b5 efficientnet_b5:efficientnet_b6
efficientnet_b6:efficientnet_b7 efficientnet_v2_s:efficientnet_v2_m
efficientnet_v2_m:efficientnet_v2_l mobilenet_v3_small:mobilenet_v3_large
convnext_tiny:convnext_small convnext_small:convnext_base convnext_base:convnext_large
convnext_tiny:convnext_large swin_t:swin_s swin_s:swin_b swin_v2_t:swin_v2_s
swin_v2_s:swin_v2_b vit_b_16:vit_l_16 vit_b_32:vit_l_32 vit_l_16:vit_h_14
regnet_y_400mf:regnet_y_800mf regnet_y_800mf:regnet_y_1_6gf regnet_y_1_6gf:regnet_y_3_2gf
regnet_y_3_2gf:regnet_y_8gf regnet_y_8gf:regnet_y_16gf regnet_y_16gf:regnet_y_32gf
regnet_x_400mf:regnet_x_800mf regnet_x_800mf:regnet_x_1_6gf regnet_x_1_6gf:regnet_x_3_2gf
regnet_x_3_2gf:regnet_x_8gf regnet_x_8gf:regnet_x_16gf regnet_x_16gf:regnet_x_32gf
resnet18:resnet50 squeezenet1_1:squeezenet1_0
"""
CLASSES = 10


def source(name: str) -> nn.Module:
    """Return a network of which no norm is the identity, in eval mode."""
    torch.manual_seed(0)
    model = parse_architecture(name, {"num_classes": CLASSES}).build("cpu").eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
        nn.init.normal_(parameter, 0.0 if fan_in else 1.0, fan_in**-0.5 if fan_in else 0.2)
    return model


def inputs(name: str) -> torch.Tensor:
    """Return images as small as the architecture takes them."""
    side = 224 if name.startswith("vit") else 64
    return torch.randn(2, 3, side, side)


def row(pair: str, most: float) -> str:
    """Return a row of the table."""
    before, after = pair.split(":")
    model, x = source(before), inputs(before)
    target = parse_architecture(after, {"num_classes": CLASSES}).build("cpu").eval()
    counts = [sum(p.numel() for p in network.parameters()) for network in (model, target)]
    shown = " → ".join(f"{count / 1e6:.1f} M" for count in counts)
    start = time.process_time()
    try:
        grown = fxgrow.convert(model, target, x, verify=counts[1] <= most)
    except fxgrow.FxgrowError as error:
        return f"| {before} | {after} | {shown} | refused: {error.message} | | |"
    seconds = time.process_time() - start
    found = grown.report.verification
    blocks = len(grown.plan.blocks)
    figures = "exact by plan, not measured"
    if found.eval is not None and found.train is not None:
        figures = f"{found.eval.float64.max_rel:.1e}, {found.train.float64.max_rel:.1e}"
    return f"| {before} | {after} | {shown} | {figures} | {blocks} | {seconds:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", default=PAIRS.split())
    parser.add_argument("--max-parameters", type=float, default=1e8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| source | target | parameters | max_rel in eval and train mode | new blocks | CPU s |")
    print("|---|---|---|---|---|---|", flush=True)
    for pair in options.pairs:
        print(row(pair, options.max_parameters), flush=True)


if __name__ == "__main__":
    main()
