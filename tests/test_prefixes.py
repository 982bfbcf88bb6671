"""Weights under the names of a trainer's attributes: found, grown, and stored under them again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from networks import max_rel, plain_mlp, trained_looking
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import fxgrow
from fxgrow.cli.app import app
from fxgrow.files.checkpoint.matching import is_average, prefixes

MLP = "networks:plain_mlp"
PREFIXES = (
    "model.", "net.", "module.model.", "model.net.", "model._orig_mod.", "module.",
    "_orig_mod.module.", "network.backbone.module.",
)  # fmt: skip


def widen(path: Path, *options: str) -> Result:
    out = path.with_name(f"o{path.suffix}")
    command = ["widen", str(path), "--width", "2x", "-o", str(out), *options]
    return CliRunner().invoke(app, command)


def stored(model: nn.Module, prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_found_and_kept(tmp_path, prefix):
    model = trained_looking(plain_mlp()).eval()
    saved = {"state_dict": stored(model, prefix), "epoch": 3, "hyper_parameters": {"lr": 0.1}}
    torch.save(saved, tmp_path / "c.ckpt")
    done = widen(tmp_path / "c.ckpt", "--arch", MLP)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    written = torch.load(tmp_path / "o.ckpt", weights_only=True)
    assert list(written["state_dict"]) == list(saved["state_dict"])
    assert (written["epoch"], written["hyper_parameters"]) == (3, {"lr": 0.1})
    grown = fxgrow.load(tmp_path / "o.ckpt", arch=MLP)
    x = torch.randn(5, 4)
    assert grown[0].out_features == 16
    assert max_rel(model(x), grown(x)) < 1e-5
    again = plain_mlp(width=16)
    names = {n.removeprefix(prefix): t for n, t in written["state_dict"].items()}
    again.load_state_dict(names)
    assert torch.equal(again.eval()(x), grown(x))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_prefix_in_a_bare_state_dict_is_kept_beside_what_is_none_of_it(tmp_path, suffix):
    model = trained_looking(plain_mlp()).eval()
    held = stored(model, "model.") | stored(trained_looking(plain_mlp(), seed=1), "model_ema.")
    held["metric.count"] = torch.ones(3)
    path = tmp_path / f"c{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(held, path)
    done = widen(path, "--arch", MLP)
    assert done.exit_code == 0, done.output
    assert "'model.'; beside them, metric.count is left as it is" in done.stderr
    out = tmp_path / f"o{suffix}"
    written = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert set(written) == set(held)
    assert torch.equal(written["metric.count"], held["metric.count"])
    x = torch.randn(5, 4)
    for name in ("model.", "model_ema."):
        pair = (plain_mlp().eval(), plain_mlp(width=16).eval())
        for network, tensors in zip(pair, (held, written), strict=True):
            part = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
            network.load_state_dict(part)
        assert max_rel(*(network(x) for network in pair)) < 1e-5


def test_a_network_is_recognised_under_a_prefix_whatever_stands_beside_it(tmp_path):
    model = torchvision.models.resnet18(num_classes=5).eval()
    held = {**stored(model, "model."), "loss_fn.weight": torch.ones(5)}
    torch.save({"state_dict": held}, tmp_path / "c.ckpt")
    options = ("--include", "layer1.*", "--verify", "quick")
    for named in (
        (),
        ("--arch", "resnet18"),
        ("--arch", "resnet18", "--arch-arg", "num_classes=5"),
    ):
        done = widen(tmp_path / "c.ckpt", *options, *named, "--force")
        assert done.exit_code == 0, done.output
        assert "torchvision:resnet18(num_classes=5)" in done.stdout
        assert "loss_fn.weight is left as it is" in done.stderr
    grown = fxgrow.load(tmp_path / "o.ckpt")
    assert grown.layer1[0].conv1.out_channels == 128
    x = torch.randn(2, 3, 64, 64)
    assert max_rel(model(x), grown(x)) < 1e-5


def test_what_does_not_fit_is_told_with_its_prefix(tmp_path):
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save({"state_dict": stored(network, "my.model.")}, tmp_path / "c.ckpt")
    done = widen(tmp_path / "c.ckpt")
    assert done.exit_code == 1
    assert "c.ckpt" in done.stderr
    assert "all names begin with 'my.model.'" in done.stderr
    assert "package.module:callable" in done.stderr
    assert "alexnet" not in done.stderr
    done = widen(tmp_path / "c.ckpt", "--arch", MLP)
    assert done.exit_code == 1
    assert "without the prefix 'my.model.'" in done.stderr
    assert f"do not fit {MLP}" in done.stderr


def test_widths_in_hyper_parameters_are_told_of(tmp_path):
    settings = {"lr": 8, "batch_size": 8, "model": {"hidden_dim": 8}}
    saved = {"state_dict": stored(plain_mlp(), "net."), "hyper_parameters": settings}
    torch.save(saved, tmp_path / "c.ckpt")
    done = widen(tmp_path / "c.ckpt", "--arch", MLP)
    assert done.exit_code == 0, done.output
    assert "hyper_parameters.model.hidden_dim" in done.stderr
    assert "batch_size" not in done.stderr
    written = torch.load(tmp_path / "o.ckpt", weights_only=True)
    assert written["hyper_parameters"] == settings


def test_prefixes_are_ordered_by_how_many_names_share_them():
    names = ["net.0.weight", "net.0.bias", "net.1.weight", "loss.weight"]
    assert prefixes(names) == ["", "net.", "net.0.", "loss.", "net.1."]
    assert [is_average(place) for place in ("model.", "ema.model", "state_dict_ema")] == [
        False, True, True,
    ]  # fmt: skip
