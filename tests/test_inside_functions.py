"""Sizes inside functions that no graph shows: heads grow, at every size of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import max_rel
from torch import Tensor, nn

import fxgrow

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def convit() -> nn.Module:
    return timm.create_model("convit_tiny", depth=2, local_up_to_layer=1, embed_dim=8, num_heads=2,
                             img_size=16, patch_size=8, num_classes=3)  # fmt: skip


def nest() -> nn.Module:
    sizes = {"embed_dims": (8, 8), "num_heads": (2, 2), "depths": (1, 1), "num_classes": 3}
    return timm.models.nest.Nest(
        img_size=32, patch_size=4, num_levels=2, drop_path_rate=0.0, **sizes
    )


def crossvit() -> nn.Module:
    return timm.models.crossvit.CrossVit(
        img_size=48, img_scale=(1.0, 1.0), patch_size=(12, 16), embed_dim=(8, 16),
        depth=((1, 1, 0),), num_heads=(2, 2), mlp_ratio=(2, 2, 1), num_classes=3,
    )  # fmt: skip


def twins() -> nn.Module:
    sizes = {"embed_dims": (8,) * 4, "num_heads": (2,) * 4, "depths": (2, 1, 1, 1)}
    return timm.create_model("twins_svt_small", img_size=64, num_classes=3, **sizes)


def segformer() -> nn.Module:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[2, 2], mlp_ratios=[2, 2],
        num_labels=3, **dict.fromkeys(names, 0.0),
    )  # fmt: skip
    return transformers.SegformerForImageClassification(config)


def phi3() -> nn.Module:
    config = transformers.Phi3Config(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


def outputs(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "shape", "heads"),
    [
        (convit, (2, 3, 16, 16), 2),
        (nest, (2, 3, 32, 32), 2),
        (crossvit, (2, 3, 48, 48), 3),
        (twins, (2, 3, 64, 64), 5),
        (segformer, (2, 3, 32, 32), 2),
        (phi3, (2, 7), 1),
    ],
)
def test_heads_grow_alone_and_nothing_is_refused(
    make: Callable[[], nn.Module], shape: tuple[int, ...], heads: int
) -> None:
    torch.manual_seed(0)
    net, bound = make().eval(), 1e-11
    for parameter in net.parameters():  # heads of classifiers begin with zeros
        nn.init.normal_(parameter, 0, 0.2)
    x = torch.randn(shape, dtype=torch.float64) if len(shape) == 4 else torch.randint(1, 20, shape)
    try:
        net.double()(x)
    except RuntimeError:  # older ConViTs of timm know float32 alone
        net, x, bound = net.float(), x.float(), 1e-5
    grown = fxgrow.widen(net, "2x", x)
    assert not grown.plan.refused
    assert type(grown.model) is type(net)
    attention = [g for g in grown.plan.groups if "att" in g.name.rpartition(".")[0]]
    assert len({group.name.rpartition(".")[0] for group in attention}) >= heads
    other = torch.cat([x, x.flip(0)])
    for training in (False, True):
        before, after = (outputs(n.train(training)(other)) for n in (net, grown.model))
        assert max_rel(before, after) < bound


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("where", "stays"), [("hidden", 0), ("all", 4)])
def test_a_segmenter_grows_as_a_whole(where: str, stays: int) -> None:
    """Its reduced sequences take their width from the shape of what comes in, in four stages."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[4, 8, 20, 32], depths=[1] * 4, num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=6, num_labels=3,
    )  # fmt: skip
    net = transformers.SegformerForSemanticSegmentation(config).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grown = fxgrow.widen(net, "2x", x, where=where)
    assert len(grown.plan.refused) <= stays  # the one head of the first stage, and the outputs
    parts = ("sequence_reduction", "linear_projections", "linear_fuse", "q_proj", "mlp.fc1")
    for part, count in zip(parts, (3, 4, 1, 3, 4), strict=True):
        assert sum(part in group.name for group in grown.plan.groups) == count
    notes = grown.report.verification.notes
    assert not any("not judged" in note for note in notes)
    assert max_rel(net(x).logits, grown.model(x).logits) < 1e-13
