"""The files a command writes: checked before any work, and written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxgrow.cli.arguments import REPORT_SUFFIXES
from fxgrow.errors import UsageError

if TYPE_CHECKING:
    from fxgrow.api.report.data import Report


def check_report_names(paths: Iterable[Path]) -> None:
    """Check that the names of reports say which kind they are.

    Raises:
        UsageError: one does not end in .json or .html.
    """
    for path in paths:
        if path.suffix.lower() not in REPORT_SUFFIXES:
            raise UsageError(
                f"the report {path} is of no known kind.",
                name=str(path),
                way_out=f"Name it {' or '.join(path.stem + suffix for suffix in REPORT_SUFFIXES)}.",
            )


def check_outputs(paths: Sequence[Path | None], sources: Iterable[Path], *, force: bool) -> None:
    """Check that files may be written, and that none of them is another or one that is read.

    What runs that were killed have left beside them is removed first.

    Args:
        paths: the model, the plan and the reports; None for what is not written.
        sources: what is read.
        force: overwrite them.

    Raises:
        SourceError: one of them may not, or a source is missing.
        UsageError: one is named twice.
    """
    from fxgrow.files.checkpoint import check_output
    from fxgrow.files.checkpoint.leftovers import tidy
    from fxgrow.files.checkpoint.reading import FileReader

    sources = tuple(sources)
    options = itertools.chain(("-o", "--plan"), itertools.repeat("--report"))
    named = [(path, option) for path, option in zip(paths, options) if path is not None]  # noqa: B905
    for folder in sorted({path.parent for path, _ in named}):
        tidy(folder)  # first: it may bring a source back
    for source in sources:  # a missing one is a better reason to stop than its output
        if not os.path.isdir(source):
            with FileReader(source):
                pass
    seen: set[Path] = set()
    for path, option in named:
        for source in sources:
            check_output(path, source, force=force, option=option)
        if path.resolve() in seen:
            raise UsageError(
                f"{path} is asked for twice.", name=str(path), way_out="Name different files."
            )
        seen.add(path.resolve())


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Write a text whole or not at all.

    Args:
        path: the file, which :func:`check_outputs` has looked at.
        text: what it will hold.
        force: overwrite a file that has come to be there since.

    Raises:
        SourceError: it cannot be written.
    """
    from fxgrow.files.checkpoint.writing import write_whole

    def write(temporary: Path) -> None:
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    write_whole(path, write, force=force)


def report_text(report: Report, path: Path, title: str) -> str:
    """Return a report as the kind of text that a file's name asks for."""
    if path.suffix.lower() == ".json":
        return json.dumps(report.to_dict(), indent=1)
    from fxgrow.api.report.tables import as_html, report_table

    return as_html(report_table(report.plan, report.verification, report.warnings), title)
