"""The convolutions of a network: their settings, and what else uses their weights.

That a kernel may grow is known only where the layer's forward is torch's own, so that its padding
is what its attributes say, and where its weight is a parameter that it alone reads, or others like
it, whose kernels then grow along.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from fxgrow.channels.analysis import Analysis
from fxgrow.grow.identity.concrete_run import record
from fxgrow.grow.kernels.taps import Convolution, PerDim
from fxgrow.modules.tensors import layer_of, named_tensors


def convolutions(analysis: Analysis) -> tuple[str, ...]:
    """Return the layers with a kernel: convolutions, and whatever else convolves its weight."""
    inside = analysis.traced.module
    found = {
        name: None
        for name, module in analysis.traced.standin.named_modules(remove_duplicate=False)
        if name and isinstance(module, _ConvNd) and name.startswith(f"{inside}." if inside else "")
    }
    for operation in analysis.tape.operations:
        if operation.name == "convolution":
            found |= dict.fromkeys(layer_of(name) for name in operation.inputs[1].origins)
    return tuple(found)


def settings_of(module: _ConvNd) -> Convolution:
    """Return what a convolution's attributes say."""
    padding = module.padding
    return Convolution(
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(module.dilation),
        padding if isinstance(padding, str) else tuple(padding),
        tuple(module.output_padding),
        bool(module.transposed),
        module.padding_mode,
    )


def sharing_weight(analysis: Analysis, layer: str) -> dict[str, _ConvNd] | str:
    """Return the convolutions that have a layer's weight, by name, itself included.

    Or why they cannot be told: one of them computes in another way than torch's own, or something
    else uses the weight too.
    """
    standin, inside = analysis.traced.standin, analysis.traced.module
    own = torch_convolution(standin, layer)
    if isinstance(own, str):
        return own
    names = [name for name, tensor in named_tensors(standin).items() if tensor is own.weight]
    found: dict[int, tuple[str, _ConvNd]] = {}
    for name in names:
        if inside and not name.startswith(f"{inside}."):
            return f"its weight is also {name}, outside of {inside}"
        module = torch_convolution(standin, layer_of(name))
        if isinstance(module, str):
            return f"its weight is also {name}: {module}"
        found.setdefault(id(module), (layer_of(name), module))
    for operation in analysis.tape.operations:
        if set(names).isdisjoint(operation.parameters):
            continue
        user = standin.get_submodule(operation.module)
        if operation.name != "convolution" or id(user) not in found:
            where = operation.module or "the model's own forward"
            return f"its weight is also used in {where} ({operation.name})"
    return dict(found.values())


def torch_convolution(model: nn.Module, layer: str) -> _ConvNd | str:
    """Return a layer that convolves its own weight as torch's classes do, or why it is none."""
    module = dict(model.named_modules(remove_duplicate=False)).get(layer)
    if module is None:
        return f"it is a parameter of the whole ({type(model).__name__}), not of a layer"
    kind = type(module).__name__
    if not isinstance(module, _ConvNd):
        return f"the forward of {kind} convolves by itself, with a padding that no attribute tells"
    if any(_home(module, method) != _ConvNd.__module__ for method in ("forward", "_conv_forward")):
        return f"{kind} has a forward of its own, which may use the kernel otherwise"
    if is_parametrized(module, "weight"):
        rule = type(module.parametrizations.weight[0]).__name__  # type: ignore[union-attr,index]
        return f"its weight is computed from other parameters ({rule.lstrip('_')})"
    if not isinstance(module._parameters.get("weight"), Tensor):
        return "its weight is no parameter: something computes it before each run"
    return module


def _home(module: nn.Module, method: str) -> str:
    """Return the name of the Python module that defines a method of a layer."""
    if method in vars(module):  # set on this layer alone
        return ""
    classes = (cls for cls in type(module).__mro__ if method in vars(cls))
    return next(classes, _ConvNd).__module__


def input_sizes(analysis: Analysis, layer: str, dims: int) -> list[PerDim]:
    """Return the sizes in space of the inputs that a convolution gets in a run in eval mode."""
    calls = record(analysis.traced, [layer]).calls[layer]
    return [call.inputs[0].shape[-dims:] for call in calls]
