"""The options of the commands, each declared once with the sentence that explains it.

The names of rescalings, pairings and presets come from their registries, which need no torch. The
inits' module does, so their names stand here, and so do
those of the methods of deepening; tests hold the lists together.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.presets import PRESETS
from fxgrow.plan.rescaling import RESCALINGS

INIT_NAMES = (
    "copy_rows", "copy_uniform", "copy_normal", "kaiming", "kaiming_normal", "lecun",
    "lecun_normal", "zeros",
)  # fmt: skip
METHOD_NAMES = ("r2deeper", "zero_last", "net2deeper")

growth = partial(typer.Option, rich_help_panel="What grows")
weights = partial(typer.Option, rich_help_panel="Old and new weights")
source = partial(typer.Option, rich_help_panel="Reading SOURCE")
output = partial(typer.Option, rich_help_panel="Checking and writing")
shown = partial(typer.Option, rich_help_panel="What is shown")


SourceFile = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A state_dict, training checkpoint or pickled module (.pt), a safetensors file or an "
        "index of shards, a torch.export program (.pt2), or the directory of a Hugging Face model.",
        show_default=False,
    ),
]
PlanFile = Annotated[
    Path, typer.Argument(metavar="PLAN", help="A plan that --plan wrote.", show_default=False)
]
AfterPlan = Annotated[
    Path | None,
    growth(
        "--after",
        metavar="PLAN",
        help="A plan to carry out first; the new plan is for what it makes, and contains it.",
    ),
]
Before = Annotated[
    Path, typer.Argument(metavar="BEFORE", help="The reference.", show_default=False)
]
After = Annotated[
    Path, typer.Argument(metavar="AFTER", help="What is compared with it.", show_default=False)
]

Widths = Annotated[
    list[str] | None,
    growth(
        "--width",
        metavar="[GLOB=]WIDTH",
        help="A ratio (2x, 1.5x), an increment (+32) or a width (256); the last two count rows, of "
        "which a head, or a unit of an LSTM, has several. With a glob over group names, only for "
        "those; repeat it for several, of which the first match counts. Needed without --budget; "
        "with it, the most that a group gets.",
        show_default="2x with --budget",
    ),
]
Blocks = Annotated[
    list[str],
    growth(
        "--blocks",
        metavar="[STAGE=]NUMBER",
        help="How many blocks: more (+2), a ratio (2x) or in all (6). Of the stage that --stage "
        "names, or of the one before the equals sign; repeatable.",
        show_default=False,
    ),
]
Stages = Annotated[
    list[str] | None,
    growth(
        "--stage",
        metavar="NAME",
        help="A list of blocks, such as layer3: new ones come at its end; or a block, such as "
        "layer3.1: new ones come after it. Blocks may also be attributes of a module, each of "
        "which gets what the one before gives (block3, or the module that holds them). "
        "Repeatable.",
    ),
]
Method = Annotated[
    str,
    weights(
        metavar="NAME", help=f"What makes a new block the identity: {', '.join(METHOD_NAMES)}."
    ),
]
Where = Annotated[
    str,
    growth(
        metavar="hidden|stream|all",
        help="Channel groups to widen: hidden ones, streams (carried by residual additions), all.",
    ),
]
Include = Annotated[
    list[str] | None,
    growth(metavar="GLOB", help="Widen only groups whose name or writers match; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    growth(metavar="GLOB", help="Leave out groups whose name or writers match; repeatable."),
]
MultipleOf = Annotated[int, growth(help="Round new widths up to a multiple.")]
Grouped = Annotated[
    str,
    growth(
        metavar="width|count",
        help="Grouped convolutions grow inside each group (width) or by whole groups (count). "
        "Group norms grow by whole groups, those of one group under count alone.",
    ),
]

KernelSizes = Annotated[
    list[str],
    growth(
        "--size",
        metavar="[GLOB=]SIZE",
        help="A kernel size (5), one for each dim (5x3) or an increment (+2). With a glob over "
        "names of layers, only for those; repeat it for several, of which the first match counts.",
        show_default=False,
    ),
]
IncludeLayers = Annotated[
    list[str] | None,
    growth("--include", metavar="GLOB", help="Only layers whose name matches; repeatable."),
]
ExcludeLayers = Annotated[
    list[str] | None,
    growth("--exclude", metavar="GLOB", help="Leave out layers whose name matches; repeatable."),
]

Preset = Annotated[
    str | None,
    weights(
        metavar="NAME",
        help="A rescaling and a pairing that go together: "
        + ", ".join(f"{name} ({' + '.join(pair)})" for name, pair in PRESETS.items())
        + ".",
    ),
]
_FOR_SOME = (
    "With a glob over names of layers, only for those; repeat it for several, of which the first "
    "match counts."
)
Rescalings = Annotated[
    list[str] | None,
    weights(
        "--rescaling",
        metavar="[GLOB=]NAME",
        help=f"What happens to old weights: {', '.join(RESCALINGS)}. {_FOR_SOME}",
        show_default="none",
    ),
]
Pairings = Annotated[
    list[str] | None,
    weights(
        "--pairing",
        metavar="[GLOB=]NAME",
        help=f"How new channels cancel: {', '.join(PAIRINGS)}. With a glob over group names, only "
        "for those; repeatable.",
        show_default="vv_z_negz",
    ),
]
Pairing = Annotated[
    str | None,
    weights(
        metavar="NAME",
        help=f"How new channels cancel: {', '.join(PAIRINGS)}.",
        show_default="vv_z_negz",
    ),
]
Init = Annotated[
    str,
    weights(
        metavar="NAME",
        help=f"What fills new weights: {', '.join(INIT_NAMES)}, or your package.module:function.",
    ),
]
OutputInit = Annotated[
    str | None,
    weights(
        metavar="NAME",
        help="What fills new outputs of layers (V, and their biases), where it is another.",
        show_default="--init",
    ),
]
InputInit = Annotated[
    str | None,
    weights(
        metavar="NAME",
        help="What fills new inputs of layers (Z), where it is another.",
        show_default="--init",
    ),
]
Inits = Annotated[
    list[str] | None,
    weights(
        "--init",
        metavar="[GLOB=]NAME",
        help=f"What fills new weights: {', '.join(INIT_NAMES)}, or your package.module:function; "
        "from --data: tiny, gradmax. With a glob over names of layers, only for those; repeatable.",
        show_default="copy_rows",
    ),
]
PlanInits = Annotated[
    list[str] | None,
    weights(
        "--init",
        metavar="[GLOB=]NAME",
        help="What fills new weights; needed where the plan names a function of your own, which "
        "is not run unasked.",
        show_default="the plan's",
    ),
]
Gains = Annotated[
    list[str] | None,
    weights(
        "--gain",
        metavar="[GLOB=]NUMBER|NAME",
        help="Gain of the vt_constraint rescalings: a number, or a nonlinearity such as relu (√2). "
        "With a glob over names of layers, only for those; repeatable.",
        show_default="1",
    ),
]
SplitNoise = Annotated[
    float,
    weights(
        help="Relative zero-sum noise between the columns of copies, so that they part in "
        "training; the function is kept."
    ),
]
Noise = Annotated[
    float,
    weights(
        help="Noise on new columns, relative to their own deviation. Twins part without it, and it "
        "breaks preservation."
    ),
]
Seed = Annotated[int, weights(help="Seed of the new weights.")]
Compensate = Annotated[
    bool,
    weights(
        "--compensate",
        help="Where rescaling changes the function, restore it: by the weights of norms and of "
        "layers that touch no widened group, or, where none can take the factor up, by multipliers "
        "in the graph. The result is then a GraphModule.",
    ),
]
Untie = Annotated[
    bool,
    weights(
        "--untie",
        help="Give a head that shares the table of an embedding a copy of its own first, so that "
        "either side grows by itself.",
    ),
]

Arch = Annotated[
    str | None,
    source(
        metavar="ARCH",
        help="resnet50, torchvision:resnet50, timm:resnet50d or package.module:callable, where "
        "the architecture is not recognised from the weights.",
    ),
]
ArchArguments = Annotated[
    list[str] | None,
    source(
        "--arch-arg",
        metavar="KEY=VALUE",
        help="An argument of ARCH, such as num_classes=10; repeatable.",
    ),
]
Module = Annotated[
    str,
    source(
        metavar="NAME",
        help="Follow this submodule alone, such as backbone.body, on inputs of its own.",
        show_default="the whole, or the largest submodules that can be followed",
    ),
]
InputShapes = Annotated[
    list[str] | None,
    source(
        "--input-shape",
        metavar="1x3x224x224",
        help="Shape of the input of the model (or of the submodule), batch first; with a dtype for "
        "whole numbers such as token ids: 2x16:int64. Repeat it for several inputs.",
        show_default="inferred from the first layer",
    ),
]
TrustPickle = Annotated[
    bool,
    source(
        "--trust-pickle",
        help="Let a pickled file or a program run code, which classes outside torch and "
        "torchvision need. Only for files you trust.",
    ),
]

Output = Annotated[
    Path | None,
    output(
        "--output",
        "-o",
        metavar="OUT",
        help="The file or directory to write, of the same kind as SOURCE unless its suffix asks "
        "for another: .pt, .safetensors, .safetensors.index.json (shards), .pt2.",
        show_default="SOURCE with the request in its name: model-2x.pt",
    ),
]
Force = Annotated[
    bool, output("--force", help="Overwrite files that exist; SOURCE is never written to.")
]
Strict = Annotated[
    bool,
    output("--strict", help="Refuse, with exit code 4, whatever does not preserve the function."),
]
Verify = Annotated[
    str,
    output(
        "--verify",
        metavar="full|quick|none",
        help="How thoroughly the result is measured before it is written. full: several inputs and "
        "sizes, eval and train mode, the given weights and drawn ones, gradients. quick: one small "
        "input in eval mode.",
    ),
]
NoVerify = Annotated[
    bool,
    output(
        "--no-verify",
        help="The same as --verify none: write without measuring; the file is read again still.",
    ),
]
Device = Annotated[
    str,
    output(
        "--device",
        metavar="DEVICE",
        help="Where the result is made and measured: cpu, cuda, cuda:1, mps. "
        "What is written is the same.",
    ),
]
DryRun = Annotated[
    bool, output("--dry-run", help="Show what would be done; write nothing but PLAN and reports.")
]
PlanOutput = Annotated[
    Path | None,
    output("--plan", metavar="PLAN.json", help="Write the plan, which fxgrow apply carries out."),
]
ReportOutput = Annotated[
    list[Path] | None,
    output(
        "--report",
        metavar="FILE.json|.html",
        help="Write what was done and measured, as data or as a page; give it twice for both.",
    ),
]
Why = Annotated[
    str | None,
    shown(
        "--why",
        metavar="LAYER",
        help="Trace one layer (or parameter, or group) instead: the groups that its rows and "
        "columns belong to, and the chain of operations from it to what pins them, to the "
        "residual addition that makes them a stream, and to each layer that must change along.",
        show_default=False,
    ),
]
Every = Annotated[
    bool,
    shown(
        "--all", help="Give every group and block a row of its own; with --why, follow every chain."
    ),
]
AsJson = Annotated[bool, output("--json", help="Print JSON instead of tables.")]
