"""Hostile files: refused in one line, fast and small, and nothing of them runs or stays."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import stat
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest
import torch
from hostile import load_pickled
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import FxgrowError, SourceError

Corpus = Callable[[], Iterator[tuple[str, bytes]]]
SECONDS = 10.0
MEMORY = 1 << 30  # bytes above an interpreter with torch
CORPORA: dict[str, tuple[Corpus, str]] = {
    "pickles": (lambda: ((w, hostile.saved(d)) for w, d in hostile.pickles()), ".pt"),
    "archives": (hostile.archives, ".pt"),
    "headers": (hostile.headers, ".safetensors"),
    "programs": (hostile.programs, ".pt2"),
    "older programs": (hostile.older_programs, ".pt2"),
}
if "version" in hostile.program():  # this torch writes and reads the older layout alone
    del CORPORA["programs"]


def refusal(path: Path) -> str:
    """Return what fxgrow says of a hostile file; fail if it says too much or does anything."""
    before, start = sorted(path.parent.iterdir()), time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxgrow.FxgrowWarning)
        try:
            fxgrow.open_model(path)
        except FxgrowError as error:
            said = str(error)
        else:
            said = ""
    assert time.monotonic() - start < SECONDS
    assert sorted(path.parent.iterdir()) == before
    return said


@pytest.mark.parametrize("name", CORPORA)
def test_every_hostile_file_is_refused_in_one_line_and_changes_nothing(tmp_path, name):
    make, suffix = CORPORA[name]
    before = hostile.classes()
    wrong = []
    count = 0
    for what, data in make():
        count += 1
        path = hostile.write(tmp_path, data, suffix)
        try:
            said = refusal(path)
        except Exception as error:  # all are shown at once
            wrong.append((what, f"{type(error).__name__}: {error}"))
            continue
        if not said or "\n" in said or str(path) not in said or "unexpected E" in said:
            wrong.append((what, said))
        if what.startswith("the operation") and "trust" not in said:  # it got to torch
            wrong.append((what, said))
    assert wrong == []
    assert count > 25
    assert hostile.changed(before) == []


def test_objects_that_loading_would_call_are_not_passed_on(tmp_path):
    plain = hostile.write(tmp_path, hostile.beside_weights(hostile.plain({"a": 1})), ".pt")
    assert load_pickled(plain)["other"] == {"a": 1}
    before, passed, count = hostile.classes(), [], 0
    for what, data in hostile.laundered():
        count += 1
        path = hostile.write(tmp_path, hostile.beside_weights(data), ".pt")
        try:
            load_pickled(path)
        except SourceError as error:
            if "trust_pickle=True" in str(error) and "\n" not in str(error):
                continue
        passed.append(what)
    assert passed == []
    assert count > 400
    assert hostile.changed(before) == []


def test_there_are_enough_hostile_files():
    assert sum(1 for make, _ in CORPORA.values() for _ in make()) >= 250


COMMAND = {
    "pickles": ["thirty huge bytearrays", "os system called", "a module whose modules is a partial",
                "attributes of ('torch.nn.modules.linear', 'Linear')"],
    "archives": ["two directories", "a zip bomb", "bytes behind the end"],
    "headers": ["a record that names code", "two tensors on one place"],
    "programs": ["the operation 'os.system'", "example inputs that are code", "a pickled weight"],
    "older programs": ["the operation 'os.system'", "serialized_state_dict.pt that is code"],
}  # fmt: skip
COMMAND_LINE = """
import resource, sys
import torch, torchvision
sys.argv = ["fxgrow", "widen", sys.argv[1], "--width", "2x"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import fxgrow.cli
try:
    fxgrow.cli.main()
except SystemExit as stop:
    code = stop.code
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("corpus", "what"), [(name, what) for name in CORPORA for what in COMMAND[name]]
)
def test_the_command_refuses_hostile_files_with_one_line_and_little_memory(tmp_path, corpus, what):
    make, suffix = CORPORA[corpus]
    path = hostile.write(tmp_path, dict(make())[what], suffix)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, str(path)],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
    )  # fmt: skip
    code, kilobytes = done.stdout.split()
    assert (code, int(kilobytes) * 1024 < MEMORY) == ("1", True)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "large", [torch.nn.Upsample(scale_factor=3000), torch.nn.AdaptiveAvgPool2d(30_000)], ids=repr
)
def test_a_run_that_would_fill_the_machine_is_refused_before_it_is_followed(tmp_path, large):
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), large, torch.nn.Conv2d(4, 2, 1)), path)
    start = time.monotonic()
    opened = fxgrow.open_model(path)
    with pytest.raises(
        fxgrow.TraceError, match=r"at 1 makes a tensor of .* smaller example inputs"
    ):
        fxgrow.inspect(opened.model)
    assert time.monotonic() - start < SECONDS


def test_weights_may_be_larger_than_what_a_run_makes():
    vgg = torch.nn.Sequential(torch.nn.Linear(9000, 9000, device="meta"), torch.nn.ReLU())
    groups = fxgrow.inspect(torch.nn.Sequential(vgg, torch.nn.Linear(9000, 2, device="meta")))
    assert len(groups.to_dict()["groups"]) == 2


# ── files that are none ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "directory", "long name", "null"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    import socket

    path = tmp_path / "model.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        path = tmp_path / ("a" * 300 if kind == "long name" else "a\0b")
    start = time.monotonic()
    with pytest.raises(SourceError, match=r".") as caught:
        fxgrow.open_model(path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < SECONDS
    assert kind != "fifo" or stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, suffix, monkeypatch):
    from fxgrow.files.checkpoint import reading
    from fxgrow.files.checkpoint.formats import FORMATS, Contents

    path = tmp_path / f"model{suffix}"
    state = {"0.weight": torch.ones(1000, 1000), "1.weight": torch.ones(1000, 1000)}
    FORMATS["torch" if suffix == ".pt" else "safetensors"].write(Contents(state), path)
    whole = path.stat().st_size
    plain = reading.FileReader.read_into

    def shrinking(self: object, start: int, buffer: memoryview) -> None:
        if len(buffer) > 10**6:
            os.truncate(path, whole - 10**6)
        plain(self, start, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.FileReader, "read_into", shrinking)
    with pytest.raises(SourceError, match=r"changed while it was read|ends too early"):
        fxgrow.open_model(path)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    from fxgrow.files.checkpoint.reading import FileReader

    path = tmp_path / "model.pt"
    path.write_bytes(hostile.weights())
    with pytest.raises(SourceError, match="changed while it was read"), FileReader(path):
        os.utime(path, (1, 1))


# ── pickles by chance ───────────────────────────────────────────────────────────────────────────


def random_pickle(chance: random.Random) -> bytes:
    """Return opcodes drawn by chance over all names that are allowed."""
    from fxgrow.files.checkpoint.rebuilding import CALLS

    names = [hostile.named(*name.rsplit(".", 1)) for name in CALLS]
    names += [hostile.named(*hostile.LINEAR), hostile.GELU, hostile.named("torch", "float32")]
    names += [hostile.named("torchvision.models.resnet", "ResNet"), hostile.tensor()]
    pieces = [
        *names, hostile.storage(), hostile.plain(chance.randint(-9, 2**40)),
        hostile.text("forward"), hostile.text("_modules"),
        b"}", b"]", b")", b"N", b"\x88", b"(", b"t", b"\x85", b"\x86",
        b"\x87", b"R", b"R", b"R", b"b", b"b", b"\x81", b"s", b"u", b"a", b"e", b"q\x01", b"h\x01",
        b"2", b"0", b"1", b"\x8f", b"\x90", b"\x93", b"Q",
    ]  # fmt: skip
    return b"".join(chance.choices(pieces, k=chance.randint(3, 40)))


@pytest.mark.parametrize(
    "count", [300, pytest.param(20_000, marks=pytest.mark.sweep)], ids=["some", "many"]
)
def test_random_pickles_of_allowed_names_do_nothing(tmp_path, count):
    chance = random.Random(0)
    before = hostile.classes()
    for _ in range(count):
        path = hostile.write(tmp_path, hostile.saved(random_pickle(chance)), ".pt")
        with contextlib.suppress(SourceError):
            load_pickled(path)
    assert hostile.changed(before) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.pt"]


def test_mutations_of_a_real_module_do_nothing(tmp_path):
    import torchvision

    chance = random.Random(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)
    path = tmp_path / "model.pt"
    torch.save(model, path)
    data = path.read_bytes()
    before = hostile.classes()
    start = data.index(b"\x80\x02")
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            changed[start + chance.randrange(12_000)] = chance.randrange(256)
        path.write_bytes(changed)
        with contextlib.suppress(SourceError):
            fxgrow.open_model(path)
    assert hostile.changed(before) == []


def test_the_pickle_machine_agrees_with_pickle_on_plain_data(tmp_path):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    scalars = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
    scalars |= st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
    nests = st.recursive(
        scalars,
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner)
        | st.tuples(inner, inner) | st.sets(st.integers()) | st.frozensets(st.text()),
        max_leaves=20,
    )  # fmt: skip

    @settings(max_examples=150, deadline=None)
    @given(value=nests, protocol=st.integers(2, 5))
    def agree(value: object, protocol: int) -> None:
        path = tmp_path / "plain.pt"
        pickled = pickle.dumps(value, protocol=protocol)
        path.write_bytes(hostile.zipped({"a/data.pkl": pickled, "a/version": b"3"}))
        assert load_pickled(path) == value

    agree()


if __name__ == "__main__":  # the whole corpus, for a look at what is said
    folder = Path(sys.argv[1])
    for corpus, (make_, suffix_) in CORPORA.items():
        for what_, data_ in make_():
            said_ = refusal(hostile.write(folder, data_, suffix_))
            sys.stdout.write(textwrap.shorten(f"{corpus}: {what_}: {said_}", 300) + "\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(f"peak {peak / 1024:.0f} MB\n")


class Quiet(nn.Module):
    """A part of it is a graph of its own in a program: no gradients flow there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean(1, keepdim=True).abs()
        return self.layer(x - mean)


@pytest.mark.parametrize("where", ["at", "within"])
def test_an_operator_that_another_one_would_call_is_refused(tmp_path: Path, where: str) -> None:
    """Of a graph within a graph, as of the graph itself, no operation is called but known ones."""
    program = torch.export.export(Quiet().eval(), (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "good.pt2")
    fxgrow.load(tmp_path / "good.pt2")
    operator, flag = "torch.ops.aten.from_file.default", tmp_path / "flag"
    with zipfile.ZipFile(tmp_path / "good.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    model = next(name for name in members if name.endswith("model.json") or "program" in name)
    data = json.loads(members[model])
    node = data["graph_module"]["graph"]["nodes"][0]
    assert node["target"].endswith("wrap_with_set_grad_enabled")
    if where == "at":
        given = ({"as_operator": operator}, {"as_string": str(flag)}, {"as_bool": True})
        node["inputs"][1:] = [
            {"name": "", "arg": one, "kind": 1} for one in (*given, {"as_int": 8})
        ]
    else:
        graphs = [one["arg"].get("as_graph") for one in node["inputs"]]
        next(one for one in graphs if one)["graph"]["nodes"][0]["target"] = operator
    with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        for name, content in {**members, model: json.dumps(data).encode()}.items():
            archive.writestr(name, content)
    with pytest.raises(SourceError, match="trust"):
        fxgrow.load(tmp_path / "evil.pt2")
    assert not flag.exists()
