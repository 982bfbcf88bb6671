"""Images, a small ResNet and a training loop for the examples that grow networks on real data."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone uses

import fxgrow

DEBIAN = Path(
    "/usr/share/datasets/fashion-mnist"
)  # where the package dataset-fashion-mnist puts it


class Block(nn.Module):
    """A basic residual block (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem, three stages of blocks of w, 2w and 4w channels, and a head."""

    def __init__(self, width: int = 16, blocks: int = 1, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width]
        for stage in range(3):
            first = Block(sizes[stage], sizes[stage + 1], 1 if stage == 0 else 2)
            rest = (Block(sizes[stage + 1], sizes[stage + 1], 1) for _ in range(blocks - 1))
            self.add_module(f"stage{stage + 1}", nn.Sequential(first, *rest))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, h, w) to logits (n, 10)."""
        x = torch.relu(self.norm(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean((2, 3)))


class Data:
    """Training and test images (n, c, h, w), normalised, with their labels (n,)."""

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        mean = train[0].mean((0, 2, 3), keepdim=True)
        std = train[0].std((0, 2, 3), keepdim=True)
        self.train = ((train[0] - mean) / std, train[1])
        self.test = ((test[0] - mean) / std, test[1])

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.train[0].shape[1]


def _idx(folder: Path, name: str) -> Tensor:
    """Read a file of the IDX format, compressed or not."""
    packed = folder / f"{name}.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return torch.frombuffer(bytearray(raw[4 + 4 * dims :]), dtype=torch.uint8).view(shape)


def load(data: str, root: Path | None, images: int) -> Data:
    """Load images of a data set that is on this machine; nothing is fetched.

    Args:
        data: ``fashion-mnist`` (Debian's package, or torchvision's folder), halved to 14×14;
            ``cifar10`` (torchvision's folder); ``made`` (random patterns, to try the script).
        root: where it is; None for where Debian puts it, or ``data``.
        images: how many to train on.
    """
    generator = torch.Generator().manual_seed(0)
    if data == "made":
        patterns = torch.randn(10, 1, 14, 14, generator=generator)
        sets = []
        for count in (images, 500):
            labels = torch.randint(10, (count,), generator=generator)
            noise = torch.randn(count, 1, 14, 14, generator=generator)
            sets.append((patterns[labels] + 2 * noise, labels))
        return Data(*sets)
    if data == "cifar10":
        import torchvision

        found = []
        for train in (True, False):
            read = torchvision.datasets.CIFAR10(str(root or "data"), train, download=False)
            pixels = torch.from_numpy(read.data).permute(0, 3, 1, 2).float()
            found.append((pixels, torch.tensor(read.targets)))
    else:
        folders = [root, DEBIAN, Path("data")] if root is None else [root]
        places = [p / inner for p in folders if p for inner in ("", "FashionMNIST/raw", "raw")]
        known = [p for p in places if any(p.glob("train-images-idx3-ubyte*"))]
        if not known:
            sys.exit(
                "Fashion-MNIST is not here. Install Debian's package dataset-fashion-mnist, or "
                "give --root, a folder with the files train-images-idx3-ubyte.gz and so on."
            )
        found = []
        for part in ("train", "t10k"):
            pixels = _idx(known[0], f"{part}-images-idx3-ubyte").unsqueeze(1).float()
            labels = _idx(known[0], f"{part}-labels-idx1-ubyte").long()
            found.append((F.avg_pool2d(pixels, 2), labels))
    (x, y), test = found
    chosen = torch.randperm(len(x), generator=generator)[:images]
    return Data((x[chosen], y[chosen]), test)


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy in per cent, in eval mode."""
    was = net.training
    net.eval()
    loss, right = 0.0, 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        out = net(x)
        loss += F.cross_entropy(out, y, reduction="sum").item()
        right += int((out.argmax(1) == y).sum())
    net.train(was)
    return loss / len(labels), 100 * right / len(labels)


def train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    data: Data,
    generator: torch.Generator,
    batch: int = 128,
) -> int:
    """Train for an epoch and return how many images that took."""
    net.train()
    images, labels = data.train
    order = torch.randperm(len(images), generator=generator)
    full = len(order) // batch * batch
    for chosen in order[:full].split(batch):
        optimizer.zero_grad()
        F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        scheduler.step()
    return full


def optimizer_for(
    net: nn.Module, epochs: int, data: Data, rate: float, batch: int = 128
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.CosineAnnealingLR]:
    """Return SGD with momentum, and a cosine over all epochs."""
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(data.train[0]) // batch)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _begin() -> None:
    """Prepare a process that runs arms: one thread, and the parent alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextlib.contextmanager
def _ended_at_once(pool: ProcessPoolExecutor) -> Iterator[None]:
    """End what runs in other processes when the script is interrupted, instead of waiting."""
    try:
        yield
    except KeyboardInterrupt:
        workers = [*(pool._processes or {}).values()]  # from Python 3.14 on, terminate_workers()
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise


def run_all(
    jobs: Sequence[tuple[str, int]],
    run: Callable[..., dict[str, Any]],
    settings: Mapping[str, Any],
    file: Path,
    workers: int,
) -> list[dict[str, Any]]:
    """Run arms and seeds in processes of one thread each, and keep each result in a file.

    What the file has already, of the same settings, is not run again.
    """
    told = json.dumps(dict(settings), sort_keys=True)
    rows: list[dict[str, Any]] = []
    if file.exists():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["settings"] == told and (row["arm"], row["seed"]) in jobs]
    left = [job for job in jobs if job not in {(row["arm"], row["seed"]) for row in rows}]
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin) as pool, _ended_at_once(pool):
        waiting = {pool.submit(run, *job, **settings): job for job in left}
        for done in as_completed(waiting):
            arm, seed = waiting[done]
            row = {"settings": told, "arm": arm, "seed": seed, **done.result()}
            rows.append(row)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print(
                f"{len(rows)} of {len(jobs)}: {arm}, seed {seed}: {row['accuracy']:.2f} % in "
                f"{row['seconds']:.0f} s of CPU",
                file=sys.stderr,
            )
    return rows


def parser_for(
    about: str, arms: Sequence[str], *, seeds: int, results: str
) -> argparse.ArgumentParser:
    """Return what reads the options that the examples have in common.

    Args:
        about: what the example is, in a line.
        arms: what it can run.
        seeds: how many of them each arm has by default.
        results: the file for them by default.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sets = ("fashion-mnist", "cifar10")
    parser.add_argument("--data", default=sets[0], choices=sets, help="what to train on")
    parser.add_argument("--root", default="", help="the folder with the data set")
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--rate", type=float, default=0.1, help="the learning rate")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[*range(seeds)], help="one run of each arm for each"
    )
    parser.add_argument(
        "--arms", nargs="+", default=list(arms), choices=list(arms), help="what to run"
    )
    parser.add_argument(
        "--results", type=Path, default=Path(results), help="the file that results are kept in"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="how many processes"
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="try the script on made-up patterns, with settings of its own where none are given",
    )  # fmt: skip
    return parser


def results_of(
    parser: argparse.ArgumentParser,
    run: Callable[..., dict[str, Any]],
    arms: Sequence[str],
    quick: Mapping[str, int],
) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """Return the options that were given, and the results of them; see :func:`run_all`.

    Args:
        parser: of the options, from :func:`parser_for`, and of the example's own.
        run: runs an arm with a seed.
        arms: what is run with ``--quick``, if nothing else is said.
        quick: the options of its own that ``run`` takes, as they are then.
    """
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick, data="made", images=512, seeds=[0], arms=list(arms))
    chosen = parser.parse_args()
    settings = {name: vars(chosen)[name] for name in (*quick, "data", "root", "images", "rate")}
    jobs = [(arm, seed) for seed in chosen.seeds for arm in chosen.arms]
    try:
        return chosen, run_all(jobs, run, settings, chosen.results, chosen.workers)
    except fxgrow.FxgrowError as error:  # such as too few epochs for the stages
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print(f"Stopped. What is in {chosen.results} is not run again.", file=sys.stderr)
        sys.exit(130)


def mean_std(values: Sequence[float]) -> str:
    """Return mean ± standard deviation as text; the mean alone of one value, which tells none."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    """Return the mean difference of the same seeds ± its standard error as text, "–" of none."""
    both = sorted(first.keys() & second.keys())
    return mean_error([first[seed] - second[seed] for seed in both]) if both else "–"


def mean_error(values: Sequence[float]) -> str:
    """Return mean ± standard error as text, with its sign; of one value, the mean alone."""
    root = math.sqrt(len(values))
    error = f" ± {statistics.stdev(values) / root:.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.2f}{error}"


def by_seed(rows: Sequence[Mapping[str, Any]], arm: str, key: str) -> dict[int, float]:
    """Return a figure of an arm for each seed."""
    return {row["seed"]: row[key] for row in rows if row["arm"] == arm}
