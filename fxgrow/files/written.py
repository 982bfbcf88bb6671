"""Read what was written once more, before it takes its name, as its users will read it."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.errors import VerificationError
from fxgrow.files.checkpoint.directory import CONFIG, is_weights, read_config
from fxgrow.files.checkpoint.exported import refuse_first_run, set_by_data
from fxgrow.files.checkpoint.formats import read_file
from fxgrow.files.checkpoint.mapping import Mappings
from fxgrow.files.comparison import (
    difference,
    keys_difference,
    structure_difference,
    tensor_difference,
)
from fxgrow.files.pretrained import architecture_of, keep_tensors_
from fxgrow.modules.calling import Arguments, call, map_tensors, results_in
from fxgrow.modules.huggingface import closed, screened
from fxgrow.modules.standin import first_line, stand_in
from fxgrow.modules.uninitialised import Limit
from fxgrow.verification.judge import NATIVE_FACTOR

_CLASSES = "architectures"
_TIED = "tie_word_embeddings"


def check_directory(
    path: Path,
    grown: nn.Module,
    inputs: Arguments | None,
    config: Mapping[str, Any],
    kept: Mapping[str, Any],
    folder: Path | None = None,
) -> None:
    """Return if a directory, read by transformers itself, gives back a model.

    Args:
        path: the directory.
        grown: the model that it should hold.
        inputs: what both are run on.
        config: what its ``config.json`` should say.
        kept: a configuration of which it should say all that is no number, but for a flag of ties.
        folder: the directory whose other files were copied; None if there is none.

    Raises:
        VerificationError: a tensor, a plain attribute, the output or another file differs.
    """
    _check_config(path, config, folder)
    kept = screened(kept).used  # what asks for code is never written
    if _TIED in kept:  # it says what has become of the model
        kept = {**kept, _TIED: getattr(getattr(grown, "config", None), _TIED, kept[_TIED])}
    if told := difference(_words(config, kept), _words(kept, kept), CONFIG):
        raise _unlike(told)
    kind: Any = type(grown)
    try:
        with _alone(path) as folder, closed("transformers"):
            found, loading = kind.from_pretrained(
                str(folder), dtype="auto", local_files_only=True, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # whatever transformers may raise on what it cannot read
        raise _unlike(f"it cannot be read: {first_line(error)}") from error
    for name, have, want in sorted(loading["mismatched_keys"]):
        sizes = f"{name} is {list(have)}, and its config.json asks for {list(want)}"
        raise _unlike(sizes, name)
    dtypes = [{tensor.dtype for tensor in model.parameters()} for model in (found, grown)]
    held: Any = read_file(path, opener=Mappings().open)[1].data
    keep_tensors_(found, held)  # from_pretrained casts all weights to one dtype
    _check_tensors(grown, found)
    if dtypes[0] == dtypes[1]:
        check_outputs(grown, found, inputs)
    # Sizes that nothing reads are out of date in the grown model.
    if told := structure_difference(found, grown, sizes=False):
        raise _unlike(told)


def check_timm(
    path: Path,
    grown: nn.Module,
    inputs: Arguments | None,
    config: Mapping[str, Any],
    folder: Path | None = None,
) -> None:
    """Return if a directory gives back a network that timm builds from its ``config.json``.

    Args:
        path: the directory.
        grown: the network that it should hold.
        inputs: what both are run on.
        config: what its ``config.json`` should say.
        folder: the directory whose other files were copied; None if there is none.

    Raises:
        VerificationError: a tensor, the configuration, the output or another file differs.
    """
    _check_config(path, config, folder)
    found = (
        architecture_of(path, read_config(path / CONFIG))
        .build("cpu", Limit.of(grown.state_dict()))
        .eval()
    )
    held: Any = read_file(path, opener=Mappings().open)[1].data
    found.load_state_dict(held, assign=True)
    _check_tensors(grown, found)
    check_outputs(grown, found, inputs)


def _check_config(path: Path, config: Mapping[str, Any], folder: Path | None) -> None:
    """Return if a directory says what it should, and its other files are copies of a folder's.

    Raises:
        VerificationError: one of the two is not so.
    """
    if told := difference(read_config(path / CONFIG), json.loads(json.dumps(config)), CONFIG):
        raise _unlike(told)
    if folder is not None:
        _check_copies(path, folder)


def _check_tensors(grown: nn.Module, found: nn.Module) -> None:
    """Return if a network has the names and, bit for bit, the tensors of another.

    Raises:
        VerificationError: it has not.
    """
    loaded, wanted = found.state_dict(), grown.state_dict()
    if told := keys_difference(sorted(loaded), sorted(wanted), ""):
        raise _unlike(told)
    for name, tensor in wanted.items():
        if told := tensor_difference(loaded[name].detach(), tensor.detach(), name):
            raise _unlike(told, name)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Yield a directory with what transformers reads of another: what lies there besides is not.

    The weights are there under a second name, and the configuration without what asks for code.
    """
    with TemporaryDirectory(prefix=".", dir=path.parent) as name:
        folder = Path(name)
        used = screened(read_config(path / CONFIG)).used
        (folder / CONFIG).write_text(json.dumps(used), encoding="utf-8")
        for file in path.iterdir():
            if file.name.endswith((".safetensors", ".safetensors.index.json")):
                try:
                    os.link(file, folder / file.name)
                except OSError:  # not all file systems have second names
                    shutil.copyfile(file, folder / file.name)
        yield folder


def check_program(path: Path, grown: nn.Module, inputs: Arguments) -> None:
    """Return if an exported program computes what the network does that it was exported from.

    Args:
        path: the program.
        grown: the network.
        inputs: what both are run on.

    Raises:
        SourceError: a first run does something else than later ones, which no program does.
        VerificationError: a tensor or the output differs.
    """
    found: Any = read_file(path, trust_pickle=True)[1].data  # fxgrow's own work
    _refuse_first_run(grown, found, inputs)
    loaded = found.state_dict()
    for name, tensor in grown.state_dict().items():
        # What the computation does not need is in no program.
        if name in loaded and (told := tensor_difference(loaded[name].detach(), tensor, name)):
            raise _unlike(told, name)
    check_outputs(grown, found, inputs)


def _refuse_first_run(grown: nn.Module, found: nn.Module, inputs: Arguments) -> None:
    """Return unless a network begins by its first data, and then goes on otherwise.

    Such a network notes in an attribute that it has run. A program has none: it begins anew each
    time. So both run twice, on other data.

    Raises:
        SourceError: a first run sets something, and the second ones are not the same.
    """
    begun = set_by_data(grown, inputs)
    if not begun:
        return
    held = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    network, program = stand_in(grown, held).eval(), deepcopy(found)
    with torch.no_grad():
        for given in (inputs, map_tensors(_other, inputs)):
            old, new = (results_in(call(model, given)) for model in (network, program))
    if not _same(old, new):
        refuse_first_run(grown, begun)


def _other(tensor: Tensor) -> Tensor:
    """Return other values of the same range, as those of example inputs may be indices."""
    return tensor.flip(*range(tensor.ndim)) + (1 if tensor.is_floating_point() else 0)


def check_outputs(grown: nn.Module, found: nn.Module, inputs: Arguments | None) -> None:
    """Return if two networks give the same outputs, up to rounding; without inputs, at once."""
    if inputs is None:
        return
    copied = stand_in(grown, {}).eval()  # a forward may set what it finds unset
    with torch.no_grad():
        before, after = (results_in(call(model, inputs)) for model in (copied, found))
    if not _same(before, after):
        raise _unlike("it computes something else")


def _same(before: Iterable[Tensor], after: Iterable[Tensor]) -> bool:
    """Return whether outputs are the same up to rounding."""
    for old, new in zip(before, after, strict=True):
        unit = torch.finfo(old.dtype).eps if old.is_floating_point() else 0.0
        if not torch.allclose(
            old.double(), new.double(), rtol=0.0, equal_nan=True,
            atol=NATIVE_FACTOR * unit * float(old.double().abs().nan_to_num().max()),
        ):  # fmt: skip
            return False
    return True


def _words(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says under those keys where another has no numbers or lists."""
    plain = {key for key, value in like.items() if isinstance(value, (str, bool))}
    return {key: value for key, value in config.items() if key in plain or key == _CLASSES}


def _check_copies(path: Path, folder: Path) -> None:
    """Return if the other files of a directory are as they were.

    Raises:
        VerificationError: one of them is not.
    """
    for copy in (file for file in path.rglob("*") if file.is_file()):
        old = folder / copy.relative_to(path)
        known = copy.parent == path and (copy.name == CONFIG or is_weights(copy.name))
        if not known and not (old.is_file() and filecmp.cmp(copy, old, shallow=False)):
            raise _unlike(f"{copy.relative_to(path)} differs")


def _unlike(how: str, name: str = "") -> VerificationError:
    return VerificationError(
        f"what was written is not the grown model when it is read again: {how}.",
        name=name,
        way_out="Nothing was kept. Write the weights alone: -o model.safetensors.",
    )
