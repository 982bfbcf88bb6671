"""Deeper networks of every family: transformers, and those of torchvision that are not ResNets."""

from __future__ import annotations

import hugging_face
import pytest
import torch
import torchvision
from networks import torchvision_model

import fxgrow
from fxgrow.api.deepen import plan_deepening


def assert_kept(grown):
    found = grown.report.verification
    assert found.verdict == "preserved"
    assert max(r.float64.max_rel for r in (found.eval, found.train)) <= 1e-10
    assert found.without_gradient == ()


@pytest.mark.parametrize("method", ["r2deeper", "zero_last"])
@pytest.mark.parametrize(
    ("name", "stage", "depth"),
    [
        ("gpt2", "transformer.h", "n_layer"),
        ("llama", "model.layers", "num_hidden_layers"),
        ("gemma2", "model.layers", "num_hidden_layers"),
        ("phi", "model.layers", "num_hidden_layers"),
        ("vit", hugging_face.VIT_LAYERS, "num_hidden_layers"),
    ],
)
def test_transformers_and_their_configurations_get_deeper(name, stage, depth, method):
    net, inputs = hugging_face.build(name)
    grown = fxgrow.deepen(net, {stage: "+2"}, inputs, method)
    assert_kept(grown)
    assert type(grown.model) is type(net)
    assert getattr(grown.model.config, depth) == 4
    assert getattr(net.config, depth) == 2
    blocks = grown.model.get_submodule(stage)
    indices = [m.layer_idx for m in blocks.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(indices)) in ([], [0, 1, 2, 3])
    configs = [
        {id(m.config) for m in n.modules() if hasattr(m, "config")} for n in (net, grown.model)
    ]
    assert len(configs[0]) == len(configs[1])  # new blocks share it


def test_a_deeper_language_model_generates():
    net, inputs = hugging_face.build("llama")
    grown = fxgrow.deepen(net, {"model.layers.0": "+1"}, inputs)
    tokens = [
        model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
        for model in (net, grown.model)
    ]
    assert torch.equal(*tokens)


def test_only_the_number_of_blocks_of_the_list_itself_changes():
    net, inputs = hugging_face.build("t5")
    grown = fxgrow.deepen(net, {"decoder.block": "+1"}, inputs)
    assert_kept(grown)
    assert (grown.model.config.num_layers, grown.model.config.num_decoder_layers) == (2, 3)


@pytest.mark.parametrize("method", ["r2deeper", "zero_last"])
@pytest.mark.parametrize(
    ("name", "stage"), [("bert", "encoder.layer"), ("bart", "model.encoder.layers")]
)
def test_a_norm_after_the_addition_is_refused(name, stage, method):
    net, inputs = hugging_face.build(name)
    with pytest.raises(fxgrow.PlanError, match=r"layer_norm at .* follows the addition"):
        plan_deepening(net, {stage: "+1"}, inputs, method)


def test_a_block_that_runs_again_and_again_is_refused():
    net, inputs = hugging_face.build("albert")
    with pytest.raises(fxgrow.PlanError, match="runs 2 times in a pass"):
        plan_deepening(net, {"encoder.albert_layer_groups": "+1"}, inputs)


@pytest.mark.parametrize("method", ["r2deeper", "zero_last"])
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("mobilenet_v3_small", "features.5"),
        ("convnext_tiny", "features.1"),
        ("swin_t", "features.1"),
    ],
)
def test_networks_of_torchvision_get_deeper(name, stage, method):
    net = torchvision_model(name, num_classes=5)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_kept(fxgrow.deepen(net, {stage: "+2"}, images, method))


def test_blocks_that_take_turns_go_on_taking_turns():
    net = torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=3
    )
    grown = fxgrow.deepen(net, {"features.1": "+2"}, torch.randn(2, 3, 64, 64))
    assert [block.attn.shift_size for block in grown.model.features[1]] == [[0, 0], [2, 2]] * 2


def test_names_with_a_stem_go_on_being_numbered():
    net = torchvision.models.VisionTransformer(32, 8, 3, 4, 32, 48, num_classes=5).eval()
    torch.nn.init.normal_(net.heads.head.weight)
    images = torch.randn(2, 3, 32, 32)
    grown = fxgrow.deepen(net, {"encoder.layers.encoder_layer_0": "+2"}, images)
    assert_kept(grown)
    deeper = torchvision.models.VisionTransformer(32, 8, 5, 4, 32, 48, num_classes=5).eval()
    deeper.load_state_dict(grown.model.state_dict(), strict=True)
    torch.testing.assert_close(deeper(images), net(images), rtol=1e-4, atol=1e-5)
    new = grown.model.encoder.layers.encoder_layer_1.self_attention.out_proj.weight
    assert torch.equal(new[:, :16], -new[:, 16:])  # two heads, and two twins
