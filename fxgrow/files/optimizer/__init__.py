"""Optimizers of grown networks: their averages grow with the weights.

:func:`grow_optimizer_` is for training that goes on in the same process, :func:`grow_state_dict`
for what a checkpoint holds. Kinds of buffers are registered in :data:`.buffers.BUFFERS`.
"""

from fxgrow.files.optimizer.buffers import BUFFERS, Buffer
from fxgrow.files.optimizer.growth import grow_optimizer_, grow_state_dict

__all__ = ["BUFFERS", "Buffer", "grow_optimizer_", "grow_state_dict"]
