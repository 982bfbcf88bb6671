"""Weights in files: load them from whatever holds them, write new ones into the same container.

Pure files and data: nothing here knows of plans or of growth.
"""

# The formats register themselves.
from fxgrow.files.checkpoint import directory as directory
from fxgrow.files.checkpoint import exported as exported
from fxgrow.files.checkpoint import safetensors_files as safetensors_files
from fxgrow.files.checkpoint.saving import default_output, save_source
from fxgrow.files.checkpoint.source import Source, load_source
from fxgrow.files.checkpoint.writing import check_output

__all__ = ["Source", "check_output", "default_output", "load_source", "save_source"]
