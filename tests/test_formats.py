"""Formats of weights: shards with an index, directories, programs, and the way between them."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from pathlib import Path

import hostile
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import small_resnet
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import SourceError
from fxgrow.files.checkpoint import Source, default_output, load_source, save_source
from fxgrow.files.models import open_model, write_grown

RECORD = {"fxgrow": "0.1.0", "architecture": None, "plans": []}


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def sharded(folder: Path, state: dict[str, Tensor], count: int = 2) -> Path:
    """Write tensors as shards with an index, as transformers lays them out."""
    names = list(state)
    places = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name].contiguous() for name in names[shard::count]}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt", "by": "me"})
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1, "made": "here"}, "weight_map": places}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def doubled(source: Source) -> list[dict[str, Tensor]]:
    """Stand in for a surgery: every set of weights with its first dim doubled."""
    return [{n: torch.cat([t, t]) for n, t in weights.items()} for weights in source.state_dicts]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ── shards ────────────────────────────────────────────────────────────────────────────────────


def test_shards_come_back_as_shards(tmp_path):
    state = network().state_dict()
    source = load_source(path := sharded(tmp_path, state))
    assert source.format == "sharded"
    assert all(torch.equal(source.state_dict[name], state[name]) for name in state)
    out = default_output(path, "2x")
    assert out.name == "model-2x.safetensors.index.json"
    assert save_source(source, doubled(source), out, record=RECORD) == []
    index = json.loads(out.read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 1
    assert shards == [f"model-2x-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert index["metadata"] == {"made": "here", "total_size": 2 * sum(
        tensor.nbytes for tensor in state.values())}  # fmt: skip
    for name, shard in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / shard, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), torch.cat([state[name]] * 2))
            assert file.metadata()["by"] == "me"
    again = load_source(out)
    assert again.record == RECORD
    assert again.shapes == {name: (2 * len(t), *t.shape[1:]) for name, t in state.items()}


def test_the_shards_of_an_index_go_with_it(tmp_path):
    state = network().state_dict()
    source = load_source(sharded(tmp_path, state))
    (tmp_path / "out").mkdir()
    out = sharded(tmp_path / "out", state, count=4)
    other = out.with_name("other.safetensors.index.json")
    index = json.loads(out.read_text())
    first, second, third, *_ = sorted(set(index["weight_map"].values()))
    for name, shard in (("mine", "notes.txt"), ("more", "model-x.safetensors")):
        index["weight_map"][name] = shard
        out.with_name(shard).write_text("precious")
    out.write_text(json.dumps(index))
    other.write_text(json.dumps({"weight_map": {"a": first}}))
    out.with_name(second).unlink()
    out.with_name(third).unlink()
    out.with_name(third).symlink_to("notes.txt")
    save_source(source, doubled(source), out, record=RECORD, force=True)
    named = set(json.loads(out.read_text())["weight_map"].values())
    kept = {out.name, other.name, first, third, "notes.txt", "model-x.safetensors"}
    assert set(files_in(out.parent)) == named | kept


def test_the_shards_of_an_index_that_cannot_be_read_go_with_it(tmp_path):
    source = load_source(sharded(tmp_path, network().state_dict()))
    (tmp_path / "out").mkdir()
    out = sharded(tmp_path / "out", network().state_dict(), count=4)
    out.write_text(out.read_text()[:-9])
    other = out.with_name("model-x-00001-of-00002.safetensors")
    other.write_text("precious")
    save_source(source, doubled(source), out, record=RECORD, force=True)
    named = set(json.loads(out.read_text())["weight_map"].values())
    assert set(files_in(out.parent)) == named | {out.name, other.name}


def test_the_shards_of_pickles_are_read_by_the_safe_unpickler(tmp_path):
    state = network().state_dict()
    torch.save({"0.weight": state["0.weight"]}, tmp_path / "a.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "a.bin"}}))
    assert torch.equal(load_source(index).state_dict["0.weight"], state["0.weight"])
    torch.save({"0.weight": Foreign()}, tmp_path / "a.bin")
    with pytest.raises(SourceError, match="Foreign, which is not on the list of harmless"):
        load_source(index)


class Foreign:
    """A class that the safe unpickler does not know."""


def broken_indices(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return indices that cannot be read, with a part of the message."""
    found = {}
    for case in ("missing", "elsewhere", "cut", "outside", "empty", "no json"):
        (folder / case).mkdir()
        path = sharded(folder / case, network().state_dict())
        first = path.with_name("model-00001-of-00002.safetensors")
        index = json.loads(path.read_text())
        if case == "missing":
            first.unlink()
            pattern = f"needs {first.name}, which is not beside it"
        elif case == "elsewhere":
            index["weight_map"]["no.such"] = first.name
            pattern = f"says that no.such is in {first.name}, where it is not"
        elif case == "cut":
            first.write_bytes(first.read_bytes()[:-7])
            pattern = f"{first.name} is truncated"
        elif case == "outside":
            index["weight_map"]["0.weight"] = "../model.safetensors"
            pattern = "which is no file's name"
        elif case == "empty":
            index = {"metadata": {}}
            pattern = "has no weight_map"
        else:
            pattern = "truncated or damaged"
        path.write_text("{" if case == "no json" else json.dumps(index))
        found[case] = (path, pattern)
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["index", "directory"])
def test_broken_indices_are_named_with_the_shard_and_the_way_out(tmp_path, whole):
    for case, (path, pattern) in broken_indices(tmp_path).items():
        with pytest.raises(SourceError, match=pattern) as caught:
            load_source(path.parent if whole else path)
        assert caught.value.way_out, case
        assert str(path.parent) in str(caught.value), case


def test_nothing_is_left_of_shards_that_cannot_be_written(tmp_path, monkeypatch):
    source = load_source(sharded(tmp_path, network().state_dict()))
    before = files_in(tmp_path)
    out = tmp_path / "o.safetensors.index.json"
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(SourceError, match="No space left"):
        save_source(source, doubled(source), out, record=RECORD)
    assert files_in(tmp_path) == before


def test_a_shard_that_is_there_needs_force(tmp_path):
    source = load_source(sharded(tmp_path, network().state_dict()))
    out = tmp_path / "o.safetensors.index.json"
    save_source(source, doubled(source), out, record=RECORD)
    out.unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SourceError, match=r"o-00001-of.*exists.*force=True"):
        save_source(source, source.state_dicts, out, record=RECORD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_source(source, source.state_dicts, out, record=RECORD, force=True)
    assert load_source(out).shapes == source.shapes


# ── directories ───────────────────────────────────────────────────────────────────────────────


def test_a_directory_comes_back_with_what_belongs_to_it(tmp_path):
    folder = tmp_path / "net-0.5"
    (folder / "more").mkdir(parents=True)
    sharded(folder, network().state_dict())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "more" / "notes.txt").write_text("words")
    (folder / "model.onnx").write_bytes(b"old weights")
    source = load_source(folder)
    out = default_output(folder, "2x")
    assert out.name == "net-0.5-2x"
    warnings = save_source(source, doubled(source), out, record=RECORD)
    assert warnings == ["what does not fit the new weights is not copied: model.onnx."]
    assert (out / "more" / "notes.txt").read_text() == "words"
    assert not (out / "model.onnx").exists()
    again = load_source(out)
    assert again.format == "directory"
    assert again.record == RECORD
    assert again.shapes["0.weight"] == (16, 6)
    assert load_source(folder).shapes == source.shapes


def test_only_the_directory_of_a_model_is_replaced_and_with_force(tmp_path):
    for name in ("model", "other", "precious"):
        (tmp_path / name).mkdir()
    for name in ("model", "other"):
        safetensors.torch.save_file(network().state_dict(), tmp_path / name / "model.safetensors")
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    source = load_source(tmp_path / "model")

    def save(out: Path, *, force: bool = True) -> None:
        save_source(source, doubled(source), out, record=RECORD, force=force)

    with pytest.raises(SourceError, match=r"exists.*force=True"):
        save(tmp_path / "other", force=False)
    for out, reason in {
        tmp_path / "precious": "is a directory",
        tmp_path / "model": "is the source",
        tmp_path / "model" / "inside": "lies in the source",
        tmp_path: "is a directory",
    }.items():
        with pytest.raises(SourceError, match=reason):
            save(out)
    save(tmp_path / "other")
    assert load_source(tmp_path / "other").shapes["0.weight"] == (16, 6)
    assert files_in(tmp_path) == ["model", "other", "precious"]
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(SourceError, match="is a directory without weights"):
        load_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"has a config.json but none of model.safetensors"):
        load_source(tmp_path)


# ── programs ──────────────────────────────────────────────────────────────────────────────────


class Attention(nn.Module):
    """A small transformer with its sizes in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(n, length, 16))
        return self.head((x + self.down(nn.functional.gelu(self.up(x)))).mean(1))


PROGRAMS = {
    "resnet": (lambda: small_resnet().eval(), (2, 3, 32, 32), "layer1.0.conv1.weight"),
    "mlp": (network, (2, 6), "0.weight"),
    "attention": (lambda: Attention().eval(), (2, 5, 6), "qkv.weight"),
}


def program(path: Path, name: str) -> tuple[nn.Module, Tensor]:
    """Export a network; return it and its input."""
    make, shape, _ = PROGRAMS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    dims = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=False)
    torch.export.save(exported, path)
    return model, x


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")  # as the source is
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_grows_and_stays_one(tmp_path, name):
    path = tmp_path / "net.pt2"
    model, x = program(path, name)
    opened = open_model(path)
    grown = fxgrow.widen(opened.model, "2x", opened.inputs)
    assert grown.report.verification.verdict == "preserved"
    write_grown(opened, grown, out := tmp_path / "out.pt2")
    assert files_in(tmp_path) == ["net.pt2", "out.pt2"]
    loaded = fxgrow.load(out)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    weight = PROGRAMS[name][2]
    assert loaded.state_dict()[weight].shape[0] == 2 * model.state_dict()[weight].shape[0]
    larger = torch.cat([x, x, x])  # the size that may vary still may
    torch.testing.assert_close(loaded(larger), model(larger), rtol=1e-4, atol=1e-5)


def test_a_state_dict_may_become_a_program_and_a_program_a_state_dict(tmp_path):
    torch.save(network(), tmp_path / "net.pt")
    opened = open_model(tmp_path / "net.pt")
    grown = fxgrow.widen(opened.model, "2x")
    write_grown(opened, grown, tmp_path / "out.pt2")
    x = torch.randn(5, 6)
    torch.testing.assert_close(fxgrow.load(tmp_path / "out.pt2")(x), network()(x))
    opened = open_model(tmp_path / "out.pt2")
    again = fxgrow.widen(opened.model, "2x", opened.inputs)
    write_grown(opened, again, tmp_path / "weights.pt")
    wide = network(32)
    wide.load_state_dict(torch.load(tmp_path / "weights.pt"), strict=True)
    torch.testing.assert_close(wide(x), network()(x))


def test_a_network_grown_in_python_is_saved_as_a_program(tmp_path):
    fxgrow.save(fxgrow.widen(network(), "2x"), tmp_path / "net.pt2")
    x = torch.randn(4, 6)
    torch.testing.assert_close(fxgrow.load(tmp_path / "net.pt2")(x), network()(x))


def test_a_program_that_was_written_wrong_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "net.pt2"
    program(path, "mlp")
    opened = open_model(path)
    grown = fxgrow.widen(opened.model, "2x", opened.inputs)
    written = torch.export.save

    def spoilt(exported: torch.export.ExportedProgram, path: Path) -> None:
        exported.state_dict["0.weight"] = nn.Parameter(exported.state_dict["0.weight"] + 1.0)
        written(exported, path)

    monkeypatch.setattr(torch.export, "save", spoilt)
    with pytest.raises(fxgrow.VerificationError, match=r"0\.weight\[0, 0\] is"):
        write_grown(opened, grown, tmp_path / "out.pt2")
    assert files_in(tmp_path) == ["net.pt2"]


def rewritten(path: Path, member: str, change: object) -> None:
    """Change one member of a zip archive, or add one."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(held)).partition("/")[0]
    full = f"{root}/{member}"
    held[full] = change(held.get(full, b""))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)


CRAFTED = {
    "an operation": (
        "models/model.json",
        lambda data: data.replace(b"torch.ops.aten.relu.default", b"torch.hub.load"),
        "the operation 'torch.hub.load'",
    ),
    "a name": (
        "models/model.json",
        lambda data: data.replace(b'"relu"', b'"relu=print(1)"'),
        "the name 'relu=print",
    ),
    "an expression": (
        "models/model.json",
        lambda data: data.replace(b'"expr_str": "', b'"expr_str": "exec(chr(49)) + ', 1),
        "the expression .exec",
    ),
    "a pickle": (
        "data/weights/model_weights_config.json",
        lambda data: data.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
        "a pickled tensor",
    ),
    "compiled code": ("data/aotinductor/model/x.so", lambda _: b"\x7fELF", "the member '.*x.so'"),
    "an object": ("data/constants/custom_obj_0", lambda _: b"\x80\x02N.", "custom_obj_0"),
    "inputs": ("data/sample_inputs/model.pt", lambda _: b"cos\nsystem\n.", "example inputs"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_program_that_might_run_code_needs_trust(tmp_path, case):
    member, change, pattern = CRAFTED[case]
    path = tmp_path / "net.pt2"
    program(path, "mlp")
    if "version" in zipfile.ZipFile(path).namelist():
        pytest.skip("this torch writes the older layout")
    load_source(path)
    rewritten(path, member, change)
    with pytest.raises(SourceError, match=pattern) as caught:
        load_source(path)
    assert "trust_pickle=True" in caught.value.way_out


@pytest.mark.filterwarnings("ignore:the result is a torch.fx.GraphModule")  # as the source is
def test_a_program_of_before_torch_2_8_grows(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_bytes(hostile.zipped(hostile.older_program()))
    opened = open_model(path)
    grown = fxgrow.widen(opened.model, "2x", torch.randn(3, 4))
    write_grown(opened, grown, out := tmp_path / "out.pt2")
    x = torch.randn(5, 4)
    torch.testing.assert_close(fxgrow.load(out)(x), opened.model(x))


# ── from one to another ───────────────────────────────────────────────────────────────────────

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
ENTRIES = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}\.(weight|bias|[0-9])", fullmatch=True),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)
OUTPUTS = ("o.pt", "o.safetensors", "o.safetensors.index.json")


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(entries=ENTRIES, way=st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=4))
def test_the_way_through_any_formats_loses_nothing(tmp_path, entries, way):
    weights: OrderedDict[str, Tensor] = OrderedDict()
    for name, (dtype, shape, tie) in entries.items():
        others = list(weights.values())
        weights[name] = others[tie % len(others)] if tie and others else (
            torch.randn(shape).mul(3).to(dtype))  # fmt: skip
    versions = {"": {"version": 1}, "a": {"version": 2}}
    vars(weights)["_metadata"] = OrderedDict(versions)
    torch.save(weights, path := tmp_path / "in.pt")
    for step, name in enumerate(way):
        (folder := tmp_path / str(step)).mkdir(exist_ok=True)
        source = load_source(path)
        path = folder / name
        assert save_source(source, source.state_dicts, path, record=RECORD, force=True) == []
    found = load_source(path)
    assert found.record == RECORD
    assert dict(found.state_dict._metadata) == versions
    assert found.state_dict.keys() == weights.keys()
    for name, tensor in weights.items():
        new = found.state_dict[name]
        assert new.dtype == tensor.dtype
        assert torch.equal(new, tensor)
        for other in weights:
            were = tensor.data_ptr() == weights[other].data_ptr()
            are = new.data_ptr() == found.state_dict[other].data_ptr()
            assert were == are or not new.numel() or not weights[other].numel()


def test_what_a_format_cannot_hold_is_said(tmp_path):
    weights = OrderedDict(network().state_dict()) | {"0._extra_state": {"calls": 3}}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "c.pt")
    torch.save(weights, tmp_path / "m.pt")
    safetensors.torch.save_file(network().state_dict(), tmp_path / "s.safetensors", {"by": "me"})
    cases = {
        ("c.pt", "o.safetensors"): "it is without the rest of the checkpoint",
        ("m.pt", "p.safetensors"): "it is without 0._extra_state",
        ("s.safetensors", "q.pt"): "is without the texts of the header: by",
    }
    for (name, out), pattern in cases.items():
        source = load_source(tmp_path / name)
        (warning,) = save_source(source, source.state_dicts, tmp_path / out, record=RECORD)
        assert pattern in warning


def test_a_tied_tensor_is_stored_once(tmp_path):
    weight = torch.randn(30, 30)
    torch.save({"a.weight": weight, "b.weight": weight}, tmp_path / "m.pt")
    source = load_source(tmp_path / "m.pt")
    save_source(source, source.state_dicts, out := tmp_path / "o.safetensors", record=RECORD)
    with safetensors.safe_open(out, framework="pt") as file:
        assert file.keys() == ["a.weight"]
        assert file.metadata()["b.weight"] == "a.weight"  # as safetensors' own save_model does
