"""What a stranger's directory or record says runs nothing, fetches nothing and leads nowhere."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from hugging_face import CORE, EXTRAS, outputs
from torch import nn
from transformers.integrations import hub_kernels
from typer.testing import CliRunner

import fxgrow
from fxgrow.cli.app import app
from fxgrow.errors import FxgrowError, SourceError
from fxgrow.files.checkpoint import load_source
from fxgrow.files.checkpoint.directory import left_out
from fxgrow.files.checkpoint.safetensors_files import read_index
from fxgrow.files.models import open_model, write_grown
from fxgrow.files.pretrained import target_architecture
from fxgrow.files.written import check_directory
from fxgrow.modules.architectures import Architecture
from fxgrow.modules.huggingface import closed, screened
from fxgrow.modules.uninitialised import ExceededError, Limit, build_uninitialised

pytestmark = pytest.mark.filterwarnings("default")  # what transformers and its parts deprecate

NAMES = ("bert", "llama", "vit", "convnextv2", "clip", "detr", "mixtral", "swin", "segformer")
Spoil = Callable[[Path], object]
Config = dict[str, Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny honest directories in it."""
    folder = tmp_path_factory.mktemp("originals")
    for name in NAMES:
        kind, config, _ = (CORE | EXTRAS)[name]
        torch.manual_seed(0)
        getattr(transformers, kind)(config({})).save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def dialled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Note and refuse every connection."""
    found: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        found.append(arguments[-1])
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield found
    assert not found


@pytest.fixture
def honest(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a copy of an honest directory, with code in it that tells."""

    def make(name: str) -> Path:
        path: Path = shutil.copytree(originals / name, tmp_path / name, dirs_exist_ok=True)
        (path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        return path

    return make


def config_of(path: Path) -> Config:
    found: Config = json.loads((path / "config.json").read_text())
    return found


def change(path: Path, **fields: Any) -> Path:
    """Change fields of a ``config.json``; ``a/b`` is the field b of a."""
    config = config_of(path)
    for name, value in fields.items():
        *above, last = name.split("/")
        holder = config
        for part in above:
            holder = holder.setdefault(part, {})
        holder[last] = value
    (path / "config.json").write_text(json.dumps(config))
    return path


def refusal(read: Callable[[], object], *names: object) -> str:
    """Return the refusal that something ends in: one line, that names a file, and soon."""
    begun = time.process_time()
    with pytest.raises(SourceError) as caught:
        read()
    text = str(caught.value)
    assert time.process_time() - begun < 10
    assert "\n" not in text
    assert len(text) < 1000
    assert caught.value.way_out
    for name in names:
        assert str(name) in text
    return text


def nothing_ran(path: Path) -> bool:
    """Return whether no code of a directory was imported."""
    return not (path.parent / "ran").exists() and not any("evil" in name for name in sys.modules)


# ── fields of config.json ───────────────────────────────────────────────────────────────────────

CLASSES = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
ELSEWHERE = {name: f"org/repo--{code}" for name, code in CLASSES.items()}
REACHING: dict[str, Any] = {
    "auto_map": CLASSES,
    "text_config/auto_map": ELSEWHERE,
    "vision_config/auto_map": CLASSES,
    "custom_pipelines": {"evil": {"impl": "modeling_evil.Evil", "pt": ["AutoModel"]}},
    "trust_remote_code": True,
    "text_config/trust_remote_code": True,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "org/repo:RMSNorm"},
    "fusion_config": {"patch_embeddings": True},
    "distributed_config": {"tp_plan": "auto"},
    "transformers_weights": "other.safetensors",
    "vision_config/transformers_weights": "../other.safetensors",
    "configuration_files": ["config.0.0.1.json"],
    "custom_generate": "org/repo",
    "code_revision": "main",
    "adapter_kwargs": {"_adapter_model_path": "org/repo"},
    "attribute_map": {"hidden_size": "evil", "quantization_config": "text_config"},
    "text_config/attribute_map": {"hidden_size": "evil"},
    "sub_configs_defaults": {"text_config": None},
    "to_dict": "evil",
    "get_text_config": {"a": 1},
    "validate": "evil",
    "__class__": "evil",
    "__dict__": {"evil": 1},
    "text_config/__init__": "evil",
    "attn_implementation": "org/repo",
    "_attn_implementation": "kernels-community/flash-attn2@main:flash_attn_func",
    "text_config/attn_implementation": "flash|org/repo@v1",
    "text_config/_attn_implementation": {"": "org/repo"},
    "_attn_implementation_internal": "org/repo",
    "experts_implementation": "org/repo",
    "vision_config/experts_implementation": ["org/repo"],
}


@pytest.mark.parametrize("field", REACHING)
def test_a_field_that_reaches_out_is_left_out_and_told(honest, field):
    if field == "sub_configs_defaults" and not hasattr(transformers.PreTrainedConfig, field):
        pytest.skip("this transformers has no such field")
    before = open_model(honest("clip"))
    path = change(honest("clip"), **{field: REACHING[field]})
    opened = open_model(path)
    inputs = (EXTRAS["clip"])[2]()
    assert all(map(torch.equal, outputs(before.model, inputs), outputs(opened.model, inputs)))
    (note,) = (note for note in opened.warnings if "asks for code or files" in note)
    assert f"it: {field.replace('/', '.')} left out" in note
    assert str(path / "config.json") in note
    assert opened.model.config._attn_implementation in ("eager", "sdpa")
    assert nothing_ran(path)


def test_all_of_them_make_one_warning_and_the_new_directory_has_none(honest, tmp_path):
    path = change(honest("llama"), auto_map=ELSEWHERE, use_kernels=True, attn_implementation="a/b")
    opened = open_model(path)
    assert sum("left out" in note for note in opened.warnings) == 1
    grown = fxgrow.widen(opened.model, "2x", opened.inputs, include="*mlp*")
    write_grown(opened, grown, out := tmp_path / "out")
    assert not {"auto_map", "use_kernels", "attn_implementation"} & config_of(out).keys()
    assert config_of(out)["intermediate_size"] == 48
    assert (out / "modeling_evil.py").exists()  # copied like any other file, and not run
    assert nothing_ran(path)


WORDS = (
    "flash_attention_2", "flash_attention_3", "flex_attention", "eager", "sdpa",
    {"": "eager"}, None,
)  # fmt: skip


@pytest.mark.parametrize("value", WORDS, ids=str)
def test_an_implementation_that_is_a_word_stays_in_the_file_and_is_used_if_it_is_torchs(
    honest, tmp_path, value
):
    path = change(honest("llama"), attn_implementation=value, _attn_implementation_autoset=False)
    opened = open_model(path)
    assert not opened.warnings
    used = opened.model.config._attn_implementation
    assert used == ("eager" if value in ("eager", {"": "eager"}) else "sdpa")
    if value in ("flash_attention_2", "eager"):
        grown = fxgrow.widen(opened.model, "2x", opened.inputs, include="*mlp*", verify=False)
        write_grown(opened, grown, out := tmp_path / "out")
        assert config_of(out)["attn_implementation"] == value


@pytest.mark.parametrize("value", ["sonicmoe", "deepgemm", "batched_mm", "eager", None])
def test_experts_are_computed_by_torch(honest, value):
    path = change(honest("mixtral"), experts_implementation=value)
    used = open_model(path).model.config._experts_implementation
    assert used == (value if value in ("eager", "batched_mm") else "grouped_mm")


def test_no_kernel_is_fetched_where_kernels_are_installed(monkeypatch, dialled):
    asked: list[object] = []
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", lambda *a, **_: asked.append(a), False)
    rwkv: Any = __import__("transformers.models.rwkv.modeling_rwkv", fromlist=["x"])
    for module in (hub_kernels, rwkv, transformers.modeling_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "_kernels_available", True, raising=False)
    version = importlib.metadata.version  # older transformers ask for that of kernels
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.0" if name == "kernels" else version(name)
    )
    for name in ("is_ninja_available", "is_torch_cuda_available"):
        monkeypatch.setattr(rwkv, name, lambda: True)
    config = transformers.RwkvConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, context_length=8
    ).to_dict()
    config["attn_implementation"] = "flash_attention_2"
    assert Architecture("transformers:RwkvModel", {"config": config}).build()
    assert not asked
    transformers.RwkvModel(transformers.RwkvConfig(vocab_size=20, hidden_size=8,
                                                   num_hidden_layers=2))  # fmt: skip
    assert asked  # the same without fxgrow


def test_the_hub_is_closed_while_any_model_is_built_and_open_again_afterwards():
    constants: Any = __import__("huggingface_hub.constants", fromlist=["x"])
    before, kernel = constants.HF_HUB_OFFLINE, hub_kernels.get_kernel
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with closed("transformers"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with closed("timm"):
        assert constants.is_offline_mode()
    assert constants.is_offline_mode()
    assert hub_kernels.get_kernel is not kernel
    leave.set()
    thread.join()
    assert constants.HF_HUB_OFFLINE is before
    assert hub_kernels.get_kernel is kernel


DETR: Config = {"backbone_config": None, "use_timm_backbone": False}
FETCHED: dict[str, tuple[str, Config, str]] = {
    "a backbone of the hub": ("detr", DETR | {"backbone": "org/repo"}, "have to be fetched"),
    "a backbone by a word": ("detr", DETR | {"backbone": "resnet50"}, "offline"),
    "a backbone of timm's hub": ("detr", {"backbone": "hf-hub:org/repo"}, "have to be fetched"),
    "a timm model in a folder": (
        "detr",
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "local-dir:/etc"}},
        "backbone_config.backbone",
    ),
    "a nested hub": (
        "detr",
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:a/b",
                             "backbone_config": {}}},
        "have to be fetched",
    ),
    "a wrapped model": (
        "vit",
        {"architectures": ["TimmWrapperModel"], "model_type": "timm_wrapper",
         "architecture": "hf_hub:org/repo"},
        "have to be fetched",
    ),
    "a wrapped checkpoint": (
        "vit",
        {"architectures": ["TimmWrapperModel"], "model_type": "timm_wrapper",
         "architecture": "resnet18", "model_args": {"checkpoint_path": "/etc/passwd"}},
        "model_args.checkpoint_path",
    ),
    "quantized": ("clip", {"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
    "quantized below": ("clip", {"text_config/quantization_config": {}}, "is quantized"),
    "compressed": ("clip", {"compression_config": {"a": 1}}, "is quantized"),
    "quantized by another name": (
        "bert",
        {"attribute_map": {"quantization_config": "x"}, "x": {"quant_method": "gptq"},
         "quantization_config": {"quant_method": "gptq"}},
        "is quantized",
    ),
    "a function as dtype": ("bert", {"dtype": "load"}, "no dtype"),
    "a module as dtype": ("bert", {"torch_dtype": "hub"}, "no dtype"),
    "a number as dtype": ("clip", {"text_config/dtype": 3}, "no dtype"),
    "code as class": ("bert", {"architectures": ["modeling_evil.Evil"]}, "no model class"),
    "a long class": ("bert", {"architectures": ["x" * 10**6]}, "no model class"),
    "a class of lines": ("bert", {"architectures": ["a\nb"]}, "no model class"),
    "an auto class": ("bert", {"architectures": ["AutoModel"]}, "no model class"),
    "the class of all": ("bert", {"architectures": ["PreTrainedModel"]}, ""),
    "a function": ("bert", {"architectures": ["pipeline"]}, "no model class"),
    "a list of types": ("bert", {"model_type": ["bert"]}, "no model type"),
    "a type of lines": ("bert", {"model_type": "a\nb"}, "no model type"),
}  # fmt: skip


@pytest.mark.parametrize("case", FETCHED)
def test_what_is_named_and_not_described_is_refused(honest, case):
    name, fields, pattern = FETCHED[case]
    path = change(honest(name), **fields)
    there = sorted(path.parent.rglob("*"))
    assert pattern in refusal(lambda: open_model(path), path)
    assert sorted(path.parent.rglob("*")) == there
    assert nothing_ran(path)


def test_a_quantization_of_nothing_and_a_pretrained_backbone_change_nothing(honest):
    path = change(honest("detr"), use_pretrained_backbone=True, quantization_config=None)
    assert not open_model(path).warnings
    assert open_model(path).architecture.arguments["config"]["use_pretrained_backbone"] is True


def test_labels_may_be_called_like_fields(honest):
    labels = {"auto_map": 0, "backbone": 1, "dtype": 2, "quantization_config": 3, "x/y": 4}
    names = {str(index): name for name, index in labels.items()}
    opened = open_model(change(honest("vit"), label2id=labels, id2label=names))
    assert not opened.warnings
    assert opened.model.config.label2id == labels


def test_a_large_number_that_is_no_size_is_a_float(honest):
    rope = {"rope_type": "default", "rope_theta": 10**10}
    opened = open_model(change(honest("llama"), rope_parameters=rope, seed=-(10**18)))
    assert opened.model.config.rope_parameters["rope_theta"] == 1e10
    assert opened.architecture.arguments["config"]["rope_parameters"] == rope


# ── numbers and values ──────────────────────────────────────────────────────────────────────────

HUGE: dict[str, tuple[str, Config]] = {
    f"{name} {field} {str(value)[:20]}": (name, {field: value})
    for name, field, values in [
        ("bert", "num_hidden_layers", [10**6, 2**24, 10**8, 10**12, 10**400]),
        ("llama", "num_hidden_layers", [10**6, 10**12]),
        ("bert", "vocab_size", [10**9, 10**12, -1]),
        ("bert", "max_position_embeddings", [10**7]),
        ("bert", "num_labels", [2**24]),
        ("vit", "image_size", [10**6, 20000, 0, [10**6, 10**6]]),
        ("vit", "num_hidden_layers", [10**7]),
        ("swin", "window_size", [500, 5000]),
        ("swin", "depths", [[10**5, 2], [2, 10**5]]),
        ("convnextv2", "depths", [[10**6, 1]]),
        ("segformer", "depths", [[10**5, 1]]),
        ("mixtral", "num_local_experts", [10**6]),
        ("clip", "text_config/num_hidden_layers", [10**6]),
        ("clip", "vision_config/image_size", [10**6]),
        ("detr", "backbone_config/depths", [[10**6, 1]]),
    ]
    for value in values
}


@pytest.mark.parametrize("case", HUGE)
def test_what_would_fill_the_machine_is_refused_at_once(honest, case):
    name, fields = HUGE[case]
    path = change(honest(name), **{k: v for k, v in fields.items() if v != 10**400})
    if 10**400 in fields.values():
        text = (path / "config.json").read_text().replace("{", '{"seed": 1' + 400 * "0" + ",", 1)
        (path / "config.json").write_text(text)
    refusal(lambda: open_model(path), path)


VALUES = (
    None, -1, 0, 10**6, 2**24, 10**12, float("nan"), float("inf"), 1e30, "x", "", [], {}, True,
    "org/repo", [[[]]], {"a": 1},
)  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "vit", "clip"])
def test_any_field_may_be_anything(honest, name):
    path = honest(name)
    model: Any = open_model(path).model
    full = json.loads(model.config.to_json_string(use_diff=False))
    places = [(key,) for key in full if key not in ("id2label", "label2id")]
    places += [(k, below) for k, v in full.items() if isinstance(v, dict) for below in v]
    chosen = random.Random(0).sample([(p, v) for p in places for v in VALUES], 50)
    refused = 0
    for place, value in chosen:
        (path / "config.json").write_text(json.dumps(full))
        change(path, **{"/".join(place): value})
        begun, text = time.process_time(), ""
        try:
            open_model(path)
        except FxgrowError as error:
            refused, text = refused + 1, str(error)
        assert str(path) in text or not text, (place, value)
        assert "\n" not in text, (place, value)
        assert time.process_time() - begun < 10, (place, value)
    assert 0 < refused < len(chosen)


TEXTS = {
    "nothing": "",
    "no object": "[1]",
    "a text": '"x"',
    "deep": '{"a":' + "[" * 10**5 + "]" * 10**5 + "}",
    "rather deep": '{"a":' + "[" * 300 + "]" * 300 + "}",
    "digits": '{"a": ' + "9" * 5000 + "}",
    "cut": '{"a": [1, 2',
    "no text": "\udcff",
    "a null byte": '{"a": "\0"}',
    "no architectures": '{"architectures": [], "model_type": "bert"}',
    "architectures of numbers": '{"architectures": [1], "model_type": "bert"}',
    "no model type": '{"architectures": ["BertModel"]}',
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_configuration_that_is_none_is_refused_wherever_it_is_given(honest, case):
    path = honest("bert")
    (path / "config.json").write_bytes(TEXTS[case].encode("utf-8", "surrogateescape"))
    refusal(lambda: open_model(path), path)
    spec = str(path / "config.json")
    refusal(lambda: target_architecture(spec, None, {}).build(), spec)


def test_an_image_of_any_size_in_a_configuration_is_not_made(honest):
    for size in (10**6, 10**5, [10**7, 1], 0, -1):
        assert open_model(change(honest("convnextv2"), image_size=size)).inputs is None
    assert open_model(change(honest("convnextv2"), image_size=64)).inputs is not None


# ── links, pipes and other entries ──────────────────────────────────────────────────────────────


def link(name: str, target: object) -> Spoil:
    """Return what makes a link of a name, to what is given relative to the directory."""

    def make(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(str(target))

    return make


def moved_out(name: str) -> Spoil:
    """Return what moves a file out of the directory and puts a link to it in its place."""

    def make(path: Path) -> None:
        shutil.move(path / name, path.parent / "elsewhere")
        (path / name).symlink_to("../elsewhere")

    return make


def pipe(name: str) -> Spoil:
    def make(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(path / name)

    return make


def plug(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as plugged:
            plugged.bind("tokenizer.sock")
    finally:
        os.chdir(here)


def folder_in_place_of(name: str) -> Spoil:
    def make(path: Path) -> None:
        shutil.copytree(path, path.parent / "whole")
        (path / name).unlink()
        shutil.move(path.parent / "whole", path / name)

    return make


def cached(path: Path, blobs: str | None = None) -> None:
    """Make a directory what the cache of the Hub has in place of one, with links to blobs."""
    entry = path.parent / "cache" / "models--org--x"
    (entry / "blobs").mkdir(parents=True)
    shutil.move(path, entry / "snapshots" / "0123abc")
    for file in (entry / "snapshots" / "0123abc").iterdir():
        shutil.move(file, entry / "blobs" / f"blob-{file.name}")
        file.symlink_to(f"../../blobs/blob-{file.name}")
    if blobs is not None:
        shutil.move(entry / "blobs", entry.parent / blobs)
        (entry / "blobs").symlink_to(entry.parent / blobs)
    path.symlink_to(entry / "snapshots" / "0123abc")


ENTRIES: dict[str, tuple[Spoil, str]] = {
    "a system's file": (link("tokenizer.json", "/etc/passwd"), "tokenizer.json"),
    "a file above": (moved_out("tokenizer.json"), "tokenizer.json"),
    "the weights": (moved_out("model.safetensors"), "model.safetensors"),
    "the configuration": (moved_out("config.json"), "config.json"),
    "a system's directory": (link("extra", "/etc"), "extra"),
    "the directory above": (link("extra", ".."), "extra"),
    "the directory itself": (link("extra", "."), "extra"),
    "its own directory": (lambda p: ((p / "sub").mkdir(), link("extra", "sub")(p)), "extra"),
    "itself": (link("extra", "extra"), "extra"),
    "one another": (lambda p: (link("a", "b")(p), link("b", "a")(p)), "'a'"),
    "nothing": (link("extra", "missing"), "extra"),
    "nothing, for weights": (link("model.safetensors", "missing"), "model.safetensors"),
    "nothing, for a configuration": (link("config.json", "missing"), "config.json"),
    "out by another link": (
        lambda p: (link("a", "b")(p), link("b", "/etc/passwd")(p)), "'a'",
    ),
    "out and in again": (
        lambda p: (p.parent.joinpath("x").symlink_to(p / "vocab.txt"), link("a", "../x")(p)), "'a'",
    ),
    "below": (link("sub/vocab.txt", "/etc/passwd"), "sub/vocab.txt"),
    "a device": (link("extra", "/dev/zero"), "extra"),
    "the process": (link("extra", "/proc/self/environ"), "extra"),
    "a name of lines": (link("a\nb", "/etc/passwd"), "a\\nb"),
    "a name that is no text": (link("\udcff", "/etc/passwd"), "\\udcff"),
    "a pipe": (pipe("tokenizer.json"), "tokenizer.json"),
    "a pipe of weights": (pipe("model.safetensors"), "model.safetensors"),
    "a piped configuration": (pipe("config.json"), "config.json"),
    "a pipe below": (pipe("sub/pipe"), "sub/pipe"),
    "a socket": (plug, "tokenizer.sock"),
    "a folder of weights": (folder_in_place_of("model.safetensors"), "model.safetensors"),
    "a folder for a configuration": (folder_in_place_of("config.json"), "config.json"),
    "blobs that are a link": (lambda p: cached(p, "other"), "a link out of it"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES)
def test_what_is_no_file_of_the_directory_is_refused_by_its_name(honest, case):
    path = honest("bert")
    spoil, named = ENTRIES[case]
    spoil(path)
    there = sorted(path.parent.rglob("*"))
    assert named in refusal(lambda: open_model(path), path)
    assert sorted(path.parent.rglob("*")) == there


def test_links_within_a_directory_and_to_the_blobs_of_a_cache_are_read_and_become_files(
    honest, tmp_path
):
    path = honest("llama")
    (path / "sub").mkdir()
    (path / "sub" / "vocab.txt").write_text("a b c")
    (path / "vocab.txt").symlink_to("sub/vocab.txt")
    shutil.rmtree(path / "sub" / "none", ignore_errors=True)
    opened = open_model(path)
    grown = fxgrow.widen(opened.model, "2x", opened.inputs, include="*mlp*", verify=False)
    write_grown(opened, grown, out := tmp_path / "out")
    assert (out / "vocab.txt").read_text() == (out / "sub" / "vocab.txt").read_text() == "a b c"
    assert not any(file.is_symlink() for file in out.rglob("*"))
    shutil.rmtree(path / "sub")
    (path / "vocab.txt").unlink()
    cached(path)  # the argument is a link, too
    opened = open_model(path)
    write_grown(opened, grown, again := tmp_path / "again")
    assert {file.name for file in again.iterdir()} == {file.name for file in path.iterdir()}
    assert not any(file.is_symlink() for file in again.rglob("*"))


def test_a_link_to_the_blobs_of_another_model_is_refused(honest):
    path = honest("bert")
    cached(path)
    other = path.parent / "cache" / "models--org--y" / "blobs"
    other.mkdir(parents=True)
    (other / "blob").write_text("{}")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to("../../../models--org--y/blobs/blob")
    assert "tokenizer.json" in refusal(lambda: open_model(path), path)


def test_what_is_neither_read_nor_copied_may_be_anything(honest):
    path = honest("bert")
    for name in (".git", ".cache"):
        (path / name).mkdir()
        os.mkfifo(path / name / "pipe")
        (path / name / "link").symlink_to("/etc")
    assert open_model(path).model is not None


def test_holes_stay_holes(honest, tmp_path):
    path = honest("llama")
    with (path / "vocab.bin").open("wb") as file:
        file.truncate(200 << 20)
        file.seek(100 << 20)
        file.write(b"x")
    opened = open_model(path)
    grown = fxgrow.widen(opened.model, "2x", opened.inputs, include="*mlp*", verify=False)
    write_grown(opened, grown, out := tmp_path / "out")
    assert (out / "vocab.bin").read_bytes() == (path / "vocab.bin").read_bytes()
    assert os.stat(out / "vocab.bin").st_blocks * 512 < 64 << 20
    os.truncate(path / "vocab.bin", 8 << 40)  # more than any disk here
    refusal(lambda: write_grown(opened, grown, tmp_path / "more"), path)
    assert not (tmp_path / "more").exists()


# ── indices ─────────────────────────────────────────────────────────────────────────────────────

INDEX = "model.safetensors.index.json"


def sharded(path: Path) -> Path:
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    names = safetensors.torch.load_file(path / "model-1.safetensors")
    write_index(path, dict.fromkeys(names, "model-1.safetensors"))
    return path


def write_index(path: Path, places: object, **more: object) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": places, **more}))


NO_NAME, NO_WEIGHTS = "which is no file's name", "is JSON text, not weights"
PLACES: dict[str, tuple[object, str]] = {
    "itself": (INDEX, "which is an index itself"),
    "another index": ("other.index.json", "which is an index itself"),
    "another index of pickles": ("pytorch_model.bin.index.json", "which is an index itself"),
    "above": ("..", NO_NAME),
    "here": (".", NO_NAME),
    "no name": ("", NO_NAME),
    "absolute": ("/etc/passwd", NO_NAME),
    "a directory above": ("../model.safetensors", NO_NAME),
    "a directory below": ("sub/model.safetensors", NO_NAME),
    "a backslash": ("..\\model.safetensors", NO_NAME),
    "a drive": ("C:model.safetensors", NO_NAME),
    "a null byte": ("a\0b", NO_NAME),
    "a number": (1, NO_NAME),
    "none": (None, NO_NAME),
    "a list": (["model-1.safetensors"], NO_NAME),
    "missing": ("model-2.safetensors", "not beside it"),
    "lines": ("a\nb", "needs a\\nb"),
    "no weights": ("tokenizer.json", NO_WEIGHTS),
    "a configuration": ("config.json", NO_WEIGHTS),
    "code": ("modeling_evil.py", "not a torch.save file"),
    "a folder": ("sub", "is a directory, not a file"),
    "a pipe": ("pipe", "a pipe or a socket"),
    "out": ("out.safetensors", "is a link out of it"),
}


@pytest.mark.parametrize("case", PLACES)
def test_an_index_names_files_beside_it_alone(honest, case):
    path = sharded(honest("bert"))
    place, pattern = PLACES[case]
    shutil.copytree(path, path / "sub")
    names = list(read_index(path / INDEX)[0])
    write_index(path, dict.fromkeys(names, "model-1.safetensors") | {names[-1]: place})
    if case == "a pipe":
        os.mkfifo(path / "pipe")
    if case == "out":
        shutil.copy(path / "model-1.safetensors", path.parent / "elsewhere")
        (path / "out.safetensors").symlink_to("../elsewhere")
    refusal(lambda: open_model(path), path)
    assert pattern in refusal(lambda: load_source(path / INDEX), path)


@pytest.mark.parametrize("places", [None, [], {}, "x", 3, [["a", "b"]]], ids=str)
def test_an_index_without_places_is_none(honest, places):
    path = sharded(honest("bert"))
    write_index(path, places)
    assert "no index of weights" in refusal(lambda: open_model(path), path / INDEX)


def test_an_index_of_a_million_entries_takes_seconds(honest):
    path = sharded(honest("bert"))
    write_index(path, {f"w{number}": f"s{number}" for number in range(10**6)})
    assert "s0" in refusal(lambda: open_model(path), path / INDEX)
    write_index(path, {f"w{number}": "model-1.safetensors" for number in range(10**5)})
    assert "where it is not" in refusal(lambda: open_model(path), path / INDEX)


def test_what_is_told_to_be_left_out_comes_from_a_checked_index(honest):
    path = sharded(honest("bert"))
    (path / "pytorch_model.bin").write_bytes(b"")
    assert left_out(path) == ["pytorch_model.bin"]
    (path / INDEX).write_text("[" * 10**5)
    refusal(lambda: left_out(path), path / INDEX)


# ── records and targets ─────────────────────────────────────────────────────────────────────────

RECORDS: dict[str, tuple[str, Config]] = {
    "layers": ("timm:vit_tiny_patch16_224", {"depth": 10**6}),
    "more layers": ("timm:vit_tiny_patch16_224", {"depth": 10**12}),
    "classes": ("torchvision:resnet18", {"num_classes": 10**12}),
    "many classes": ("torchvision:resnet18", {"num_classes": 2**24}),
    "an image": ("torchvision:vit_b_16", {"image_size": 10**6}),
    "a smaller image": ("torchvision:vit_b_16", {"image_size": 16 * 1024}),
    "a timm image": ("timm:vit_tiny_patch16_224", {"img_size": 16 * 4096}),
    "a window": ("timm:swin_tiny_patch4_window7_224", {"img_size": 2048, "window_size": 512}),
    "blocks": ("torchvision:densenet121", {"growth_rate": 2**24}),
    "a deep argument": ("torchvision:resnet18", {"num_classes": [[10**9]]}),
    "weights": ("torchvision:resnet18", {"weights": "DEFAULT"}),
    "a checkpoint": ("timm:resnet18", {"checkpoint_path": "/etc/passwd"}),
    "a hub": ("timm:hf-hub:org/repo", {}),
    "a folder": ("timm:local-dir:/etc", {}),
    "a path": ("timm:../x", {}),
    "code": ("os:system", {"command": "true"}),
    "a text": ("torchvision:resnet18", {"num_classes": "x" * 10**5}),
    "a name of lines": ("torchvision:a\nb", {}),
    "no config": ("transformers:BertModel", {}),
    "no fields": ("transformers:BertModel", {"config": 3}),
    "layers of transformers": (
        "transformers:BertModel", {"config": {"model_type": "bert", "num_hidden_layers": 10**6}},
    ),
    "a quantized record": (
        "transformers:BertModel", {"config": {"model_type": "bert", "quantization_config": {}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_asks_for_nothing_that_its_weights_are_not_for(tmp_path, case):
    name, arguments = RECORDS[case]
    record = {"schema": 1, "architecture": {"name": name, "arguments": arguments}, "plans": []}
    path = tmp_path / "net.safetensors"
    weights = {"a.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(weights, path, {"_fxgrow": json.dumps(record)})
    refusal(lambda: open_model(path), path)
    limit = Limit.of(weights)
    refusal(lambda: Architecture.from_dict(record["architecture"], origin="f").build("cpu", limit))


def test_a_record_of_transformers_is_read_as_carefully_as_a_directory(honest, tmp_path):
    path = honest("llama")
    config = config_of(path)
    config |= {"attn_implementation": "org/repo", "auto_map": ELSEWHERE, "use_kernels": True}
    architecture = {"name": "transformers:LlamaForCausalLM", "arguments": {"config": config}}
    record = {"schema": 1, "architecture": architecture, "plans": []}
    weights = safetensors.torch.load_file(path / "model.safetensors")
    file = tmp_path / "net.safetensors"
    safetensors.torch.save_file(weights, file, {"_fxgrow": json.dumps(record)})
    opened = open_model(file)
    assert opened.model.config._attn_implementation == "sdpa"
    assert not {"auto_map", "use_kernels"} & vars(opened.model.config).keys()
    grown = fxgrow.widen(opened.model, "2x", opened.inputs, include="*mlp*")
    write_grown(opened, grown, out := tmp_path / "out")
    assert not {"auto_map", "use_kernels", "attn_implementation"} & config_of(out).keys()
    assert nothing_ran(path)


def test_what_the_user_names_has_no_limit():
    given = {"zero_init_residual": 2**25}  # a number that no size is
    assert Architecture("torchvision:resnet18", given).build()
    recorded = {"name": "torchvision:resnet18", "arguments": given}
    refusal(lambda: Architecture.from_dict(recorded, origin="a file"), "a file")
    built = Architecture("timm:vit_tiny_patch16_224", {"depth": 400, "embed_dim": 6})
    assert built.build()
    with pytest.raises(SourceError, match="layers and tensors"):
        built.build(limit=Limit.of({"a": torch.zeros(1)}))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**6},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**8},
        {"quantization_config": {"quant_method": "gptq"}},
        {"architectures": ["modeling_evil.Evil"]},
        {"num_labels": 2**24},
    ],
    ids=str,
)
def test_the_target_of_a_conversion_is_no_more_trusted(honest, fields):
    path = change(honest("bert"), **fields)
    spec = str(path / "config.json")
    refusal(lambda: target_architecture(spec, None, {}).build("cpu"), spec)
    change(path, **fields)
    assert nothing_ran(path)


def test_the_command_line_refuses_in_one_line(honest, tmp_path):
    good, bad = honest("bert"), change(honest("llama"), num_hidden_layers=10**6, auto_map=CLASSES)
    run = CliRunner()
    for command in (
        ["inspect", str(bad)],
        ["widen", str(bad), "--width", "2x", "-o", str(tmp_path / "out")],
        ["convert", str(good), "--to", str(bad), "-o", str(tmp_path / "out")],
    ):
        result = run.invoke(app, command)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert str(bad) in result.stderr
    assert not (tmp_path / "out").exists()
    assert nothing_ran(bad)


# ── what was written ────────────────────────────────────────────────────────────────────────────


def test_other_files_do_not_matter_where_transformers_reads_what_was_written(
    honest, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: True)
    path = honest("llama")
    adapter = {"base_model_name_or_path": "org/repo", "peft_type": "LORA", "auto_mapping": CLASSES}
    (path / "adapter_config.json").write_text(json.dumps(adapter))
    (path / "generation_config.json").write_text("[" * 10**5)
    (path / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__ }}")
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text((path / "modeling_evil.py").read_text())
    opened = open_model(change(path, configuration_files=["config.5.0.0.json"]))
    (path / "config.5.0.0.json").write_text('{"model_type": "bert"}')
    grown = fxgrow.widen(opened.model, "2x", opened.inputs, include="*mlp*")
    write_grown(opened, grown, out := tmp_path / "out")
    assert (out / "adapter_config.json").exists()
    assert "configuration_files" not in config_of(out)
    assert nothing_ran(path)
    assert not list(out.parent.glob(".*"))


def test_what_was_written_is_read_with_the_safe_fields_of_its_configuration(honest):
    path = honest("llama")
    opened = open_model(path)
    change(path, attn_implementation="org/repo", fusion_config={"patch_embeddings": True})
    check_directory(path, opened.model, opened.inputs, config_of(path), config_of(path))
    assert sorted(file.name for file in path.parent.iterdir()) == ["llama"]


# ── the limit ───────────────────────────────────────────────────────────────────────────────────

TIGHT = Limit(parts=100, elements=10**5, bytes=64 << 20, operations=1000, seconds=5.0)


class Hungry(nn.Module):
    """Does something in its constructor; it would swallow any error."""

    calls = 0

    def __init__(self, how: Callable[[nn.Module], object]) -> None:
        super().__init__()
        Hungry.calls += 1
        try:
            how(self)
        except Exception:
            self.swallowed = True


def forever(_: nn.Module) -> None:
    while True:
        pass


def heap(_: nn.Module) -> None:
    found = [str(number) for number in range(10**9)]
    found.clear()


HUNGRY: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "layers": (lambda m: nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**6))), "layers"),
    "buffers": (lambda m: [m.register_buffer(f"b{i}", torch.ones(1)) for i in range(1000)], "100"),
    "elements": (lambda m: nn.Linear(1000, 1000), "parameters"),
    "a tensor": (lambda m: torch.ones(10**5, 10**5), "MiB on the way"),
    "a range": (lambda m: torch.arange(0, 1, 1e-9), "MiB on the way"),
    "a table": (lambda m: torch.arange(10**5)[:, None] - torch.arange(10**5), "MiB on the way"),
    "values": (lambda m: torch.empty(2**25).uniform_(), "MiB on the way"),
    "many tensors": (lambda m: [torch.ones(2**20) for _ in range(500)], "more than 64 MiB"),
    "operations": (lambda m: [torch.ones(1) for _ in range(10**4)], "operations"),
    "items": (lambda m: [x.item() for x in torch.arange(10**5)], "operations"),
    "views": (lambda m: torch.arange(10**5).unbind(), "operations"),
    "a schedule": (lambda m: torch.linspace(0, 1, 10**6).tolist(), "operations"),
    "time": (forever, r"more than 0\.3 s;"),
    "memory": (heap, "more than 64 MiB"),
}


@pytest.mark.parametrize("case", HUNGRY)
def test_a_constructor_is_stopped_where_it_takes_too_much(case):
    how, pattern = HUNGRY[case]
    Hungry.calls = 0
    limit = replace(TIGHT, known="it was told so", seconds=0.3 if case == "time" else 5.0)
    with pytest.raises(ExceededError, match=pattern) as caught:
        build_uninitialised(lambda: Hungry(how), "meta", limit)
    assert str(caught.value).endswith("; it was told so")
    assert Hungry.calls == 1  # not once more, plainly
    assert not nn.modules.module._global_module_registration_hooks
    assert not nn.modules.module._global_parameter_registration_hooks
    assert nn.Linear(2000, 2000).weight.abs().sum() > 0
    for _ in range(10**5):
        pass  # nothing is raised any more


def test_a_limit_holds_in_its_thread_alone():
    built: list[nn.Module] = []
    stop = threading.Event()

    def other() -> None:
        while not stop.wait(0.001):
            built.append(nn.Sequential(*(nn.Linear(20, 20) for _ in range(50))))

    thread = threading.Thread(target=other)
    thread.start()
    limit = replace(TIGHT, bytes=1 << 30)
    for _ in range(20):
        assert build_uninitialised(lambda: nn.Linear(3, 3), "meta", limit)
    stop.set()
    thread.join()
    assert built
    assert all(not layer.weight.is_meta for layer in built[-1])


@pytest.mark.parametrize(
    "name",
    ["swin_t", "regnet_y_400mf", "densenet121", "googlenet", "ssdlite320_mobilenet_v3_large"],
)
def test_within_a_limit_the_same_is_built(name):
    plain = Architecture(f"torchvision:{name}").build("cpu")
    limit = Limit.of(plain.state_dict())
    limited = Architecture(f"torchvision:{name}", origin="a file").build("cpu", limit)
    shapes = ({n: t.shape for n, t in m.state_dict().items()} for m in (plain, limited))
    assert next(shapes) == next(shapes)
    buffers = (dict(module.named_buffers()) for module in (plain, limited))
    for (name, one), other in zip(next(buffers).items(), next(buffers).values(), strict=True):
        assert torch.equal(one, other), name


def test_the_worst_stays_below_a_gigabyte(honest):
    worst = [
        (honest("convnextv2"), {"depths": [2**24, 1]}),
        (honest("bert"), {"num_labels": 2**24}),
        (honest("vit"), {"num_hidden_layers": 2**24, "image_size": 512}),
    ]
    program = """
        import json, resource, sys, time
        from pathlib import Path
        from fxgrow.errors import SourceError
        from fxgrow.files.models import open_model

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

        found = []
        for path, fields in json.loads(sys.argv[1]):
            open_model(path)
            config = Path(path, "config.json")
            config.write_text(json.dumps(json.loads(config.read_text()) | fields))
            before, begun = peak(), time.process_time()
            try:
                open_model(path)
            except SourceError as error:
                found.append([peak() - before, time.process_time() - begun, str(error)])
        print(found)
    """
    arguments = json.dumps([[str(path), fields] for path, fields in worst])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), arguments],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = ast.literal_eval(done.stdout)
    assert len(found) == len(worst)
    assert max(megabytes for megabytes, *_ in found) < 1024, found
    assert max(seconds for _, seconds, _ in found) < 10, found


def test_screening_leaves_honest_configurations_as_they_are(originals):
    for name in NAMES:
        config = config_of(originals / name)
        found = screened(config)
        assert found.written == config
        assert not found.dropped
        assert found.used.keys() - {"_name_or_path"} == config.keys() - {"_name_or_path"}


def test_transformers_prints_nothing_of_what_a_configuration_says(honest, monkeypatch):
    said: list[str] = []
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [listener])
    for fields in ({"use_return_dict": "a\x1b[2Jb\nc"}, {"num_labels": 3, "id2label": {"0": "x"}}):
        path = change(honest("bert"), **fields)
        with contextlib.suppress(SourceError):
            open_model(path)
    assert not said


def test_reading_changes_no_global_state(honest):
    level = transformers.utils.logging.get_verbosity()
    filters = list(warnings.filters)
    with pytest.raises(SourceError):
        open_model(change(honest("bert"), num_hidden_layers=10**6))
    assert transformers.utils.logging.get_verbosity() == level
    assert warnings.filters == filters
    assert torch.get_default_dtype() == torch.float32
