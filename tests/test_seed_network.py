"""A small network built by shrinking the full one grows back to exactly its shapes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from test_growth_schedule import Deep, mlp
from torch import nn

from fxgrow.errors import PlanError
from fxgrow.training import (
    FlopLedger,
    GrowthSchedule,
    enter_stage_,
    flops,
    forecast,
    regrow_,
    seed_network,
    state_dict,
)
from fxgrow.training.seed import check_growth


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(40, 20, 2, 4, 32, 56, num_classes=5)


FULL = {
    "mlp": (mlp, (6,)),
    "deep": (Deep, (4,)),
    "vit": (vit, (3, 40, 40)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (3, 32, 32)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), (3, 32, 32)),
}
LARGE = {
    "resnet50": (torchvision.models.resnet50, (3, 64, 64)),
    "vgg11_bn": (torchvision.models.vgg11_bn, (3, 64, 64)),
    "vgg16": (torchvision.models.vgg16, (3, 64, 64)),
    "densenet121": (torchvision.models.densenet121, (3, 64, 64)),
    "resnext50": (torchvision.models.resnext50_32x4d, (3, 64, 64)),
    "vit_b_16": (torchvision.models.vit_b_16, (3, 224, 224)),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, (3, 64, 64)),
}


@pytest.mark.parametrize("name", FULL)
def test_the_last_stage_has_the_shapes_of_the_definition(name):
    make, shape = FULL[name]
    full, x = make(), torch.randn(2, *shape)
    before = {key: value.clone() for key, value in full.state_dict().items()}
    schedule = GrowthSchedule.geometric(full, epochs=100, example_inputs=x, stages=3)
    network = seed_network(full, schedule, x)  # which plans all stages
    assert type(network) is type(full)
    assert network.eval()(x).shape == full.eval()(x).shape
    count = [sum(p.numel() for p in each.parameters()) for each in (network, full)]
    assert count[0] < 0.5 * count[1]
    assert all(torch.equal(value, before[key]) for key, value in full.state_dict().items())
    held = {p.data_ptr() for p in full.parameters()}
    assert held.isdisjoint(p.data_ptr() for p in network.parameters())


@pytest.mark.sweep
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_grow_back_through_all_nine_stages(name):
    make, shape = LARGE[name]
    full, x = make(), torch.randn(1, *shape)
    schedule = GrowthSchedule.geometric(full, epochs=100, example_inputs=x)
    assert len(schedule.stages) >= 4
    assert type(seed_network(full, schedule, x)) is type(full)


@pytest.mark.parametrize("name", ["mlp", "vit", "deep"])
def test_it_grows_in_place_stage_by_stage(name):
    torch.manual_seed(0)
    make, shape = FULL[name]
    x = torch.randn(4, *shape)
    depth = {"blocks": {"blocks": (1, 3)}} if name == "deep" else {}
    schedule = GrowthSchedule.geometric(make, epochs=30, example_inputs=x, stages=3, **depth)
    network = seed_network(make, schedule, x).eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for stage in range(3):
        old = network(x)
        enter_stage_(network, schedule, stage, x, optimizer=optimizer, verify="quick")
        torch.testing.assert_close(network(x), old, rtol=1e-4, atol=1e-5)
        network(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert shapes(network) == shapes(make())


def test_fewer_blocks_come_first():
    full, x = Deep(16, 3), torch.randn(2, 4)
    full.num_blocks = 3
    schedule = GrowthSchedule.geometric(
        full, epochs=30, example_inputs=x, blocks={"blocks": (1, 3)}, initial=1.0
    )
    assert len(schedule.stages) == 3
    network = seed_network(full, schedule, x)
    assert (len(network.blocks), network.num_blocks, network.head.in_features) == (1, 1, 16)
    assert (len(full.blocks), full.num_blocks) == (3, 3)
    middle = seed_network(full, schedule, x, stage=1)
    assert (len(middle.blocks), middle.num_blocks) == (2, 2)
    with pytest.raises(PlanError, match="3 blocks in 'blocks'"):
        seed_network(full, GrowthSchedule.geometric(
            {"stem": 16}, epochs=30, blocks={"blocks": (4, 5)}, stages=3), x)  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_heads_as_wide_as_an_input_stay(norm_first, rate):
    """Those of nn.MultiheadAttention have the width of what they read, here the network's input."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    full = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 32)
    schedule = GrowthSchedule.geometric(full, epochs=30, rate=rate, example_inputs=x)
    assert schedule.widths_at(0) == {"layers.0.linear1": 16, "layers.1.linear1": 16}
    assert seed_network(full, schedule, x).layers[0].self_attn.embed_dim == 32


def test_every_layer_initialises_itself():
    torch.manual_seed(0)
    full, x = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512)), torch.randn(2, 64)
    full.append(nn.LayerNorm(512)).append(nn.Linear(512, 2))
    for parameter in full.parameters():
        nn.init.constant_(parameter, 7.0)
    schedule = GrowthSchedule.geometric(full, epochs=30, example_inputs=x, stages=2)
    network = seed_network(full, schedule, x)
    # U(±1/√fan_in), whose standard deviation is 1/√(3·fan_in).
    want = 1 / math.sqrt(3 * network[2].in_features)
    assert network[2].weight.std().item() == pytest.approx(want, rel=0.05)
    assert torch.equal(network[3].weight, torch.ones_like(network[3].weight))
    zeros = seed_network(full, schedule, x, init=lambda net: nn.init.zeros_(net[0].weight))
    assert not zeros[0].weight.any()


def test_what_no_layer_initialises_is_cut_from_the_definition():
    full, x = vit(), torch.randn(1, 3, 40, 40)
    schedule = GrowthSchedule.geometric(full, epochs=30, example_inputs=x, stages=3)
    network = seed_network(full, schedule, x)
    part = full.encoder.pos_embedding[..., : network.hidden_dim]
    assert torch.equal(network.encoder.pos_embedding, part)
    assert network.encoder.layers[0].self_attention.num_heads < 4


def test_groups_of_a_convolution_keep_more_than_a_channel():
    """With one in each it would be depthwise, of which the channels are others."""
    full, x = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU()), torch.randn(2, 3, 4, 4)
    full.append(nn.Conv2d(16, 32, 3, groups=4)).append(nn.ReLU()).append(nn.Conv2d(32, 2, 1))
    schedule = GrowthSchedule.geometric(full, epochs=30, example_inputs=x, stages=3)
    assert schedule.widths_at(0) == {"0": 8, "2": 8}
    network = seed_network(full, schedule, x)
    assert (network[2].groups, network[2].weight.shape[:2]) == (4, (8, 2))


def test_a_schedule_of_another_network_is_refused():
    schedule = GrowthSchedule.geometric(mlp, epochs=30)
    with pytest.raises(PlanError, match="no channel group '0'"):
        seed_network(Deep(), schedule, torch.randn(2, 4))
    other = mlp(48)
    with pytest.raises(PlanError, match="the last stage has"):
        seed_network(other, schedule, torch.randn(2, 6))
    seed_network(other, schedule, torch.randn(2, 6), check=False)


def of_whole_copies() -> nn.Module:
    """Return a network with a LayerNorm behind a layer that mixes positions."""
    full = nn.Sequential(nn.Conv1d(3, 16, 1), nn.Conv1d(16, 16, 3, groups=16))
    return full.append(Last(16)).append(nn.Linear(2, 32)).append(nn.ReLU()).append(nn.Linear(32, 2))


def test_what_grows_by_whole_copies_waits_for_the_next_multiple():
    full, x = of_whole_copies(), torch.randn(2, 3, 6)
    schedule = GrowthSchedule.geometric(full, epochs=30, example_inputs=x)
    count = len(schedule.stages)
    widths = [schedule.widths_at(stage)["0"] for stage in range(count)]
    assert sorted(set(widths)) == [4, 8, 16]
    assert widths == sorted(widths)
    others = [schedule.widths_at(stage)["3"] for stage in range(count)]
    assert others == sorted(set(others))  # which grow in each stage
    network = seed_network(full, schedule, x)
    for stage in range(1, count):
        enter_stage_(network, schedule, stage, x, verify="quick")
    assert shapes(network) == shapes(full)


def test_what_cannot_grow_back_is_named():
    full, x = of_whole_copies(), torch.randn(2, 3, 6)
    schedule = GrowthSchedule.of(
        [{"epochs": 5, "width": {"0": "4"}}, {"epochs": 5, "width": {"0": "6"}}, {"epochs": 5}]
    )
    with pytest.raises(PlanError, match="cannot be widened"):
        seed_network(full, schedule, x)


class Last(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x.transpose(1, 2)))


def test_the_check_sees_a_tensor_that_differs():
    full, x = mlp(), torch.randn(2, 6)
    schedule = GrowthSchedule.geometric(full, epochs=30)
    network = seed_network(full, schedule, x)
    check_growth(full, network, schedule, x)
    other = copy.deepcopy(full)
    other.register_buffer("more", torch.zeros(2))
    with pytest.raises(PlanError, match="nothing for more"):
        check_growth(other, network, schedule, x)


def test_flops_forward_and_backward_per_sample():
    net = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    for batch in (1, 8):
        one = flops(net, torch.randn(batch, 10))
        assert one.forward == 2 * (10 * 20 + 20 * 5)
        # Both weights have gradients, and so has what lies between; the inputs have none.
        assert one.backward == 2 * (10 * 20 + 20 * 5) + 2 * 20 * 5
    net[0].weight.requires_grad_(requires_grad=False)
    assert flops(net, torch.randn(8, 10)).backward == 2 * 20 * 5
    assert all(p.grad is None for p in net.parameters())


def test_flops_of_networks_that_meta_tensors_or_one_sample_stop():
    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum().item() > -1e9 else x

    assert flops(Looks(4, 4), torch.randn(2, 4)).forward == 32
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x, state = torch.randn(1, 4), torch.get_rng_state()
    assert flops(norm, x).forward == 32
    assert torch.equal(torch.get_rng_state(), state)
    assert norm[1].num_batches_tracked == 0
    with pytest.raises(PlanError, match="does not run"):
        flops(norm, torch.randn(1, 5))


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens, width = 6, 8
    products = 4 * width * width + 2 * width * 16 + 2 * tokens * width
    assert flops(layer, torch.randn(3, tokens, width)).forward == 2 * tokens * products


def test_the_ledger_adds_up_and_resumes():
    net, ledger = nn.Linear(4, 8), FlopLedger()
    with pytest.raises(Exception, match="no stage has begun"):
        ledger.add(3)
    ledger.begin(net, torch.randn(2, 4))
    ledger.add(10)
    ledger.add(5)
    ledger.begin(nn.Linear(4, 16), torch.randn(2, 4))
    ledger.add(10)
    assert ledger.total == 15 * 128 + 10 * 256
    again = FlopLedger()
    again.load_state_dict(ledger.state_dict())
    assert again.stages == ledger.stages
    assert str(again).splitlines()[-1].split() == ["total", "4480"]
    for state in ({}, {"stages": [{"flops": {"forward": 1.0, "backward": -9.0}, "samples": 1}]}):
        with pytest.raises(Exception, match="not the state"):
            again.load_state_dict(state)
    assert again.stages == ledger.stages


def test_a_forecast_is_what_the_ledger_counts():
    x = torch.randn(2, 6)
    schedule = GrowthSchedule.geometric(mlp, epochs=160)
    told = forecast(mlp, schedule, x, samples=10)
    network, ledger = seed_network(mlp, schedule, x), FlopLedger()
    for index, stage in enumerate(schedule.stages):
        enter_stage_(network, schedule, index, x, verify="none")
        ledger.begin(network, x)
        ledger.add(10 * stage.epochs)
    assert told.total == ledger.total
    assert told.full == flops(mlp(), x).total * 1600
    assert 0.4 < told.part < 0.8


def test_the_configuration_of_a_seed_tells_its_sizes(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        vocab_size=20, max_position_embeddings=8,
    )  # fmt: skip

    def build() -> nn.Module:
        return transformers.BertForSequenceClassification(config)

    x = torch.ones(2, 4, dtype=torch.long)
    schedule = GrowthSchedule.geometric(build, initial=0.5, rate=1.0, epochs=4, example_inputs=x)
    net = seed_network(build, schedule, x)
    told = net.config
    assert (told.hidden_size, told.num_attention_heads, told.intermediate_size) == (8, 2, 16)
    assert net.bert.config is told
    assert config.hidden_size == 16
    for stage in range(1, len(schedule.stages)):
        enter_stage_(net, schedule, stage, x)
    net.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification(
        transformers.AutoConfig.from_pretrained(tmp_path)
    )
    regrow_(again, state_dict(net)).load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(x).logits, net.eval()(x).logits)
