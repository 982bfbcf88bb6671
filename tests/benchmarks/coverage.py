"""Which architectures can be widened: a row for each network, hidden groups and all groups.

    python tests/benchmarks/coverage.py [--family video] [--width 2x] [ARCH …]
    python tests/benchmarks/coverage.py --family timm [NAME …]
    python tests/benchmarks/coverage.py --family transformers [NAME …]

Each network of a family gets random weights in float64 and mild random norms, so that a hundred
layers neither explode nor die out; it is widened and compared with the original in eval mode and
in train mode (``max_rel``), on inputs inferred for it. Of timm, the family holds one network for
each model file: the one with the fewest parameters. ``s`` is the time for tracing, labelling and
finding groups, ``s to compare`` CPU time; with ``--torch-pruning``, ``ratio`` is the CPU time of
the former over what Torch-Pruning takes to build its dependency graph. Networks that would have
more than ``--max-parameters`` parameters are planned and not compared; ``--abridged`` leaves out
all blocks that are like the two before them, which makes large networks comparable. With
``--noise`` twins do not cancel: how much the outputs change then tells what a comparison would
notice.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
import torchvision
from comparing import abridged, compared, filled
from torch import Tensor, nn

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.scope import follow
from fxgrow.cli.arguments import parse_widths
from fxgrow.errors import FxgrowError
from fxgrow.grow.widen.submodules import plan_parts
from fxgrow.modules.architectures import Architecture
from fxgrow.plan.requests import Widen
from fxgrow.plan.schema import Plan

FAMILIES = (
    "classification", "segmentation", "video", "detection", "optical_flow", "timm", "transformers",
)  # fmt: skip
COLUMNS = (
    "network",
    "where",
    "groups",
    "widened",
    "pinned or refused",
    "max_rel eval",
    "max_rel train",
    "compared on",
    "s",
    "s to compare",
    "ratio",
)


def network(
    name: str, options: argparse.Namespace, device: str
) -> tuple[nn.Module, dict[str, Tensor] | None, str]:
    """Return a network, inputs if they are not to be inferred, and what was left out of it."""
    if options.family == "transformers":
        import hugging_face

        return *hugging_face.build(name), ""
    library = "timm" if options.family == "timm" else "torchvision"
    model = Architecture(f"{library}:{name}").build(device).eval()
    left_out, total = abridged(model) if options.abridged else (0, 0)
    return model, None, f"{total - left_out} of {total} blocks: " if left_out else ""


def rows(name: str, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield the rows of one network; whatever goes wrong is told in it."""
    row: dict[str, object] = {"network": name}
    try:
        model, inputs, left_out = network(name, options, "meta")
        start, cpu = time.perf_counter(), time.process_time()
        parts, _ = follow(model, inputs)
        row["s"] = f"{time.perf_counter() - start:.2f}"
        cpu = time.process_time() - cpu
        row["ratio"] = peer_ratio(name, cpu) if options.torch_pruning else ""
    except Exception as error:  # a benchmark goes on
        yield row | {"widened": 0, "pinned or refused": told(error)}
        return
    groups = [group for part in parts for group in part.groups]
    for where in options.where or ("hidden", "all"):
        own = row | {"where": where, "groups": len(groups)}
        request = Widen(options.width, where=where, noise=options.noise)
        try:
            plan = plan_parts(parts, request, lambda _: math.nan)
            own |= {"widened": len(plan.groups), "pinned or refused": pinned(parts, plan)}
            cpu = time.process_time()
            size = plan.parameters[1]
            own["compared on"] = f"not ({size / 1e6:.0f} M parameters)"
            if size <= options.max_parameters:
                model = network(name, options, "cpu")[0]
                model = model if inputs else filled(model)
                found = compared(model, plan, options.batches, inputs)
                own["max_rel eval"] = f"{found.evaluated:.1e}"
                own["max_rel train"] = f"{found.trained:.1e}"
                own["compared on"] = f"{left_out}{found.inputs}"
                own["s to compare"] = f"{time.process_time() - cpu:.0f}"
        except Exception as error:
            own["pinned or refused"] = f"{own.get('pinned or refused', '')} {told(error)}".strip()
        yield own
        gc.collect()


def pinned(parts: Sequence[Analysis], plan: Plan) -> str:
    """Return what stays as it is and why, and which parts were followed."""
    groups = [group for part in parts for group in part.groups]
    reasons = {group.name: group.reason for group in groups if group.kind == "pinned"}
    reasons |= {refused.name: refused.reason for refused in plan.refused}
    where = ", ".join(part.module for part in plan.scopes)
    return "; ".join(filter(None, (f"in {where}" if where else "", counted(reasons.values()))))


def told(error: Exception) -> str:
    """Return an error in one line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace("|", "/")


def counted(reasons: Iterable[str]) -> str:
    """Return reasons with the number of times that each occurs."""
    found = Counter(reason.split(" (aten.")[0][:120].replace("|", "/") for reason in reasons)
    return "; ".join(f"{count}× {reason}" for reason, count in found.most_common())


def peer_ratio(name: str, cpu: float) -> str:
    """Return CPU seconds over those that Torch-Pruning takes for the same network."""
    import torch_pruning

    model = torchvision.models.get_model(name).eval()
    size = 299 if "inception" in name else 224
    start = time.process_time()
    try:
        torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 3, size, size))
    except Exception as error:
        return f"peer fails: {type(error).__name__}"
    return f"{cpu / (time.process_time() - start):.2f}"


def timm_representatives() -> Iterator[str]:
    """Yield, for each model file of timm, the architecture with the fewest parameters."""
    for file in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=file):
            with contextlib.suppress(FxgrowError):  # one that does not even build
                model = Architecture(f"timm:{name}").build("meta")
                sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        if sizes:
            yield min(sizes, key=lambda name: sizes[name])


def names(family: str) -> Iterable[str]:
    """Return the networks of a family."""
    if family == "timm":
        return timm_representatives()
    if family == "transformers":
        import hugging_face

        return [*hugging_face.CORE, *hugging_face.EXTRAS]
    module = torchvision.models
    if family != "classification":
        module = getattr(torchvision.models, family)
    found: list[str] = torchvision.models.list_models(module)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="classification")
    parser.add_argument("--width", action="append", help="2x, or GLOB=2x several times")
    parser.add_argument("--where", action="append", choices=("hidden", "stream", "all"))
    parser.add_argument("--max-parameters", type=float, default=3e8, help="0: compare nothing")
    parser.add_argument("--abridged", action="store_true", help="leave out repeated blocks")
    parser.add_argument("--batches", type=int, default=2, help="to compare on; 0: wholes alone")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--torch-pruning", action="store_true")
    parser.add_argument("architectures", nargs="*")
    options = parser.parse_args()
    options.width = parse_widths(options.width or ["2x"])
    warnings.simplefilter("ignore")  # about initial values
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    for name in options.architectures or names(options.family):
        for row in rows(name, options):
            print("|", " | ".join(str(row.get(column, "")) for column in COLUMNS), "|", flush=True)


if __name__ == "__main__":
    main()
