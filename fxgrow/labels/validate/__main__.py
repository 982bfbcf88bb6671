"""``python -m fxgrow.labels.validate``: hold the rules against torch's own samples."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fxgrow.labels.validate.case import Outcome, outcomes_of
from fxgrow.labels.validate.claims import SampleCall, Way
from fxgrow.labels.validate.samples import operators

SHOWN = 4  # of each operator's wrong cases


@dataclass
class Tally:
    """What came of the cases of one operator.

    Attributes:
        counts: how many cases were right, missing and wrong.
        wrong: of each wrong one, how to run it again, and what is wrong.
        reasons: why channels are pinned, and how often.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def main(arguments: list[str] | None = None) -> int:
    """Validate operators; return 1 if a claim is wrong."""
    parser = argparse.ArgumentParser(prog="python -m fxgrow.labels.validate", description=__doc__)
    parser.add_argument("--op", action="append", help="an operator, by its name in torch's op_db")
    parser.add_argument("--seconds", type=float, default=90.0, help="CPU time to spend")
    parser.add_argument("--sample", type=int, help="one sample alone, by its number")
    parser.add_argument("--way", help="one way alone that its operands come in: d01,p,c")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = operators()
    unknown = sorted(set(options.op or ()) - set(known))
    if unknown:
        parser.error(f"no operator {', '.join(unknown)}")
    calls = {name: list(known[name]()) for name in options.op or sorted(known)}
    way = tuple(options.way.split(",")) if options.way else None
    tallies = validate(calls, options.seconds, options.sample, way)
    report(tallies)
    return int(any(tally.wrong for tally in tallies.values()))


def validate(
    calls: dict[str, list[SampleCall]],
    seconds: float,
    sample: int | None = None,
    way: Way | None = None,
) -> dict[str, Tally]:
    """Check the calls of each operator in turn, a call of each in each round, while time lasts."""
    end = time.process_time() + seconds
    tallies = {name: Tally() for name in calls}
    for name, index in _in_rounds(calls):
        if sample is not None and index != sample:
            continue
        if time.process_time() > end:
            break
        for outcome in outcomes_of(calls[name][index], way):
            _count(tallies[name], outcome, name, index)
    return tallies


def _in_rounds(calls: dict[str, list[SampleCall]]) -> Iterator[tuple[str, int]]:
    """Yield operators and numbers of their calls, those of each operator far apart at first."""
    orders = {name: spread(len(own)) for name, own in calls.items()}
    for place in range(max(map(len, orders.values()), default=0)):
        for name, order in orders.items():
            if place < len(order):
                yield name, order[place]


def spread(count: int) -> list[int]:
    """Return the numbers below a count so that each of the first few is far from the others."""
    bits = max(count - 1, 0).bit_length()
    backwards = (int(format(n, f"0{bits}b")[::-1], 2) if bits else 0 for n in range(1 << bits))
    return [n for n in backwards if n < count]


def _count(tally: Tally, outcome: Outcome, name: str, index: int) -> None:
    tally.counts[outcome.kind] += 1
    if outcome.kind == "wrong":
        again = f"--op '{name}' --sample {index} --way {','.join(outcome.way)}"
        tally.wrong.append(f"python -m fxgrow.labels.validate {again}  # {outcome.reason}")
    elif outcome.kind == "missing":
        tally.reasons[outcome.reason] += 1


def _told(wrong: list[str]) -> list[str]:
    """Return the first of many lines, and how many there are besides."""
    return wrong if len(wrong) <= SHOWN else [*wrong[:SHOWN], f"… and {len(wrong) - SHOWN} more"]


def report(tallies: dict[str, Tally]) -> None:
    """Print what came of each operator, what is wrong, and what is missing."""
    lines = []
    for name, tally in tallies.items():
        told = ", ".join(f"{tally.counts[kind]} {kind}" for kind in ("wrong", "missing", "right"))
        lines.append(f"{name}: {told}")
    wrong = [line for tally in tallies.values() for line in _told(tally.wrong)]
    count = sum(len(tally.wrong) for tally in tallies.values())
    missing = {n: t for n, t in tallies.items() if t.reasons and not t.counts["right"]}
    lines.append(f"\nOperators of which nothing is claimed ({len(missing)}):")
    for name, tally in sorted(missing.items(), key=lambda item: -item[1].counts["missing"]):
        (reason, _), *_ = tally.reasons.most_common(1)
        lines.append(f"{name} ({tally.counts['missing']}): {reason}")
    right = sum(t.counts["right"] > 0 and not t.wrong for t in tallies.values())
    lines += ["", *wrong, f"{right} of {len(tallies)} operators right", f"{count} wrong"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
