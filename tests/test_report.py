"""The report: the fields that others rely on, and tables that stay readable."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

import fxgrow
from fxgrow.api.report.inspection import inspection_table
from fxgrow.api.report.tables import as_html, as_text, plan_table, report_table, verification_table

INPUT = torch.empty(2, 3, 32, 32, device="meta")
GROUP_FIELDS = {
    "name", "width", "kind", "block", "writers", "readers", "factors", "alpha", "beta",
    "alpha_beta", "absorbed_by", "pairing", "gain", "preserves", "reason",
}  # fmt: skip


@pytest.fixture(scope="module")
def grown() -> fxgrow.Grown:
    torch.manual_seed(0)
    return fxgrow.widen(resnet18(num_classes=10), "2x", INPUT, rescaling="default_vt")


@pytest.fixture(scope="module")
def deep() -> fxgrow.Grown:
    model = resnet50(num_classes=10)
    return fxgrow.widen(model, "2x", INPUT, rescaling="default_vt", verify=False)


def test_the_report_has_the_promised_fields_and_is_json(grown):
    report = grown.report.to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["schema"], report["fxgrow"]) == (1, fxgrow.__version__)
    assert report["request"]["width"] == "2x"
    assert set(report["groups"][0]) == GROUP_FIELDS
    first = report["groups"][0]
    assert first["name"] == "layer1.0.conv1"
    assert first["width"] == [64, 128]
    assert first["block"] == "layer1.0"
    assert first["factors"] == pytest.approx({"layer1.0.conv1": 1, "layer1.0.conv2": 0.5**0.5})
    assert first["alpha_beta"] == pytest.approx(first["alpha"] * first["beta"])
    assert first["absorbed_by"] == ["layer1.0.bn2"]
    assert (first["gain"], first["preserves"], first["reason"]) == (1.0, "exact", "")
    for total in ("parameters", "flops"):
        before, after = report[total]
        assert before < after
    assert report["parameters"][0] == sum(p.numel() for p in resnet18(num_classes=10).parameters())
    assert report["parameters"][1] == sum(p.numel() for p in grown.model.parameters())


def test_the_verification_has_the_promised_fields(grown):
    found = grown.report.to_dict()["verification"]
    assert found["verdict"] == "preserved"
    assert set(found["inputs"]) == {"2x3x32x32"}
    for mode in ("eval", "train"):
        for kind in ("float64", "native"):
            assert set(found[mode][kind]) == {"max_abs", "max_rel"}
    assert found["eval"]["float64"]["max_rel"] <= 1e-10


def test_alpha_is_null_where_writers_share_none():
    torch.manual_seed(0)
    plan = fxgrow.widen(
        resnet50(num_classes=10), "2x", INPUT, rescaling="vt_constraint_old_shape",
        include=["conv1"], verify=False,
    ).plan  # fmt: skip
    (group,) = plan.groups
    assert len(group.readers) == 2
    assert (group.beta, group.alpha_beta) == (None, None)
    assert "–" in as_text(plan_table(plan))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_fit_their_width_and_lose_no_figure(grown, deep, width):
    for report in (grown.report, deep.report):
        text = as_text(report_table(report.plan, report.verification, report.warnings), width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text.replace(" … ", "")  # nothing is cut
        for group in report.plan.groups:
            assert f"{group.width[0]} → {group.width[1]}" in text
        assert "0.7071" in text


def test_blocks_share_rows_only_where_every_figure_is_the_same(deep):
    lines = as_text(plan_table(deep.plan)).splitlines()
    assert any(line.startswith("layer3.0 … layer3.5 (×6)") for line in lines)
    first = deep.plan.groups[3]  # layer1.1.conv1
    changed = replace(first, gain=0.5)
    groups = tuple(changed if group is first else group for group in deep.plan.groups)
    lines = as_text(plan_table(replace(deep.plan, groups=groups))).splitlines()
    assert sum("0.5 " in line and str(first.block) in line for line in lines) == 1


def test_the_string_of_a_report_is_its_table(grown):
    text = str(grown.report)
    for part in ("absorbed by", "parameters", "FLOPs", "×1.98", "preserved", "train mode"):
        assert part in text


def test_warnings_and_refusals_are_shown(grown):
    refusal = fxgrow.plan.step.Refusal("fc", "an output of the network")
    plan = replace(grown.plan, refused=(refusal,))
    report = fxgrow.Report(plan, grown.report.verification, ("layer1.0.conv1: something",))
    text = str(report)
    assert "not widened:\n  fc  an output of the network" in text
    assert "warnings:\n  layer1.0.conv1: something" in text
    assert "something" not in as_text(report_table(report.plan, report.verification))


def test_a_skipped_verification_says_so(deep):
    assert as_text(verification_table(deep.report.verification)) == "verification: skipped"


def test_predictions_are_shown_where_the_function_changes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    text = str(fxgrow.widen(net, "2x", rescaling="default_vt").report)
    for part in ("as predicted", "off prediction", "because:", "scaled", "the output"):
        assert part in text


def test_names_are_no_markup():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = fxgrow.widen(net, "2x").plan
    odd = replace(plan.groups[0], name="[red]x[/]")
    assert "[red]x[/]" in as_text(plan_table(replace(plan, groups=(odd,))))


def test_a_page_of_html_holds_the_table_and_nothing_from_elsewhere(grown):
    page = as_html(
        report_table(grown.plan, grown.report.verification, grown.report.warnings),
        "model.pt → <model>",
    )
    assert "&lt;model&gt;" in page
    assert "layer1.0, layer1.1" in page
    assert "http" not in page


@pytest.mark.parametrize("width", [80, 120])
def test_an_inspection_shows_pairs_groups_and_pins(width):
    found = fxgrow.inspect(resnet18(num_classes=10), INPUT)
    text = as_text(inspection_table(found.to_dict()), width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("conv1 → bn1 → relu → conv2", "projection", "stream", "an output of the network"):
        assert part in text
    data = found.to_dict()
    assert json.loads(json.dumps(data))["blocks"][0]["pairs"][0]["group"] == "layer1.0.conv1"
    assert {block["skip"] for block in data["blocks"]} == {"identity", "projection"}
