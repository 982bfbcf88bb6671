"""Loading pickles: what torch's own modules need is let in, everything else stays out."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import io
import itertools
import os
import pickle
import pickletools
import struct
import types
import uuid
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hostile import load_pickled
from torch import nn

import fxgrow
from fxgrow.errors import SourceError
from fxgrow.files.checkpoint.formats import FORMATS, Contents
from fxgrow.files.checkpoint.harmless import resolve
from fxgrow.files.checkpoint.kept import Kept, Name, save_keeping
from fxgrow.files.checkpoint.pickles import Machine, PickleError
from fxgrow.files.checkpoint.unpickling import _Words
from fxgrow.files.comparison import difference
from fxgrow.modules.architectures import Architecture, torchvision_names

ZIP, LEGACY = True, False


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> object:
        return self.call


class OwnData:
    def __init__(self, value: int) -> None:
        self.value = value


class OwnModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def save(obj: object, path: Path, use_zip: bool = ZIP) -> Path:
    torch.save(obj, path, _use_new_zipfile_serialization=use_zip)
    return path


def exploits(target: Path) -> list[Exploit]:
    touch = f"touch {target}"
    evil_name = f'x"); __import__("os").system("touch {target}"); ("'
    return [
        Exploit(os.system, touch),
        Exploit(open, str(target), "w"),
        Exploit(eval, f"open({str(target)!r}, 'w')"),
        Exploit(functools.partial(os.system, touch)),
        Exploit(torch.load, str(target)),
        Exploit(torchvision.models.get_model, evil_name),
        Exploit(nn.Sequential, Exploit(os.system, touch)),
        Exploit(functools.partial, os.system, touch),
    ]


@pytest.mark.parametrize("use_zip", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("nest", [lambda e: e, lambda e: {"state_dict": {"w": [e]}}])
def test_a_pickle_that_would_run_code_does_not_run(tmp_path, use_zip, which, nest):
    target = tmp_path / "ran"
    path = save(nest(exploits(target)[which]), tmp_path / "evil.pt", use_zip)
    with pytest.raises(SourceError, match="trust_pickle=True"):
        load_pickled(path)
    assert not target.exists()


def test_trust_pickle_runs_what_the_file_holds(tmp_path):
    target = tmp_path / "ran"
    path = save({"a": Exploit(os.system, f"touch {target}")}, tmp_path / "evil.pt")
    load_pickled(path, trust_pickle=True)
    assert target.exists()


def test_a_second_pickle_in_the_archive_is_not_loaded(tmp_path):
    path = save({"w": torch.ones(1)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as archive:
        target = tmp_path / "ran"
        evil = pickle.dumps(Exploit(os.system, f"touch {target}"), protocol=2)
        archive.writestr("other/data.pkl", evil)
    with pytest.raises(SourceError, match="not in a subdirectory"):
        load_pickled(path)
    assert not target.exists()


@pytest.mark.parametrize("use_zip", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_an_unknown_class_is_named(tmp_path, use_zip):
    path = save({"a": OwnData(1)}, tmp_path / "a.pt", use_zip)
    with pytest.raises(SourceError, match=r"test_unpickling\.OwnData.*trust_pickle=True"):
        load_pickled(path)


def test_an_own_module_class_is_named_and_loads_with_trust(tmp_path):
    path = save(OwnModule(), tmp_path / "own.pt")
    with pytest.raises(SourceError, match=r"OwnModule.*trust_pickle=True, which executes"):
        load_pickled(path)
    assert isinstance(load_pickled(path, trust_pickle=True), OwnModule)


def test_a_class_is_let_in_only_where_it_was_defined(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.models.resnet, "Own", OwnModule, raising=False)
    assert resolve("torchvision.models.resnet", "ResNet") is torchvision.models.ResNet
    for name in ("resnet.Own", "no_such_module.ResNet", "resnet.ResNet.__init__"):
        with pytest.raises(PickleError):
            resolve("torchvision.models." + name.rpartition(".")[0], name.rpartition(".")[2])
    with pytest.raises(PickleError):
        resolve("torch.utils.data", "DataLoader")


def test_graph_modules_are_refused_because_they_compile_code(tmp_path):
    path = save(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), tmp_path / "graph.pt")
    with pytest.raises(SourceError, match="reduce_graph_module"):
        load_pickled(path)
    from torchvision.models.feature_extraction import DualGraphModule

    with pytest.raises(SourceError, match="DualGraphModule"):
        load_pickled(save({"a": DualGraphModule}, tmp_path / "dual.pt"))


@pytest.mark.parametrize("name", ['a"); evil(); ("', "a\\", "a\nb", "a.b", ""])
def test_names_that_could_end_a_string_in_generated_code_are_refused(tmp_path, name):
    network = nn.Sequential(OrderedDict([("good", nn.ReLU())]))
    network._modules[name] = nn.Linear(1, 1)
    with pytest.raises(SourceError, match="which is no name"):
        load_pickled(save({"model": [network]}, tmp_path / "a.pt"))


def test_a_module_without_its_tables_is_damaged(tmp_path):
    network = nn.ReLU()
    del network.__dict__["_modules"]
    with pytest.raises(SourceError, match="damaged"):
        load_pickled(save(network, tmp_path / "a.pt"))


CONTAINERS = {
    "sequential": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GELU()),
    "dict": lambda: nn.ModuleDict({"a": nn.ParameterList([torch.ones(2)])}),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True),
    "gelu_layer": lambda: nn.TransformerEncoderLayer(8, 2, activation="gelu"),
    "lstm": lambda: nn.LSTM(2, 2),
    "data_parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_modules_of_torch_load_without_trust(tmp_path, name):
    model = CONTAINERS[name]()
    loaded = load_pickled(save(model, tmp_path / "m.pt"))
    assert type(loaded) is type(model)
    assert repr(loaded) == repr(model)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def check_torchvision(name: str, path: Path) -> None:
    model = Architecture(f"torchvision:{name}").build()
    loaded = load_pickled(save(model, path))
    assert repr(loaded) == repr(model)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "shufflenet_v2_x0_5", "raft_small"])
def test_modules_of_torchvision_load_without_trust(tmp_path, name):
    check_torchvision(name, tmp_path / "m.pt")


@pytest.mark.sweep
@pytest.mark.parametrize("name", torchvision_names())
def test_all_modules_of_torchvision_load_without_trust(tmp_path, name):
    check_torchvision(name, tmp_path / "m.pt")


def test_the_usual_contents_of_training_checkpoints_survive(tmp_path):
    checkpoint = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, name="run", milestones=[1, 2]),
        "best_acc": np.float64(0.75),
        "small": np.float32(1.5),
        "count": np.int64(7),
        "flag": np.bool_(True),
        "dtype": np.dtype("f4"),
        "rng": torch.get_rng_state(),
        "seen": {1, 2},
    }
    path = save(checkpoint, tmp_path / "c.pt")
    loaded = load_pickled(path)
    for key in ("epoch", "args", "best_acc", "small", "count", "flag", "seen"):
        assert loaded[key] == checkpoint[key]
        assert type(loaded[key]) is type(checkpoint[key])
    again = load_pickled(save(loaded, tmp_path / "again.pt"), trust_pickle=True)
    assert again["dtype"] == np.dtype("f4")
    assert again["best_acc"] == 0.75


OTHERS = {
    "path": PurePosixPath("runs/1"),
    "date": datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.timezone.utc),
    "took": datetime.timedelta(minutes=3),
    "budget": decimal.Decimal("1.5"),
    "share": fractions.Fraction(1, 3),
    "queue": collections.deque([1, 2], maxlen=4),
    "run": uuid.UUID(int=7),
    "steps": range(0, 10, 2),
    "space": types.SimpleNamespace(lr=0.1, sizes=[1, 2]),
    "generator": np.random.RandomState(3),
    "new generator": np.random.default_rng(3),
    "kind": torch.optim.SGD,
    "factory": functools.partial(torch.optim.SGD, lr=0.1),
}


@pytest.mark.parametrize("use_zip", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", OTHERS)
def test_data_of_other_libraries_is_passed_on_and_not_made(tmp_path, key, use_zip):
    value = OTHERS[key]
    path = save({"a": value, "again": [value], "w": torch.ones(2)}, tmp_path / "a.pt", use_zip)
    loaded = load_pickled(path)
    assert type(loaded["a"]) in (Kept, Name)
    assert loaded["a"] is loaded["again"][0]
    FORMATS["torch" if use_zip == ZIP else "torch_legacy"].write(
        Contents(loaded), tmp_path / "b.pt"
    )
    assert difference(load_pickled(tmp_path / "b.pt"), loaded) == ""
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert str(pickle.dumps(again["a"])) == str(pickle.dumps(value))
    assert again["a"] is again["again"][0]


def test_arrays_and_dicts_with_defaults_are_read_as_what_they_are(tmp_path):
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        np.array(["a", "bcd"]),
        np.array(1.5),
        np.zeros((0, 3)),
        np.array([True]),
    ]
    saved = {"arrays": arrays, "rng": np.random.RandomState(1).get_state(), "empty": {}}
    saved["counts"] = defaultdict(list, {"a": [1]})
    loaded = load_pickled(save(saved, tmp_path / "a.pt"))
    for one, other in zip(loaded["arrays"], pickle.loads(pickle.dumps(arrays)), strict=True):
        assert (one.dtype, one.shape, one.strides) == (other.dtype, other.shape, other.strides)
        assert np.array_equal(one, other)
    assert difference(loaded["rng"], saved["rng"]) == ""
    assert loaded["counts"] == saved["counts"]
    assert loaded["counts"]["new"] == []


@pytest.mark.parametrize(
    "state",
    [
        (1, (2**30,), np.dtype("f8"), False, b"\0" * 8),
        (1, (-1, -8), np.dtype("u1"), False, b"\0" * 8),
        (1, (1,), np.dtype("f8"), False, [1.0]),
        (1, (1,), np.dtype("f8"), None, b"\0" * 8),
        (1, (1.0,), np.dtype("f8"), False, b"\0" * 8),
    ],
)
def test_an_array_of_another_size_than_it_says_is_refused(tmp_path, state):
    class Lies:
        def __reduce__(self) -> Any:
            make = np.ones(1).__reduce__()
            return (make[0], make[1], state)

    with pytest.raises(SourceError, match="array"):
        load_pickled(save({"a": Lies()}, tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("os", "system"), ("builtins", "getattr"), ("omegaconf", "x.y"),
        ("omegaconf.os", "system.x"), ("torch.optim", "a\nb"), ("types", "CodeType"),
    ],
)  # fmt: skip
def test_what_is_no_class_of_data_is_not_kept(module, name):
    with pytest.raises(PickleError):
        resolve(module, name)


@pytest.mark.parametrize(
    "code",
    [
        b"comegaconf.dictconfig\nDictConfig\n)\x81}X\x08\x00\x00\x00_contentK\x01sb.",
        b"clightning.fabric.utilities.data\nAttributeDict\n)\x81X\x02\x00\x00\x00lrK\x01s.",
        b"ceasydict\nEasyDict\n)\x81(X\x01\x00\x00\x00aK\x01u}X\x02\x00\x00\x00bbK\x01sb.",
    ],
)
def test_settings_of_libraries_that_are_not_there_are_written_again_as_they_were(code):
    loaded = Machine(b"\x80\x02" + code, _Words()).load()
    assert type(loaded) is Kept
    file = io.BytesIO()
    save_keeping(lambda pickle_module: pickle_module.dump(loaded, file, protocol=2))
    again = [(op.name, arg) for op, arg, _ in pickletools.genops(file.getvalue())]
    first = [(op.name, arg) for op, arg, _ in pickletools.genops(b"\x80\x02" + code)]
    own = ("PUT", "MARK", "SETITEM", "GET")  # how much is written at once is the writer's affair
    assert [x for x in again if not any(word in x[0] for word in own)] == [
        x for x in first if not any(word in x[0] for word in own)
    ]


def test_what_is_kept_by_name_is_not_called_unless_it_makes_a_value(tmp_path):
    for code in (b"comegaconf.base\nMetadata\n(K\x01tR.", b"cdatetime\ndate\n)\x81."):
        with pytest.raises(PickleError, match=r"it (calls|makes)"):
            Machine(b"\x80\x02" + code, _Words()).load()


def test_numpy_objects_that_are_no_plain_numbers_are_refused(tmp_path):
    pairs = np.dtype([("a", "f4"), ("b", "O")])
    for value in (np.array([{}]), np.zeros(2, pairs), np.dtype("O"), pairs):
        with pytest.raises(SourceError):
            load_pickled(save({"a": value}, tmp_path / "a.pt"))


def of_python_2(value: object) -> bytes:
    """Return a pickle whose texts are bytes without a name of their encoding."""
    pickled, found = pickle.dumps(value, protocol=2), b""
    steps = list(pickletools.genops(pickled))
    for (code, text, start), (_, _, end) in itertools.pairwise(
        [*steps, (None, None, len(pickled))]
    ):
        data = str(text).encode()
        short = bytes([len(data) % 256])
        old = b"U" + short + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data
        found += old if code.name == "BINUNICODE" else pickled[start:end]  # type: ignore[union-attr]
    return found


def test_texts_of_python_2_are_read():
    value = {"conv1.weight": ["a", "é" * 300, 3], "x" * 300: OrderedDict([("b", None)])}
    data = of_python_2(value)
    assert b"U" in data
    assert b"T" in data
    assert Machine(data, _Words()).load() == value
    assert Machine(b"\x80\x02U\x02\xff\x00.", _Words()).load() == "\xff\x00"  # an array's bytes


LIES = {
    "negative length": b"T\xfb\xff\xff\xff",  # which would read the same again and again
    "ends too early": b"U\x05ab",
    "it ends too early": b"T\xff\xff\xff\x7fab",
    "asks for os.system": b"U\x02os\x94U\x06system\x94\x93)R",
}


@pytest.mark.parametrize("told", LIES)
def test_texts_of_python_2_that_lie_are_refused(told):
    with pytest.raises(PickleError, match=told):
        Machine(b"\x80\x02" + LIES[told] + b".", _Words()).load()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_writes_is_read(tmp_path, protocol):
    path = tmp_path / "p.pt"
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    saved = {"model": model, "seen": {1, 2}, "raw": b"\x00\xff", "more": bytearray(b"ab"), "c": 1j}
    torch.save(saved, path, pickle_protocol=protocol)
    loaded = load_pickled(path)
    assert repr(loaded["model"]) == repr(model)
    assert torch.equal(loaded["model"][0].weight, model[0].weight)
    assert all(loaded[key] == saved[key] for key in ("seen", "raw", "more", "c"))


def test_code_that_cannot_be_imported_is_named(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": OwnModule}, buffer)
    path = tmp_path / "gone.pt"
    own = OwnModule.__module__.encode()
    members = {}
    with zipfile.ZipFile(buffer) as archive:
        for name in archive.namelist():
            members[name] = archive.read(name).replace(own + b"\n", b"gone_package\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(SourceError, match=r"cannot be imported here.*gone_package"):
        load_pickled(path, trust_pickle=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_what_scripting_leaves_in_a_module_is_no_matter(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.jit.script(net)
    assert "__overloads__" in vars(net[0])
    torch.save(net, tmp_path / "net.pt")
    for trust in (True, False):
        opened = fxgrow.open_model(tmp_path / "net.pt", trust_pickle=trust)
        wide = fxgrow.widen(opened.model, "2x").model
        torch.testing.assert_close(wide(torch.ones(1, 4)), net(torch.ones(1, 4)))
