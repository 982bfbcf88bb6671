"""Inspection: what folds into one row, what would free a pin, and why a layer is what it is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from networks import quick
from torch import Tensor, nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.api.report.inspection import folded, inspection_table, patterns, same_group
from fxgrow.api.report.tables import as_text
from fxgrow.channels.explain import ONE_PARAMETER, Chain, Explanation
from fxgrow.cli.app import app
from fxgrow.labels.pins import PinKind

IMAGES = torch.empty(2, 3, 64, 64, device="meta")


class Attention(nn.Module):
    """A stream of learned tokens with attention of four heads and a gated MLP, twice."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
            self.gated = nn.Linear(16, 48)
            self.out = nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            x = x + self.attend(y, y, y, need_weights=False)[0]
            return x + self.out(F.glu(self.gated(x), -1))

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1)
        for block in self.blocks:
            y = block(y)
        return self.head(y[:, 0])


class Cumulative(nn.Module):
    """An operation that nobody knows, two layers away from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(4, 8)
        self.third = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.logcumsumexp(self.first(x) + self.second(x), dim=1))


NETWORKS = {
    "resnet18": (lambda: quick("resnet18"), IMAGES, "layer2.1.conv2"),
    "densenet121": (lambda: quick("densenet121"), IMAGES, "features.denseblock1.denselayer3.conv1"),
    "shufflenet": (lambda: quick("shufflenet_v2_x0_5"), IMAGES, "stage3.0.branch2.5"),
    "attention": (Attention, torch.empty(2, 3, 8), "blocks.1.attend"),
    "pinned": (Cumulative, torch.empty(2, 4), "second"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[fxgrow.Inspection, Explanation]:
    build, inputs, layer = NETWORKS[request.param]
    found = fxgrow.inspect(build(), inputs)
    return found, found.why(layer)


def chains(explained: Explanation) -> Iterator[Chain]:
    for side in explained.sides:
        yield from side.partners
        if side.cause is not None:
            yield side.cause


# ── why a layer is what it is ─────────────────────────────────────────────────────────────────


def test_every_link_of_a_chain_is_a_union_that_was_made_there(case):
    found, explained = case
    made = {
        (min(pair), max(pair), place)
        for left, right, place in found.parts[0].channels.unions
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    }
    links = [
        (*sorted((a.label, b.label)), place)
        for chain in chains(explained)
        for (a, b), place in zip(itertools.pairwise(chain.stations), chain.places, strict=True)
    ]
    assert links
    assert not [link for link in links if link not in made and link[2] != ONE_PARAMETER]


def test_chains_start_at_the_layer_and_reach_every_writer_and_reader(case):
    found, explained = case
    channels = found.parts[0].channels
    groups = {group.name: group for group in found.parts[0].groups}
    for side in explained.sides:
        if not side.group:
            continue
        for chain in side.partners:
            assert chain.stations[0].layer == explained.layer
        reached = {(c.stations[-1].tensor, c.stations[-1].dim) for c in side.partners}
        own = {(side.station.tensor, side.station.dim)}
        axes = [axis for axis in groups[side.group].axes if channels.roles[axis] != "carrier"]
        assert (
            reached | own == {(channels.axes[a].tensor, channels.axes[a].dim) for a in axes} | own
        )


def test_the_cause_of_a_pin_ends_at_labels_that_were_pinned_for_this_reason(case):
    found, explained = case
    channels = found.parts[0].channels
    for side in explained.sides:
        if side.kind != "pinned" or not side.group:
            continue
        assert side.cause is not None
        ends = [labels for labels, pin in channels.pinned if str(pin) == side.cause.end]
        assert side.cause.end == side.reason
        assert side.cause.stations[-1].label in np.concatenate(ends)


def test_the_cause_of_a_stream_is_a_residual_addition():
    found = fxgrow.inspect(quick("resnet18"), IMAGES)
    rows, columns = found.why("layer2.1.conv1").sides
    assert (rows.kind, rows.cause) == ("hidden", None)
    assert columns.kind == "stream"
    assert columns.cause.stations[0].layer == "layer2.1.conv1"
    assert columns.cause.end == "the residual addition aten.add at layer2.0"


def test_a_chain_reads_as_operations_between_layers():
    found = fxgrow.inspect(Cumulative(), torch.empty(2, 4))
    rows = found.why("second").sides[0]
    assert rows.remedy == PinKind.MIXED.remedy
    assert str(rows.cause).startswith(
        "second rows – (aten.add at the top level) – first rows: logcumsumexp over the channels"
    )
    columns = found.why("second").sides[1]
    assert (columns.group, columns.size) == ("", 4)
    assert "belong to no group" in str(found.why("second"))


def test_heads_and_gates_are_told_with_their_rows():
    found = fxgrow.inspect(Attention(), torch.empty(2, 3, 8))
    widths = {group.name: group.described_width for group in found.parts[0].groups}
    assert widths["blocks.0.attend"] == "4 × 12 rows"
    assert widths["blocks.0.gated"] == "24 × 2 rows"
    assert widths["embed"] == "16"


def test_a_part_of_a_group_that_shares_no_channel_is_reached_through_one_parameter():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write = nn.Linear(4, 8)
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = self.write(x).chunk(2, -1)
            return self.left(first), self.right(second)

    columns = fxgrow.inspect(Split(), torch.empty(2, 4)).why("left").sides[1]
    ends = {chain.stations[-1].layer: chain.places for chain in columns.partners}
    assert ends == {
        "write": ("aten.addmm at left",),
        "right": ("aten.addmm at left", ONE_PARAMETER, "aten.addmm at right"),
    }


@pytest.mark.parametrize("name", ["layer2.1.conv2", "layer2.1.conv2.weight"])
def test_a_layer_and_its_parameter_have_the_same_story(name):
    found = fxgrow.inspect(quick("resnet18"), IMAGES)
    assert [side.group for side in found.why(name).sides] == ["layer2.0.conv2", "layer2.1.conv1"]


@pytest.mark.parametrize(
    ("name", "offered"),
    [("layer2.1.convv2", "layer2.1.conv2"), ("layer2.1", "layer2.1.conv1"), ("", "conv1")],
)
def test_unknown_layers_offer_others(name, offered):
    with pytest.raises(fxgrow.PlanError, match=offered):
        fxgrow.inspect(quick("resnet18"), IMAGES).why(name)


def test_the_text_fits_and_says_how_many_chains_it_leaves_out():
    explained = fxgrow.inspect(quick("densenet121"), IMAGES).why("features.conv0")
    lines = str(explained).splitlines()
    assert max(map(len, lines)) <= 100
    total = len(explained.sides[0].partners)
    assert total == 7
    many = fxgrow.inspect(quick("resnet50"), IMAGES).why("layer3.0.conv3")
    left = len(many.sides[0].partners) - 12
    assert left > 0
    assert f"… and {left} more" in str(many)
    assert "more" not in many.text(every=True)
    assert all(str(c.stations[-1]) in many.text(every=True) for c in many.sides[0].partners)


# ── what folds into one row ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_16"])
def test_rows_hold_every_group_once_and_agree_in_kind_and_width(name):
    size = 224 if name == "vit_b_16" else 64
    found = fxgrow.inspect(quick(name), torch.empty(2, 3, size, size, device="meta"))
    groups = found.to_dict()["groups"]
    text = as_text(inspection_table(found.to_dict()), 100)
    whole = as_text(inspection_table(found.to_dict(), every=True), 100)
    for shown in (text, whole):
        assert max(map(len, shown.splitlines())) <= 100
        assert "needed: nothing to do: fxgrow never changes what the network returns" in shown
    assert len(text.splitlines()) < 70
    assert len(whole.splitlines()) >= len(groups)
    rows = folded(groups, same_group)
    assert sorted(group["name"] for row in rows for group in row) == sorted(
        group["name"] for group in groups
    )
    for row in rows:
        assert len({(group["kind"], group["described_width"]) for group in row}) == 1


def test_a_stage_is_one_row_and_stages_are_apart():
    entries = [
        {"name": f"stage{stage}.{block}.conv1", "same": True}
        for stage in (1, 2)
        for block in range(3)
    ]
    rows = folded(entries, lambda entry: entry["same"])
    assert [[entry["name"] for entry in row] for row in rows] == [
        [f"stage{stage}.{block}.conv1" for block in range(3)] for stage in (1, 2)
    ]
    assert len(folded(entries, lambda entry: entry["same"], every=True)) == 6
    assert patterns(entry["name"] for entry in entries) == ["stage1.*.conv1", "stage2.*.conv1"]


def test_groups_of_other_widths_or_structure_keep_their_rows():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 2))
    text = str(fxgrow.inspect(net, torch.empty(2, 4)))
    rows = text[text.index("channel groups") : text.index("pinned, because")].splitlines()[3:-1]
    assert [row.split()[1:5] for row in rows] == [
        ["*", "2", "8", "hidden"],
        ["2", "1", "6", "hidden"],
        ["3", "1", "2", "pinned"],
    ]
    assert "4 groups: 3 hidden and 0 stream can grow, 1 pinned" in text
    assert "180 parameters" in text


def test_the_data_tells_what_would_be_needed():
    found = fxgrow.inspect(Cumulative(), torch.empty(2, 4)).to_dict()
    assert json.loads(json.dumps(found)) == found
    (pinned, last) = found["groups"]
    assert pinned["needed"].startswith("apply it within each channel")
    assert last["needed"].startswith("nothing to do")
    assert (pinned["width"], pinned["channels"], pinned["described_width"]) == (8, 8, "8")


# ── on the command line ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def source(tmp_path: Path) -> list[str]:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.save(net, tmp_path / "model.pt")
    return ["inspect", str(tmp_path / "model.pt"), "--input-shape", "2x4"]


def test_why_and_all_on_the_command_line(source):
    runner = CliRunner()
    told = runner.invoke(app, [*source, "--why", "2"])
    assert told.exit_code == 0, told.output
    assert "2 rows: hidden group 2, width 8" in told.stdout
    assert "4 columns (aten.addmm)" in told.stdout
    data = json.loads(runner.invoke(app, [*source, "--why", "2", "--json"]).stdout)
    assert [side["group"] for side in data["sides"]] == ["2", "0"]
    folded_text = runner.invoke(app, source).stdout
    every = runner.invoke(app, [*source, "--all"]).stdout
    assert len(every.splitlines()) == len(folded_text.splitlines()) + 1


def test_an_unknown_layer_ends_with_1_and_names_the_nearest(source):
    result = CliRunner().invoke(app, [*source, "--why", "two"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "there is no layer 'two' with channels. Near it: 0, 2, 4." in result.stderr
