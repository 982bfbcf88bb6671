"""The command ``fxgrow`` itself: its options, and how errors become a line and an exit code."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fxgrow.cli.terminal import errors_in_one_line
from fxgrow.version import __version__
from fxgrow.wording import in_options


class Commands(TyperGroup):
    """The group of commands; what any of them raises becomes a line and an exit code."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options before the command, each flag with a default.

        To convert a flag that is not given and has none (--help, those for completion), typer
        loads pydantic, which takes as long as all the rest of a help text.
        """
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with in_options(), errors_in_one_line(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxgrow {__version__}")
        raise typer.Exit


@app.callback(
    epilog="[b]First steps[/b]\n\n"
    "fxgrow inspect model.pt  (what can grow, and why the rest cannot)\n\n"
    "fxgrow widen model.pt --width 2x --dry-run  (what would be done)\n\n"
    "fxgrow widen model.pt --width 2x  (writes model-2x.pt once it has been measured)\n\n"
    "In Python, fxgrow.load('model-2x.pt') is the wider network. SOURCE is never written to."
)
def fxgrow(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FXGROW_DEBUG", help="Show tracebacks of errors.")
    ] = False,
) -> None:
    """Grow trained PyTorch networks without changing what they compute."""
    del version, debug  # the group and the option's callback act on them
