"""Faults to plant, each of which the run itself must see, and the runs that they are planted in.

Each fault is a function that changes one thing of fxgrow's own by ``monkeypatch``. A run prepares a
folder and returns the arguments of a command line, which ends with 0 if there is no fault.
"""

from __future__ import annotations

import copy
import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from networks import PreactivationNet, mild
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import mobilenet_v3_small
from typer.testing import CliRunner, Result

import fxgrow
from fxgrow.cli.app import app
from fxgrow.files import copies, models, targets
from fxgrow.files.checkpoint import directory, safetensors_files, saving
from fxgrow.files.checkpoint.formats import FORMATS, Contents
from fxgrow.files.optimizer import growth, state, steps
from fxgrow.modules.architectures import Architecture

Way = Callable[[Path], list[str]]
Patch = Callable[[pytest.MonkeyPatch], None]
ARCH = ("--arch", "networks:PreactivationNet", "--arch-arg", "skip=identity")
IMAGES = ("--input-shape", "2x3x6x6")


class Fault(NamedTuple):
    """A fault.

    Attributes:
        name: what is wrong.
        run: name of a function of :data:`RUNS` that must see it.
        patch: plants it.
        silent: the example gives the same output as without the fault.
        refused: it is refused before anything is made, as a network that cannot grow.
        where: what the message names, where that is no dotted name.
    """

    name: str
    run: str
    patch: Patch
    silent: bool = False
    refused: bool = False
    where: str = ""


class Tied(nn.Module):
    """Two tables that are one, of which an example reaches a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 6)
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 6)
        self.head = nn.Linear(6, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.out(torch.relu(self.hidden(self.table(ids)))))


def trained(model: nn.Module, batch: Callable[[], Tensor]) -> dict[str, Any]:
    """Return a checkpoint of a network after a few steps of training."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) == f] for f in (True, False)
    )
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
    return {
        "model": model.state_dict(), "average": average.state_dict(), "epoch": 3,
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "noise": torch.randn(5), "history": [{"loss": 0.5}, {"loss": float("nan")}],
    }  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return mild(PreactivationNet("identity")).float()


def command(source: Path, out: str, *options: str) -> list[str]:
    """Return the arguments of a command line that widens a network without running it."""
    width = () if "--width" in options else ("--width", "2x")
    return ["widen", str(source), "-o", str(source.with_name(out)), "--no-verify", *width, *options]


def run(arguments: list[str]) -> Result:
    return CliRunner().invoke(app, arguments)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────


def checkpoint(folder: Path, *options: str) -> list[str]:
    saved = trained(network(), lambda: torch.randn(4, 3, 6, 6))
    torch.save(saved, folder / "net.pt")
    return command(folder / "net.pt", "out.pt", *ARCH, *IMAGES, "--width", "2x", *options)


def rescaled(folder: Path) -> list[str]:
    return checkpoint(folder, "--rescaling", "default_vt")


def replicated(folder: Path) -> list[str]:
    return checkpoint(folder, "--pairing", "replicate", "--where", "all")


def weights(folder: Path) -> list[str]:
    state_dict = network().state_dict()
    state_dict["norm.running_mean"][1] = -0.0
    torch.save(state_dict, folder / "net.pt")
    return command(folder / "net.pt", "out.pt", *ARCH, *IMAGES, "--where", "all")


def legacy(folder: Path) -> list[str]:
    state_dict = network().state_dict()
    torch.save(state_dict, folder / "net.pt", _use_new_zipfile_serialization=False)
    return command(folder / "net.pt", "out.pt", *ARCH, *IMAGES)


def safetensors_file(folder: Path) -> list[str]:
    source = folder / "net.safetensors"
    safetensors.torch.save_file(network().state_dict(), source, metadata={"by": "me"})
    return command(source, "out.safetensors", *ARCH, *IMAGES)


def shards(folder: Path) -> list[str]:
    index = folder / "net.safetensors.index.json"
    header = {"format": "pt", "by": "me"}
    contents = Contents(network().state_dict(), header, safetensors_files.Shards(600))
    FORMATS["sharded"].write(contents, index)
    return command(index, "out.safetensors.index.json", *ARCH, *IMAGES)


def module(folder: Path) -> list[str]:
    torch.manual_seed(0)
    torch.save(mild(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), folder / "net.pt")
    return command(folder / "net.pt", "out.pt", "--input-shape", "2x3")


def tables(folder: Path) -> list[str]:
    torch.manual_seed(0)
    torch.save(trained(Tied(), lambda: torch.randint(5, (4, 3))), folder / "net.pt")
    ids = torch.zeros(1, 2, dtype=torch.long)
    made = fxgrow.widen(Tied(), "2x", ids, where="all", verify=False).plan
    (folder / "plan.json").write_text(made.to_json())
    files = (str(folder / "plan.json"), str(folder / "net.pt"), "-o", str(folder / "out.pt"))
    return ["apply", *files, "--no-verify", "--arch", "mutations:Tied"]


def twice(folder: Path) -> list[str]:
    torch.save(network().state_dict(), folder / "first.pt")
    first = run(command(folder / "first.pt", "net.pt", *ARCH, *IMAGES))
    assert first.exit_code == 0, first.output
    (folder / "first.pt").unlink()
    return command(folder / "net.pt", "out.pt", *ARCH, *IMAGES, "--width", "+2")


def known(folder: Path) -> list[str]:
    torch.manual_seed(0)
    torch.save(mobilenet_v3_small(num_classes=3).state_dict(), folder / "net.pt")
    return command(folder / "net.pt", "out.pt", "--include", "features.0*")


def model_directory(folder: Path) -> list[str]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "net")
    (folder / "net" / "vocab.txt").write_text("one\ntwo\n")
    return command(folder / "net", "out", "--include", "*intermediate*")


RUNS: dict[str, Way] = {
    run.__name__: run
    for run in (
        checkpoint, rescaled, replicated, weights, legacy, safetensors_file, shards, module,
        tables, twice, known, model_directory,
    )
}  # fmt: skip


# An example for each run, where it takes other inputs than images.
_IDS = torch.arange(5).expand(2, 5)
_OTHER_EXAMPLES: dict[str, Tensor] = {
    "module": torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3),
    "tables": _IDS, "model_directory": _IDS,
}  # fmt: skip
EXAMPLES: dict[str, Tensor] = {
    name: _OTHER_EXAMPLES.get(name, torch.linspace(-2, 2, 216).sin().reshape(2, 3, 6, 6))
    for name in RUNS
}


# ── how faults are planted ────────────────────────────────────────────────────────────────────


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Return a patch by which what a function returns is given to ``change`` first."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def changed(*arguments: Any, **keywords: Any) -> Any:
            return change(original(*arguments, **keywords))

        monkeypatch.setattr(owner, name, changed)

    return patch


def instead(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Return a patch by which a function of another takes its place."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owner, name, make(getattr(owner, name)))

    return patch


def stored(change: Callable[[dict[str, Any]], Any]) -> Patch:
    """Plant a fault in how a set of weights is laid out."""

    def changed(entries: dict[str, Any]) -> Any:
        copied = copy.copy(entries)
        return change(copied) or copied

    return wrap(saving, "store", changed)


def written(change: Callable[[Any], Any], file_format: str = "torch") -> Patch:
    """Plant a fault in what is given to a format."""

    def make(write: Any) -> Any:
        def changed(contents: Contents, path: Path) -> None:
            kept = copy.copy(contents)
            kept.header = dict(contents.header)
            if isinstance(contents.data, dict):
                kept.data = copy.copy(contents.data)
            change(kept)
            write(kept, path)

        return changed

    return instead(FORMATS[file_format], "write", make)


def each_tensor(change: Callable[[str, Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def changed(entries: dict[str, Any]) -> None:
        for name, value in entries.items():
            if isinstance(value, Tensor):
                entries[name] = change(name, value)

    return changed


def _nothing(_: object) -> None:
    """Return nothing, after something was done."""


def _reversed_statistics(name: str, tensor: Tensor) -> Tensor:
    return tensor.flip(0) if name.endswith("running_mean") else tensor


def _through_half(_: str, tensor: Tensor) -> Tensor:
    return tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor


def _one_bit(name: str, tensor: Tensor) -> Tensor:
    return tensor + 0.0 if name.endswith("running_mean") else tensor  # −0 becomes 0


def _exchanged(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        entries[one], entries[other] = entries[other], entries[one]

    return change


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.pop(key)


def _bare(entries: dict[str, Any]) -> Any:
    return OrderedDict((name.removeprefix("module."), v) for name, v in entries.items())


def _untied(result: Any) -> Any:
    tensors, parted = result
    return OrderedDict((name, tensor.clone()) for name, tensor in tensors.items()), parted


def _in_place(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(value: Any) -> Any:
        value = copy.deepcopy(value)
        found = change(value)
        return value if found is None else found

    return changed


def _cut_copies(copying: Any) -> Any:
    def changed(file: Path, to: Path) -> None:
        copying(file, to)
        to.write_bytes(to.read_bytes()[:-1])

    return changed


def _set(path: str, value: object) -> Callable[[Any], None]:
    """Return what sets one entry in nested dicts."""

    def change(saved: Any) -> None:
        *outer, last = path.split(".")
        for key in outer:
            saved[key] = copy.copy(saved[key])
            saved = saved[key]
        saved[last] = value

    return change


def _on_data(change: Callable[[Any], Any]) -> Callable[[Contents], None]:
    def changed(contents: Contents) -> None:
        change(contents.data)

    return changed


WRITER: list[Fault] = [
    Fault("running statistics in another order", "checkpoint",
          stored(each_tensor(_reversed_statistics))),
    Fault("running statistics in another order", "weights",
          stored(each_tensor(_reversed_statistics))),
    Fault("weights through half precision", "checkpoint", stored(each_tensor(_through_half))),
    Fault("weights through half precision", "legacy",
          written(_on_data(each_tensor(_through_half)), "torch_legacy")),
    Fault("weights through half precision", "safetensors_file",
          written(_on_data(each_tensor(_through_half)), "safetensors")),
    Fault("one zero has another sign", "weights", stored(each_tensor(_one_bit)), silent=True),
    Fault("two layers exchanged", "safetensors_file", written(
        _on_data(_exchanged("block.conv1.weight", "block.conv2.weight")), "safetensors")),
    Fault("two norms exchanged", "shards", written(
        _on_data(lambda d: [_exchanged(f"{n}.running_var", f"{n}.weight")(d)
                            for n in ("norm", "block.norm1") if f"{n}.running_var" in d]),
        "sharded")),
    Fault("a shard goes without its last tensor", "shards", wrap(
        safetensors_files, "_groups", lambda groups: ([g[:-1] or g for g in groups]))),
    Fault("a text of the header is lost", "safetensors_file", written(
        lambda contents: contents.header.pop("by"), "safetensors"), silent=True),
    Fault("an entry of the checkpoint is lost", "checkpoint",
          written(_on_data(_without("epoch"))), silent=True),
    Fault("the schedule starts anew", "checkpoint",
          written(_on_data(_set("scheduler.last_epoch", 0))), silent=True),
    Fault("a tensor beside the weights is another", "checkpoint",
          written(_on_data(_set("noise", torch.zeros(5)))), silent=True),
    Fault("a number in a list is another", "checkpoint",
          written(_on_data(_set("history", [{"loss": 0.5}, {"loss": 0.5}]))), silent=True),
    Fault("the versions of modules are lost", "weights", wrap(
        saving, "store", lambda entries: OrderedDict(entries)), silent=True),
    Fault("what was tied is parted", "tables", wrap(saving, "keep_ties", _untied), silent=True),
    Fault("another file of the directory is cut", "model_directory",
          instead(directory, "_copy", _cut_copies), silent=True),
    Fault("a module's weights are others", "module", wrap(
        saving, "rewrap", _in_place(lambda net: _nothing(nn.init.zeros_(net[0].bias))))),
]  # fmt: skip


# ── moving averages ───────────────────────────────────────────────────────────────────────────


def _computed(change: Callable[[dict[str, Tensor]], None]) -> Patch:
    """Plant a fault in how a moving average grows."""

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: tensor.clone() for name, tensor in tensors.items()}
        change(found)
        return found

    return wrap(copies, "apply_to_state_dict", changed)


def _zero(name: str, row: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: _nothing(tensors[name][row].zero_())


AVERAGE: list[Fault] = [
    Fault("the average is overwritten by the weights", "checkpoint", wrap(
        targets, "_grown_weights", lambda found: [found[0]] * len(found)), silent=True),
    Fault("the average is under other names", "checkpoint", stored(_bare), silent=True),
    Fault("the average's counter is lost", "checkpoint",
          stored(lambda entries: _nothing(entries.pop("n_averaged", None))), silent=True),
    Fault("an old row of the average is lost", "checkpoint",
          _computed(_zero("block.conv1.weight", 1)), silent=True),
    Fault("a new row of the average has no twin", "checkpoint",
          _computed(_zero("block.conv1.weight", -1)), silent=True),
    Fault("a row beyond the example's ids is lost", "tables",
          _computed(_zero("table.weight", 33)), silent=True),
]  # fmt: skip


# ── optimizers ────────────────────────────────────────────────────────────────────────────────


def _states(change: Callable[[dict[str, Any]], None]) -> Patch:
    """Plant a fault in what an optimizer keeps for each parameter."""

    def changed(found: dict[str, Any]) -> dict[str, Any]:
        change(found)
        return found

    return wrap(steps, "grow_state", changed)


def _swap_states(result: Any) -> Any:
    states, notes = result
    one, other = "block.conv1.bias", "block.norm2.bias"
    states[one], states[other] = states[other], states[one]
    return states, notes


def _drop_state(result: Any) -> Any:
    states, notes = result
    states.pop("block.conv1.weight")
    return states, notes


def _settings(change: Callable[[dict[str, Any]], None]) -> Patch:
    def changed(result: Any) -> Any:
        saved, notes = result
        change(saved)
        return saved, notes

    return wrap(models, "grow_state_dict", changed)


OPTIMIZER: list[Fault] = [
    Fault("averages of gradients start anew", "checkpoint",
          _states(lambda found: _nothing(found["exp_avg"].zero_())), silent=True),
    Fault("averages are in another order", "checkpoint",
          _states(lambda found: found.update(exp_avg_sq=found["exp_avg_sq"].flip(0))), silent=True),
    Fault("steps start anew", "checkpoint",
          _states(lambda found: found.update(step=torch.tensor(0.0))), silent=True),
    Fault("squares of new weights are zero", "checkpoint",
          instead(state, "_mean", lambda _: lambda tensor, reference, fan_in: tensor.zero_()),
          silent=True),
    Fault("averages do not follow the rescaling", "rescaled",
          wrap(state, "_factor", lambda factor: torch.ones_like(factor)), silent=True),
    Fault("copies do not share gradients", "replicated",
          wrap(state, "_share", lambda share: torch.ones_like(share)), silent=True),
    Fault("two parameters have each other's state", "checkpoint",
          wrap(growth, "grow_states", _swap_states), silent=True),
    Fault("a state is lost without a word", "checkpoint",
          wrap(growth, "grow_states", _drop_state), silent=True),
    Fault("a setting of a group is another", "checkpoint",
          _settings(lambda saved: saved["param_groups"][1].update(weight_decay=0.1)), silent=True),
    Fault("the optimizer does not grow", "checkpoint",
          instead(saving, "with_optimizers", lambda _: lambda saved, change: saved), silent=True),
    Fault("the optimizer is rounded on writing", "checkpoint", written(_on_data(
        lambda data: [each_tensor(_through_half)(s) for s in data["optimizer"]["state"].values()]
        and None)), silent=True),
]  # fmt: skip


# ── configurations ────────────────────────────────────────────────────────────────────────────


def _config(**fields: object) -> Patch:
    return wrap(targets, "config_of", lambda config: {**config, **fields})


CONFIGURATION: list[Fault] = [
    Fault("another number of heads", "model_directory", _config(num_attention_heads=2)),
    Fault("another activation", "model_directory", _config(hidden_act="relu")),
    Fault("another eps", "model_directory", _config(layer_norm_eps=1e-9), silent=True),
    Fault("another dropout", "model_directory", _config(hidden_dropout_prob=0.5), silent=True),
    Fault("another class is named", "model_directory", _config(architectures=["BertForMaskedLM"])),
    Fault("a width does not follow", "model_directory", _config(intermediate_size=24)),
    Fault("a field is lost on writing", "model_directory", written(
        lambda contents: contents.config.pop("vocab_size"), "directory")),
    Fault("an attribute does not follow", "module", wrap(
        saving, "rewrap", _in_place(lambda net: setattr(net[0], "out_features", 4))), silent=True),
    Fault("a module is in another mode", "module", wrap(
        saving, "rewrap", _in_place(lambda net: _nothing(net[0].train()))), silent=True),
]  # fmt: skip


# ── records ───────────────────────────────────────────────────────────────────────────────────


def _record(change: Callable[[dict[str, Any]], Any]) -> Patch:
    def changed(record: dict[str, Any]) -> dict[str, Any]:
        found = json.loads(json.dumps(record))
        change(found)
        return found

    return wrap(models, "record_of", changed)


def _plans(change: Callable[[list[Any]], Any]) -> Patch:
    return _record(lambda record: record.update(plans=change(record["plans"])))


def _attributes_lost(plans: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [{**plan, "modules": []} for plan in plans]


RECORD: list[Fault] = [
    Fault("a plan is lost", "checkpoint", _plans(lambda plans: plans[:-1])),
    Fault("the plan before is lost", "twice", _plans(lambda plans: plans[1:])),
    Fault("plans are in another order", "twice", _plans(lambda plans: plans[::-1])),
    Fault("edits of attributes are lost", "checkpoint", _plans(_attributes_lost), silent=True),
    Fault("a plan has another seed", "weights",
          _plans(lambda plans: [{**p, "request": {**p["request"], "seed": 7}} for p in plans]),
          silent=True),
    Fault("another argument of the architecture", "safetensors_file",
          _record(lambda record: record["architecture"]["arguments"].update(skip="projection"))),
    Fault("no architecture", "shards", _record(lambda record: record.update(architecture=None))),
    Fault("the record is lost", "checkpoint", written(_on_data(_without("_fxgrow")))),
    Fault("another architecture in memory", "known",
          wrap(Architecture, "to_dict", lambda told: {**told, "name": "torchvision:resnet18"})),
]  # fmt: skip
FAULTS = [*WRITER, *AVERAGE, *OPTIMIZER, *CONFIGURATION, *RECORD]
