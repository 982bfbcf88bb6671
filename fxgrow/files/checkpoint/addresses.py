"""What somebody may have meant by a path at which there is nothing."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pt2")
_OTHERS = (".json", ".onnx", ".h5", ".gguf", ".npz", ".keras", ".msgpack", ".zip", ".gz")


def way_to(path: Path) -> str:
    """Return the way out where a path does not exist: it may be the name of something online."""
    text = str(path)
    if re.match(r"(https?|s3|gs|ftp):/", text):
        return "It is an address: download the file, and name it."
    hub = re.fullmatch(r"(?:hf-hub:|hf_hub:|hf:/+)?([\w.-]+(?:/[\w.-]+)?)", text)
    plain = path.suffix.lower() not in (*WEIGHT_SUFFIXES, *_OTHERS)
    if hub and plain and not path.is_absolute() and not text.startswith("."):
        return (
            "Check the path. If it is a name of the Hugging Face Hub, download it (hf download "
            f"{hub[1]} --local-dir DIRECTORY) and name the directory; if it is an architecture, "
            "its weights are needed: a file, with --arch."
        )
    return "Check the path."
