"""The command line: a thin layer over the Python API that loads torch only when it must."""

from fxgrow.cli.app import main

__all__ = ["main"]
