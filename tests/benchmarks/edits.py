"""Plans of every torchvision classification network, told apart before and after a change.

usage: python tests/benchmarks/edits.py record FOLDER [NAME ...]
       python tests/benchmarks/edits.py compare BEFORE AFTER

``record`` plans each network 2x and 1.5x, hidden groups and all, without weights, and writes what
each plan says of tensors, attributes, sizes and groups to one JSON file per network; planning is
timed. To record another version, let PYTHONPATH name its checkout. ``compare`` prints the plans
that differ, and where they begin to.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CASES = [(where, width) for where in ("hidden", "all") for width in ("2x", "1.5x")]
RESCALING = "default_vt"  # the plans then also say where every factor is taken up
TIMES = "seconds"


def classifiers() -> list[str]:
    """Return the names of torchvision's classification networks."""
    from torchvision.models import list_models

    return list_models(module=__import__("torchvision").models)


def recorded(name: str) -> dict[str, Any]:
    """Return what the plans of one network say."""
    from torchvision.models import get_model

    try:
        from fxgrow.api.widen import plan
    except ImportError:  # as it was before there were rooms
        from fxgrow.api.widen import plan
    from fxgrow.errors import FxgrowError

    try:
        with torch.device("meta"):
            model = get_model(name, weights=None).eval()
    except NotImplementedError:  # its initial values look at values
        model = get_model(name, weights=None).eval()
    found: dict[str, Any] = {TIMES: {}}
    for where, width in CASES:
        began = time.process_time()
        try:
            made = plan(model, width, where=where, rescaling=RESCALING)
            found[f"{where} {width}"] = json.loads(made.to_json())
        except FxgrowError as error:
            found[f"{where} {width}"] = {"refused": str(error)}
        found[TIMES][f"{where} {width}"] = round(time.process_time() - began, 3)
    return found


def record(folder: Path, names: list[str]) -> None:
    """Write one file per network."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names or classifiers():
        path = folder / f"{name}.json"
        if not path.exists():
            found = recorded(name)
            path.write_text(json.dumps(found))
            print(name, *found[TIMES].values(), flush=True)


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Yield where two plans differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{at}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            name = one.get("name", index) if isinstance(one, dict) else index
            yield from differences(one, other, f"{at}[{name}]")
    elif before != after:
        yield f"{at}: {str(before)[:100]} → {str(after)[:100]}"


def present(data: Any) -> Any:
    """Return a plan as this version writes it; what is no plan is as it is."""
    from fxgrow.plan.schema import Plan

    return Plan.from_dict(data).to_dict() if data and "schema" in data else data


def compare(before: Path, after: Path) -> int:
    """Print where the plans of two folders differ; return how many do."""
    plans = changed = 0
    for path in sorted(before.glob("*.json")):
        old = json.loads(path.read_text())
        new = json.loads((after / path.name).read_text()) if (after / path.name).exists() else {}
        for case in (case for case in old if case != TIMES):
            plans += 1
            found = list(differences(present(old[case]), present(new.get(case))))
            if found:
                changed += 1
                print(f"{path.stem} {case}: {len(found)} differences")
                print(*(f"    {line}" for line in found[:5]), sep="\n")
    print(f"{changed} of {plans} plans differ")
    return changed


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])) > 0)
