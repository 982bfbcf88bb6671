"""Which networks of Hugging Face transformers can be widened: a row for each, hidden and all.

    python tests/benchmarks/transformers_coverage.py [NAME …]

Tiny configurations with random float64 weights (``tests/hugging_face.py``). ``max_rel`` compares
the outputs of the widened network with those of the original; norms that compute in float32
whatever the weights are leave about 1e-7 where a stream grows. ``s`` is for all: analysis, plan,
growth and verification.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hugging_face import CORE, EXTRAS, build, outputs
from networks import max_rel

import fxgrow
from fxgrow.errors import FxgrowError

HEADER = "| network | where | groups | widened | pinned or refused | max_rel | s |"


def row(name: str, where: str) -> str:
    """Return a row of the table."""
    model, inputs = build(name)
    begin = time.perf_counter()
    try:
        groups = fxgrow.inspect(model, inputs).parts[0].groups
        reasons = {group.name: group.reason for group in groups if group.kind == "pinned"}
        grown = fxgrow.widen(model, "2x", inputs, where=where)
    except FxgrowError as error:
        return f"| {name} | {where} | – | 0 | {error} | – | {time.perf_counter() - begin:.1f} |"
    seconds = time.perf_counter() - begin
    reasons |= {refusal.name: refusal.reason for refusal in grown.plan.refused}
    pairs = zip(outputs(model, inputs), outputs(grown.model, inputs), strict=True)
    worst = max(max_rel(old, new) for old, new in pairs)
    short = Counter(reason.split(" (aten.")[0] for reason in reasons.values())
    counted = "; ".join(f"{count} × {reason}" for reason, count in short.items())
    counts = f"{len(groups)} | {len(grown.plan.groups)}"
    return f"| {name} | {where} | {counts} | {counted} | {worst:.1e} | {seconds:.1f} |"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print(HEADER)
    print("|" + " --- |" * (HEADER.count("|") - 1))
    for name in sys.argv[1:] or [*CORE, *EXTRAS]:
        for where in ("hidden", "all"):
            print(row(name, where), flush=True)


if __name__ == "__main__":
    main()
