"""Inits that compute new weights from batches of data, for :func:`fxgrow.widen`.

:class:`GradMax` keeps the function and gives new channels the largest gradients; :class:`Tiny`
adds channels for what the present ones cannot express, and takes a step down the loss.
"""

from fxgrow.grow.data.gradmax import GradMax as GradMax
from fxgrow.grow.data.inits import DataDriven as DataDriven
from fxgrow.grow.data.tiny import Tiny as Tiny
