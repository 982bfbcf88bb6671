"""Sizes at which every channel has a place; where there is none, the rest still grows."""

from __future__ import annotations

import pytest
import torch
from networks import max_rel, small_images, torchvision_model

from fxgrow import widen

X0_5, X1_0 = "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"


@pytest.mark.parametrize(
    ("name", "settings", "stuck"),
    [
        (X0_5, {"width": "2x"}, {"stage3"}),
        (X0_5, {"width": "+6", "where": "all"}, {"stage3", "fc"}),
        (X0_5, {"width": "2x", "multiple_of": 10}, set()),
        (X0_5, {"width": {"stage3.*": "97", "*": "2x"}}, set()),
        (X1_0, {"width": "1.5x"}, set()),  # 87 is odd, and of some groups halves would be read
        (X1_0, {"width": "1.5x", "pairing": "replicate"}, set()),
    ],
)
def test_a_shuffler_grows_as_far_as_it_can(
    name: str, settings: dict[str, object], stuck: set[str]
) -> None:
    model, x = torchvision_model(name, num_classes=5), small_images()
    grown = widen(model, example_inputs=x, verify=False, **settings)  # type: ignore[arg-type]
    assert {refusal.name.partition(".")[0] for refusal in grown.plan.refused} == stuck
    hidden = [group.name for group in grown.plan.groups if group.name.endswith("branch2.0")]
    assert len(hidden) == 16  # inside the blocks, every group grows
    for train in (False, True):
        model.train(train), grown.model.train(train)
        with torch.no_grad():
            assert max_rel(model(x), grown.model(x)) < 1e-10
