"""Hashes that can be summed: of what a channel touches, in no order."""

from __future__ import annotations

import numpy as np

from fxgrow.channels.channels import HashArray


def mix(values: HashArray) -> HashArray:
    """Return well-mixed 64-bit hashes (the splitmix64 finaliser), so that their sums differ."""
    z: HashArray = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: HashArray = z ^ (z >> np.uint64(31))
    return mixed
