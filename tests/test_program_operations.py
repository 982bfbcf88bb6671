"""Programs that are not trusted compute, and check what they are given, or they are not loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, log_softmax

import fxgrow
from fxgrow.files.checkpoint.operations import is_safe


class Odd(nn.Module):
    """Operations that torch.export tells by private names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).masked_fill((x > 0) & (x < 0.5), 0.0)
        y = interpolate(x[:, None, None], scale_factor=2.0, mode="nearest-exact")
        y = interpolate(y, size=(3, 3), mode="bilinear", antialias=True).to(torch.float64)
        return log_softmax(y, -1).to(x.dtype)


@pytest.mark.parametrize("decomposed", [False, True])
def test_what_export_writes_is_loaded(tmp_path: Path, decomposed: bool) -> None:
    net, x = Odd().eval(), torch.randn(2, 4)
    program = torch.export.export(net, (x,))
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "a.pt2")
    torch.testing.assert_close(fxgrow.load(tmp_path / "a.pt2")(x), net(x))


def test_no_operation_writes_files_or_memory_that_is_not_its_own() -> None:
    """Of all that ATen has: of names, and of what kernels were seen to write outside of tensors."""
    names = [
        f"torch.ops.aten.{name}.{overload or 'default'}"
        for name, _, overload in (
            full[6:].partition(".")
            for full in torch._C._dispatch_get_all_op_names()
            if full.startswith("aten::")
        )
    ]
    safe = {name for name in names if is_safe(name)}
    assert len(safe) > 1000
    for word in ("unsafe", "backward", "file", "sparse", "_foreach", "_fused", "resize", "_test"):
        assert [name for name in safe if word in name] == []
    assert [name for name in safe if name.endswith((".out", "_out"))] == []


@pytest.mark.parametrize("name", ["save", "from_file", "warn", "seed", "manual_seed", "device"])
def test_nothing_that_torchscript_calls_is_allowed(name: str) -> None:
    assert not is_safe(f"torch.ops.aten.{name}.default")
