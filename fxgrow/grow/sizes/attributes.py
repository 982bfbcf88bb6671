"""Attributes of modules that must follow their tensors, so that a grown module tells the truth.

One line per family: which attribute repeats which size. A module of your own whose ``forward``
reads such an attribute is registered with ``@follows(MyModule)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from fxgrow.errors import PlanError
from fxgrow.modules.tensors import aliases_of, layer_of, named_tensors
from fxgrow.plan.edits import ModuleEdit

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Attributes: TypeAlias = dict[str, int | tuple[int, ...]]
Follow: TypeAlias = Callable[[nn.Module, Shapes, "int | None"], Attributes]

TOGETHER = (
    "all heads of an nn.MultiheadAttention are together as wide as what comes in (embed_dim), so "
    "that both grow alike, or neither does"
)

ALL_LAYERS = (
    "all layers and directions of an nn.LSTM, nn.GRU or nn.RNN are alike wide (hidden_size), so "
    "that all grow alike, or none does"
)
ALIKE = (TOGETHER, ALL_LAYERS)  # why one group does not grow without another

_FOLLOWS: dict[type[nn.Module], Follow] = {}


def follows(*classes: type[nn.Module]) -> Callable[[Follow], Follow]:
    """Return a decorator that registers what attributes repeat which sizes.

    The function gets the module, the new shapes of its own tensors by local name, and the new
    number of groups of its convolution or group norm (None if unchanged); it returns the
    attributes' new values.

    Raises:
        ValueError: a class is registered already.
    """

    def decorate(function: Follow) -> Follow:
        for cls in classes:
            if cls in _FOLLOWS:
                raise ValueError(f"{cls.__name__} is registered already")
            _FOLLOWS[cls] = function
        return function

    return decorate


def _repeats(**sizes: tuple[str, int]) -> Follow:
    """Return what gives each attribute the size of a tensor along a dim."""
    return lambda _, shapes, groups: {x: shapes[name][dim] for x, (name, dim) in sizes.items()}


follows(nn.Linear)(_repeats(out_features=("weight", 0), in_features=("weight", 1)))
follows(nn.Embedding)(_repeats(num_embeddings=("weight", 0), embedding_dim=("weight", 1)))
follows(nn.EmbeddingBag)(_repeats(embedding_dim=("weight", 1)))  # rows are looked up and stay
follows(nn.RNNCellBase)(_repeats(hidden_size=("weight_hh", 1), input_size=("weight_ih", 1)))
follows(nn.PReLU)(_repeats(num_parameters=("weight", 0)))


@follows(_ConvNd)
def convolution(module: nn.Module, shapes: Shapes, groups: int | None) -> Attributes:
    """``out_channels``, ``in_channels`` and ``groups``."""
    count = groups if groups is not None else int(module.groups)  # type: ignore[arg-type]
    first, second = shapes["weight"][:2]
    if getattr(module, "transposed", False):
        return {"in_channels": first, "out_channels": second * count, "groups": count}
    return {"out_channels": first, "in_channels": second * count, "groups": count}


@follows(_NormBase)
def batch_norm(module: nn.Module, shapes: Shapes, groups: int | None) -> Attributes:
    """``num_features``."""
    del module, groups
    return {"num_features": next(shape[0] for shape in shapes.values() if shape)}


@follows(nn.LayerNorm, nn.RMSNorm)
def layer_norm(module: nn.Module, shapes: Shapes, groups: int | None) -> Attributes:
    """``normalized_shape``."""
    del module, groups
    return {"normalized_shape": next(tuple(shape) for shape in shapes.values())}


@follows(nn.GroupNorm)
def group_norm(module: nn.Module, shapes: Shapes, groups: int | None) -> Attributes:
    """``num_channels`` and ``num_groups``."""
    count = groups if groups is not None else int(module.num_groups)  # type: ignore[arg-type]
    return {"num_channels": next(shape[0] for shape in shapes.values()), "num_groups": count}


@follows(nn.MultiheadAttention)
def attention(module: nn.Module, shapes: Shapes, groups: int | None) -> Attributes:
    """``embed_dim`` and, as ``head_dim`` stays, ``num_heads``."""
    del groups
    width = shapes["in_proj_weight" if "in_proj_weight" in shapes else "q_proj_weight"][1]
    same = module.kdim == module.embed_dim
    return {
        "embed_dim": width,
        "num_heads": width // int(module.head_dim),  # type: ignore[arg-type]
        "kdim": width if same else shapes["k_proj_weight"][1],
        "vdim": width if same else shapes["v_proj_weight"][1],
    }


@follows(nn.RNNBase)
def recurrent(module: nn.Module, shapes: Shapes, groups: int | None) -> Attributes:
    """``hidden_size``, of which each gate has one, ``input_size`` and ``proj_size``."""
    del groups
    rows, inputs = shapes["weight_ih_l0"]
    gates = {"LSTM": 4, "GRU": 3}.get(str(module.mode), 1)
    sizes: Attributes = {"hidden_size": rows // gates, "input_size": inputs}
    return sizes | ({"proj_size": shapes["weight_hr_l0"][0]} if module.proj_size else {})


def following(module: object) -> Follow | None:
    """Return what tells the attributes of a module that repeat sizes of its tensors, if known."""
    return next((_FOLLOWS[c] for c in type(module).__mro__ if c in _FOLLOWS), None)


def sizes_told(module: nn.Module) -> Attributes:
    """Return what a module should say of the sizes of its tensors; {} where nothing is known."""
    follow = following(module)
    if follow is None:
        return {}
    try:
        shapes = {local: tuple(tensor.shape) for local, _, tensor in _own_tensors(module)}
        return follow(module, shapes, None)
    except Exception:  # of a class of the user's, that keeps its tensors elsewhere
        return {}


def _unfit(name: str, module: nn.Module) -> PlanError:
    """Return why attributes cannot follow the tensors of a module."""
    if prune.is_pruned(module):
        return PlanError(
            f"the weights of {name} are pruned, by masks of these sizes: make that permanent "
            "first, by torch.nn.utils.prune.remove.",
            name=name,
        )
    return PlanError(
        f"the attributes of {name} ({type(module).__name__}) do not fit its weights.",
        name=name,
        way_out="Build the module anew and load the weights into it.",
    )


def attribute_edits(
    model: nn.Module, new_shapes: Shapes, new_groups: Mapping[str, int]
) -> Iterator[ModuleEdit]:
    """Yield the attribute edits that go with new tensor shapes.

    Args:
        model: the network, at its old sizes.
        new_shapes: new shape by fully qualified name, of the tensors that change.
        new_groups: new number of groups by name of a grouped convolution's or a group norm's
            weight.

    Raises:
        PlanError: the attributes that a module has do not fit the tensors that it has.
    """
    groups_of = {layer_of(weight): count for weight, count in new_groups.items()}
    aliases = aliases_of(named_tensors(model)).items()  # layers that share a tensor follow alike
    tied = {name: new_shapes[first] for name, first in aliases if first in new_shapes}
    new_shapes = {**tied, **new_shapes}
    for owner in sorted({layer_of(tensor) for tensor in new_shapes}):
        try:
            module = model.get_submodule(owner)
        except AttributeError:  # a raw parameter of the top-level module
            continue
        follow = following(module)
        if follow is None:
            continue
        shapes = {
            local: tuple(new_shapes.get(f"{owner}.{name}", tuple(tensor.shape)))
            for local, name, tensor in _own_tensors(module)
        }
        groups = groups_of.get(owner)
        try:
            attributes = follow(module, shapes, groups)
        except (KeyError, StopIteration, TypeError, ZeroDivisionError) as error:
            raise _unfit(owner, module) from error
        for attribute, after in attributes.items():
            before = getattr(module, attribute, after)
            if before != after:
                yield ModuleEdit(owner, attribute, before, after)


def alike_layers(model: nn.Module) -> set[str]:
    """Return the layers of a network whose own code has one size for several groups."""
    kinds = (nn.MultiheadAttention, nn.RNNBase)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def misfit(model: nn.Module, new_shapes: Shapes) -> tuple[str, str] | None:
    """Return a layer whose own code cannot run at new sizes, whatever its attributes, and why.

    Args:
        model: the network, at its old sizes.
        new_shapes: new shape by fully qualified name, of the tensors that change.
    """
    for owner in sorted({layer_of(tensor) for tensor in new_shapes}):
        packed = new_shapes.get(f"{owner}.in_proj_weight")
        rows, width = packed or new_shapes.get(f"{owner}.q_proj_weight") or (0, 0)
        uneven = rows != (3 * width if packed else width)
        if uneven and isinstance(model.get_submodule(owner), nn.MultiheadAttention):
            return owner, TOGETHER
    recurrent = {n: m for n, m in model.named_modules() if isinstance(m, nn.RNNBase)}
    for owner, module in recurrent.items():
        sizes = {
            new_shapes.get(f"{owner}.{name}", tuple(tensor.shape))
            for name, tensor in module.named_parameters(recurse=False)
            if name.startswith("weight_hh")
        }
        if len(sizes) > 1:
            return owner, ALL_LAYERS
    return None


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield a module's tensors: what it calls them, their names below it, and themselves.

    Of a weight that is computed of others, the one that has its shape.
    """
    for name, tensor in (
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ):
        yield name, name, tensor
    if is_parametrized(module):
        for local, parts in module.parametrizations.items():  # type: ignore[operator, union-attr]
            original = "original" if hasattr(parts, "original") else "original1"
            yield local, f"parametrizations.{local}.{original}", getattr(parts, original)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, f"{hook.name}_v", getattr(module, f"{hook.name}_v")
