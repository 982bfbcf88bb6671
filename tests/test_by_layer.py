"""Settings by layer: globs decide which layer or group gets what, and nothing else changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.api import widen as api
from fxgrow.cli.app import app
from fxgrow.errors import NotPreservedError, PlanError, UsageError

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def chain() -> nn.Sequential:
    """Return a chain of three layers, whose groups are 0 and 2; layer 2 reads one, writes one."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return nn.Sequential(*layers).double()


def widened(model: nn.Module, **options: Any) -> fxgrow.Grown:
    return fxgrow.widen(model, "2x", X, **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def off(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        old, new = before.eval()(x), after.eval()(x)
    return float((old - new).abs().max() / old.abs().max())


# ── which layer gets what ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        {"rescaling": "default_vt"},
        {"rescaling": "vt_constraint_old_shape", "gain": "relu"},
        {"pairing": "replicate"},
        {"pairing": "v_zero"},
        {"init": "copy_uniform", "pairing": "replicate"},  # the law of the noise depends on it
        {"init": "kaiming_normal"},
    ],
)
def test_one_glob_for_all_is_one_setting_for_all(options: dict[str, str]) -> None:
    by_layer = {name: {"*": value} for name, value in options.items()}
    assert same(widened(chain(), **options).model, widened(chain(), **by_layer).model)


def test_the_first_glob_counts_and_what_none_matches_keeps_the_default() -> None:
    rescaling = {"2": "vt_output", "[24]": "default_vt"}
    (first, second) = widened(chain(), rescaling=rescaling).plan.groups
    assert first.factors == {"0": 1.0, "2": 0.5}
    assert second.factors == {"2": 0.5, "4": pytest.approx(math.sqrt(0.5))}


def test_a_gain_is_that_of_its_layers() -> None:
    (plain, gained) = (
        widened(chain(), rescaling="vt_constraint_new_shape", gain=gain).plan.groups[1].factors
        for gain in (1.0, {"2": "relu"})
    )
    assert gained["2"] == pytest.approx(math.sqrt(2) * plain["2"])
    assert gained["4"] == plain["4"]


def test_an_init_fills_the_tensors_of_its_layers() -> None:
    mixed = widened(chain(), init={"2": "kaiming", "*": "copy_normal"}).model.state_dict()
    single = {
        name: widened(chain(), init=name).model.state_dict() for name in ("kaiming", "copy_normal")
    }
    for name, tensor in mixed.items():
        init = "kaiming" if name.startswith("2.") else "copy_normal"
        assert torch.equal(tensor, single[init][name]), name
    assert not torch.equal(mixed["2.weight"], single["copy_normal"]["2.weight"])


def test_an_init_by_layer_may_be_code_and_is_refused_from_a_plan_alone() -> None:
    def ones(tensor: Tensor, reference: Tensor | None, fan_in: int) -> None:
        tensor.fill_(1.0)

    grown = widened(chain(), init={"0": ones})
    assert bool((grown.model.state_dict()["0.weight"][8:] == 1).all())
    with pytest.raises(PlanError, match="code of its own"):
        grown.plan.apply(chain())


def test_what_a_preset_means_goes_where_no_glob_does() -> None:
    groups = widened(chain(), preset="vt", rescaling={"4": "none"}).plan.groups
    assert groups[1].factors == {"2": pytest.approx(math.sqrt(0.5)), "4": 1.0}
    with pytest.raises(UsageError, match='preset="netmorph" means pairing="v_zero"'):
        widened(chain(), preset="netmorph", pairing="vv_z_negz")
    assert widened(chain(), preset="netmorph").plan.request.pairing == "v_zero"  # type: ignore[union-attr]


# ── pairings of groups side by side ────────────────────────────────────────────────────────────

PAIRS = [
    {"0": "replicate", "2": "v_zero"},
    {"0": "v_zero", "2": "replicate"},
    {"0": "vv_z_negz", "2": "replicate_random"},
    {"0": "replicate"},
]


@pytest.mark.parametrize("pairing", PAIRS)
def test_groups_of_different_pairings_keep_the_function(pairing: dict[str, str]) -> None:
    grown = widened(chain(), pairing=pairing, strict=True)
    assert grown.report.verification.verdict == "preserved"
    assert off(chain(), grown.model, X) < 1e-10
    found = {group.name: group.pairing for group in grown.plan.groups}
    assert found == {"0": "vv_z_negz", "2": "vv_z_negz", **pairing}


def test_each_group_is_laid_out_as_under_its_own_pairing_alone() -> None:
    mixed = widened(chain(), pairing={"0": "replicate", "2": "v_zero"}).model.state_dict()
    copies = widened(chain(), pairing="replicate").model.state_dict()
    zeros = widened(chain(), pairing="v_zero").model.state_dict()
    assert torch.equal(mixed["0.weight"], copies["0.weight"])  # the rows of one group
    assert torch.equal(mixed["4.weight"], zeros["4.weight"])  # the columns of the other
    assert torch.equal(mixed["4.weight"][:, 8:], torch.zeros(2, 8).double())


def test_only_groups_that_do_not_cancel_change_the_function() -> None:
    grown = widened(chain(), pairing={"2": "none"})
    assert {group.name: group.preserves for group in grown.plan.groups} == {"0": "exact", "2": "no"}
    assert grown.report.verification.verdict == "changed"
    with pytest.raises(NotPreservedError) as caught:
        widened(chain(), pairing={"2": "none"}, strict=True)
    assert caught.value.name == "2"


def test_zeros_are_asked_of_their_own_groups_alone() -> None:
    """Behind a ReLU new channels of zeros could not learn; the other group has a GELU."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    model = nn.Sequential(*layers).double()
    grown = widened(model, pairing={"2": "zero_z"})
    state = grown.model.state_dict()
    assert not state["2.weight"][8:, :8].any()
    assert state["0.weight"][8:].all()
    assert grown.report.verification.verdict == "preserved"
    assert not grown.plan.refused
    assert [r.name for r in widened(model, pairing={"*": "zero_z"}).plan.refused] == ["0"]


def test_a_group_norm_follows_the_pairing_of_its_own_channels() -> None:
    """Whole copies keep the number of groups; what does not copy gets new groups."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)]
    model = nn.Sequential(*parts, nn.Conv2d(8, 2, 1)).double()
    with pytest.warns(fxgrow.FxgrowWarning, match="group norms get new groups"):
        grown = fxgrow.widen(
            model, "2x", torch.randn(2, 3, 5, 5).double(), pairing={"0": "replicate"}
        )
    assert [norm.num_groups for norm in grown.model if isinstance(norm, nn.GroupNorm)] == [2, 4]
    assert grown.report.verification.verdict == "preserved"


def test_a_layer_that_is_rescaled_leaves_padding_of_others_alone() -> None:
    """Writers that keep their weights take 1/η, so that no eps changes."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    model = nn.Sequential(*layers).double()

    def eps_edits(rescaling: Mapping[str, str]) -> int:
        plan = api.plan(model, {"0": "12", "2": "12"}, X, rescaling=rescaling)
        return sum("eps" in edit.attribute for edit in plan.modules)

    assert eps_edits({"4": "default_vt"}) == 0
    assert eps_edits({"0": "default_vt"}) == 1


# ── as data, on the command line, and where it is not taken ────────────────────────────────────

BY_LAYER: dict[str, Any] = {
    "rescaling": {"4": "vt_output", "2": "vt_constraint_old_shape", "*": "default_vt"},
    "pairing": {"0": "replicate", "*": "v_zero"},
    "init": {"2": "kaiming", "*": "copy_normal"},
    "gain": {"2": 1.5},
}


def test_a_plan_tells_settings_by_layer_in_their_order(tmp_path: Path) -> None:
    grown = widened(chain(), **BY_LAYER)
    plan = fxgrow.Plan.from_json(grown.plan.to_json())
    assert plan == grown.plan
    assert plan.to_dict()["request"]["rescaling"] == BY_LAYER["rescaling"]
    assert [*plan.to_dict()["request"]["init"]] == ["2", "*"]
    assert same(plan.apply(chain()), grown.model)
    fxgrow.save(grown, tmp_path / "wide.pt")
    assert same(fxgrow.load(tmp_path / "wide.pt"), grown.model)
    assert "rescaling 4=vt_output, 2=vt_constraint_old_shape, *=default_vt" in " ".join(
        str(grown.report).split()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rescaling", {}),
        ("rescaling", {"": "none"}),
        ("rescaling", {"a" * 2000: "none"}),
        ("rescaling", {"a": "no name"}),
        ("rescaling", {str(n): "none" for n in range(1 << 15)}),
        ("pairing", {"a": 1}),
        ("pairing", ["none"]),
        ("init", {"a": "os:system('x')"}),
        ("gain", {"a": 0.0}),
        ("gain", {"a": "relu"}),
        ("seed", {"a": 1}),
    ],
)
def test_a_plan_that_says_other_things_by_layer_is_refused(name: str, value: object) -> None:
    data = widened(chain(), verify=False).plan.to_dict()
    data["request"][name] = value
    with pytest.raises(PlanError, match=rf"request\.(widen\.)?{name}"):
        fxgrow.Plan.from_dict(data)


@pytest.mark.parametrize("name", ["rescaling", "pairing", "init", "gain"])
def test_a_glob_that_matches_nothing_is_refused(name: str) -> None:
    model = nn.Sequential()
    for layer, module in zip(("first", "act", "second"), (*chain()[:2], chain()[4]), strict=True):
        model.add_module(layer, module)
    value = BY_LAYER[name].get("*", 1.0)
    with pytest.raises(PlanError, match=r"'frist' matches no .*Near it: first"):
        widened(model, **{name: {"first": value, "frist": value}})


@pytest.mark.parametrize(
    ("gain", "glob"),
    [({"0": 2.0}, "0"), ({"0": "relu", "*": 1.5}, "0"), ({"4": 1.0, "?": 3.0}, "?")],
)
def test_a_gain_that_its_layers_do_not_take_is_refused(
    gain: dict[str, float | str], glob: str
) -> None:
    rescaling = {"4": "vt_constraint_old_shape", "*": "default_vt"}
    if "*" in gain:
        rescaling = {"0": "none", "*": "vt_constraint_new_shape"}
    with pytest.raises(UsageError, match=rf"the gain of '[{glob}]' says nothing"):
        widened(chain(), rescaling=rescaling, gain=gain)
    widened(chain(), rescaling=rescaling, gain=dict.fromkeys(gain, 1.0))


WRONG: list[dict[str, object]] = [
    {"rescaling": {}}, {"rescaling": ["none"]}, {"rescaling": 1}, {"rescaling": {"*": None}},
    {"rescaling": {1: "none"}}, {"rescaling": {"*": "twice"}}, {"rescaling": {"*": {"*": "none"}}},
    {"pairing": []}, {"pairing": {"*": 1}}, {"pairing": "twins"}, {"init": None}, {"init": {}},
    {"init": ["zeros"]}, {"init": {"*": None}}, {"gain": None}, {"gain": [1.0]},
    {"gain": {"*": "loud"}}, {"gain": {"*": -1}}, {"seed": {"*": 1}}, {"seed": None},
    {"where": {"*": "hidden"}}, {"where": None}, {"noise": {"*": 0.1}}, {"noise": None},
    {"multiple_of": {"*": 8}}, {"grouped": {"*": "count"}}, {"split_noise": [0.1]},
    {"preset": {"*": "vt"}}, {"include": {"0": "2x"}}, {"exclude": 0}, {"include": [0]},
    {"verify": {"*": "full"}}, {"module": {"*": ""}}, {"width": {"0": 2}}, {"width": None},
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_what_is_not_taken_is_told(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError if "module" not in options else fxgrow.TraceError) as caught:
        fxgrow.widen(chain(), **{"width": "2x", "example_inputs": X, **options})
    assert caught.value.way_out or "module" in options


def test_a_mapping_is_not_taken_where_all_is_one() -> None:
    weight, by_layer = torch.ones(2, 2), {"*": "none"}
    blocks = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    calls: list[Callable[[Any], object]] = [
        lambda setting: fxgrow.apply_rescaling(weight, setting, new_fan_in=3),
        lambda setting: fxgrow.apply_rescaling(weight, "none", new_fan_in=3, gain=setting),
        lambda setting: fxgrow.apply_pairing(weight, weight, weight, weight, setting),
        lambda setting: fxgrow.deepen(blocks, {"0": "+1"}, X, setting),
        lambda setting: fxgrow.deepen(blocks, {"0": "+1"}, X, init=setting),
        lambda setting: fxgrow.deepen(blocks, {"0": "+1"}, X, seed=setting),
        lambda setting: fxgrow.convert(blocks, blocks, X, pairing=setting),
        lambda setting: fxgrow.convert(blocks, blocks, X, init=setting),
    ]
    for call in calls:
        for setting in (by_layer, ["none"], None):
            with pytest.raises(UsageError):
                call(setting)


def test_weights_from_data_are_not_for_some_layers() -> None:
    init = fxgrow.GradMax(nn.functional.mse_loss, [(X, X[:, :2])])
    with pytest.raises(UsageError, match="GradMax computes the new weights of all layers"):
        widened(chain(), init={"0": init})


def test_the_command_line_takes_globs(tmp_path: Path) -> None:
    torch.save(chain().float(), tmp_path / "model.pt")
    told = [f"--{name}={g}={v}" for name, pairs in BY_LAYER.items() for g, v in pairs.items()]
    common = [str(tmp_path / "model.pt"), "--input-shape=2x4"]
    where = ["-o", str(tmp_path / "out.pt"), "--plan", str(tmp_path / "plan.json")]
    done = CliRunner().invoke(app, ["widen", *common, "--width=2x", *told, *where])
    assert done.exit_code == 0, done.output
    request = json.loads((tmp_path / "plan.json").read_text())["request"]
    assert {name: request[name] for name in BY_LAYER} == BY_LAYER
    other = ["apply", str(tmp_path / "plan.json"), *common, "-o", str(tmp_path / "zeros.pt")]
    done = CliRunner().invoke(app, [*other, "--init", "0=zeros", "--init", "*=kaiming"])
    assert done.exit_code == 0, done.output
    twice = CliRunner().invoke(app, ["widen", *common, "--width=2x", "--gain=1", "--gain=2"])
    assert twice.exit_code == 2
    assert "two gains" in twice.stderr
    missing = CliRunner().invoke(app, ["widen", *common, "--width=2x", "--rescaling", "x=none"])
    assert missing.exit_code == 1
    assert "matches no layer" in missing.stderr
