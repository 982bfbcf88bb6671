"""Makers of hostile files: pickles by opcodes, archives with tricks, headers, programs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from fxgrow.files.checkpoint.reading import FileReader
from fxgrow.files.checkpoint.rebuilding import CALLS
from fxgrow.files.checkpoint.unpickling import load_trusted, load_untrusted

LINEAR = ("torch.nn.modules.linear", "Linear")

# ── pickles, by opcodes ─────────────────────────────────────────────────────────────────────────


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def plain(value: object) -> bytes:
    """Return the opcodes of plain data, without the frame around them."""
    return pickle.dumps(value, protocol=2)[2:-1]


def many(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + many(*arguments) + b"R"


def instance(kind: tuple[str, str], *state: tuple[str, bytes]) -> bytes:
    """Return the opcodes of an empty instance that gets attributes."""
    made = named(*kind) + b")\x81"
    return made + table(*state) + b"b" if state else made


def table(*items: tuple[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items) + b"u"


def module(*extra: tuple[str, bytes], kind: tuple[str, str] = LINEAR, **parts: bytes) -> bytes:
    """Return the opcodes of a module with parts and further attributes."""
    tables = {"_parameters": b"}", "_buffers": b"}", "_modules": b"}", "training": b"\x89", **parts}
    return instance(kind, *tables.items(), *extra)


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    parts = text("storage"), named("torch", kind), text(key), text("cpu"), plain(count)
    return many(*parts) + b"Q"


def tensor(size: object = (4,), stride: object = (1,), offset: object = 0, **of: object) -> bytes:
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    hooks = called(named("collections", "OrderedDict"))
    arguments = storage(**of), plain(offset), plain(size), plain(stride), b"\x89", hooks  # type: ignore[arg-type]
    return called(rebuild, *arguments)


def parameter(data: bytes) -> bytes:
    return called(named("torch._utils", "_rebuild_parameter"), data, b"\x89", b"}")


def repeated(code: bytes, count: int, before: bytes = b"", after: bytes = b"") -> bytes:
    return before + code * count + after


GELU = named("torch.nn.functional", "gelu")
PARTIAL = called(named("functools", "partial"), named(*LINEAR))
# Parts of modules that torch or fxgrow call by their names.
METHODS = (
    "forward", "modules", "named_modules", "parameters", "named_parameters", "buffers", "children",
    "named_children", "state_dict", "load_state_dict", "train", "eval", "get_submodule", "to",
    "register_module", "extra_repr", "_call_impl", "_apply", "double", "get_extra_state",
    "_save_to_state_dict", "__call__", "__class__", "__deepcopy__", "__reduce_ex__",
    "__getstate__", "__dict__", "__bool__",
)  # fmt: skip


def pickles() -> Iterator[tuple[str, bytes]]:
    """Yield pickles that ask for more than plain data, or are none, with what they are."""
    arguments = {
        "nothing": (),
        "numbers": (plain(10**18), plain(-1)),
        "functions": (GELU, PARTIAL),
        "nests": (plain([[[[1]]]]), plain({"a": (1, None)}), plain("x" * 99)),
        "itself": (named("torch._utils", "_rebuild_tensor_v2"),),
        "tensors": (tensor(), tensor(), tensor()),
        "seven": (plain(2**62),) * 7,
    }
    for name in CALLS:
        head, _, tail = name.rpartition(".")
        head = {"builtins": "__builtin__"}.get(head, head)
        for kind, given in arguments.items():
            yield f"{name} of {kind}", plain({"w": 1}) + called(named(head, tail), *given) + b"0"
    for method in METHODS:
        yield f"a module whose {method} is a partial", module((method, PARTIAL))
        yield f"a module whose {method} is a number", module((method, plain(1)))
    for hooks in (name for name in vars(nn.Module()) if "hook" in name):
        value = table(("1", GELU)) if "is_full" not in hooks else GELU
        yield f"a module with {hooks}", module((hooks, value))
    for name in ('a"b', "a\\", "a\nb", "a.b", "", "\u2028", "a" + chr(0)):
        yield f"a part called {name!r}", module(_modules=table((name, module())))
        yield f"a parameter called {name!r}", module(_parameters=table((name, parameter(tensor()))))
    for kind in (LINEAR, ("torch.nn.modules.module", "Module"), ("torch", "Tensor")):
        yield f"attributes of {kind}", named(*kind) + table(("forward", GELU)) + b"b"
        yield f"items of {kind}", named(*kind) + text("forward") + GELU + b"s"
        yield f"{kind} called", called(named(*kind), plain(10**6), plain(10**6))
        yield f"{kind} made with arguments", named(*kind) + many(plain(9), plain(9)) + b"\x81"
    for function in (GELU, named("torchvision.models.optical_flow.raft", "_pass_through_h")):
        yield "a function that is called", called(function, named(*LINEAR))
        yield "attributes of a function", function + table(("__code__", plain(1))) + b"b"
    for full in (
        "os system", "builtins eval", "__builtin__ getattr", "builtins __import__", "torch load",
        "torch.fx.graph_module reduce_graph_module", "collections defaultdict",
        "torch.nn.modules.module _global_forward_hooks", "torch.hub load", "nt system",
        "torch.nn.modules.module register_module_forward_hook",
        "torchvision.models get_model", "torchvision.models._api get_model", "operator attrgetter",
        "torch.nn.modules.lazy torch", "torch.storage _load_from_bytes", "copyreg _reconstructor",
        "torchvision.models.feature_extraction DualGraphModule", "subprocess Popen", "io open",
        "torch.nn.modules.linear Linear.forward", "torch.nn.modules.no_such X",
        "torch.utils.checkpoint checkpoint", "types FunctionType", "importlib import_module",
    ):  # fmt: skip
        head, tail = full.split()
        yield f"{full} by name", named(head, tail)
        yield f"{full} by names on the stack", text(head) + text(tail) + b"\x93"
        yield f"{full} called", called(named(head, tail), plain("touch flag"))
    loop = b"]q\x00h\x00a"
    yield "a list in itself", loop
    yield "a dict in itself", b"}q\x00" + text("a") + b"h\x00s"
    yield "a module in itself", (
        named(*LINEAR) + b")\x81q\x00" + table(
            ("_parameters", b"}"), ("_buffers", b"}"), ("_modules", table(("a", b"h\x00"))),
        ) + b"b"
    )  # fmt: skip
    yield "a thousand lists in one another", repeated(b"a", 999, b"]" * 1000)
    yield (
        "a thousand modules in one another",
        repeated(b"", 0, b"".join(module(_modules=b"}")[:-1] for _ in range(2)), b"b" * 2),
    )
    doubled = module()
    for _ in range(30):
        doubled += b"q\x05" + b"0" + module(_modules=table(("a", b"h\x05"), ("b", b"h\x05")))
    yield "a module that is held a billion times", doubled
    names = b"".join(text(f"m{index}") + b"h\x05" for index in range(30_000))
    yield (
        "one module under many names",
        module() + b"q\x050" + module(_modules=b"}(" + names + b"u"),
    )
    yield (
        "one state_dict under many names",
        table(("a.b", tensor()))
        + b"q\x050"
        + b"}("
        + (b"".join(text(f"k{index}") + b"h\x05" for index in range(200)) + b"u"),
    )
    yield "tuples that double", plain(1) + b"2\x86" * 60
    yield "a key that doubles", b"}" + plain(1) + b"2\x86" * 60 + plain(1) + b"s"
    yield "a key that is a tensor", b"}" + tensor() + plain(1) + b"s"
    yield "four million steps", b"]" + b"N0" * 2_000_000
    yield (
        "thirty huge bytearrays",
        b"".join(called(named("__builtin__", "bytearray"), plain(10**9)) for _ in range(30)),
    )
    yield (
        "a text that is copied again and again",
        text("x" * 10**6)
        + b"q\x00"
        + b"".join(
            called(named("_codecs", "encode"), b"h\x00", text("latin1")) for _ in range(3000)
        ),
    )
    yield "a number of many digits", b"L" + b"9" * 100_000 + b"L\n"
    yield "a text longer than the file", b"X" + struct.pack("<I", 2**31) + b"x"
    yield "bytes longer than the file", b"\x8e" + struct.pack("<Q", 2**62) + b"x"
    yield "a memo that is not there", b"h\x07"
    extension = b"\x84\x01\x00\x00\x00"
    for code in (b"i", b"o", b"\x82\x01", extension, b"P0\n", b"\x92", b"\x97", b"\x98"):
        yield f"the opcode {code!r}", plain(1) + plain(2) + code
    yield "an end without a stack", b"."
    yield "a mark that stays open", b"((("
    yield "nothing", b""
    sizes = {
        "beyond its memory": {"size": (5,)},
        "of a huge size": {"size": (2**40, 2**40), "stride": (0, 0)},
        "that is one number a trillion times": {"size": (10**12,), "stride": (0,)},
        "before its memory": {"offset": -1},
        "with steps back": {"stride": (-1,)},
        "of sixty-five dims": {"size": (1,) * 65, "stride": (1,) * 65},
        "without a shape": {"size": None},
        "of texts": {"size": ("4",)},
        "of truths": {"size": (True,)},
        "of two shapes": {"stride": (1, 1)},
        "of a member that is not there": {"key": "7"},
        "of a member outside": {"key": "../0"},
        "of another count": {"count": 10**9},
        "of a negative count": {"count": -1},
        "of no dtype": {"kind": "Linear"},
    }  # fmt: skip
    for what, options in sizes.items():
        yield f"a tensor {what}", table(("w", tensor(**options)))  # type: ignore[arg-type]
    metadata = called(named("collections", "OrderedDict"))
    yield "a state_dict whose items is a partial", metadata + table(("items", PARTIAL)) + b"b"
    yield (
        "a recurrent module of many layers",
        module(
            ("num_layers", plain(10**9)),
            ("_all_weights", plain([[1]])),
            ("bidirectional", plain(True)),
            ("bias", plain(True)),
            kind=("torch.nn.modules.rnn", "LSTM"),
        ),
    )
    large = many(named(*LINEAR), b")", table(("in_features", plain(10**9))), b"N")
    yield "a partial of large numbers", PARTIAL + large + b"b"
    yield (
        "a partial with arguments",
        called(named("functools", "partial"), named("collections", "OrderedDict"), plain([])),
    )


# ── objects that would be passed on ─────────────────────────────────────────────────────────────

STEP = ("torch.optim.lr_scheduler", "StepLR")
NUMPY = "numpy.random._pickle"
BITS = named(NUMPY, "__bit_generator_ctor")


def full(name: str) -> bytes:
    """Return the opcode of a name, of which the last part is no module."""
    return named(*name.rsplit(".", 1))


def filled(name: str, state: bytes = b"", entries: bytes = b"", items: bytes = b"") -> bytes:
    """Return the opcodes of an empty instance that is filled in the order of pickles."""
    more = (b"(" + items + b"e" if items else b"") + (b"(" + entries + b"u" if entries else b"")
    return full(name) + b")\x81" + more + (state + b"b" if state else b"")


def built(function: str, *arguments: bytes, state: bytes = b"") -> bytes:
    return called(full(function), *arguments) + (state + b"b" if state else b"")


def partial_of(function: bytes, state: bytes | None = None) -> bytes:
    own = many(function, b")", table(("init", b"\x89")), b"N") if state is None else state
    return called(named("functools", "partial"), function) + own + b"b"


def seeds(*state: bytes, kind: str = "numpy.random.bit_generator.SeedSequence") -> bytes:
    make = "numpy.random.bit_generator.__pyx_unpickle_SeedSequence"
    return built(make, full(kind), plain(65708578), b"N", state=many(*state))


def laundered() -> Iterator[tuple[str, bytes]]:
    """Yield objects of other libraries with more than data, which whoever loads them would run."""
    step, lists = named(*STEP), named("builtins", "list")
    evil = partial_of(step)
    for package, modules in {
        "numpy.random": ("tests.test_smoke.dataclass", "tests.test_smoke.partial",
                         "tests.test_extending.spec_from_file_location",
                         "mtrand.seed", "_pickle.BitGenerator", "RandomState", "bit_generator.abc"),
        "torch.optim": ("optimizer.deepcopy", "optimizer.register_optimizer_step_pre_hook",
                        "lr_scheduler.partial", "optimizer.functools", "swa_utils.update_bn", "sgd",
                        "adam._single_tensor_adam", "lr_scheduler.warnings",
                        "_multi_tensor.reduce"),
        "torchvision.transforms": ("transforms.Lambda", "functional.Image", "v2._misc.Lambda",
                                   "transforms.F", "functional.to_pil_image", "v2._utils.Callable"),
        "sklearn.preprocessing": ("_function_transformer.FunctionTransformer", "_data.warnings",
                                  "_data.check_array", "_encoders.numbers", "FunctionTransformer"),
        "omegaconf": ("omegaconf.OmegaConf", "base.copy", "nodes.Node", "_utils.yaml",
                      "resolvers.oc",
                      "omegaconf.register_default_resolvers", "base.import_module"),
        "": ("builtins.eval", "builtins.type", "builtins.getattr", "types.FunctionType",
             "types.CodeType", "types.MethodType", "types.new_class", "copyreg.__newobj__",
             "copyreg.__newobj_ex__", "copyreg._reconstructor", "enum.Enum",
             "operator.methodcaller",
             "functools.reduce", "functools.partialmethod", "collections.UserDict", "uuid.os",
             "pathlib.os", "pathlib.Path.unlink", "datetime.sys", "decimal.getcontext",
             "zoneinfo.ZoneInfo",
             "numpy.load", "numpy.memmap", "box.box.open_file", "yacs.config.load_cfg",
             "munch.DefaultMunch", "easydict.sys", "collections.namedtuple"),
    }.items():  # fmt: skip
        for name in modules:
            name = f"{package}.{name}".removeprefix(".")
            yield f"{name} by name", full(name)
            yield f"{name} called", built(name, plain("a"))
            yield f"{name} made", filled(name, table(("a", plain(1))))
            yield (
                f"{name} for a generator",
                built(f"{NUMPY}.__generator_ctor", plain("a"), full(name)),
            )
    for make in ("__generator_ctor", "__randomstate_ctor"):
        make = f"{NUMPY}.{make}"
        for what, function in {
            "a partial": evil, "a scheduler": step, "a type": lists, "itself": full(make),
            "a module": named(*LINEAR), "a function": GELU, "a text": text("builtins.eval"),
            "a path": built("pathlib.Path", text("a")), "a path's class": named("pathlib", "Path"),
        }.items():  # fmt: skip
            yield f"{make} that calls {what}", built(make, text("MT19937"), function)
            yield f"{make} of {what}", built(make, function)
        yield f"{make} of an odd name", built(make, text("os"), BITS)
        yield f"{make} of three", built(make, text("MT19937"), BITS, BITS)
        yield f"{make} with items", built(make) + b"(" + plain(1) + b"e"
        yield f"{make} with an odd state", built(make, state=table(("state", evil)))
        for key, value in {"pos": 625, "buffer_pos": -1}.items():
            state = table(("state", table((key, plain(value)))), (key, plain(value)))
            yield f"{make} whose {key} is {value}", built(make, state=state)
    for what, kind in {"a partial": evil, "a type": lists, "a name": text("os.system")}.items():
        yield f"a bit generator of {what}", called(BITS, kind)
    bits = called(BITS, full("numpy.random._pcg64.PCG64"))
    yield "a bit generator with seeds of its own", bits + many(b"}", evil) + b"b"
    yield "a bit generator with a function", bits + many(table(("state", step)), b"N") + b"b"
    numbers = (plain(3), plain(0), b"N", plain(4), b")")
    yield "seeds without a pool", seeds(*numbers)
    yield "seeds of a text", seeds(text("a"), *numbers[1:])
    yield "seeds with attributes", seeds(*numbers, table(("spawn", evil)))
    yield "seeds of another class", seeds(*numbers, kind="builtins.list")
    yield "seeds of a partial", seeds(evil, *numbers[1:])
    for what, state in {
        "another function": many(lists, b")", b"}", b"N"),
        "a function of another library": many(named("numpy", "ndarray"), b")", b"}", b"N"),
        "attributes": many(step, b")", b"}", table(("__reduce__", lists))),
        "numbers for keywords": many(step, b")", plain([1]), b"N"),
        "keywords of a class": many(step, b")", table(("__class__", lists)), b"N"),
        "a list": plain([1]),
    }.items():
        yield f"a partial with {what}", partial_of(step, state)
    yield "a partial of a partial", partial_of(evil)
    yield "a partial of a constructor", partial_of(full(f"{NUMPY}.__generator_ctor"))
    yield "a partial of a class that is filled", partial_of(full("omegaconf.dictconfig.DictConfig"))
    for factory in (step, evil, full(f"{NUMPY}.__generator_ctor"), BITS, full("pathlib.Path"), GELU,
                    text("builtins.list"), named(*LINEAR), full("collections.deque")):  # fmt: skip
        yield "a dict with a default of something else", built("collections.defaultdict", factory)
    hidden = ("__class__", "__reduce__", "__reduce_ex__", "__setstate__", "__deepcopy__",
              "__dict__", "__getstate__", "__call__", "__len__", "__copy__")  # fmt: skip
    for name in ("easydict.EasyDict", "munch.Munch", "yacs.config.CfgNode", "box.box.Box",
                 "lightning.fabric.utilities.data.AttributeDict", "addict.addict.Dict",
                 "mmengine.config.config.ConfigDict", "fvcore.common.config.CfgNode"):  # fmt: skip
        for key in hidden:
            yield f"{name} with an entry {key}", filled(name, b"}", text(key) + evil)
            yield f"{name} with an attribute {key}", filled(name, table((key, lists)))
        yield f"{name} whose update is called", filled(name, b"}", text("update") + evil)
        yield f"{name} with slots", filled(name, many(b"N", table(("a", evil))))
        yield f"{name} with items", filled(name, items=plain(1))
        yield f"{name} made of a function", full(name) + many(evil) + b"\x81"
        yield f"{name} called", built(name, plain({"a": 1}))
    for name in ("types.SimpleNamespace", "pathlib.Path", "collections.deque", "decimal.Decimal"):
        for key in hidden:
            yield f"{name} whose {key} is set", built(name, state=table((key, evil)))
        yield f"{name} of a partial", built(name, evil)
        yield f"{name} of a type", built(name, lists)
        yield f"{name} with slots", built(name, state=many(b"N", table(("a", evil))))
        yield f"{name} with entries", built(name) + b"(" + text("a") + evil + b"u"
    for key in hidden:
        yield (
            f"a namespace of arguments whose {key} is set",
            instance(("argparse", "Namespace"), (key, evil)),
        )
        yield (
            f"a recipe for scaling whose {key} is set",
            filled("sklearn.preprocessing._data.StandardScaler", table((key, evil))),
        )
    options = table(("box_recast", table(("a", lists))))
    yield "a box that calls", filled("box.box.Box", table(("_box_config", options)))
    options = table(("default_box_attr", evil))
    yield "a box with a default", filled("box.box.Box", table(("_box_config", options)))
    options = table(("box_class", step))
    yield (
        "a list of boxes of a class",
        filled("box.box_list.BoxList", table(("box_options", options))),
    )
    frozen = "ml_collections.config_dict.config_dict.FrozenConfigDict"
    yield "a frozen configuration of something else", filled(frozen, table(("_configdict", evil)))
    fields = table(("_fields", table(("__deepcopy__", evil))))
    yield "a configuration with a method", filled(frozen.replace("Frozen", ""), fields)
    tree = "omegaconf.dictconfig.DictConfig"
    metadata = filled(
        "omegaconf.base.ContainerMetadata", table(("ref_type", named("typing", "Any")))
    )
    yield "a tree without metadata", filled(tree, table(("_content", b"}")))
    for key, value in {"_parent": evil, "_metadata": evil, "__setstate__": evil}.items():
        held = {"_metadata": metadata, "_content": b"}", key: value}
        yield f"a tree whose {key} is a partial", filled(tree, table(*held.items()))
    node = ("_metadata", metadata)
    other = partial_of(step, many(lists, b")", b"N", b"N"))
    for what, content in {
        "another program": table(("a", full("os.system"))),
        "a constructor": table(("a", full(tree))),
        "a partial of another function": table(("a", other)),
        "a path of a partial": table(("a", built("pathlib.Path", evil))),
    }.items():  # fmt: skip
        above = filled(tree, table(node, ("_content", content)))
        yield f"a part of a tree with {what}", filled(tree, table(node, ("_parent", above)))
        top = filled(tree, table(node, ("_content", b"}")))
        above = filled(tree, table(node, ("_content", content), ("_parent", top)))
        yield f"a part of a part with {what}", filled(tree, table(node, ("_parent", above)))
    above = filled(tree, table(node, ("_parent", b"h\x05")))
    yield (
        "two trees that are parts of one another",
        full(tree) + b")\x81q\x05" + table(node, ("_parent", above)) + b"b",
    )
    resize = "torchvision.transforms.transforms.Resize"
    for key in ("forward", "__call__", "__class__"):
        yield f"a transform whose {key} is a partial", filled(resize, table((key, evil)))
    for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
        yield f"a transform with {key}", filled(resize, table((key, table(("a", evil)))))
    yield "a transform made with arguments", full(resize) + many(plain(1)) + b"\x81"
    yield "a date in a zone of its own", built("datetime.datetime", plain(b"a" * 10), evil)
    yield "a date of a function", built("datetime.date", GELU)
    yield "a zone without a difference", built("datetime.timezone", plain(3), step)
    yield "a path of a number", built("pathlib.PosixPath", plain(1))
    yield "a path of a path", built("pathlib.PosixPath", built("pathlib.Path", text("a")))
    yield "a huge fraction", built("fractions.Fraction", text("1e999999999"))
    yield "a range of texts", built("builtins.range", text("a"))
    yield "a slice of functions", built("builtins.slice", lists, step)
    yield "a UUID that is safe by a function", filled("uuid.UUID", table(("is_safe", evil)))
    yield "a UUID of a text", filled("uuid.UUID", table(("int", text("a"))))
    yield (
        "an interpolation of a function",
        built("torchvision.transforms.functional.InterpolationMode", lists),
    )
    array = built(
        "numpy._core.multiarray._reconstruct", full("numpy.ndarray"), many(plain(0)), plain(b"b")
    )
    objects = built("numpy.dtype", text("O8"), b"\x89", b"\x88")
    yield (
        "an array of objects",
        array + many(plain(1), plain((1,)), objects, b"\x89", b"](" + evil + b"e") + b"b",
    )
    memory = "numpy.float64"
    yield (
        "an array of another class",
        built("numpy._core.multiarray._reconstruct", full(memory), many(plain(0)), plain(b"b")),
    )
    yield "a constructor that stands for itself", BITS
    yield "a class that stands for itself", full(tree)


def beside_weights(code: bytes) -> bytes:
    """Return a checkpoint of a small network that holds an object besides."""
    state = table(("0.weight", tensor((2, 2), (2, 1))), ("1.weight", tensor((2, 2), (2, 1))))
    return saved(table(("state_dict", state), ("other", code)))


def saved(pickled: bytes, memory: bytes = bytes(16), **members: bytes) -> bytes:
    """Return a file of torch's format around a pickle, whose one tensor may have four numbers."""
    parts = {
        "data.pkl": b"\x80\x02" + pickled + b".",
        "byteorder": b"little",
        "data/0": memory,
        "version": b"3\n",
        **members,
    }
    return zipped({f"archive/{name}": data for name, data in parts.items()})


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return held.getvalue()


# ── archives ────────────────────────────────────────────────────────────────────────────────────


def torch_saved(data: object) -> bytes:
    held = io.BytesIO()
    torch.save(data, held)
    return held.getvalue()


def weights() -> bytes:
    return torch_saved({"0.weight": torch.ones(4, 4), "0.bias": torch.zeros(4)})


def _end(data: bytes) -> tuple[int, int, int, int]:
    """Return where the end record of a small archive lies, and what it says."""
    end = data.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack("<HII", data[end + 10 : end + 20])
    return end, count, size, start


def archives() -> Iterator[tuple[str, bytes]]:
    """Yield archives that readers may read in different ways, or not to their end."""
    good = saved(table(("w", tensor())))
    end, count, size, start = _end(good)
    directory, tail = good[start:end], good[end:]

    def record(**change: int) -> bytes:
        values = {"disk": 0, "first": 0, "here": count, "count": count}
        values |= {"size": size, "start": start, **change}
        return b"PK\x05\x06" + struct.pack("<HHHHIIH", *values.values(), change.get("comment", 0))

    yield "two directories", good[:end] + directory + tail
    yield "bytes behind the end", good + b"\x00"
    yield "an archive behind the end", good + good
    yield "bytes before the beginning", b"PK\x03\x04" + good
    yield "a comment", good[:-2] + b"\x04\x00text"
    yield "bytes before the directory", good[:start] + b"evil" + directory + record(start=start + 4)
    yield "a directory of another size", good[:end] + record(size=size - 1)
    yield "a directory elsewhere", good[:end] + record(start=0)
    yield "more members than it says", good[:end] + record(here=count - 1, count=count - 1)
    yield "fewer members than it says", good[:end] + record(here=count + 1, count=count + 1)
    yield "a number of disks", good[:end] + record(disk=1)
    yield "a million members", good[:end] + record(here=65535, count=65535)
    yield "a cut end", good[:-5]
    yield "a cut directory", good[: start + 10]
    yield "half of it", good[: len(good) // 2]
    yield "its first bytes", good[:30]
    for name in ("../x", "/x", "a//b", "a/./b", "archive\\x", "archive/a\nb", "flat"):
        yield f"a member called {name!r}", zipped({"archive/data.pkl": b"\x80\x02N.", name: b"1"})
    yield "two folders", zipped({"a/data.pkl": b"\x80\x02N.", "b/data.pkl": b"\x80\x02N."})
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for data in (b"\x80\x02N.", b"\x80\x02}."):
            archive.filelist[:] = archive.filelist  # zipfile only warns of a second of that name
            info = zipfile.ZipInfo("archive/data.pkl" if data[2:3] == b"N" else "archive/data.pkm")
            archive.writestr(info, data)
    yield "two members of one name", held.getvalue().replace(b"data.pkm", b"data.pkl")
    yield "a zip bomb", zipped({"archive/data.pkl": bytes(2 * 10**8)}, zipfile.ZIP_DEFLATED)
    of_one = {"archive/data.pkl": b"\x80\x02" + table(("w", tensor())) + b"."}
    yield (
        "a compressed tensor",
        zipped({**of_one, "archive/data/0": bytes(16)}, zipfile.ZIP_DEFLATED),
    )
    for what, offset, value in (
        ("an encrypted member", 8, b"\x01\x00"),
        ("a member compressed by LZMA", 10, b"\x0e\x00"),
        ("a member of another size", 24, b"\xff\x00\x00\x00"),
        ("a member that lies in another", 42, struct.pack("<I", 5)),
        ("a member behind the file", 42, struct.pack("<I", 2**31)),
        ("a member on another disk", 34, b"\x01\x00"),
        ("a member with a long name", 28, b"\xff\xff"),
        ("a member with extra fields", 30, b"\x04\x00"),
    ):
        changed = bytearray(good)
        changed[start + offset : start + offset + len(value)] = value
        yield what, bytes(changed)
    changed = bytearray(good)
    changed[30:46] = b"archive/data.pkx"
    yield "a member that calls itself something else", bytes(changed)
    yield "an order of bytes that is none", saved(table(("w", tensor())), byteorder=b"middle")
    yield "no pickle", zipped({"archive/version": b"3", "archive/data/0": bytes(4)})
    yield "a tensor that is too short", saved(table(("w", tensor())), memory=bytes(8))
    legacy = io.BytesIO()
    torch.save({"0.weight": torch.ones(4)}, legacy, _use_new_zipfile_serialization=False)
    old = legacy.getvalue()
    yield "a legacy file with more behind it", old + b"x"
    yield "a legacy file that is cut", old[:-3]
    yield "a legacy file without tensors", old[:120]
    yield "a legacy file of other sizes", old[:-24] + struct.pack("<q", 2**40) + old[-16:]


# ── safetensors ─────────────────────────────────────────────────────────────────────────────────


def safetensors_file(header: object, data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def headers() -> Iterator[tuple[str, bytes]]:
    """Yield safetensors files whose headers are not plain."""

    def entry(**change: object) -> dict[str, object]:
        return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}

    changes = {
        "a dtype that is none": {"dtype": "F33"},
        "a dtype that is a list": {"dtype": []},
        "a shape of another size": {"shape": [5]},
        "a shape that is negative": {"shape": [-4]},
        "a shape of fractions": {"shape": [4.0]},
        "a shape of truths": {"shape": [True, 4]},
        "a shape of huge numbers": {"shape": [2**62, 2**62]},
        "a shape of many dims": {"shape": [1] * 65},
        "no shape": {"shape": None},
        "offsets beyond the file": {"data_offsets": [0, 10**12], "shape": [25 * 10**10]},
        "offsets before it": {"data_offsets": [-16, 0]},
        "offsets the wrong way round": {"data_offsets": [16, 0]},
        "a hole before it": {"data_offsets": [4, 16], "shape": [3]},
        "bytes behind it": {"data_offsets": [0, 12], "shape": [3]},
        "three offsets": {"data_offsets": [0, 8, 16]},
        "another field": {"code": "import os"},
    }
    for what, change in changes.items():
        yield what, safetensors_file({"w": entry(**change)})
    yield "two tensors on one place", safetensors_file({"a": entry(), "b": entry()})
    yield (
        "a name that stands twice",
        safetensors_file(
            b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"w":{"dtype":"I32","shape":[4],"data_offsets":[0,16]}}'
        ),
    )
    yield "texts that are numbers", safetensors_file({"__metadata__": {"a": 1}, "w": entry()})
    yield "texts that are a list", safetensors_file({"__metadata__": [], "w": entry()})
    yield "a tensor that is a number", safetensors_file({"w": 3})
    yield "a deep header", safetensors_file(b'{"w":' + b"[" * 50_000 + b"]" * 50_000 + b"}")
    yield "a header longer than the file", struct.pack("<Q", 10**6) + b"{}"
    yield "a header of a terabyte", struct.pack("<Q", 10**12)[:7] + b"\x00{" + bytes(50)
    yield "a header that is cut", safetensors_file({"w": entry()})[:40]
    yield "a header that is no JSON", safetensors_file(b"{nonsense}")
    yield "a number of many digits", safetensors_file(b'{"w":' + b"9" * 10_000 + b"}")
    for what, record in _records().items():
        yield (
            f"a record that {what}",
            safetensors_file({"__metadata__": {"format": "pt", "_fxgrow": record}, "w": entry()}),
        )
    for what, kept in {"deep": "[" * 50_000, "odd": '{"": {"version": "x"}, "w": 3}'}.items():
        yield (
            f"metadata that is {what}",
            safetensors_file({"__metadata__": {"_metadata": kept}, "w": entry()}),
        )


def _records() -> dict[str, str]:
    """Return records of fxgrow's that are not what it writes."""

    def of(**fields: object) -> str:
        return json.dumps({"schema": 1, "plans": [], **fields})

    def resnet(**arguments: object) -> str:
        return of(architecture={"name": "torchvision:resnet18", "arguments": arguments})

    return {
        "is deep": "[" * 50_000,
        "is a text": '"a"',
        "names code": of(architecture={"name": "os:system", "arguments": {}}),
        "has no plans": of(architecture=None, plans=7),
        "has wrong plans": of(architecture=None, plans=[7, None]),
        "has an odd name": of(architecture={"name": ["a"], "arguments": 3}),
        "asks for weights": resnet(weights="DEFAULT"),
        "asks for a trillion classes": resnet(num_classes=10**12),
    }


# ── programs ────────────────────────────────────────────────────────────────────────────────────


def program() -> dict[str, bytes]:
    """Return the members of a small program."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    held = io.BytesIO()
    batch = {0: torch.export.Dim.AUTO}
    inputs = (torch.randn(3, 4),)
    exported = torch.export.export(net, inputs, dynamic_shapes=(batch,), strict=False)
    torch.export.save(exported, held)
    with zipfile.ZipFile(held) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def older_program() -> dict[str, bytes]:
    """Return the members of a small program as torch wrote it before 2.8: in no folder."""
    members = program()
    if "version" in members:
        return members
    found = {name.rpartition("/")[2]: data for name, data in members.items()}
    version = json.loads(found["model.json"])["schema_version"]
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    held = {
        "state_dict": dict(net.named_parameters()),
        "constants": {},
        "example_inputs": ((torch.randn(3, 4),), {}),
    }
    return {
        "version": f"{version['major']}.{version['minor']}".encode(),
        "serialized_exported_program.json": found["model.json"],
        **{f"serialized_{name}.pt": torch_saved(data) for name, data in held.items()},
    }


def with_json(members: dict[str, bytes], name: str, change: Callable[[dict], object]) -> bytes:
    """Return a program of which one part is changed."""
    data = json.loads(members[name])
    change(data)
    return zipped({**members, name: json.dumps(data).encode()})


def graphs(members: dict[str, bytes], model: str) -> Iterator[tuple[str, bytes]]:
    """Yield programs with graphs that torch would load by more than reading them."""

    def graph(change: Callable[[dict], object]) -> bytes:
        return with_json(members, model, lambda data: change(data["graph_module"]["graph"]))

    def node(change: Callable[[dict], object]) -> bytes:
        return graph(lambda found: change(found["nodes"][0]))

    for target in (
        "os.system", "torch.ops.aten.from_file.default", "torch.ops.prims.x.default", "torch.load",
        "torch.ops.higher_order.cond", "math.__import__('os')", "_operator.attrgetter", "eval",
        "torch.ops.aten.add.Tensor\nimport os", "torch.sym_x.__class__",
        "torch.ops.aten.save.default", "torch.ops.aten._convert_indices_from_csr_to_coo.default",
        "torch.ops.aten._embedding_bag_dense_backward.default", "torch.ops.aten.relu.out",
        "torch.ops.aten.sparse_compressed_tensor.comp_plain_value_size",
        "torch.ops.aten.segment_reduce.default", "torch.ops.aten.mkldnn_rnn_layer.default",
        "torch.ops.aten.ctc_loss.Tensor", "torch.ops.aten.set_.source_Tensor_storage_offset",
        "torch.ops.aten.set_data.default", "torch.ops.aten.resize_.default",
        "torch.ops.aten.record_stream.default", "torch.ops.aten.manual_seed.default",
        "torch.ops.aten._fft_r2c.default",
        "torch.ops.aten.max_pool2d_with_indices_backward.default",
    ):  # fmt: skip
        yield f"the operation {target!r}", node(lambda n, t=target: n.update(target=t))
    for target in ("torch.ops.aten.from_file.default", "torch.ops.aten.relu.default"):

        def called_by_another(found: dict, operator: str = target) -> None:
            given = ({"as_bool": False}, {"as_operator": operator}, {"as_string": "flag"})
            inputs = [{"name": "", "arg": one, "kind": 1} for one in given]
            name = "torch.ops.higher_order.wrap_with_set_grad_enabled"
            found.update(target=name, inputs=inputs)

        yield f"the operation {target!r} called by another", node(called_by_another)
    for name in ('x"; import os', "x\\", "a b", "a.b", "x'"):
        yield f"the node {name!r}", node(lambda n, t=name: n.update(name=t))
    for text_ in (
        "__import__('os').system('touch flag')", "9**9**9**9", "Pow(9, Pow(9, 9))", "s0.__class__",
        "Symbol('s0', evil=open('flag','w'))", "1" * 20, "(" * 1500 + ")" * 1500,
    ):  # fmt: skip

        def expression(data: dict, text_: str = text_) -> None:
            values = data["graph_module"]["graph"]["tensor_values"].values()
            next(iter(values))["sizes"][0] = {"as_expr": {"expr_str": text_, "hint": {"as_int": 3}}}

        yield f"the expression {text_[:40]!r}", with_json(members, model, expression)
    for context in ({"__enum__": True, "fqn": "antigravity:x", "name": "a"}, {"a": 1}, [[1]], 'x"'):
        spec = {"type": "builtins.dict", "context": json.dumps(context), "children_spec": []}

        def nested(data: dict, spec: dict = spec) -> None:
            signature = data["graph_module"]["module_call_graph"][0]["signature"]
            signature["in_spec"] = json.dumps([1, spec])

        yield f"arguments nested by {context}", with_json(members, model, nested)
    yield (
        "a keyword with code",
        with_json(
            members,
            model,
            lambda d: d["graph_module"]["module_call_graph"][0]["signature"].update(
                forward_arg_names=["x=print()"]
            ),
        ),
    )
    yield (
        "an object that is no tensor",
        graph(lambda found: found.update(custom_obj_values={"a": {}})),
    )


def older_programs() -> Iterator[tuple[str, bytes]]:
    """Yield such programs in the layout of torch before 2.8."""
    members = older_program()
    model = "serialized_exported_program.json"
    yield from graphs(members, model)
    yield "the member evil.so", zipped({**members, "evil.so": b"x"})
    for name in members:
        if name.endswith(".pt"):
            code = saved(called(named("os", "system"), plain("touch flag")))
            yield f"{name} that is code", zipped({**members, name: code})
            yield f"{name} that is a module", zipped({**members, name: saved(module())})
            yield f"{name} that is nothing", zipped({**members, name: b""})
    for data in (b"{", b"[" * 100_000, b"[]"):
        yield f"the graph {data[:9]!r}", zipped({**members, model: data})
    for name in members:
        yield f"no {name}", zipped({n: data for n, data in members.items() if n != name})


def programs() -> Iterator[tuple[str, bytes]]:
    """Yield programs that torch would load by more than reading them."""
    members = program()
    model = next(name for name in members if name.endswith("model.json"))
    config = next(name for name in members if name.endswith("weights_config.json"))
    inputs = next(name for name in members if name.endswith("model.pt"))
    folder = model.partition("/")[0]

    def weight(name: str, change: Callable[[dict], object]) -> bytes:
        return with_json(members, config, lambda data: change(data["config"][name]))

    yield from graphs(members, model)
    for what, change in {
        "a pickled weight": {"use_pickle": True},
        "a weight elsewhere": {"path_name": "../model.pt"},
        "a weight that is an object": {"path_name": "custom_obj_0"},
        "a weight that is not there": {"path_name": "weight_99"},
    }.items():
        yield what, weight("0.weight", lambda found, change=change: found.update(change))
    odd = {"a weight of a trillion": [{"as_int": 10**12}], "a size that is none": [3]}
    for what, sizes in odd.items():
        yield what, weight("0.bias", lambda found, s=sizes: found["tensor_meta"].update(sizes=s))
    for name in ("data/aotinductor/model/x.so", "executorch/x", "data/weights/model.pt",
                 "data/constants/custom_obj_0", "models/other.json", "code/evil.py"):  # fmt: skip
        yield f"the member {name}", zipped({**members, f"{folder}/{name}": b"x"})
    yield (
        "example inputs that are code",
        zipped({**members, inputs: saved(called(named("os", "system"), plain("touch flag")))}),
    )
    yield "example inputs that are a module", zipped({**members, inputs: saved(module())})
    yield "example inputs that are nothing", zipped({**members, inputs: b""})
    for name in (model, config):
        yield f"no JSON in {name}", zipped({**members, name: b"{"})
        yield f"a deep {name}", zipped({**members, name: b"[" * 100_000})
        yield f"a list in {name}", zipped({**members, name: b"[]"})
        yield f"no {name}", zipped({n: data for n, data in members.items() if n != name})


def classes() -> dict[type, dict[str, object]]:
    """Return what every class of torch.nn, torch.fx, torchvision and fxgrow holds."""
    packages = ("torch.nn", "torch._tensor", "torch.fx", "torchvision", "fxgrow", "collections")
    counted = ("__slotnames__", "__annotations__", "next_id", "cache_hits", "cache_misses")
    found: dict[type, dict[str, object]] = {}
    for name, home in list(sys.modules.items()):
        if name.startswith(packages):
            for value in [*vars(home).values()]:
                if issubclass(type(value), type):  # asks no object for its class
                    held = vars(value).items()
                    found[value] = {key: part for key, part in held if key not in counted}
    return found


def changed(before: dict[type, dict[str, object]]) -> list[str]:
    """Return the parts of classes that are others than before."""
    after = classes()
    return [
        f"{kind.__module__}.{kind.__qualname__}.{key}"
        for kind, held in before.items()
        for key in held.keys() | after[kind].keys()
        if held.get(key) is not after[kind].get(key)
    ]


def write(folder: Path, data: bytes, suffix: str) -> Path:
    path = folder / f"hostile{suffix}"
    path.write_bytes(data)
    return path


def load_pickled(path: Path, *, trust_pickle: bool = False) -> object:
    """Return what ``torch.save`` wrote into a file, whatever its format is said to be."""
    if trust_pickle:
        return load_trusted(path)
    with FileReader(path) as file:
        return load_untrusted(file)
