"""Shortcuts on meta tensors return what torch would, and refuse what torch would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxgrow.modules.calling import tensors_in
from fxgrow.modules.meta_shapes import SHORTCUTS, run_on_meta

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Any, ...]:
    n = x.ndim - 2
    return (x, weight, bias, [2] * n, [1] * n, [1] * n, transposed, [0] * n, groups)


VECTORS = (meta(4), meta(4), meta(4), meta(4))
CASES: list[tuple[Any, tuple[Any, ...]]] = [
    *((getattr(aten, name).default, (meta(2, 3, 4),))
      for name in ("silu", "relu", "sigmoid", "hardswish", "hardsigmoid",
                   "silu_", "relu_", "hardswish_", "hardsigmoid_")),
    *((getattr(aten, name).default, (meta(2, 3), 0.5))
      for name in ("leaky_relu", "leaky_relu_", "hardtanh", "hardtanh_")),
    (aten.sigmoid.default, (meta(2, dtype=torch.int64),)),
    (aten.clamp.default, (meta(2, 3), 0.0, 6.0)),
    (aten.clamp_min.default, (meta(2, 3), 0.0)),
    (aten.mul.Scalar, (meta(2, 3), 2.0)),
    (aten.roll.default, (meta(2, 3), [1], [1])),
    (aten.gelu.default, (meta(2, 3),)),
    (aten._safe_softmax.default, (meta(2, 3), -1)),
    (aten.add.Tensor, (meta(2, 3), meta(2, 3))),
    (aten.add.Tensor, (meta(2, 3, 4), meta(3, 1))),
    (aten.add.Tensor, (meta(2, 3), meta(2, 3, dtype=torch.float64))),
    (aten.mul.Tensor, (meta(2, 3), meta(3, dtype=torch.int64))),
    (aten.mul.Tensor, (meta(2, 3), torch.tensor(2.0))),
    (aten.sub.Tensor, (meta(2, 3), meta(2, 3))),
    *((func, (0.5, meta(2, 3))) for func in (aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)),
    (aten.mul.Scalar, (meta(2, 3), 2j)),
    (aten.div.Tensor, (meta(2, 3), meta(2, 1))),
    (aten.div.Tensor, (meta(2, dtype=torch.int64), meta(2, dtype=torch.int64))),
    (aten.add_.Tensor, (meta(2, 3), meta(2, 3))),
    (aten.mul_.Tensor, (meta(2, 3), meta(3))),
    (aten.native_batch_norm.default, (meta(2, 4, 5, 5), *VECTORS, False, 0.1, 1e-5)),
    (aten.native_batch_norm.default, (meta(2, 4), None, None, *VECTORS[2:], False, 0.1, 1e-5)),
    (aten.native_layer_norm.default, (meta(2, 3, 4), [4], meta(4), None, 1e-5)),
    (aten.native_layer_norm.default, (meta(2, 3, 4), [3, 4], meta(3, 4), meta(3, 4), 1e-5)),
    (aten.addmm.default, (meta(5), meta(2, 3), meta(3, 5))),
    (aten.addmm.default, (meta(1), meta(2, 3), meta(3, 5))),
    (aten.addmm.default, (meta(2, 1), meta(2, 3), meta(3, 5))),
    (aten.bmm.default, (meta(2, 3, 4), meta(2, 4, 5))),
    (aten.convolution.default, convolved(meta(2, 4, 9, 8), meta(6, 2, 3, 5), meta(6), groups=2)),
    (aten.convolution.default, convolved(meta(2, 4, 9), meta(6, 4, 2), None)),
    (aten.convolution.default, convolved(meta(2, 4, 9, 9), meta(4, 6, 3, 3), None, True)),
    (aten._grouped_mm.default, (
        meta(16, 16, dtype=torch.bfloat16), meta(2, 16, 8, dtype=torch.bfloat16),
        meta(2, dtype=torch.int32),
    )),
    (aten.cat.default, ([meta(2, 3), meta(2, 4)], 1)),
    (aten.cat.default, ([meta(2, 3), meta(1, 3)],)),
    (aten.cat.default, ([meta(0), meta(2, 3)], -1)),
    (aten.cat.default, ([meta(2), meta(2, dtype=torch.float64)],)),
    (aten.mean.dim, (meta(2, 3, 4, 5), [-1, 2])),
    (aten.mean.dim, (meta(2, 3, 4, 5), [2, 3], True)),
    (aten.mean.dim, (meta(2, 3), [])),
    (aten.mean.dim, (meta(), [0])),
    (aten.mul.Tensor, (meta(1, 3, 1), meta(2, 1, 4))),
    *((getattr(aten, name).Scalar, (meta(2, 3), 0))
      for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    (aten.ne.Scalar, (meta(3, 2).T, 0.5)),
    (aten.masked_fill.Scalar, (meta(2, 3), meta(3, dtype=torch.bool), -100.0)),
    (aten.masked_fill.Scalar, (meta(1, 3), meta(2, 1, dtype=torch.bool), -100.0)),
    (aten.clone.default, (meta(3, 2).T,)),
    (aten.clone.default, (meta(3, 1, 2).expand(3, 4, 2),)),
    (aten.empty_like.default, (meta(3, 2),)),
    (aten.empty_like.default, (meta(3, 2).T,)),
    (aten._unsafe_view.default, (meta(4, 6), [2, 2, 6])),
    (aten._unsafe_view.default, (meta(4, 6), [-1, 6])),
    (aten._softmax.default, (meta(2, 3, 4).mT, -1, False)),
    (aten._log_softmax.default, (meta(2, 3), 1, False)),
    (aten.index.Tensor, (meta(9, 3), [meta(2, 5, dtype=torch.int64)])),
    (aten.index.Tensor, (meta(9, 3, 4), [None, meta(2, 5, dtype=torch.int64)])),
    (aten.index.Tensor, (meta(3, 9).T, [meta(2, 5, dtype=torch.int64)])),
    (aten.index.Tensor, (meta(3, 9), [meta(4, dtype=torch.int64), meta(4, dtype=torch.int64)])),
    (aten.mm.default, (meta(2, 3), meta(5, 3).T)),
    *((aten.max_pool2d_with_indices.default, (meta(2, 3, 9, 12), *rest))
      for rest in (([2],), ([3, 2], [2, 2], [1, 1], [1, 1], True), ([3], [2], [1], [2], True),
                   ([2, 2], [3, 3], [1], [1], True), ([3, 3], [1, 2]))),
    (aten.max_pool2d_with_indices.default, (meta(3, 9, 9), [2])),
]  # fmt: skip
WRONG: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.mm.default, (meta(2, 3), meta(2, 3))),
    (aten._unsafe_view.default, (meta(4, 6), [5, 5])),
    (aten.masked_fill.Scalar, (meta(2, 3), meta(2, dtype=torch.bool), 1.0)),
    (aten.index.Tensor, (meta(9), [None, meta(2, dtype=torch.int64)])),
    (aten.max_pool2d_with_indices.default, (meta(2, 3, 9, 9), [2], [2], [2])),
    (aten.max_pool2d_with_indices.default, (meta(2, 3, 2, 2), [5])),
    (aten.add.Tensor, (meta(2, 3), meta(2, 4))),
    (aten.add_.Tensor, (meta(2, 1), meta(2, 4))),
    (aten.native_batch_norm.default, (meta(2, 5), *VECTORS, False, 0.1, 1e-5)),
    (aten.native_layer_norm.default, (meta(2, 3, 4), [3], meta(3), None, 1e-5)),
    (aten.native_layer_norm.default, (meta(2, 3, 4), [4], meta(3), None, 1e-5)),
    (aten.addmm.default, (meta(5), meta(2, 3), meta(4, 5))),
    (aten.addmm.default, (meta(4), meta(2, 3), meta(3, 5))),
    (aten.bmm.default, (meta(2, 3, 4), meta(3, 4, 5))),
    (aten.bmm.default, (meta(2, 3, 4), meta(2, 5, 4))),
    (aten.convolution.default, convolved(meta(2, 5, 9, 8), meta(6, 2, 3, 5), None, groups=2)),
    (aten.convolution.default, convolved(meta(2, 4, 1, 1), meta(6, 4, 9, 9), None)),
    (aten.cat.default, ([meta(2, 3), meta(3, 3)], 1)),
    (aten.mean.dim, (meta(2, 3), [2])),
]


@pytest.mark.parametrize(("func", "args"), CASES)
def test_a_shortcut_returns_what_torch_returns(func: Any, args: tuple[Any, ...]) -> None:
    ours, theirs = run_on_meta(func, args, {}, tensors_in(args)), func(*args)
    if isinstance(theirs, tuple):  # what follows serves the backward pass
        ours, theirs = ours[0], theirs[0]
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.stride() == theirs.stride()
    in_place = func._name.split(".")[0].endswith("_")
    assert (ours is args[0]) == in_place


@pytest.mark.parametrize(("func", "args"), WRONG)
def test_a_shortcut_refuses_what_torch_refuses(func: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        func(*args)
    with pytest.raises((RuntimeError, IndexError)):
        run_on_meta(func, args, {}, tensors_in(args))


def test_every_shortcut_is_tried() -> None:
    without = {"aten::binomial", "aten::_sample_dirichlet"}  # torch cannot tell their shapes
    assert set(SHORTCUTS) - without == {func._name for func, _ in CASES}
