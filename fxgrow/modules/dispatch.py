"""The base of the modes that see each operation: one that lets torch's compiler unloaded."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode whose ``__torch_dispatch__`` is called as it is.

    torch wraps what is called for each operation, to keep its compiler (dynamo) away from it: that
    loads the compiler, for most of a second, and takes time at each call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return whether to be wrapped."""
        return False
