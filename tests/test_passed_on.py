"""Objects of other libraries that are passed on: loading what is written runs nothing of a file."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import functools
import importlib
import io
import pathlib
import pickle
import subprocess
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from hostile import load_pickled
from networks import plain_mlp
from torchvision import transforms
from torchvision.transforms import v2
from typer.testing import CliRunner

from fxgrow.cli.app import app
from fxgrow.files.checkpoint import kept_checks, kept_names
from fxgrow.files.checkpoint.kept import Name

UTC = datetime.timezone.utc
HELD: dict[str, Any] = {
    "path": pathlib.Path("runs") / "1",
    "times": [datetime.datetime(2024, 5, 6, 7, tzinfo=UTC), datetime.date(2024, 1, 1)],
    "zone": datetime.timezone(datetime.timedelta(hours=2), "there"),
    "time": datetime.time(3, 4, tzinfo=UTC),
    "numbers": [decimal.Decimal("1.5"), fractions.Fraction(-1, 3), range(3), slice(1, None)],
    "queue": collections.deque([torch.ones(2), {"a": 1}], maxlen=3),
    "run": uuid.UUID(int=7),
    "space": types.SimpleNamespace(lr=0.1, sizes=[1, 2]),
    "old": np.random.RandomState(3),
    "new": [np.random.Generator(getattr(np.random, name)(3)) for name in kept_names.BIT_GENERATORS],
    "seeds": np.random.SeedSequence([1, 2]).spawn(2),
    "kinds": [torch.optim.AdamW, torch.optim.lr_scheduler.StepLR, np.float32, dict],
    "recipe": functools.partial(torch.optim.SGD, lr=0.1, betas=(0.9, 0.99)),
    "counts": collections.defaultdict(set, {"a": {1}}),
    "images": transforms.Compose(
        [
            transforms.Resize(8),
            transforms.RandomApply([transforms.GaussianBlur(3)]),
            transforms.RandAugment(),
            transforms.Normalize([0.5], [0.5]),
        ]
    ),
    "more images": v2.Compose([v2.RandomCrop(4), v2.AutoAugment(), v2.ToDtype(torch.float32)]),
}


def widen(folder: Path, data: object) -> Any:
    torch.save({"model": plain_mlp().state_dict(), "held": data}, folder / "c.pt")
    command = ["widen", str(folder / "c.pt"), "--width", "2x", "--arch", "networks:plain_mlp"]
    return CliRunner().invoke(app, [*command, "-o", str(folder / "o.pt")])


LOAD = """
import encodings.latin_1, importlib, io, pathlib, sys, torch
path, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
data, empty = io.BytesIO(pathlib.Path(path).read_bytes()), io.BytesIO()
torch.save({"w": torch.ones(1)}, empty)
empty.seek(0)
torch.load(empty, weights_only=False)
seen = set()
sys.addaudithook(lambda event, given: seen.add((event, str(given)[:99])))
torch.load(data, weights_only=False)
found = sorted(map(str, seen))
print("\\n".join(found))
"""


def test_loading_what_was_passed_on_runs_nothing(tmp_path):
    done = widen(tmp_path, HELD)
    assert done.exit_code == 0, done.output
    listed = [name.rpartition(".")[0] for name in _asked(tmp_path / "o.pt")]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "o.pt"), *sorted(set(listed))],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    events = [line for line in ran.stdout.splitlines() if "pickle.find_class" not in line]
    assert events == []
    assert ran.stdout.count("pickle.find_class") > 30


def _asked(path: Path) -> list[str]:
    """Return the names that a file asks for."""
    asked = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            asked.append(f"{module}.{name}")
            return super().find_class(module, name)

    own = types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="pickle")
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False, pickle_module=own)
    return [name.replace("__builtin__.", "builtins.") for name in asked]


def test_what_was_passed_on_is_what_it_was(tmp_path):
    torch.save(HELD, tmp_path / "plain.pt")
    assert widen(tmp_path, HELD).exit_code == 0
    again = torch.load(tmp_path / "o.pt", weights_only=False)["held"]
    assert again.keys() == HELD.keys()
    for key in HELD.keys() - {"queue", "new", "seeds", "old"}:
        assert str(again[key]) == str(HELD[key]), key
    assert again["old"].randint(10**6) == np.random.RandomState(3).randint(10**6)
    for one, name in zip(again["new"], kept_names.BIT_GENERATORS, strict=True):
        assert one.random() == np.random.Generator(getattr(np.random, name)(3)).random()
    for one, other in zip(again["seeds"], HELD["seeds"], strict=True):
        assert one.generate_state(2).tolist() == other.generate_state(2).tolist()
    assert again["queue"].maxlen == 3


def test_a_generator_that_calls_what_the_file_names_is_refused_by_the_command(tmp_path):
    for what, data in hostile.laundered():
        if "that calls a" in what or "for a generator" in what:
            path = hostile.write(tmp_path, hostile.beside_weights(data), ".pt")
            command = ["widen", str(path), "--width", "2x", "-o", str(tmp_path / "o.pt")]
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 1, what
            assert "--trust-pickle" in done.output, what
            assert not (tmp_path / "o.pt").exists()
            return
    pytest.fail("no such object")


def test_every_name_has_a_check_and_none_is_called_and_made():
    assert set(kept_checks._CALLED) == kept_names.CALLED
    assert set(kept_checks._MADE) == kept_names.MADE
    assert not kept_names.CALLED & kept_names.MADE
    assert not kept_names.CALLED & kept_names.VALUES


@pytest.mark.parametrize("group", ["VALUES", "TRANSFORMS", "ARGUMENTS", "ENUMS", "TIMES"])
def test_names_are_classes_where_they_are_defined(group):
    for full in getattr(kept_names, group):
        home, _, name = full.rpartition(".")
        try:
            found = getattr(importlib.import_module(home), name, None)
        except ImportError:
            continue  # another version's
        if found is not None and home != "typing":
            assert isinstance(found, type), full
            own = (found.__module__, found.__qualname__)
            inside = f"{home}.".startswith(f"{own[0]}.") or own[0].startswith(f"{home}.")
            assert inside, full
            assert own[1] in (name, name.removeprefix("_"), name.removesuffix("_")), full


@pytest.mark.parametrize("key", ["__reduce_ex__", "__deepcopy__", "__setstate__"])
def test_no_attribute_of_a_namespace_is_called_in_its_stead(tmp_path, key):
    space = types.SimpleNamespace(lr=0.1)
    pickled = hostile.built("types.SimpleNamespace", state=hostile.table((key, hostile.GELU)))
    assert load_pickled(hostile.write(tmp_path, hostile.saved(hostile.plain(1)), ".pt")) == 1
    torch.save({"a": space}, tmp_path / "a.pt")
    assert load_pickled(tmp_path / "a.pt")["a"].name == Name("types", "SimpleNamespace")
    with pytest.raises(Exception, match="made of other things"):
        load_pickled(hostile.write(tmp_path, hostile.saved(pickled), ".pt"))


def test_configurations_that_hold_what_they_are_part_of_are_passed_on(tmp_path):
    tree = "omegaconf.dictconfig.DictConfig"
    metadata = ("_metadata", hostile.filled("omegaconf.base.ContainerMetadata", b"}"))
    node = hostile.filled(
        "omegaconf.nodes.AnyNode",
        hostile.table(metadata, ("_val", b"K\x01"), ("_parent", b"h\x05")),
    )
    state = hostile.table(metadata, ("_parent", b"N"), ("_content", hostile.table(("a", node))))
    whole = hostile.full(tree) + b")\x81q\x05" + state + b"b"
    loaded: Any = load_pickled(hostile.write(tmp_path, hostile.beside_weights(whole), ".pt"))
    kept = loaded["other"]
    assert kept.state["_content"]["a"].state["_parent"] is kept
