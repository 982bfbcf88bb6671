"""What the rules of the operations do to labels: two pictures for each, and numbers."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.nn import functional as F  # noqa: N812 - the usual name

from fxgrow.labels.testing import assert_rule

POSITIONS = torch.tensor([0, 2, 0])
RULES = {
    "linear": (
        F.linear,
        "x[2 a=4] w*[o=6 i=4] b*[c=6]",
        "x[2 a] w*[o:writer a:reader] b*[o:carrier] -> [2 o]",
    ),
    "conv2d": (
        F.conv2d,
        "x[2 a=4 5 5] w*[o=6 i=4 3 3] b*[c=6]",
        "x[2 a 5 5] w*[o:writer a:reader 3 3] b*[o:carrier] -> [2 o 3 3]",
    ),
    "depthwise": (
        lambda x, w: F.conv2d(x, w, groups=x.shape[1]),
        "x[2 a=4 5 5] w*[c=4 1 3 3]",
        "x[2 a 5 5] w*[a:carrier 1 3 3] -> [2 a 3 3]",
    ),
    "transposed": (
        F.conv_transpose2d,
        "x[2 a=4 5 5] w*[i=4 o=6 3 3]",
        "x[2 a 5 5] w*[a:reader o:writer 3 3] -> [2 o 7 7]",
    ),
    "deform_conv2d": (
        torchvision.ops.deform_conv2d,
        "x[2 a=4 5 5] offset[2 18 3 3] w*[o=6 i=4 3 3] b*[c=6]",
        "x[2 a 5 5] offset[2 18 3 3] w*[o:writer a:reader 3 3] b*[o:carrier] -> [2 o 3 3]",
    ),
    "bilinear": (
        F.bilinear,
        "x[2 a=4] y[2 b=5] w*[o=3 i=4 j=5]",
        "x[2 a] y[2 b] w*[o:writer a:reader b:reader] -> [2 o]",
    ),
    "index_add": (
        lambda x, y: x.index_add(0, POSITIONS, y),
        "x[4 a=5] y[3 b=5]",
        "x[4 a] y[3 a] -> [4 a]",
    ),
    "scatter_add": (
        lambda x, y: x.scatter_add(0, POSITIONS[:, None].expand(3, 5), y),
        "x[4 a=5] y[3 b=5]",
        "x[4 a] y[3 a] -> [4 a]",
    ),
    "index_add along channels": (
        lambda x, y: x.index_add(1, POSITIONS, y),
        "x[4 a=5] y[4 b=3]",
        "x[4 a!] y[4 b!] -> [4 5]",
    ),
    "embedding": (
        lambda w: F.embedding(POSITIONS, w),
        "w*[v=7 o=4]",
        "w*[v! o:writer] -> [3 o]",
    ),
    "batch_norm": (
        lambda x, m, v, w: F.batch_norm(x, m, v.abs(), w),
        "x[2 a=4 5] m*[c=4] v*[d=4] w*[e=4]",
        "x[2 a 5] m*[a:carrier] v*[a:carrier] w*[a:carrier] -> [2 a 5]",
    ),
    "cat": (lambda x, y: torch.cat([x, y], 1), "x[2 a=3] y[2 b=4]", "x[2 a] y[2 b] -> [2 a+b]"),
    "shuffle": (
        lambda x: F.channel_shuffle(x, 2),
        "x[2 a=4 3 3]",
        "x[2 a 3 3] -> [2 a(0)+a(2)+a(1)+a(3) 3 3]",
    ),
    "padding": (lambda x: F.pad(x, (1, 2)), "x[2 a=3]", "x[2 a] -> [2 0+a+0+0]"),
    "softmax": (lambda x: x.softmax(1), "x[2 a=3]", "x[2 a!] -> [2 3]"),
}


@pytest.mark.parametrize("name", RULES)
def test_labels_and_numbers_are_these(name: str) -> None:
    assert_rule(*RULES[name])


def test_other_labels_are_told() -> None:
    with pytest.raises(AssertionError, match=r"\[2 a\] -> \[2 a\(2\)\+a\(1\)\+a\(0\)\]"):
        assert_rule(lambda x: x.flip(1), "x[2 a=3]", "x[2 a] -> [2 a]")
