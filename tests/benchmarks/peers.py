"""What fxgrow costs beside what does a part of the same, all in one run and as ratios.

usage: python tests/benchmarks/peers.py [--json FILE] [SECTION ...]

``block``: gromo widening one convolutional block, rescaled and paired. ``step``: new channels from
data (TINY) by both, with amplitudes by line search, and the losses they come to. ``graph``: Torch-
Pruning building its dependency graph, beside following. ``surgery``: a plan carried out, beside
copies of the same size. ``growth``: seconds over depth and width, with fitted exponents.
``judging``: what verification takes, beside one run of both networks forwards and backwards in
float64. ``loading``: imports after torch, and help texts beside those of a bare typer application.

CPU time on one thread, medians of runs that take turns, the quartiles of their ratios in brackets.
gromo and Torch-Pruning come with the extra ``bench``; what is missing is said and skipped.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from planning import residual_chain
from torch import Tensor, nn
from torchvision.models import get_model

import fxgrow
from fxgrow.api.widen import plan
from fxgrow.apply.module import apply_to_module
from fxgrow.channels.scope import follow

WIDTHS = (64, 256, 512)
FOLLOWED = (
    "alexnet", "vgg16_bn", "resnet18", "resnet50", "densenet121", "googlenet", "mobilenet_v2",
    "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t",
)  # fmt: skip
GROWN = ("mobilenet_v3_small", "resnet50", "vit_b_16")
JUDGED = ("mobilenet_v3_small", "resnet18", "resnet50")
DEPTHS, HIDDEN = (50, 100, 200, 400), (64, 128, 256, 512, 1024)
STEPPING_SEEDS = 12
Batches = list[tuple[Tensor, Tensor]]
BARE = "import typer\napp = typer.Typer()\n@app.command()\ndef run(name: str = 'x'): ...\napp()\n"
COMMAND = "from fxgrow.cli import main; main()"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        section, name: what was compared.
        ours, theirs: CPU seconds, medians.
        ratio: of the medians.
        quartiles: of the ratios of runs that followed one another.
        note: what else was measured: differences of outputs, an exponent.
    """

    section: str
    name: str
    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]
    note: str = ""

    def __str__(self) -> str:
        low, high = self.quartiles
        numbers = f"{1e3 * self.ours:9.1f} {1e3 * self.theirs:9.1f} {self.ratio:7.2f}"
        return f"{self.section:8} {self.name:36} {numbers} ({low:.2f} to {high:.2f}) {self.note}"


def seconds(function: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def compared(
    section: str,
    name: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    times: int = 9,
    note: str = "",
) -> Row:
    """Return a row; each function returns the seconds of a run, and the first runs do not count."""
    pairs = [(ours(), theirs()) for _ in range(times + 1)][1:]
    first, second = np.median(pairs, axis=0).tolist()
    ratios = [a / b for a, b in pairs]
    low, high = np.quantile(ratios, (0.25, 0.75)).tolist()
    return Row(section, name, first, second, first / second, (low, high), note)


class Block(nn.Module):
    """Two convolutions with a norm between them, and a shortcut around."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU()
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the branch makes of its input."""
        return x + self.second(self.act(self.norm(self.first(x))))


def growing_block(block: Block, width: int) -> nn.Module:
    """Return gromo's block that computes the same."""
    from gromo.containers.growing_block import Conv2dGrowingBlock
    from gromo.modules.growing_normalisation import GrowingBatchNorm2d

    norm = GrowingBatchNorm2d(width)
    norm.load_state_dict(block.norm.state_dict())
    made = Conv2dGrowingBlock(
        width, width, kernel_size=3, hidden_channels=width, pre_activation=nn.Identity(),
        mid_activation=nn.Sequential(norm, nn.ReLU()), kwargs_layer={"padding": 1},
        device=torch.device("cpu"),
    )  # fmt: skip
    made.first_layer.layer.load_state_dict(block.first.state_dict())
    made.second_layer.layer.load_state_dict(block.second.state_dict())
    return made.eval()


def grow_in_place(block: Any, width: int) -> None:
    """Widen gromo's block to twice its hidden width."""
    block.create_layer_extensions(
        width, neuron_pairing="vv_z_negz", rescaling="default_vt", noise_ratio=0.0
    )
    block.apply_change(extension_size=width, scaling_factor=1.0)
    block.delete_update()


def block() -> Iterator[Row]:
    """Widen one block to twice its hidden width, without verification."""
    for width in WIDTHS:
        torch.manual_seed(0)
        model, x = Block(width).eval(), torch.randn(2, width, 8, 8)
        grown: list[nn.Module] = []

        def ours(model: nn.Module = model, x: Tensor = x, grown: list[Any] = grown) -> float:
            def widen() -> None:
                made = fxgrow.widen(model, "2x", x, rescaling="default_vt", verify=False)
                grown[:1] = [made.model]

            return seconds(widen)

        def theirs(model: Block = model, width: int = width, grown: list[Any] = grown) -> float:
            made = growing_block(model, width)
            grown[1:] = [made]
            return seconds(lambda: grow_in_place(made, width))

        row = compared("block", f"{width} to {2 * width} hidden channels", ours, theirs, 15)
        with torch.no_grad():  # the rescaling leaves the branch √½ of what it was
            expected = x + (model(x) - x) * math.sqrt(0.5)
            off = [float((made(x) - expected).abs().max()) for made in grown]
        yield Row(**{**asdict(row), "note": f"off by {off[0]:.1e} and {off[1]:.1e}"})


def stepping_blocks(seed: int) -> dict[str, nn.Module]:
    """Return small blocks with a shortcut around, by what they are made of."""
    torch.manual_seed(seed)
    conv = partial(nn.Conv2d, kernel_size=3, padding=1)
    return {
        "MLP": Shortcut(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 12)),
        "conv, ReLU, conv": Shortcut(conv(6, 4), nn.ReLU(), conv(4, 6)),
        "conv, BN, ReLU, conv": Shortcut(conv(6, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6)),
    }


class Shortcut(nn.Sequential):
    """Layers with a shortcut around them."""

    def forward(self, x: Tensor) -> Tensor:
        """Add what the layers make of their input."""
        return x + super().forward(x)


def stepping_peer(model: nn.Sequential, *, full: bool = True) -> Any:
    """Return gromo's block that computes the same as a shortcut's layers.

    Args:
        model: the layers.
        full: whether new columns of a convolution have all its taps; gromo's default is one tap.
    """
    from gromo.containers.growing_block import Conv2dGrowingBlock, LinearGrowingBlock
    from gromo.modules.conv2d_growing_module import (
        FullConv2dGrowingModule,
        RestrictedConv2dGrowingModule,
    )
    from gromo.modules.growing_normalisation import GrowingBatchNorm2d

    first, *between, second = model
    mid: list[nn.Module] = []
    for layer in between:
        if isinstance(layer, nn.BatchNorm2d):
            mid.append(GrowingBatchNorm2d(layer.num_features))
            mid[-1].load_state_dict(layer.state_dict())
        else:
            mid.append(nn.ReLU())
    outer, hidden = first.weight.shape[1], first.weight.shape[0]
    told = {
        "pre_activation": nn.Identity(), "mid_activation": nn.Sequential(*mid),
        "device": torch.device("cpu"),
    }  # fmt: skip
    if isinstance(first, nn.Linear):
        made = LinearGrowingBlock(outer, outer, hidden_features=hidden, **told)
    else:
        made = Conv2dGrowingBlock(
            outer, outer, 3, hidden_channels=hidden, kwargs_layer={"padding": 1},
            growing_conv_type=FullConv2dGrowingModule if full else RestrictedConv2dGrowingModule,
            **told,
        )  # fmt: skip
    made.first_layer.layer.load_state_dict(first.state_dict())
    made.second_layer.layer.load_state_dict(second.state_dict())
    return made.eval()


def stepped_peer(made: Any, batches: Batches, count: int) -> float:
    """Return the loss after gromo has grown a block by the amplitude that lowers it most.

    The factor is the best of powers of √2, as fxgrow's amplitude is of 2.
    """
    made.init_computation()
    for x, y in batches:
        made.zero_grad()
        nn.functional.mse_loss(made(x), y).backward()
        made.update_computation()
    made.compute_optimal_updates(maximum_added_neurons=count, statistical_threshold=0.0)
    made.reset_computation()
    for module in made.modules():  # what a forward left there cannot be copied
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[key] = value.detach()
    losses = []
    for power in range(-16, 17):
        grown = copy.deepcopy(made)
        grown.apply_change(scaling_factor=2 ** (power / 2), apply_delta=False)
        grown.delete_update()
        with torch.no_grad():
            found = [float(nn.functional.mse_loss(grown.eval()(x), y)) for x, y in batches]
        losses.append(sum(found) / len(found))
    return min(losses)


def stepping_batches(name: str) -> Batches:
    """Return random inputs and targets for one of the small blocks."""
    shape = (12,) if name == "MLP" else (6, 8, 8)
    return [(torch.randn(32, *shape), torch.randn(32, *shape)) for _ in range(4)]


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Return the mean of the batches' losses."""
    with torch.no_grad():
        return sum(float(nn.functional.mse_loss(model(x), y)) for x, y in batches) / len(batches)


def stepped(model: nn.Module, batches: Batches) -> float:
    """Return the loss after fxgrow has grown a block likewise."""
    init = fxgrow.Tiny(nn.functional.mse_loss, batches)
    return mean_loss(
        fxgrow.widen(model, "+2", batches[0][0], init=init, verify=False).model, batches
    )


def step() -> Iterator[Row]:
    """Compute two new channels of small blocks from data; losses are medians over seeds."""
    names = list(stepping_blocks(0))
    for name in names:
        losses = []
        for seed in range(STEPPING_SEEDS):
            model = stepping_blocks(seed)[name].eval()
            batches = stepping_batches(name)
            losses.append((
                mean_loss(model, batches),
                stepped(model, batches),
                stepped_peer(stepping_peer(model), batches, 2),
                stepped_peer(stepping_peer(model, full=False), batches, 2),
            ))  # fmt: skip
        model, batches = stepping_blocks(0)[name].eval(), stepping_batches(name)

        def ours(model: nn.Module = model, batches: Batches = batches) -> float:
            return seconds(lambda: stepped(model, batches))

        def theirs(model: Any = model, batches: Batches = batches) -> float:
            return seconds(lambda: stepped_peer(stepping_peer(model), batches, 2))

        before, own, full, one_tap = np.median(losses, axis=0)
        lower = sum(row[1] < row[2] for row in losses)
        note = (
            f"loss {before:.3f} to {own:.3f} and {full:.3f} (ours lower in {lower} of "
            f"{len(losses)}), {one_tap:.3f} with one tap"
        )
        yield compared("step", name, ours, theirs, 3, note)


def graph() -> Iterator[Row]:
    """Follow networks, and build Torch-Pruning's dependency graph, on an image of 224 pixels."""
    import torch_pruning

    image, ratios = torch.zeros(1, 3, 224, 224), []
    for name in FOLLOWED:
        model = get_model(name, weights=None).eval()

        def ours(model: nn.Module = model) -> float:
            return seconds(lambda: follow(model, image))

        def theirs(model: nn.Module = model) -> float:
            built = torch_pruning.DependencyGraph()
            return seconds(lambda: built.build_dependency(model, image))

        row = compared("graph", name, ours, theirs, 5)
        ratios.append(row.ratio)
        yield row
    print(f"graph    of all: median {np.median(ratios):.2f}, worst {max(ratios):.2f}", flush=True)


def surgery() -> Iterator[Row]:
    """Carry a plan out; copy a state of the grown size, and draw as many numbers as are new."""
    for name in GROWN:
        model = get_model(name, weights=None).eval()
        made = plan(model, "2x")
        grown = apply_to_module(made, model)
        state, new = grown.state_dict(), made.parameters[1] - made.parameters[0]

        def carry_out(model: nn.Module = model, made: fxgrow.Plan = made) -> float:
            return seconds(lambda: apply_to_module(made, model))

        def copy_state(state: dict[str, Tensor] = state, new: int = new) -> float:
            def make() -> None:
                {key: tensor.clone() for key, tensor in state.items()}
                torch.empty(new).uniform_()

            return seconds(make)

        def copy_model(grown: nn.Module = grown) -> float:
            return seconds(lambda: copy.deepcopy(grown))

        yield compared("surgery", f"{name}, clone and draw", carry_out, copy_state)
        yield compared("surgery", f"{name}, deepcopy", carry_out, copy_model)
        whole = fxgrow.widen(model, "2x", verify=False)
        with tempfile.TemporaryDirectory() as folder:
            path, other = Path(folder, "grown.pt"), Path(folder, "copy.pt")

            def write(whole: fxgrow.Grown = whole, path: Path = path) -> float:
                path.unlink(missing_ok=True)
                return seconds(lambda: fxgrow.save(whole, path))

            def copy_file(path: Path = path, other: Path = other) -> float:
                return seconds(lambda: shutil.copyfile(path, other))

            yield compared("surgery", f"{name}, writing and copying the file", write, copy_file, 5)


def growth() -> Iterator[Row]:
    """Widen deeper and wider networks, without verification, beside a copy of the result."""
    cases: dict[str, tuple[tuple[int, ...], Callable[[int], nn.Module]]] = {
        "blocks": (DEPTHS, residual_chain),
        "channels": (HIDDEN, lambda width: nn.Sequential(
            nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )),
    }  # fmt: skip
    x = torch.zeros(2, 4)
    for kind, (counts, build) in cases.items():
        rows = []
        for count in counts:
            model = build(count).eval()
            grown = fxgrow.widen(model, "2x", x, verify=False).model

            def ours(model: nn.Module = model) -> float:
                return seconds(lambda: fxgrow.widen(model, "2x", x, verify=False))

            def theirs(grown: nn.Module = grown) -> float:
                return seconds(lambda: copy.deepcopy(grown))

            rows.append(compared("growth", f"{count} {kind}", ours, theirs, 5))
        of_ours, of_theirs = (
            np.polyfit(np.log(counts), np.log([getattr(row, side) for row in rows]), 1)[0]
            for side in ("ours", "theirs")
        )
        told = f"exponents over all {kind}: {of_ours:.2f} and {of_theirs:.2f}"
        yield from rows[:-1]
        yield Row(**{**asdict(rows[-1]), "note": told})


def judging() -> Iterator[Row]:
    """Verify, beside one run of both networks in float64 at the sizes that were judged."""
    for name in JUDGED:
        model = get_model(name, weights=None).eval()
        report = fxgrow.widen(model, "2x").report.verification
        both = model, fxgrow.widen(model, "2x", verify=False).model
        shapes = [tuple(map(int, told.split("x"))) for told in report.inputs]
        batches = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

        def ours(model: nn.Module = model) -> float:
            bare = seconds(lambda: fxgrow.widen(model, "2x", verify=False))
            return seconds(lambda: fxgrow.widen(model, "2x")) - bare

        def theirs(both: Any = both, batches: list[Tensor] = batches) -> float:
            doubles = [copy.deepcopy(one).double() for one in both]

            def run() -> None:
                for one in doubles:
                    for batch in batches:
                        one(batch).sum().backward()

            return seconds(run)

        yield compared("judging", name, ours, theirs, 3, note=" ".join(report.inputs))


def of_command(*arguments: str) -> float:
    """Return the CPU seconds of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    root = str(Path(fxgrow.__file__).parents[1])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", *arguments]
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def loading() -> Iterator[Row]:
    """Load what widening needs, beside torch; show help texts, beside a bare application's."""
    first = (
        "net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))"
    )
    used = f"import torch, fxgrow\nfxgrow.widen\n{first}"
    cases = {
        "torch, and fxgrow.widen": used,
        "torch, and a first widening": f"{used}\nfxgrow.widen(net, '2x')",
    }
    for name, code in cases.items():
        row = compared(
            "loading", name, lambda code=code: of_command(code), lambda: of_command("import torch")
        )
        more = row.ours - row.theirs
        yield Row(**{**asdict(row), "note": f"{more:.2f} s more"})
    for arguments in (["--help"], ["widen", "--help"]):
        yield compared(
            "loading",
            f"fxgrow {' '.join(arguments)}",
            lambda arguments=arguments: of_command(COMMAND, *arguments),
            lambda: of_command(BARE, "--help"),
        )


SECTIONS: dict[str, tuple[Callable[[], Iterator[Row]], str]] = {
    "block": (block, "gromo"),
    "step": (step, "gromo"),
    "graph": (graph, "torch_pruning"),
    "surgery": (surgery, ""),
    "growth": (growth, ""),
    "judging": (judging, ""),
    "loading": (loading, "typer"),
}


def main() -> None:
    """Print what the command line asks for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    asked = parser.parse_args()
    if unknown := {*asked.sections} - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run_with = {
        "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(*(f"{key} {value}" for key, value in run_with.items()), sep=", ")
    print(f"{'section':8} {'':36} {'ours, ms':>9} {'theirs':>9} {'ratio':>7}")
    rows = []
    for name, (section, needs) in SECTIONS.items():
        if asked.sections and name not in asked.sections:
            continue
        if needs and importlib.util.find_spec(needs) is None:
            print(f"{name:8} skipped: {needs} is not there; it comes with fxgrow[bench]")
            continue
        for row in section():
            print(row, flush=True)
            rows.append(asdict(row))
    if asked.json is not None:
        asked.json.write_text(json.dumps({**run_with, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
