"""Architectures: parsed, built without weights, recognised from names and shapes."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
import torchvision
from torch import nn

from fxgrow.errors import FxgrowWarning, SourceError, UsageError
from fxgrow.modules import architectures, recognition
from fxgrow.modules.architectures import (
    Architecture,
    parse_architecture,
    parse_arguments,
    torchvision_names,
)
from fxgrow.modules.recognition import adjusted, recognise
from fxgrow.modules.uninitialised import build_uninitialised

MORE = ["maxvit_t", "vit_b_16", "densenet121", "shufflenet_v2_x0_5", "googlenet"]
SOME = ["resnet18", "regnet_y_400mf", "swin_t", "inception_v3", "ssdlite320_mobilenet_v3_large"]


def shapes_of(name: str, **arguments: object) -> dict[str, tuple[int, ...]]:
    model = Architecture(f"torchvision:{name}", arguments).build()
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def plain(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchvision.models.get_model(name, weights=None).eval()


def check_meta(name: str) -> None:
    model = Architecture(f"torchvision:{name}").build()
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.training


@pytest.mark.parametrize("name", SOME)
def test_building_on_meta_needs_no_weights_and_no_words(name):
    check_meta(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", architectures._torchvision_names())
def test_every_torchvision_model_builds_on_meta(name):
    check_meta(name)


@pytest.mark.parametrize(
    "name",
    ["swin_t", "regnet_y_400mf", *(pytest.param(n, marks=pytest.mark.sweep) for n in MORE)],
)
def test_a_model_built_on_cpu_computes_the_same_once_weights_are_loaded(name):
    reference = plain(name)
    model = Architecture(f"torchvision:{name}").build("cpu").eval()
    for (key, tensor), (_, expected) in zip(
        model.named_buffers(), reference.named_buffers(), strict=True
    ):
        assert torch.equal(tensor, expected), key
    model.load_state_dict(dict(reference.named_parameters()), strict=False)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))


def test_building_leaves_the_random_state_and_the_initialisers_alone():
    before, initialise = torch.get_rng_state(), nn.init.kaiming_normal_
    for name in SOME:
        Architecture(f"torchvision:{name}").build("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.init.kaiming_normal_ is initialise
    assert float(nn.Linear(4, 4).weight.detach().abs().sum()) > 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.a.weight = self.b.weight = shared
        self.register_buffer("steps", torch.arange(3), persistent=False)
        self.scale = torch.full((1,), 2.0)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_ties_flags_and_constants_survive_building(device):
    model = build_uninitialised(Tied, device)
    assert model.a.weight is model.b.weight
    assert not model.a.weight.requires_grad
    assert model.a.weight.device.type == model.steps.device.type == device
    assert model.scale.item() == 2.0
    assert "steps" not in model.state_dict()
    if device == "cpu":
        assert model.steps.tolist() == [0, 1, 2]


class ReadsItself(nn.Module):
    """Computes a buffer and decides a size from its own initial weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("copy", self.weight.detach().clone())


def test_a_constructor_that_reads_its_parameters_is_run_plainly():
    assert build_uninitialised(ReadsItself, "cpu").copy.tolist() == [1, 1, 1]
    assert build_uninitialised(ReadsItself, "meta").copy.is_meta


def test_initialisers_that_look_at_values_are_skipped(monkeypatch):
    def rejecting(tensor, *args, **kwargs):
        assert not (tensor < 0).any()  # raises on meta
        pytest.fail("the initialiser ran")

    monkeypatch.setattr(nn.init, "trunc_normal_", rejecting)
    model = Architecture("torchvision:vit_b_16").build("meta")
    assert model.class_token.is_meta


def test_recurrent_layers_are_usable_on_the_cpu():
    lstm = build_uninitialised(lambda: nn.LSTM(2, 3), "cpu")
    reference = nn.LSTM(2, 3)
    lstm.load_state_dict(reference.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(lstm(x)[0], reference(x)[0])


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("resnet50", "torchvision:resnet50"),
        ("torchvision:vgg11", "torchvision:vgg11"),
        ("torch.nn:Sequential", "torch.nn:Sequential"),
    ],
)
def test_specs_are_normalised(spec, name):
    assert parse_architecture(spec).name == name


def test_timm_models_are_found_and_built():
    pytest.importorskip("timm")
    architecture = parse_architecture("resnet50d", {"num_classes": 5})
    assert architecture.name == "timm:resnet50d"
    assert architecture.build().fc.weight.shape == (5, 2048)
    assert parse_architecture("timm:resnet18").build().fc.weight.is_meta


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("resnet5", "no model 'resnet5'.*Did you mean.*resnet50"),
        ("torchvision:resnet50d", "resnet50"),
        ("resnet35", r"Did you mean (resnet\d+(, )?)+\?"),
        ("timm:hf-hub:user/model", "timm has no model"),
        ("no_such_package:net", "cannot be imported.*package.module:callable"),
        ("networks.plain_mlp", "no model 'networks.plain_mlp'.*your own as networks:plain_mlp"),
        ("resnet50.a1_in1k", "Did you mean resnet50\\?"),
        ("torch.nn:Sequentiel", "Did you mean Sequential"),
        ("math:pi", "not a class or a function"),
    ],
)
def test_unknown_architectures_are_refused_with_the_closest(spec, pattern):
    with pytest.raises(SourceError, match=pattern):
        parse_architecture(spec)


def test_user_code_is_imported_only_from_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef net(width=2): return nn.Linear(width, width)\n"
        "def text(): return 'no'\ndef fails(): raise ValueError('bad width')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert parse_architecture("my_nets:net", {"width": 3}).build().weight.shape == (3, 3)
    with pytest.raises(SourceError, match="returns str"):
        parse_architecture("my_nets:text").build()
    with pytest.raises(SourceError, match="bad width"):
        parse_architecture("my_nets:fails").build()
    recorded = parse_architecture("my_nets:net").to_dict()
    with pytest.raises(SourceError, match='arch="my_nets:net"'):
        Architecture.from_dict(recorded)
    assert Architecture.from_dict(recorded, trust_code=True).name == "my_nets:net"


def test_architectures_survive_json():
    architecture = Architecture("torchvision:resnet18", {"num_classes": 3, "size": (1, 2)})
    again = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    assert again == architecture
    assert hash(again) == hash(architecture)
    with pytest.raises(SourceError):
        Architecture.from_dict({"arguments": {}})


@pytest.mark.parametrize("arguments", [{"weights": "DEFAULT"}, {"pretrained": True}])
def test_pretrained_weights_are_never_asked_for(arguments):
    with pytest.raises(SourceError, match="weights come from SOURCE"):
        parse_architecture("resnet18", arguments)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(SourceError, match="arch_arguments"):
        Architecture("torchvision:resnet18", {"no_such": 1}).build()
    with pytest.raises(SourceError, match="module:function"):
        Architecture("torchvision:resnet18", {"norm_layer": nn.Identity})


def test_argument_pairs_are_literals_or_texts():
    pairs = ["a=1", "b=x=y", "c=[1, 2]", "d=", "e=None"]
    expected = {"a": 1, "b": "x=y", "c": [1, 2], "d": "", "e": None}
    assert parse_arguments(pairs) == expected
    for bad in (["a"], ["=1"], ["a b=1"], ["a=1", "a=2"]):
        with pytest.raises(UsageError):
            parse_arguments(bad)


RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
RESNETS += ["wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_64x4d"]


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_are_recognised_whatever_the_number_of_classes(name):
    for arguments in ({}, {"num_classes": 7}):
        found = recognise(shapes_of(name, **arguments), hint="model")
        assert found == Architecture(f"torchvision:{name}", arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("googlenet", {"aux_logits": False}),
        ("inception_v3", {"aux_logits": False, "num_classes": 5}),
        ("vit_b_16", {"image_size": 384, "num_classes": 7}),
        ("fcn_resnet50", {"aux_loss": True}),
        ("keypointrcnn_resnet50_fpn", {"num_classes": 3, "num_keypoints": 5}),
        ("ssd300_vgg16", {"num_classes": 4}),
        ("squeezenet1_1", {"num_classes": 1}),
    ],
)
def test_other_arguments_that_show_in_shapes_are_found(name, arguments):
    found = recognise(shapes_of(name, **arguments))
    assert found == Architecture(f"torchvision:{name}", arguments)


@pytest.mark.sweep
@pytest.mark.parametrize("name", torchvision_names())
def test_every_torchvision_architecture_is_recognised(name):
    assert recognise(shapes_of(name), name) == Architecture(f"torchvision:{name}")
    if not name.startswith("raft"):
        found = recognise(shapes_of(name, num_classes=7), name)
        assert found == Architecture(f"torchvision:{name}", {"num_classes": 7})


@pytest.mark.sweep
def test_the_index_is_that_of_the_installed_torchvision():
    index = {name: frozenset(text.split()) for name, text in recognition.build_index().items()}
    known = recognition._index()
    assert {name: index[name] for name in known if name in index} == known


def test_old_checkpoints_without_num_batches_tracked_are_recognised():
    shapes = {n: s for n, s in shapes_of("resnet18").items() if "batches" not in n}
    assert recognise(shapes).name == "torchvision:resnet18"


def test_architectures_that_share_all_shapes_are_told_by_the_hint_or_a_warning():
    one, other = "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"
    shapes = shapes_of(one)
    for name in (one, other):
        assert recognise(shapes, hint=f"{name}-fb6a3cc7").name == f"torchvision:{name}"
    with pytest.warns(FxgrowWarning, match=f"{one}, which compute differently"):
        assert recognise(shapes).name == f"torchvision:{other}"


def test_a_hint_never_overrules_the_shapes():
    assert recognise(shapes_of("resnet18"), hint="resnet50").name == "torchvision:resnet18"


def test_an_architecture_that_the_index_lacks_is_recognised(monkeypatch):
    index = {name: sketch for name, sketch in recognition._index().items() if name != "alexnet"}
    monkeypatch.setattr(recognition, "_index", lambda: index)
    assert recognise(shapes_of("alexnet", num_classes=3)).name == "torchvision:alexnet"


def test_an_index_that_is_wrong_changes_no_answer(monkeypatch):
    index = {**recognition._index()}
    index["resnet50"], index["resnext50_32x4d"] = index["resnext50_32x4d"], index["resnet50"]
    monkeypatch.setattr(recognition, "_index", lambda: index)
    assert recognise(shapes_of("resnet50")).name == "torchvision:resnet50"


def test_what_nobody_knows_is_compared_with_the_nearest():
    shapes = shapes_of("resnet50")
    shapes["layer1.0.conv1.weight"] = (128, 64, 1, 1)
    del shapes["fc.bias"]
    pattern = (
        r"nearest is torchvision:resnet50: missing fc.bias 1000; of another shape "
        r"layer1.0.conv1.weight 128x64x1x1 for 64x64x1x1\. .*with arch"
    )
    with pytest.raises(SourceError, match=pattern):
        recognise(shapes)


@pytest.mark.parametrize("shapes", [{"a": (3,)}, {}])
def test_nothing_is_called_near_that_has_hardly_anything_in_common(shapes):
    with pytest.raises(
        SourceError, match=r"(are a 3|are none).*package\.module:callable"
    ) as caught:
        recognise(shapes)
    assert "nearest" not in str(caught.value)


def test_the_names_are_told_that_no_architecture_has():
    found = shapes_of("resnet18").items()
    renamed = {name.replace("layer", "stage"): shape for name, shape in found}
    with pytest.raises(SourceError, match=r"are stage1\.0\.conv1\.weight 64x64x3x3, .* more") as e:
        recognise(renamed)
    assert "conv1.weight" not in str(e.value).replace("stage1.0.conv1.weight", "")


def test_arguments_that_shapes_tell_need_not_be_given():
    def own(name: str, **arguments: object) -> Architecture | None:
        shapes = {
            n: tuple(t.shape) for n, t in Architecture(name, arguments).build().state_dict().items()
        }
        return adjusted(Architecture(name), shapes)

    assert own("torchvision:resnet18", num_classes=7).arguments == {"num_classes": 7}
    assert own("networks:plain_mlp", classes=5).arguments == {"classes": 5}
    assert own("torchvision:resnet50", width_per_group=128) is None
