"""Directories of transformers: they grow with their configuration, and transformers reads them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from hugging_face import CORE, EXTRAS, OLD_VIT
from networks import max_rel
from torch import Tensor, nn
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app
from fxgrow.errors import SourceError
from fxgrow.files.comparison import keys_difference
from fxgrow.files.models import OpenedModel, open_model, write_grown

pytestmark = pytest.mark.filterwarnings("default")  # what transformers and its parts deprecate


def directory(folder: Path, name: str, **changes: Any) -> Path:
    """Write a tiny network of random weights as transformers does, with a tokenizer's file."""
    kind, config, _ = (CORE | EXTRAS)[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config(changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder / name)
    (folder / name / "tokenizer.json").write_text("{}")
    return folder / name


def widened(path: Path, width: str = "2x", **arguments: Any) -> tuple[OpenedModel, fxgrow.Grown]:
    opened = open_model(path)
    return opened, fxgrow.widen(opened.model, width, opened.inputs, **arguments)


def first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).values()))


# What grows, and the fields of the configuration that say so.
GROWTHS: dict[str, tuple[dict[str, Any], dict[str, object]]] = {
    "llama": ({}, {"intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "mistral": ({}, {"intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "t5": ({}, {"d_ff": 48, "num_heads": 8}),
    "bert": ({"exclude": "*attention*"}, {"intermediate_size": 48}),
    "gpt2": ({"exclude": "*attn*"}, {"n_inner": 128}),
    "vit": (
        {"where": "all"},
        {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8},
    ),
    "convnextv2": ({"where": "all"}, {"hidden_sizes": [16, 24]}),
    "whisper": (  # which takes spectrograms of one length, that its configuration tells
        {"where": "all"},
        {
            "d_model": 32, "decoder_attention_heads": 8, "decoder_ffn_dim": 48,
            "encoder_attention_heads": 8, "encoder_ffn_dim": 48,
        },
    ),
    # Its code slices by sizes that no attribute gives alone; with its own configuration it fits.
    "phi3": (
        {"where": "all"},
        {
            "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("width", ["2x", "1.5x"])
@pytest.mark.parametrize(
    ("name", "untie"),
    [("gpt2", False), ("gpt2", True), ("gemma", False), ("gemma", True), ("t5", False)],
)
def test_a_directory_of_a_tied_network_grows(tmp_path, name, untie, width):
    path = directory(tmp_path, name)
    opened, grown = widened(path, width, where="all", untie=untie)
    out = tmp_path / "out"
    notes = write_grown(opened, grown, out)
    assert [note.partition(" ")[2] for note in notes] == [
        "was tied to another tensor and no longer is."
    ] * untie
    after = json.loads((out / "config.json").read_text())
    assert after["tie_word_embeddings"] is not untie
    size = {"2x": 32, "1.5x": 24}[width]
    assert size in (after.get("n_embd"), after.get("hidden_size"), after.get("d_model"))
    loaded = type(opened.model).from_pretrained(out)
    before, found = (first_output(m.eval(), opened.inputs) for m in (opened.model, loaded))
    assert max_rel(before, found) < 1e-5


@pytest.mark.parametrize("name", GROWTHS)
def test_a_directory_grows_and_transformers_reads_it(tmp_path, name):
    path = directory(tmp_path, name)
    arguments, fields = GROWTHS[name]
    old = {file.name: file.read_bytes() for file in path.iterdir()}
    opened, grown = widened(path, **arguments)
    assert grown.report.verification.verdict == "preserved"
    out = tmp_path / "out"
    assert write_grown(opened, grown, out) == []
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, out))
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    assert changed == fields
    assert {file.name for file in out.iterdir()} == old.keys()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == old
    loaded = type(opened.model).from_pretrained(out)
    assert max_rel(first_output(opened.model, opened.inputs), first_output(loaded, opened.inputs)
                   ) < 1e-4  # fmt: skip
    assert type(transformers.AutoModel.from_pretrained(out)).__module__ == type(loaded).__module__
    stored = safetensors.torch.load_file(out / "model.safetensors")
    assert stored.keys() == safetensors.torch.load_file(path / "model.safetensors").keys()


def test_a_directory_of_shards_stays_one_and_half_precision_stays_half(tmp_path):
    path = directory(tmp_path, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16)
    shutil.rmtree(path)
    model.save_pretrained(path, max_shard_size="8KB")
    opened, grown = widened(path)
    write_grown(opened, grown, out := tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    tensors = {k: t for s in shards for k, t in safetensors.torch.load_file(out / s).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.num_attention_heads == 8


def test_dtypes_are_those_of_the_file_tensor_by_tensor(tmp_path):
    path = directory(tmp_path, "llama")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    halves = {k: t if "norm" in k else t.bfloat16() for k, t in weights.items()}
    safetensors.torch.save_file(halves, path / "model.safetensors", {"format": "pt", "by": "me"})
    opened, grown = widened(path, verify=False)
    write_grown(opened, grown, out := tmp_path / "out")
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        assert {k: file.get_tensor(k).dtype for k in file.keys()} == {  # noqa: SIM118
            k: t.dtype for k, t in halves.items()
        }
        assert file.metadata() == {"format": "pt", "by": "me"}


def test_names_of_older_checkpoints_are_understood(tmp_path):
    path = directory(tmp_path, "gpt2")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(bare, path / "model.safetensors")
    opened, grown = widened(path, exclude="*attn*", verify=False)
    assert isinstance(opened.model, transformers.GPT2LMHeadModel)
    write_grown(opened, grown, out := tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.transformer.h[0].mlp.c_fc.nf == 128


def test_pickled_weights_are_read_by_the_safe_unpickler_and_written_as_safetensors(tmp_path):
    path = directory(tmp_path, "bert")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    opened, grown = widened(path, exclude="*attention*", verify=False)
    write_grown(opened, grown, out := tmp_path / "out")
    assert (out / "model.safetensors").exists()
    assert not (out / "pytorch_model.bin").exists()
    torch.save({"a.b": Foreign()}, path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="not on the list of harmless classes"):
        open_model(path)


class Foreign:
    """A class that the safe unpickler does not know."""


def test_what_no_field_governs_is_refused_and_weights_alone_can_be_written(tmp_path):
    path = directory(tmp_path, "bert")
    opened, grown = widened(path)
    there = sorted(tmp_path.iterdir())
    reason = r"encoder.layer.0.attention.self.query.weight 32x16, it stays 16x16"
    with pytest.raises(SourceError, match=reason) as caught:
        write_grown(opened, grown, tmp_path / "out")
    assert 'exclude="encoder.layer.*.attention.self.query"' in caught.value.way_out
    assert sorted(tmp_path.iterdir()) == there
    write_grown(opened, grown, out := tmp_path / "weights.safetensors")
    loaded = fxgrow.load(out)
    assert loaded.encoder.layer[0].attention.self.query.out_features == 32
    before, after = (first_output(m, opened.inputs) for m in (opened.model, loaded))
    assert max_rel(before, after) < 1e-5


def test_widths_that_differ_from_layer_to_layer_are_refused(tmp_path):
    opened, grown = widened(directory(tmp_path, "llama"), {"model.layers.1.mlp*": "2x"})
    with pytest.raises(SourceError, match=r"makes model.layers.1.mlp.gate_proj.weight 48x16 by"):
        write_grown(opened, grown, tmp_path / "out")


def test_heads_of_twice_the_size_are_not_twice_the_heads(tmp_path, monkeypatch):
    path = directory(tmp_path, "llama")
    opened, grown = widened(path, verify=False)
    config = json.loads((path / "config.json").read_text())
    wrong = config | {"head_dim": 8, "intermediate_size": 48}  # the same shapes
    monkeypatch.setattr("fxgrow.files.targets.config_of", lambda *_: wrong)
    with pytest.raises(fxgrow.VerificationError, match="it computes something else"):
        write_grown(opened, grown, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_rebuilds_a_model_of_transformers_with_its_ties(tmp_path):
    opened, grown = widened(directory(tmp_path, "t5"), verify=False)
    write_grown(opened, grown, out := tmp_path / "net.safetensors")
    loaded = fxgrow.load(out)
    assert loaded.lm_head.weight is loaded.shared.weight
    again = open_model(out)
    assert again.inputs is not None
    further = fxgrow.widen(again.model, "+4", again.inputs, include="*wi*", verify=False)
    write_grown(again, further, tmp_path / "more.safetensors")
    assert fxgrow.load(tmp_path / "more.safetensors").encoder.block[0].layer[1].DenseReluDense.wi \
        .out_features == 52  # fmt: skip


Spoil = Callable[[Path, dict[str, Any]], None]


def _drop_weight(path: Path, _: dict[str, Any]) -> None:
    weights = safetensors.torch.load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(weights, path / "model.safetensors")


def _cut(path: Path, _: dict[str, Any]) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


SPOILT: dict[str, tuple[Spoil, str]] = {
    "no class": (lambda _, c: c.pop("architectures"), "config.json does not say which class"),
    "unknown class": (lambda _, c: c.update(architectures=["Nothing"]), "no model class 'Nothing'"),
    "no model": (lambda _, c: c.update(architectures=["BertConfig"]), "no model class"),
    "unknown type": (lambda _, c: c.update(model_type="nothing"), "no model type 'nothing'"),
    "quantized": (lambda _, c: c.update(quantization_config={}), "is quantized"),
    "other sizes": (
        lambda _, c: c.update(intermediate_size=20),
        r"encoder.layer.0.intermediate.dense.bias is \[24\] and should be \[20\]",
    ),
    "no weight": (_drop_weight, "they miss encoder.layer.1.output.dense.weight"),
    "cut": (_cut, "model.safetensors is truncated"),
    "no weights": (lambda p, _: (p / "model.safetensors").unlink(), "but none of"),
    "no object": (lambda p, _: (p / "config.json").write_text("[]"), "is not a JSON object"),
    "no json": (lambda p, _: (p / "config.json").write_text("{"), "truncated or damaged"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_directory_that_cannot_be_read_is_one_line_with_the_way_out(tmp_path, case):
    path = directory(tmp_path, "bert")
    spoil, pattern = SPOILT[case]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text("")
    spoil(path, config)
    if not (path / "config.json").read_text():
        (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=pattern) as caught:
        open_model(path)
    assert caught.value.way_out
    assert "\n" not in str(caught.value)


def test_without_transformers_the_way_out_names_the_extra(tmp_path, monkeypatch):
    path = directory(tmp_path, "bert")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(SourceError, match="not installed") as caught:
        open_model(path)
    assert "fxgrow[transformers]" in caught.value.way_out


def test_the_command_line_takes_directories(tmp_path):
    path = directory(tmp_path, "llama")
    run = CliRunner()
    result = run.invoke(app, ["widen", str(path), "--width", "2x"])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    out = tmp_path / "llama-2x"
    assert f"wrote {out} (a directory of transformers:LlamaForCausalLM" in result.stdout
    assert run.invoke(app, ["verify", str(path), str(out)]).exit_code == 0
    again = run.invoke(app, ["widen", str(path), "--width", "2x"])
    assert again.exit_code == 1
    assert "--force" in again.stderr
    more = ["--width", "3x", "--include", "*mlp*", "-o", str(out), "--force"]
    assert run.invoke(app, ["widen", str(path), *more]).exit_code == 0
    assert fxgrow.load(out).config.intermediate_size == 72
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama", "llama-2x"]


def test_heads_that_the_configuration_forbids_are_refused(tmp_path):
    opened, grown = widened(directory(tmp_path, "llama"), "3x")  # 12 heads do not divide 16
    with pytest.raises(SourceError, match="with which it computes something else") as caught:
        write_grown(opened, grown, tmp_path / "out")
    assert "model.safetensors" in caught.value.way_out


# What the command line makes of a directory: the fields that change, and what is told to be left.
MOST: dict[str, tuple[str, str, dict[str, object], str]] = {
    "bert": ("bert", "2x", {"intermediate_size": 48}, "encoder.layer.*.attention.self.query"),
    "gpt2": ("gpt2", "1.5x", {"n_inner": 96}, "transformer.h.*.attn.c_attn"),
    "a field that is left out": (
        "vit", "2x", {"intermediate_size": 48},
        "vit.encoder.layer.*.attention.attention.key",  # no head_dim is read
    ) if OLD_VIT else (
        "vit", "2x", {"intermediate_size": 48, "num_attention_heads": 8, "head_dim": 4}, ""),
    "heads that divide nothing": (
        "llama", "1.5x", {"intermediate_size": 36}, "model.layers.*.self_attn.q_proj"),
    "heads of the same size": (
        "llama", "1.5x",
        {"intermediate_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}, ""),
    "masks in training": (
        "wav2vec2", "2x", {"intermediate_size": 48, "conv_dim": [16, 8]},
        "encoder.layers.*.attention.q_proj"),
}  # fmt: skip
_KEPT: dict[str, dict[str, object]] = {
    "heads of the same size": {"hidden_size": 24, "head_dim": 4},
    "masks in training": {"apply_spec_augment": True},
}


@pytest.mark.parametrize("case", MOST)
def test_the_command_line_grows_what_the_configuration_can_say(tmp_path, case):
    name, width, fields, left = MOST[case]
    path, out = directory(tmp_path, name, **_KEPT.get(case, {})), tmp_path / "out"
    done = CliRunner().invoke(app, ["widen", str(path), "--width", width, "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert (f"left as they are: {left}, because" in done.stderr) == bool(left), done.stderr
    assert "exclude" not in done.stdout  # which was not asked for
    assert ("not widened:" in done.stdout) == bool(left)
    assert len(done.stderr) < 300  # a line or two of a terminal; the reasons are in the report
    before, after = (json.loads((each / "config.json").read_text()) for each in (path, out))
    assert {k: v for k, v in after.items() if before.get(k) != v} == fields
    opened = open_model(path)
    found = getattr(transformers, (CORE | EXTRAS)[name][0]).from_pretrained(out)
    outputs = (first_output(model, opened.inputs) for model in (opened.model, found))
    assert max_rel(*outputs) < 1e-5


@pytest.mark.parametrize("keys", [2, 4])
def test_fields_that_only_together_leave_all_sizes_are_found(tmp_path, keys):
    path = directory(tmp_path, "qwen2", num_key_value_heads=keys)
    opened, grown = widened(path, "1.5x", where="all", verify=False)
    write_grown(opened, grown, out := tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    found = [config[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads")]
    assert found == [24, 6, 3 * keys // 2]
    assert "head_dim" not in config
    after = transformers.Qwen2ForCausalLM.from_pretrained(out)
    assert max_rel(*(first_output(m, opened.inputs) for m in (opened.model, after))) < 1e-5


def test_thousands_of_labels_are_no_fields_and_cost_what_reading_them_costs(tmp_path):
    count = 3000
    labels = {index: f"class {index}" for index in range(count)}
    path = directory(tmp_path, "vit", num_labels=count)
    config = json.loads((path / "config.json").read_text())
    config |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    (path / "config.json").write_text(json.dumps(config))
    opened, grown = widened(path, where="all")
    out, start = tmp_path / "out", time.process_time()
    assert write_grown(opened, grown, out) == []
    assert time.process_time() - start < 20  # seconds; each label as a field took 200 models
    after = json.loads((out / "config.json").read_text())
    assert GROWTHS["vit"][1].items() <= after.items()
    assert len(after["id2label"]) == len(after["label2id"]) == count


def test_keys_are_compared_at_a_cost_that_their_number_sets():
    keys = [f"key {index}" for index in range(50_000)]
    start = time.process_time()
    assert keys_difference(keys, list(keys), "") == ""
    assert "'more'" in keys_difference([*keys, "more"], keys, "")
    assert time.process_time() - start < 5  # seconds; one set for each key took hours


def test_what_the_class_refuses_is_told_with_what_it_would_take(tmp_path):
    opened, grown = widened(directory(tmp_path, "llama"), "1.5x", verify=False)
    told = r"refuses num_attention_heads 6: The hidden size \(16\) is not a multiple"
    with pytest.raises(SourceError, match=told) as caught:
        write_grown(opened, grown, tmp_path / "out")
    assert 'where="all"' in caught.value.way_out


def test_where_no_kind_is_in_the_way_alone_kinds_are_tried_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("fxgrow.files.fitting._Tries.otherwise", lambda *_: "")
    path, out = directory(tmp_path, "llama"), tmp_path / "out"
    done = CliRunner().invoke(
        app, ["widen", str(path), "--width", "1.5x", "--verify", "none", "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "left as they are: model.layers.*.self_attn.q_proj, because" in done.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (36, 4)


def test_what_no_field_governs_at_all_is_refused_on_the_command_line_too(tmp_path):
    command = [
        "widen",
        str(directory(tmp_path, "bert")),
        "--width",
        "2x",
        "--include",
        "*attention*",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "no field of config.json makes" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["bert"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {"intermediate_size": 48}),
        ("llama", {"num_hidden_layers": 3, "intermediate_size": 40, "hidden_size": 32,
                   "num_attention_heads": 8, "num_key_value_heads": 4}),
    ],
)  # fmt: skip
def test_a_directory_becomes_that_of_a_larger_configuration(tmp_path, name, changes):
    path, out = directory(tmp_path, name), tmp_path / "out"
    config = json.loads((path / "config.json").read_text()) | changes
    config.pop("architectures")  # a configuration alone is of no class: that of the source is meant
    (tmp_path / "larger.json").write_text(json.dumps(config))
    command = ["convert", str(path), "--to", str(tmp_path / "larger.json"), "-o", str(out)]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    kind = getattr(transformers, CORE[name][0])
    small, large = (kind.from_pretrained(p).double().eval() for p in (path, out))
    assert changes.items() <= large.config.to_dict().items()
    inputs = CORE[name][2]()
    before, after = (first_output(model, inputs) for model in (small, large))
    assert max_rel(before, after) < 1e-6  # the weights are in float32


def test_a_directory_of_timm_grows_and_its_record_tells_what_it_is(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3).eval()
    path, out = tmp_path / "net", tmp_path / "net-2x"
    path.mkdir()
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"tag": "c3_in1k"}}
    (path / "config.json").write_text(json.dumps(config))
    command = ["widen", str(path), "--width", "2x", "--include", "layer1*", "--verify", "quick"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "config.json is left out" in done.stderr
    assert not (out / "config.json").exists()
    grown = fxgrow.load(out)
    images = torch.randn(2, 3, 64, 64)
    assert grown.layer1[0].conv1.out_channels == 2 * model.layer1[0].conv1.out_channels
    assert max_rel(model(images), grown(images)) < 1e-5


def test_a_directory_of_timm_that_becomes_another_of_its_networks_says_so(tmp_path):
    timm = pytest.importorskip("timm")
    small = timm.create_model("resnet18", num_classes=3).eval()
    path, out = tmp_path / "net", tmp_path / "larger"
    path.mkdir()
    safetensors.torch.save_file(small.state_dict(), path / "model.safetensors")
    trained = {"tag": "a1_in1k", "mean": [0.5, 0.5, 0.5], "first_conv": "conv1"}
    config = {"architecture": "resnet18", "num_classes": 3, "num_features": 512,
              "pretrained_cfg": trained}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    command = ["convert", str(path), "--to", "timm:resnet34", "-o", str(out), "--verify", "quick"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "config.json" not in done.stderr
    written = json.loads((out / "config.json").read_text())
    assert (written["architecture"], written["num_classes"]) == ("resnet34", 3)
    assert written["pretrained_cfg"]["mean"] == trained["mean"]
    assert "tag" not in written["pretrained_cfg"]
    images = torch.randn(2, 3, 64, 64)
    for large in (fxgrow.load(out), timm.create_model(f"local-dir:{out}", pretrained=True).eval()):
        assert len(large.layer3) == 6
        assert max_rel(small(images), large(images)) < 1e-4


def _beside(path: Path, kind: str, old: dict[str, Tensor]) -> Path:
    """Put a file with something of a network's weights, or nothing, into its directory."""
    name, layer = "model.layers.1.mlp.down_proj", old["model.layers.1.mlp.down_proj.weight"]
    saved: dict[str, tuple[str, object]] = {
        "average": ("ema.pt", {"shadow": [layer.clone()]}),
        "optimizer": ("state.pth", {"o": {"state": {0: {"exp_avg": layer}}, "param_groups": []}}),
        "adapter": ("adapter_model.bin", {f"base.{name}.lora_A.weight": torch.zeros(4, 24)}),
        "legacy": ("old.bin", {"w": layer}),
        "below": ("step-5/model.safetensors", {name: layer}),
        "code": ("code.bin", {"w": torch.zeros(3), "code": print}),
        "settings": ("training_args.bin", {"function": print}),
        "other weights": ("2_Dense/pytorch_model.bin", {"linear.weight": torch.zeros(3, 7)}),
        "text": ("notes.bin.txt", b"nothing"),
        "form": ("onnx/model.onnx", b"\x08\x07\x12\x07pytorch"),
        "raw": ("openvino/model.bin", b"\0\1\2\3"),
    }
    file, what = saved[kind]
    (path / file).parent.mkdir(exist_ok=True)
    if isinstance(what, bytes):
        (path / file).write_bytes(what)
    elif file.endswith(".safetensors"):
        safetensors.torch.save_file(what, path / file)
    else:
        torch.save(what, path / file, _use_new_zipfile_serialization=kind != "legacy")
    return path / file


OLD_WIDTHS = {
    "average": "model.layers.0.mlp.down_proj.weight", "optimizer": "o.state.0.exp_avg",
    "adapter": "lora_A", "legacy": "of the old widths", "below": "of the old widths",
    "code": "without running code", "form": "ONNX", "raw": "without running code",
}  # fmt: skip


@pytest.mark.parametrize("kind", [*OLD_WIDTHS, "settings", "other weights", "text"])
def test_a_copied_file_that_holds_old_widths_is_named(tmp_path, kind):
    path = directory(tmp_path, "llama")
    file = _beside(path, kind, safetensors.torch.load_file(path / "model.safetensors"))
    held = file.read_bytes()
    opened, grown = widened(path, include="*mlp*", verify=False)
    out = tmp_path / "out"
    notes = write_grown(opened, grown, out)
    assert (out / file.relative_to(path)).read_bytes() == held
    if kind not in OLD_WIDTHS:
        assert notes == []
        return
    (note,) = notes
    assert str(file) in note
    assert OLD_WIDTHS[kind] in note
    assert "is copied as it is" in note


def test_a_configuration_that_says_all_leaves_nothing_of_memory_to_warn_of(tmp_path):
    path = directory(tmp_path, "phi3")
    out = tmp_path / "o"
    command = ["widen", str(path), "--width", "2x", "--where", "all", "-o", str(out)]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "hooks" not in told.output
    weights = tmp_path / "o.safetensors"
    assert "hooks" in CliRunner().invoke(app, [*command[:-1], str(weights)]).output
