"""Models of Hugging Face transformers: what a ``config.json`` describes, and how weights fit it.

transformers is asked for all that it knows better: which class a model is of, how old names of
weights became new ones, which tensors are tied. It is imported where it is needed, and never runs
code that comes with a model.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.errors import SourceError, listed, shown
from fxgrow.files.checkpoint import Source
from fxgrow.files.checkpoint.directory import CONFIG, read_config
from fxgrow.files.checkpoint.reading import reading, refuse_source
from fxgrow.files.checkpoint.source import with_weights
from fxgrow.modules.architectures import Architecture, larger_relative
from fxgrow.modules.huggingface import closed, screened
from fxgrow.modules.tensors import named_tensors
from fxgrow.modules.uninitialised import Limit

LIBRARY = "transformers"
_OF_TRAINING = ("tag", "url", "file", "hf_hub_id", "hf_hub_filename", "origin_url", "paper_ids")
_OF_NETWORK = ("first_conv", "classifier", "pool_size")  # likewise, of the network alone
_NAME_IT = "Name the architecture with --arch."
_TRAINER_STATE = "trainer_state.json"
_TOKENS = 8  # in an example input
_BATCH = 2
_LARGEST_INPUT = 1 << 25  # elements; an image of 1024 x 1024 has a tenth


def is_pretrained(architecture: Architecture | None) -> bool:
    """Return whether an architecture is a class of transformers with its configuration."""
    return architecture is not None and architecture.name.startswith(f"{LIBRARY}:")


def architecture_of(path: Path, config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a ``config.json`` describes, without what would reach out of it.

    Args:
        path: the directory that it lies in.
        config: what it says.

    Raises:
        SourceError: it names no class, or describes what cannot be built.
    """
    named = config.get("architectures")
    if not named and isinstance(config.get("architecture"), str):
        return _of_timm(path, config)
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise SourceError(
            f"{path / CONFIG} does not say which class the model is of: it has no architectures.",
            name=str(path),
            way_out=f'Add "architectures": ["BertModel"] or the like to it. Or: {_NAME_IT}',
        )
    file = path / CONFIG
    with reading(file):
        try:
            fields = screened(config).written
        except SourceError as error:
            reason = error.message.rstrip(".")
            refuse_source(file, f"describes no model to grow: {reason}", error.way_out, error)
    return Architecture(f"{LIBRARY}:{named[0]}", {"config": fields}, str(file))


def _of_timm(path: Path, config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a ``config.json`` of timm's names.

    Raises:
        SourceError: timm is not installed or has no such model, or it has arguments of other kinds.
    """
    arguments = config.get("model_args")
    given = dict(arguments) if isinstance(arguments, Mapping) else {}
    if isinstance(config.get("num_classes"), int):
        given.setdefault("num_classes", config["num_classes"])
    name = str(config["architecture"]).partition(".")[0]  # without the name of its training
    return Architecture(f"timm:{name}", given, str(path / CONFIG))


def is_of_timm(config: Mapping[str, Any] | None) -> bool:
    """Return whether a ``config.json`` is one of timm's."""
    return bool(config) and "architectures" not in config and "architecture" in config  # type: ignore[operator]


def timm_config(
    config: Mapping[str, Any], architecture: Architecture, model: nn.Module
) -> dict[str, Any]:
    """Return the ``config.json`` of a network as timm builds it.

    Args:
        config: that of the model which it was made of, whose inputs it takes.
        architecture: ``timm:NAME`` and its arguments.
        model: the network.
    """
    old, own = (dict(found or {}) for found in (config.get("pretrained_cfg"), _described(model)))
    found = {
        **config,
        "architecture": architecture.name.partition(":")[2],
        "model_args": dict(architecture.arguments),
        "pretrained_cfg": {key: value for key, value in old.items() if key not in _OF_TRAINING}
        | {key: own[key] for key in _OF_NETWORK if key in own},
    }
    for name in ("num_features", "num_classes"):
        if isinstance(number := getattr(model, name, None), int):
            found[name] = number
    written: dict[str, Any] = json.loads(json.dumps(found))
    return written


def _described(model: nn.Module) -> Mapping[str, Any]:
    """Return what timm tells of weights for a network of this kind."""
    found = getattr(model, "pretrained_cfg", None)
    return found if isinstance(found, Mapping) else {}


def target_architecture(
    spec: str, source: Architecture | None, arguments: Mapping[str, object]
) -> Architecture:
    """Find the architecture that a conversion aims at.

    Args:
        spec: a ``config.json`` or the directory of one, or as for
            :func:`~fxgrow.modules.architectures.parse_architecture`. A configuration that names no
            class means that of the source, if it is of the same ``model_type``.
        source: what is converted, whose arguments count where there are no others; None if it is
            not known.
        arguments: keyword arguments for the builder.

    Raises:
        SourceError: there is no such architecture, or the configuration cannot be read.
    """
    path = Path(spec)
    is_folder = path.is_dir()
    path = path / CONFIG if is_folder else path
    if path.suffix != ".json":
        return larger_relative(source, spec, arguments)
    try:
        config = read_config(path, inside=is_folder)
    except SourceError as error:
        reason = error.message.replace(f"{path} ", "it ", 1)
        raise SourceError(
            f"the configuration {path} cannot be read: {reason}", name=spec, way_out=error.way_out
        ) from error
    known = source.arguments.get("config") if source is not None else None
    if (
        isinstance(known, Mapping)
        and not config.get("architectures")
        and known.get("model_type") == config.get("model_type")
    ):
        config = {**config, "architectures": known.get("architectures")}
    return architecture_of(path.parent, config)


def open_pretrained(
    source: Source, architecture: Architecture
) -> tuple[nn.Module, Source, tuple[str, ...]]:
    """Return the model that weights in a directory are for, with these weights.

    Args:
        source: the weights, under the names that they are stored under.
        architecture: as :func:`architecture_of` returned it.

    Returns:
        The model in eval mode, the source under the model's own names, and what to know.

    Raises:
        SourceError: the class cannot be built, or the weights do not fit it.
    """
    empty: Any = architecture.build(limit=Limit.of(source.state_dict))
    try:
        with closed(LIBRARY):
            model, found = type(empty).from_pretrained(
                None, config=empty.config, state_dict=dict(source.state_dict), dtype="auto",
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # whatever a constructor or a conversion may raise
        raise _misfit(source, architecture, f"{type(error).__name__}: {error}", "") from error
    for name in sorted(found["missing_keys"]):
        raise _misfit(source, architecture, f"they miss {name}", name)
    for name, have, want in sorted(found["mismatched_keys"]):
        shapes = f"{name} is {list(have)} and should be {list(want)}"
        raise _misfit(source, architecture, shapes, name, _grown_in_training(source.path))
    with reading(source.path):
        keep_tensors_(model, source.state_dict)
    notes = reaching(source.config or {}, source.path / CONFIG)
    if found["unexpected_keys"]:
        unknown = _listed(sorted(found["unexpected_keys"]))
        notes.append(f"{unknown} in {source.path} belong to no part of {architecture.name} "
                     "and are left out")  # fmt: skip
    return model, with_weights(source, OrderedDict(model.state_dict())), tuple(notes)


def reaching(config: Mapping[str, Any], file: Path) -> list[str]:
    """Return what to know of fields that ask for code or files, which are left out.

    Args:
        config: what a ``config.json`` says, or the ``config`` of a recorded architecture.
        file: where it says so.
    """
    dropped = screened(config).dropped
    what = f"asks for code or files that are not taken from it: {_listed(dropped, 5)} left out"
    return [f"{file} {what}"] if dropped else []


def _listed(names: Sequence[str], most: int = 1) -> str:
    """Return the first of some names, and how many more there are."""
    return listed([shown(name, 200) for name in names], most)


def _grown_in_training(path: Path) -> str:
    """Return the way out where a network may have grown while it was trained."""
    if (path / _TRAINER_STATE).is_file():
        return (
            " If the network grew in training: build it from the configuration, "
            f"fxgrow.training.trainer.regrow_from(model, {shown(str(path))!r}), and load the "
            "weights."
        )
    return (
        " If the network grew in training: fxgrow.training.trainer.regrow_from reads a checkpoint "
        f"of the Trainer, with {_TRAINER_STATE}; what save_pretrained wrote needs what "
        "fxgrow.training.state_dict(model) returned, for regrow_."
    )


def _misfit(
    source: Source, architecture: Architecture, how: str, name: str, more: str = ""
) -> SourceError:
    first = shown(how.strip().partition("\n")[0], 400).rstrip(".")
    return SourceError(
        f"the weights in {source.path} do not fit {architecture.name}: {first}.",
        name=name,
        way_out=f"Check that {CONFIG} and the weights belong together.{more}",
    )


def keep_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's parameters the very tensors of the file, in place: their dtypes are theirs."""
    by_memory = {t.data_ptr(): t for t in named_tensors(model).values() if t.numel()}
    for name, tensor in stored(model, model.state_dict()).items():
        mine, own = by_memory.get(tensor.data_ptr()), tensors.get(name)
        if mine is not None and own is not None and mine.shape == own.shape == tensor.shape:
            mine.data = own


def stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that transformers stores them under.

    Args:
        model: the model whose names the tensors have.
        tensors: all of its state_dict, or without the further names of tied tensors.
    """
    loading: Any = importlib.import_module("transformers.core_model_loading")
    return dict(loading.revert_weight_conversion(model, dict(tensors)))


def untied(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state_dict with each tensor under its first name alone."""
    first = {id(tensor): name for name, tensor in reversed(named_tensors(model).items())}
    names = set(first.values())
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def example_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Return inputs for a model of transformers, or None where its configuration tells too little.

    Tokens are drawn from the vocabulary; images are of the size that the configuration names.
    """
    main, config = getattr(model, "main_input_name", ""), getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    shape = _shape_of(main, model, config)
    parameter = next((t for t in model.parameters() if t.is_floating_point()), None)
    if shape is not None and _are_sizes(shape) and parameter is not None:
        found[main] = torch.randn(shape, generator=generator).to(parameter.dtype)
    elif main != "input_ids":
        return None
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    if main == "input_ids" or decodes:
        size = getattr(config.get_text_config(), "vocab_size", 0) if config is not None else 0
        if not _are_sizes([size]):
            return None
        tokens = torch.randint(min(3, size - 1), size, (_BATCH, _TOKENS), generator=generator)
        if main == "input_ids":
            found[main] = tokens
        if decodes:
            found["decoder_input_ids"] = tokens.flip(0)[:, : _TOKENS - 1]
    return found


def _shape_of(main: str, model: nn.Module, config: object) -> tuple[Any, ...] | None:
    """Return the shape of images, spectrograms or sound that a model of transformers takes.

    Args:
        main: the name of its first input.
        model: the model.
        config: its configuration.
    """
    if main == "pixel_values":
        size = getattr(config, "image_size", None)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        shape = (_BATCH, getattr(config, "num_channels", 3), *sides)
        return shape if len(shape) == 4 else None
    positions = getattr(config, "max_source_positions", None)
    if main == "input_features" and isinstance(positions, int):
        strides = [m.stride[0] for m in model.modules() if isinstance(m, nn.Conv1d)]
        return (_BATCH, getattr(config, "num_mel_bins", None), positions * math.prod(strides))
    steps = getattr(config, "conv_stride", None)
    if main == "input_values" and isinstance(steps, (list, tuple)) and _are_sizes(steps):
        masked = getattr(config, "mask_time_length", 0)  # in train mode, of a longer sequence
        longer = 2 * masked if isinstance(masked, int) and masked > 0 else 0
        return (_BATCH, (max(_TOKENS, longer) + 1) * math.prod(steps))
    return None


def _are_sizes(numbers: Sequence[object]) -> bool:
    """Return whether all are whole numbers above 0, and a tensor of these sizes is no large one."""
    whole = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return len(whole) == len(numbers) and math.prod(whole) <= _LARGEST_INPUT
