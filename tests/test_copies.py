"""What a checkpoint holds of a network's weights a second time grows, or is told of."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import max_rel, plain_mlp, trained_looking
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import fxgrow
from fxgrow.cli.app import app
from fxgrow.files.checkpoint import load_source
from fxgrow.files.copies import stale_settings

ARCH = ("--arch", "networks:plain_mlp")


def widen(path: Path, *options: str) -> Result:
    command = ["widen", str(path), "--width", "2x", *ARCH, "-o", str(path.with_name("o.pt"))]
    return CliRunner().invoke(app, [*command, *options])


def vector(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def named(model: nn.Module, values: Any) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return {n: torch.as_tensor(value) for n, value in zip(names, values, strict=True)}


def unflattened(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([p.numel() for p in model.parameters()])
    return {
        name: part.view_as(parameter)
        for (name, parameter), part in zip(model.named_parameters(), parts, strict=True)
    }


def by_groups(model: nn.Module, groups: Any) -> dict[str, Tensor]:
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    vectors = [name for name, p in model.named_parameters() if p.ndim == 1]
    return dict(zip([*matrices, *vectors], [*groups[0], *groups[1]], strict=True))


Pack = Callable[[dict[str, Tensor]], Any]
Unpack = Callable[[nn.Module, Any], dict[str, Tensor]]
# How averages of the parameters are kept: what is saved for them, and what they are again.
LAYOUTS: dict[str, tuple[Pack, Unpack]] = {
    "list": (lambda v: {"shadow_params": list(v.values()), "decay": 0.9},
             lambda m, s: named(m, s["shadow_params"])),
    "tuple": (lambda v: tuple(v.values()), named),
    "parameters": (lambda v: [nn.Parameter(t) for t in v.values()], named),
    "arrays": (lambda v: [t.numpy() for t in v.values()], named),
    "by name": (dict, lambda m, s: s),
    "by name with a prefix": (lambda v: OrderedDict((f"module.{k}", t) for k, t in v.items()),
                              lambda m, s: {k.removeprefix("module."): t for k, t in s.items()}),
    "without dots": (lambda v: {f"ema.{k.replace('.', '')}": t for k, t in v.items()},
                     lambda m, s: named(m, s.values())),
    "arrays by name": (lambda v: {k: t.numpy() for k, t in v.items()},
                       lambda m, s: {k: torch.as_tensor(t) for k, t in s.items()}),
    "by number": (lambda v: dict(enumerate(v.values())), lambda m, s: named(m, s.values())),
    "deep": (lambda v: {"a": [{"b": {"c": {"d": dict(v)}}}]},
             lambda m, s: s["a"][0]["b"]["c"]["d"]),
    "vector": (vector, unflattened),
    "within an optimizer": (lambda v: {"optimizer_states": [{"opt": {}, "ema": tuple(v.values())}]},
                            lambda m, s: named(m, s["optimizer_states"][0]["ema"])),
    "groups": (lambda v: [[t for t in v.values() if t.ndim > 1],
                          [t for t in v.values() if t.ndim == 1]], by_groups),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_of_the_parameters_compute_what_they_did(tmp_path, layout):
    pack, unpack = LAYOUTS[layout]
    model = trained_looking(plain_mlp())
    average = {name: p.detach() * 0.7 for name, p in model.named_parameters()}
    torch.save({"model": model.state_dict(), "other": pack(average)}, tmp_path / "c.pt")
    done = widen(tmp_path / "c.pt")
    assert done.exit_code == 0, done.output
    assert "left as" not in done.output
    saved = torch.load(tmp_path / "o.pt", weights_only=False)["other"]
    grown = fxgrow.load(tmp_path / "o.pt", arch="networks:plain_mlp")
    model.load_state_dict(average, strict=False)
    grown.load_state_dict(unpack(grown, saved), strict=False)
    x = torch.randn(5, 4)
    assert max_rel(model.eval()(x), grown.eval()(x)) < 1e-5
    assert type(saved) is type(pack(average))


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("more", [(1, 0), (0, 2), (1, 2)])
def test_an_average_that_holds_other_weights_too_grows_where_its_own_are_certain(
    tmp_path, kind, more
):
    model = trained_looking(plain_mlp())
    average = [p.detach() * 0.7 for p in model.parameters()]
    others = [torch.full((3, 5 + index), 0.5) for index in range(sum(more))]
    held = kind([*others[: more[0]], *average, *others[more[0] :]])
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    saved = {"state_dict": state, "optimizer_states": [{"opt": {}, "ema": held}]}
    torch.save(saved, tmp_path / "c.pt")
    done = widen(tmp_path / "c.pt")
    assert done.exit_code == 0, done.output
    assert "left as" not in done.output
    new = torch.load(tmp_path / "o.pt", weights_only=False)["optimizer_states"][0]["ema"]
    assert type(new) is kind
    assert len(new) == len(held)
    before, own, after = new[: more[0]], new[more[0] :][: len(average)], new[len(new) - more[1] :]
    assert all(map(torch.equal, [*before, *after], others))
    grown = fxgrow.load(tmp_path / "o.pt", arch="networks:plain_mlp")
    model.load_state_dict(named(model, average), strict=False)
    grown.load_state_dict(named(grown, own), strict=False)
    x = torch.randn(5, 4)
    assert max_rel(model.eval()(x), grown.eval()(x)) < 1e-5


def test_an_average_that_holds_a_network_twice_is_left_and_told_of(tmp_path):
    model = trained_looking(plain_mlp())
    average = [p.detach() * 0.7 for p in model.parameters()]
    torch.save({"model": model.state_dict(), "ema": (*average, *average)}, tmp_path / "c.pt")
    done = widen(tmp_path / "c.pt")
    assert done.exit_code == 0, done.output
    assert "'ema' in" in done.output
    assert "is left as it is" in done.output
    kept = torch.load(tmp_path / "o.pt", weights_only=False)["ema"]
    assert all(map(torch.equal, kept, (*average, *average)))


def test_an_average_beside_the_network_in_one_state_dict_grows_with_it(tmp_path):
    model = trained_looking(plain_mlp())
    state = {f"model.net.{k}": v for k, v in model.state_dict().items()}
    state |= {f"model_ema.{k.replace('.', '')}": p * 0.7 for k, p in model.named_parameters()}
    state |= {"model_ema.decay": torch.tensor(0.9), "loss.weight": torch.ones(3)}
    torch.save({"state_dict": OrderedDict(state)}, tmp_path / "c.pt")
    done = widen(tmp_path / "c.pt")
    assert done.exit_code == 0, done.output
    assert "beside them, loss.weight" in done.output
    saved = torch.load(tmp_path / "o.pt", weights_only=True)["state_dict"]
    assert list(saved) == list(state)
    grown = fxgrow.load(tmp_path / "o.pt", arch="networks:plain_mlp")
    for name, value in grown.state_dict().items():
        assert torch.equal(saved[f"model.net.{name}"], value)
    for name, _ in grown.named_parameters():
        flat = f"model_ema.{name.replace('.', '')}"
        average = torch.equal(saved[flat][: len(state[flat])][..., :4], state[flat][..., :4])
        assert saved[flat].shape == grown.get_parameter(name).shape, name
        assert average, name


@pytest.mark.parametrize(
    "other",
    [
        {"fisher": {"0.weight": torch.ones(8, 4)}},
        {"grads": [torch.ones(8, 4)]},
        {"stats": [{"deep": (np.ones((8, 4)),)}]},
        {"loose": torch.ones(2, 8)},
        {"optimizer": {"m": [torch.ones(8, 4), torch.ones(8)], "step": 3}},
        {"exp_avg": [p.detach() for p in plain_mlp().parameters()]},
        {0: {"model": torch.ones(8, 4)}},
    ],
    ids=lambda other: str(next(iter(other))),
)
def test_what_has_the_old_shape_of_a_grown_weight_is_told_of(tmp_path, other):
    torch.save({"model": plain_mlp().state_dict(), **other}, tmp_path / "c.pt")
    done = widen(tmp_path / "c.pt")
    assert done.exit_code == 0, done.output
    assert f"{next(iter(other))}" in done.output
    assert "left as" in done.output
    saved = torch.load(tmp_path / "o.pt", weights_only=False)
    key = next(iter(other))
    assert str(saved[key]) == str(other[key])


def test_what_has_no_shape_of_the_network_is_passed_on_in_silence(tmp_path):
    others = {"rng": torch.get_rng_state(), "history": [0.1, 0.2], "table": torch.ones(3, 5)}
    counts = defaultdict(list, {"a": [1]})
    torch.save({"model": plain_mlp().state_dict(), **others, "counts": counts}, tmp_path / "c.pt")
    done = widen(tmp_path / "c.pt")
    assert done.exit_code == 0, done.output
    assert "warning" not in done.output


class Normed(nn.Sequential):
    """A network with buffers, whose averages are kept apart from those of its parameters."""


def normed() -> nn.Module:
    return Normed(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


APART: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module, Any], dict[str, Tensor]]]]
APART = {
    "parameters and buffers": (
        lambda m: {"params": dict(m.named_parameters()), "buffers": dict(m.named_buffers())},
        lambda m, s: {**s["params"], **s["buffers"]},
    ),
    "all that a state_dict holds": (
        lambda m: {"EMA": {"ema_weights": list(m.state_dict().values())}},
        lambda m, s: dict(zip(m.state_dict(), s["EMA"]["ema_weights"], strict=True)),
    ),
}


@pytest.mark.parametrize("layout", APART)
def test_averages_of_buffers_too_compute_what_they_did(tmp_path, layout):
    pack, unpack = APART[layout]
    net, average = (trained_looking(normed(), seed=seed).eval() for seed in (0, 1))
    path = tmp_path / "a.pt"
    torch.save({"model": net.state_dict(), "ema": pack(average)}, path)
    grown = tmp_path / "o.pt"
    arch = ("--arch", "test_copies:normed", "--input-shape", "4x4")
    command = ["widen", str(path), "--width", "2x", *arch, "-o", str(grown)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "ema" in result.output
    wide = fxgrow.load(grown, arch="test_copies:normed").eval()
    wide.load_state_dict(unpack(wide, torch.load(grown, weights_only=False)["ema"]))
    x = torch.randn(8, 4)
    assert max_rel(average(x), wide(x)) < 1e-5


def test_settings_at_the_top_and_of_short_names_are_told_of(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    saved = {"model": net.state_dict(), "hidden": 16, "epoch": 16, "hyper_parameters": {"h": 16}}
    torch.save(saved, tmp_path / "net.pt")
    grown = fxgrow.widen(net, "2x", verify=False)
    (told,) = stale_settings(load_source(tmp_path / "net.pt"), grown.plan)
    assert "hidden is 16, hyper_parameters.h is 16" in told
    assert "epoch" not in told


def test_what_no_config_can_say_is_refused_before_the_weights_are_read(tmp_path):
    source = tmp_path / "net"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "bert"}')  # no weights: read later
    torch.save([(torch.ones(1, 4), torch.ones(1))], tmp_path / "batch.pt")
    given = ["widen", str(source), "--width", "2x", "--init", "tiny", "--loss", "mse_loss"]
    done = CliRunner().invoke(app, [*given, "--data", str(tmp_path / "batch.pt")])
    assert done.exit_code == 2
    assert "no config.json can say" in " ".join(done.stderr.split())
