"""Weights in files: every container comes back as it was, with the new weights in it."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxgrow.errors import SourceError
from fxgrow.files.checkpoint import Source, check_output, default_output, load_source, save_source
from fxgrow.files.checkpoint.formats import sniff
from fxgrow.files.models import open_model

RECORD = {"fxgrow": "0.1.0", "architecture": {"name": "torchvision:resnet18", "arguments": {}}}


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())


def save(obj: object, path: Path, **kwargs: object) -> Path:
    torch.save(obj, path, **kwargs)
    return path


def grown(source: Source) -> list[dict[str, torch.Tensor]]:
    """Stand in for a surgery: every set of weights with its first dim doubled."""
    return [
        {n: torch.cat([t, t]) if t.dim() else t for n, t in weights.items()}
        for weights in source.state_dicts
    ]


def rewrite(path: Path, out: Path, **kwargs: object) -> tuple[object, list[str]]:
    """Load, double, save; return what plain torch reads from the output, and the warnings."""
    source = load_source(path)
    warnings = save_source(source, grown(source), out, record=RECORD, **kwargs)
    return torch.load(out, weights_only=True), warnings


@pytest.mark.parametrize("use_zip", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_comes_back_as_one_that_loads_strictly(tmp_path, use_zip):
    path = save(
        network().state_dict(), tmp_path / "model.pt", _use_new_zipfile_serialization=use_zip
    )
    source = load_source(path)
    assert (source.kind, source.model, source.record) == ("state_dict", None, None)
    assert source.state_dict._metadata["1"] == {"version": 2}
    saved, warnings = rewrite(path, out := tmp_path / "out.pt")
    assert warnings == []
    model = network(8)
    assert str(model.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(model[0].weight, torch.cat([source.state_dict["0.weight"]] * 2))
    again = load_source(out)
    assert again.record == RECORD
    assert again.format == source.format == ("torch" if use_zip else "torch_legacy")
    assert "_fxgrow" not in again.state_dict._metadata


def test_a_plain_dict_of_tensors_carries_the_record_too(tmp_path):
    path = save(dict(network().state_dict()), tmp_path / "model.pt")
    saved, _ = rewrite(path, tmp_path / "out.pt")
    network(8).load_state_dict(saved, strict=True)
    assert load_source(tmp_path / "out.pt").record == RECORD


def test_loading_in_a_fresh_interpreter_needs_no_fxgrow(tmp_path):
    path = save(network(), tmp_path / "module.pt")
    source = load_source(path)
    out = tmp_path / "out.pt"
    save_source(source, grown(source), out, record=RECORD, model=network(8))
    code = (
        "import sys, torch; sys.modules['fxgrow'] = None\n"
        f"m = torch.load({str(out)!r}, weights_only=False)\n"
        "raise SystemExit(0 if m(torch.ones(1, 3, 5, 5)).shape == (1, 8, 3, 3) else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
PLACES = ["state_dict", "model", "model_state_dict", "net", "network", "weights", "params", "G"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key", PLACES)
def test_checkpoints_keep_everything_but_the_weights(tmp_path, prefix, key):
    weights = OrderedDict((prefix + n, t) for n, t in network().state_dict().items())
    checkpoint = {"epoch": 3, key: weights, "lr": [0.1], "rng": torch.get_rng_state()}
    path = save(checkpoint, tmp_path / "c.pth")
    source = load_source(path)
    assert source.kind == "checkpoint"
    assert list(source.state_dict) == list(network().state_dict())
    saved, warnings = rewrite(path, tmp_path / "out.pth")
    assert warnings == []
    assert list(saved) == [*checkpoint, "_fxgrow"]
    assert type(saved[key]) is OrderedDict
    assert list(saved[key]) == list(weights)
    assert saved[key][prefix + "0.weight"].shape[0] == 8
    assert torch.equal(saved["rng"], checkpoint["rng"])
    assert (saved["epoch"], saved["lr"], saved["_fxgrow"]) == (3, [0.1], RECORD)
    assert load_source(tmp_path / "out.pth").record == RECORD


def test_the_usual_names_come_first_and_others_are_left_with_a_warning(tmp_path):
    other = nn.Linear(2, 2).state_dict()
    path = save({"critic": other, "state_dict": network().state_dict()}, tmp_path / "c.pt")
    source = load_source(path)
    assert "0.weight" in source.state_dict
    assert [text for text in source.warnings if "critic" in text]
    saved, _ = rewrite(path, tmp_path / "out.pt")
    assert torch.equal(saved["critic"]["weight"], other["weight"])


def test_tensors_that_are_no_weights_are_not_taken_for_them(tmp_path):
    states = {"cpu": torch.get_rng_state()}
    path = save({"rng": states, "G": network().state_dict()}, tmp_path / "c.pt")
    source = load_source(path)
    assert "0.weight" in source.state_dict
    assert source.warnings == []
    saved, _ = rewrite(path, tmp_path / "out.pt")
    assert torch.equal(saved["rng"]["cpu"], states["cpu"])


def test_names_of_parts_that_were_compiled_are_those_of_the_bare_model(tmp_path):
    names = {"0.weight": "0._orig_mod.weight"}
    weights = {f"module.{names.get(n, n)}": t for n, t in network().state_dict().items()}
    source = load_source(path := save(weights, tmp_path / "m.pt"))
    assert list(source.state_dict) == list(network().state_dict())
    saved, _ = rewrite(path, tmp_path / "out.pt")
    assert list(saved) == list(weights)
    assert saved["module.0._orig_mod.weight"].shape[0] == 8


def test_moving_averages_are_replaced_by_their_own_new_weights(tmp_path):
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    nn.init.constant_(average.module[0].bias, 7.0)
    checkpoint = {"model": model.state_dict(), "ema": {"shadow": average.state_dict()}}
    path = save(checkpoint, tmp_path / "c.pt")
    assert len(load_source(path).state_dicts) == 2
    saved, _ = rewrite(path, tmp_path / "out.pt")
    wide = torch.optim.swa_utils.AveragedModel(network(8))
    wide.load_state_dict(saved["ema"]["shadow"], strict=True)
    assert wide.module[0].bias.tolist() == [7.0] * 8
    assert torch.equal(saved["model"]["0.bias"], torch.cat([model[0].bias.detach()] * 2))


def test_every_optimizer_in_a_checkpoint_is_exchanged(tmp_path):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25)
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "more": {"optimizers": (optimizer.state_dict(), 3)},
    }
    path = save(checkpoint, tmp_path / "c.pt")
    places = []

    def change(saved, place):
        places.append(place)
        return {**saved, "state": {}}

    saved, _ = rewrite(path, tmp_path / "out.pt", optimizer=change)
    assert places == ["optimizer", "more.optimizers.0"]
    assert saved["optimizer"]["state"] == saved["more"]["optimizers"][0]["state"] == {}
    assert saved["more"]["optimizers"][1] == 3
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.25
    kept, _ = rewrite(path, tmp_path / "kept.pt")
    assert kept["optimizer"]["state"][0]["step"] == 1


def test_a_module_inside_a_checkpoint_is_replaced(tmp_path):
    path = save({"model": network(), "ema": network(), "epoch": 1}, tmp_path / "c.pt")
    source = load_source(path)
    assert source.kind == "checkpoint"
    assert type(source.model) is nn.Sequential
    new = grown(source)
    model = network(8)
    model.load_state_dict(new[0])
    save_source(source, new, tmp_path / "out.pt", record=RECORD, model=model)
    again = load_source(tmp_path / "out.pt")
    assert again.record == RECORD
    for weights, expected in zip(again.state_dicts, new, strict=True):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not torch.equal(again.state_dicts[0]["0.weight"], again.state_dicts[1]["0.weight"])


def test_a_pickled_data_parallel_stays_one(tmp_path):
    path = save(nn.DataParallel(network()), tmp_path / "dp.pt")
    source = load_source(path)
    assert source.kind == "module"
    assert list(source.state_dict) == list(network().state_dict())
    save_source(source, grown(source), tmp_path / "out.pt", record=RECORD, model=network(8))
    loaded = torch.load(tmp_path / "out.pt", weights_only=False)
    assert type(loaded) is nn.DataParallel
    assert loaded(torch.ones(1, 3, 4, 4)).shape[1] == 8
    assert source._locations[0].stored.module[0].out_channels == 4


def test_extra_state_and_parameters_are_kept(tmp_path):
    weights = OrderedDict(network().state_dict())
    weights["0.weight"] = nn.Parameter(weights["0.weight"], requires_grad=False)
    weights["2._extra_state"] = {"calls": 3}
    saved, _ = rewrite(save(weights, tmp_path / "m.pt"), tmp_path / "out.pt")
    assert saved["2._extra_state"] == {"calls": 3}
    assert isinstance(saved["0.weight"], nn.Parameter)
    assert not saved["0.weight"].requires_grad


def test_safetensors_keep_their_header(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(network().state_dict(), path, metadata={"license": "mit"})
    source = load_source(path)
    save_source(source, grown(source), tmp_path / "o.safetensors", record=RECORD)
    again = load_source(tmp_path / "o.safetensors")
    assert again.record == RECORD
    assert again._contents.header["license"] == "mit"
    network(8).load_state_dict(again.state_dict, strict=True)


def test_the_suffix_of_out_may_ask_for_another_format(tmp_path):
    tied = nn.Linear(3, 3)
    path = save({"a": tied.weight.detach(), "b": tied.weight.detach()}, tmp_path / "m.pt")
    source = load_source(path)
    warnings = save_source(source, grown(source), tmp_path / "o.safetensors", record=RECORD)
    assert warnings == []
    source = load_source(tmp_path / "o.safetensors")
    assert source.state_dict["a"].data_ptr() == source.state_dict["b"].data_ptr()
    save_source(source, grown(source), tmp_path / "back.pth", record=RECORD)
    assert load_source(tmp_path / "back.pth").format == "torch"
    with pytest.raises(ValueError, match="exported from a module"):
        save_source(source, grown(source), tmp_path / "o.pt2", record=RECORD)
    path = save({"model": network().state_dict(), "epoch": 1}, tmp_path / "c.pt")
    source = load_source(path)
    warnings = save_source(source, grown(source), tmp_path / "c.safetensors", record=RECORD)
    assert "without the rest of the checkpoint" in warnings[0]
    assert list(load_source(tmp_path / "c.safetensors").state_dict) == sorted(source.state_dict)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
ENTRIES = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}\.(weight|bias|[0-9])", fullmatch=True),
    st.tuples(
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 3), max_size=4),
        st.booleans(),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    entries=ENTRIES,
    prefix=st.sampled_from(PREFIXES),
    nested=st.booleans(),
    suffix=st.sampled_from([".pt", ".safetensors"]),
)
def test_saving_what_was_loaded_changes_nothing(tmp_path, entries, prefix, nested, suffix):
    weights: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, (dtype, shape, transposed, tie) in entries.items():
        tensor = torch.randn(shape).mul(3).to(dtype)
        tensor = tensor.t() if transposed and tensor.dim() == 2 else tensor
        if tie and weights:
            tensor = list(weights.values())[tie % len(weights)]
        weights[prefix + name] = tensor
    path, out = tmp_path / "in.pt", tmp_path / f"out{suffix}"
    torch.save({"state_dict": weights} if nested else weights, path)
    source = load_source(path)
    copies = [{n: t.clone() for n, t in source.state_dict.items()}]
    save_source(source, copies, out, record=RECORD, force=True)
    again = load_source(out)
    assert again.record == RECORD
    assert set(again.state_dict) == set(entries)
    for name in entries:
        new, old = again.state_dict[name], weights[prefix + name]
        assert new.dtype == old.dtype
        assert torch.equal(new, old)
        if suffix == ".pt":
            assert new.stride() == old.stride() or new.numel() <= 1
        for other in entries:
            were = old.data_ptr() == weights[prefix + other].data_ptr()
            are = new.data_ptr() == again.state_dict[other].data_ptr()
            assert were == are or not new.numel() or not weights[prefix + other].numel()


def test_tied_tensors_that_part_are_mentioned(tmp_path):
    weight = torch.ones(2, 2)
    path = save({"a": weight, "b": weight}, tmp_path / "m.pt")
    new = [{"a": torch.ones(2), "b": torch.zeros(2)}]
    warnings = save_source(load_source(path), new, tmp_path / "o.pt", record={})
    assert warnings == ["b was tied to another tensor and no longer is."]


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    path = save({"a": torch.ones(2)}, tmp_path / "m.pt")
    new = [{"a": torch.zeros(1_000_000)[:2]}]
    save_source(load_source(path), new, tmp_path / "o.pt", record={})
    assert (tmp_path / "o.pt").stat().st_size < 10_000


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def zip_bytes(tmp_path: Path) -> bytes:
    return save(network(64).state_dict(), tmp_path / "whole.pt").read_bytes()


def bad_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    model = network()
    state = model.state_dict()
    legacy = save(state, tmp_path / "l.pt", _use_new_zipfile_serialization=False).read_bytes()
    tensors = safetensors.torch.save({n: t.contiguous() for n, t in state.items()})
    exported = tmp_path / "exported.pt2"
    torch.export.save(torch.export.export(model.eval(), (torch.ones(1, 3, 5, 5),)), exported)
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    files = {
        "missing": (tmp_path / "none.pt", "does not exist"),
        "empty": (write(tmp_path / "e.pt", b""), "is empty"),
        "directory": (tmp_path, "is a directory"),
        "text": (write(tmp_path / "t.pt", b"epoch,loss\n1,2\n"), "is a text file"),
        "lfs": (write(tmp_path / "g.pt", b"version https://git-lfs.github.com/"), "git lfs pull"),
        "noise": (write(tmp_path / "n.pt", bytes(range(256))), "unknown format"),
        "pickle": (write(tmp_path / "p.pt", b"\x80\x04N."), "pickle that torch.save did not"),
        "cut zip": (write(tmp_path / "z.pt", zip_bytes(tmp_path)[:-900]), "truncated"),
        "cut legacy": (write(tmp_path / "cl.pt", legacy[:-50]), "truncated"),
        "cut legacy head": (write(tmp_path / "ch.pt", legacy[:200]), "truncated"),
        "cut tensors": (write(tmp_path / "c.safetensors", tensors[:-9]), "truncated"),
        "cut header": (write(tmp_path / "h.safetensors", tensors[:40]), "truncated"),
        "cut program": (write(tmp_path / "x.pt2", exported.read_bytes()[:-700]), "truncated"),
        "no weights": (save({"epoch": 3, "lr": 0.1}, tmp_path / "d.pt"), r"epoch \(int\), lr"),
        "tensor": (save(torch.ones(2), tmp_path / "1.pt"), "an object of type Tensor"),
        "list": (save([torch.ones(2)], tmp_path / "2.pt"), "an object of type list"),
        "quantized": (save({"a.w": quantized}, tmp_path / "q.pt"), "tensor a.w .* is quantized"),
        "sparse": (save({"s.w": torch.eye(2).to_sparse()}, tmp_path / "s.pt"), "s.w .* is sparse"),
        "meta": (save({"m.w": torch.ones(2, device="meta")}, tmp_path / "m.pt"), "no values"),
    }
    return files


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_bad_files_are_one_line_with_the_file_and_the_way_out(tmp_path):
    for case, (path, pattern) in bad_files(tmp_path).items():
        with pytest.raises(SourceError, match=pattern) as caught:
            load_source(path)
        text = str(caught.value)
        assert str(path) in text, case
        assert "\n" not in text, case
        assert caught.value.way_out, case


def test_weights_in_other_places_are_named_with_the_way_to_save_them(tmp_path):
    state = network().state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    kept = {
        "saved[0]": [state, {"epoch": 1}],
        "saved[1]": ({"epoch": 1}, state),
        "saved['a']['b']['c']['d']": {"a": {"b": {"c": {"d": state}}}},
        "saved['model']": {"model": arrays},
    }
    for place, saved in kept.items():
        path = save(saved, tmp_path / "elsewhere.pt")
        with pytest.raises(SourceError, match=re.escape(f" in {place} ")) as caught:
            load_source(path)
        assert "holds no weights" not in str(caught.value)
        line = re.search(r"torch\.save\((.*), 'model.pt'\)", caught.value.way_out)
        given = eval(line.group(1), {"saved": saved, "torch": torch})
        assert load_source(save(given, tmp_path / "mended.pt")).state_dict.keys() == state.keys()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "s.pt")
    with pytest.raises(SourceError, match=r"TorchScript.*state_dict"):
        load_source(tmp_path / "s.pt")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_loads_or_is_refused_and_nothing_else(tmp_path, data):
    whole = save(network().state_dict(), tmp_path / "w.pt").read_bytes()
    if data.draw(st.booleans()):
        whole = safetensors.torch.save(network().state_dict())
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with suppress(SourceError):
        load_source(write(tmp_path / "broken", bytes(broken)))


def test_formats_are_told_by_content_not_by_name(tmp_path):
    path = tmp_path / "weights.pt"
    safetensors.torch.save_file(network().state_dict(), path)
    assert sniff(path).name == "safetensors"
    assert sniff(save(network().state_dict(), tmp_path / "w.safetensors")).name == "torch"


@pytest.fixture
def source(tmp_path):
    return load_source(save(network().state_dict(), tmp_path / "model.pt"))


def outputs(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "there.pt").write_bytes(b"precious")
    (tmp_path / "link.pt").symlink_to(tmp_path / "model.pt")
    (tmp_path / "folder").mkdir()
    return {
        "exists": (tmp_path / "there.pt", "exists.*force=True"),
        "source": (tmp_path / "model.pt", "is the source"),
        "roundabout": (tmp_path / "folder" / ".." / "model.pt", "is the source"),
        "link": (tmp_path / "link.pt", "is the source"),
        "directory": (tmp_path / "folder", "is a directory"),
        "no directory": (tmp_path / "none" / "o.pt", "there is no directory"),
        "under a file": (tmp_path / "there.pt" / "o.pt", "there is no directory"),
    }


def test_outputs_that_cannot_be_written_are_refused(tmp_path, source):
    for case, (out, pattern) in outputs(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SourceError, match=pattern):
            save_source(source, grown(source), out, record=RECORD, force=case != "exists")
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.pt").read_bytes() == b"precious"


def test_an_unwritable_directory_is_refused(tmp_path, source, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with pytest.raises(SourceError, match=r"is not writable.*out"):
        check_output(tmp_path / "o.pt")


def test_force_overwrites_another_file(tmp_path, source):
    (tmp_path / "there.pt").write_bytes(b"old")
    save_source(source, grown(source), tmp_path / "there.pt", record=RECORD, force=True)
    assert load_source(tmp_path / "there.pt").record == RECORD


@pytest.mark.parametrize("name", ["o.pt", "o.safetensors"])
def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, source, monkeypatch, name):
    def full(*args):
        raise OSError(28, "No space left on device")

    out = tmp_path / name
    out.write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SourceError, match="No space left"):
        save_source(source, grown(source), out, record=RECORD, force=True)
    assert sorted(tmp_path.iterdir()) == before
    assert out.read_bytes() == b"old"


def test_saving_changes_neither_the_source_nor_its_data(tmp_path, source):
    before, weights = source.path.read_bytes(), copy.deepcopy(source.state_dict)
    save_source(source, grown(source), tmp_path / "o.pt", record=RECORD)
    assert source.path.read_bytes() == before
    assert "_fxgrow" not in source._contents.data._metadata
    assert all(torch.equal(source.state_dict[n], t) for n, t in weights.items())


def test_mistakes_of_the_caller_are_not_source_errors(tmp_path, source):
    with pytest.raises(ValueError, match="2 state_dicts for 1"):
        save_source(source, grown(source) * 2, tmp_path / "o.pt", record=RECORD)
    with pytest.raises(TypeError):
        save_source(source, grown(source), tmp_path / "o.pt", record={"a": torch.ones(1)})
    module = load_source(save(network(), tmp_path / "module.pt"))
    with pytest.raises(ValueError, match="a new module is needed"):
        save_source(module, grown(module), tmp_path / "o.pt", record=RECORD)


def test_a_damaged_record_is_ignored_with_a_warning(tmp_path):
    path = save({"model": network().state_dict(), "_fxgrow": "?"}, tmp_path / "c.pt")
    source = load_source(path)
    assert source.record is None
    assert "cannot be read" in source.warnings[0]
    safetensors.torch.save_file(
        network().state_dict(), tmp_path / "s.safetensors", metadata={"_fxgrow": "{"}
    )
    assert load_source(tmp_path / "s.safetensors").record is None


@pytest.mark.parametrize(
    ("path", "label", "expected"),
    [
        ("a/model.pt", "2x", "a/model-2x.pt"),
        ("model.pt", "+32", "model-+32.pt"),
        ("resnet50-0.9.pth", "1.5x", "resnet50-0.9-1.5x.pth"),
        ("m", "2x", "m-2x"),
        ("model.pth.tar", "2x", "model-2x.pth.tar"),
        ("m.pt", "layer*/conv 1=2x", "m-layer_conv_1=2x.pt"),
    ],
)
def test_outputs_are_named_after_the_source(path, label, expected):
    assert default_output(path, label) == Path(expected)


def test_records_are_json_in_a_safetensors_header(tmp_path, source):
    save_source(source, grown(source), tmp_path / "o.safetensors", record=RECORD)
    with safetensors.safe_open(tmp_path / "o.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["_fxgrow"]) == RECORD


def test_weights_of_another_architecture_are_not_blamed_on_the_number_of_classes(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    with pytest.raises(
        SourceError, match=r"do not fit torchvision:resnet34.*names of tensors"
    ) as caught:
        open_model(path, arch="resnet34")
    assert "num_classes" not in caught.value.way_out
    with pytest.raises(SourceError, match=r"fc\.bias"):
        open_model(path, arch="resnet18", arch_arguments={"num_classes": 7})
