"""Which operations of ATen a program that is not trusted may name.

ATen is more than what computes: what TorchScript calls under its name writes files, and kernels
that torch calls itself take what they get to be right, so that a wrong index, length or size among
their arguments reads and writes memory that is not theirs.
"""

from __future__ import annotations

import re

import torch

_NAMED = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
# A private operation is checked by what calls it, unless it is of the core. These others stand in
# programs as they are, and check what they get.
_EXPORTED = re.compile(
    r"_assert_(tensor_metadata|scalar|async)|_weight_norm|_conj|_trilinear|_upsample_\w+"
    r"|_linalg_(det|slogdet|svd|eigh|solve_ex)|__\w+__"
)
# What is made of indices or addresses that nobody compares with the memory, what one backend alone
# computes, and what puts other memory under a tensor.
_UNCHECKED = re.compile(
    r"unsafe|backward|ctc_loss|sparse|nested|jagged|quant|mkldnn|cudnn|miopen|fbgemm|from_file"
    r"|^_fft_|^set(_|_data)?$|^shallow_copy|^resize"
)
_UNCHECKED_KINDS = re.compile(r"Storage|Stream|bool unsafe")  # of arguments


def is_safe(target: str) -> bool:
    """Return whether an operation computes, and checks what it is given.

    Args:
        target: as programs name it.

    Example:
        >>> is_safe("torch.ops.aten.relu.default"), is_safe("torch.ops.aten.save.default")
        (True, False)
    """
    named = _NAMED.fullmatch(target)
    if named is None:
        return False
    name, overload = named.groups()
    full = f"aten::{name}" if overload == "default" else f"aten::{name}.{overload}"
    if not torch._C._dispatch_has_kernel(full):  # TorchScript's own, or none
        return False
    operation = getattr(getattr(torch.ops.aten, name), overload)
    is_core = torch.Tag.core in operation.tags
    if name.startswith("_") and not (is_core or _EXPORTED.fullmatch(name)):
        return False
    arguments = operation._schema.arguments
    kinds = " ".join(f"{argument.type} {argument.name}" for argument in arguments)
    written = any(argument.is_out for argument in arguments)
    return not (written or _UNCHECKED.search(name) or _UNCHECKED_KINDS.search(kinds))
