"""The options for data, each declared once with the sentence that explains it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fxgrow.cli.options import growth, shown, weights

Budget = Annotated[
    str,
    growth(
        metavar="+NUMBER[%]",
        help="With --init tiny or gradmax: how many parameters the new channels may bring, of all "
        "(+10%) or in number (+50000). They go to the groups that gain most per parameter.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None,
    weights(
        "--data",
        metavar="BATCHES",
        help="A file of batches for --init tiny or gradmax (and inspect --growth): what "
        "torch.save([(inputs, targets), …], BATCHES) writes. No code in it is run.",
    ),
]
Loss = Annotated[
    str | None,
    weights(
        "--loss",
        metavar="cross_entropy|mse_loss",
        help="What the batches are judged by, the mean over samples.",
        show_default="cross_entropy where the targets are whole numbers, else mse_loss",
    ),
]
Keep = Annotated[
    int | None,
    weights(help="At most so many directions from the data for each group.", metavar="NUMBER"),
]
Threshold = Annotated[
    float,
    weights(help="Leave out directions weaker than this part of the strongest, from 0 to 1."),
]
DataMethod = Annotated[
    str, weights("--method", metavar="tiny|gradmax", help="How --growth computes new channels.")
]
GrowthTable = Annotated[
    bool,
    shown(
        "--growth",
        help="Tell instead what new channels would gain in each group, to first order and per "
        "parameter, from --data.",
    ),
]
GrowthInclude = Annotated[
    list[str] | None,
    shown("--include", metavar="GLOB", help="Of --growth, only groups that match; repeatable."),
]
GrowthExclude = Annotated[
    list[str] | None,
    shown("--exclude", metavar="GLOB", help="Of --growth, leave groups out; repeatable."),
]
