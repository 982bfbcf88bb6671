"""Ratios of norms of parts: as masks of the same entries give them, however memory is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxgrow.training.parts import Part
from fxgrow.training.ratios import PartsByGrowth, ratios_of


def parts(shape: tuple[int, ...], cuts: list[tuple[int, int]]) -> PartsByGrowth:
    """Return parts of a parameter whose first two dims have grown: an L of entries a growth."""
    rest = tuple(((0, size),) for size in shape[2:])
    growths, rows, columns = [], 0, 0
    for stage, (more, wider) in enumerate(cuts):
        blocks = [(((0, more),), ((0, wider),), *rest)]
        if stage:
            blocks = [
                block
                for block, taken in (
                    ((((rows, more),), ((0, wider),), *rest), more > rows),
                    ((((0, rows),), ((columns, wider),), *rest), wider > columns),
                )
                if taken
            ]
        growths.append((Part("weight", stage, 1, 1, tuple(blocks)),))
        rows, columns = more, wider
    return PartsByGrowth(tuple(growths), shape)


def by_masks(parameter: Tensor, grown: PartsByGrowth) -> list[float]:
    """Return the ratios by definition."""
    first, *later = (
        sum(parameter[part.mask(parameter)].double().square().sum().item() for part in growth)
        for growth in grown.growths
    )
    return [(own / first) ** 0.5 if own and first else 1.0 for own in later]


CASES = {
    "runs": ((8, 64, 3, 3), [(4, 32), (8, 64)], True),
    "two growths": ((12, 96), [(4, 64), (8, 64), (12, 96)], False),
    "rows": ((6, 5, 7, 7), [(2, 5), (6, 5)], True),
    "short": ((8, 9, 3, 3), [(4, 4), (8, 9)], False),
    "matrix": ((8, 256), [(4, 128), (8, 256)], True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ratios_are_those_of_the_entries(name: str, layout: str, dtype: torch.dtype) -> None:
    """Whether runs are read at once or parts as views makes no difference."""
    shape, cuts, in_runs = CASES[name]
    grown = parts(shape, cuts)
    assert (grown.runs is not None) == in_runs
    parameter = torch.randn(shape).to(dtype)
    if layout == "channels_last" and len(shape) == 4:
        parameter = parameter.to(memory_format=torch.channels_last)
    (found,) = ratios_of([(parameter, grown)])
    wanted = by_masks(parameter, grown)
    assert all(ratio.dtype == dtype and ratio.shape == () for ratio in found)
    torch.testing.assert_close(
        torch.stack(found).double(), torch.tensor(wanted).double(),
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0,
    )  # fmt: skip


def test_each_parameter_has_its_own() -> None:
    """Of several dtypes and numbers of growths at once; a part of zeros has the whole rate."""
    one, two = parts((8, 256), [(4, 128), (8, 256)]), parts((8, 9), [(2, 3), (4, 6), (8, 9)])
    first, second = torch.randn(8, 256), torch.randn(8, 9, dtype=torch.float64)
    silent = first.clone()
    silent[:4, :128] = 0
    members = [(first, one), (second, two), (silent, one)]
    found = ratios_of(members)
    assert [len(own) for own in found] == [1, 2, 1]
    for (parameter, grown), own in zip(members, found, strict=True):
        assert [float(ratio) for ratio in own] == pytest.approx(by_masks(parameter, grown))
    assert float(found[2][0]) == 1.0
    assert ratios_of([]) == []
