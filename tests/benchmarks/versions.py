"""Run the tests on the oldest and on the newest of what fxgrow is built on.

    pip install uv
    python tests/benchmarks/versions.py --folder FOLDER [--only oldest] [-- PYTEST ARGUMENTS …]

Each row is an environment of its own: all as old as ``pyproject.toml`` admits, all as new as there
is, and all new but for one (Python, torch with torchvision, transformers, timm). The oldest are
read from ``pyproject.toml``; ``uv`` finds what fits together, and a Python that is not there. An
environment takes about 6 GB and is removed when its tests have run, unless ``--keep`` is given.
Warnings of old libraries are no errors here. The table is Markdown; the tests that failed are
listed below it, and the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
NEWEST_PYTHON = "3.13"  # the newest that every dependency has wheels for
COLUMNS = ("torch", "torchvision", "transformers", "timm")


@dataclass(frozen=True)
class Environment:
    """What is installed.

    Attributes:
        name: the row's.
        python: the version of Python.
        pins: requirements besides the project's own.
        lowest: whether the project's own dependencies are the oldest that it admits.
    """

    name: str
    python: str
    pins: tuple[str, ...] = ()
    lowest: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the tests said: how many there were of each kind, and the names of those that failed."""

    versions: Mapping[str, str]
    passed: int
    skipped: int
    failed: tuple[str, ...]


def environments(project: Mapping[str, object]) -> list[Environment]:
    """Return the environments that a ``pyproject.toml`` asks for, the oldest first."""
    oldest_python = str(project["requires-python"]).removeprefix(">=")
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["transformers"], *extras["test"]]  # type: ignore[misc, index]
    lowest = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", a).groups() for a in asked if ">=" in a)  # type: ignore[union-attr]

    def old(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}=={lowest[name]}" for name in names)

    return [
        Environment("oldest", oldest_python, lowest=True),
        Environment("newest", NEWEST_PYTHON),
        Environment("old Python", oldest_python),
        Environment("old torch", NEWEST_PYTHON, old("torch", "torchvision")),
        Environment("old transformers", NEWEST_PYTHON, old("transformers")),
        Environment("old timm", NEWEST_PYTHON, old("timm")),
    ]


def run(environment: Environment, folder: Path, arguments: Sequence[str], *, keep: bool) -> Outcome:
    """Make an environment, run the tests in it and remove it.

    Raises:
        subprocess.CalledProcessError: it cannot be made.
    """
    place = folder / environment.name.replace(" ", "-")
    settings = {**os.environ, "UV_HTTP_TIMEOUT": "600"}
    there = ["--python", str(place)]  # uv run as a module takes its own environment for the active
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--clear", "--python", environment.python, place], check=True)
    resolution = ["--resolution", "lowest-direct"] if environment.lowest else []
    # Compiled once, or every command that the tests start compiles torch again.
    install = [*uv, "pip", "install", "-q", *there, "--compile-bytecode", *resolution]
    install += ["-e", f"{ROOT}[test]", *environment.pins]
    try:
        subprocess.run(install, check=True, env=settings)
        python = place / "bin" / "python"
        listed = subprocess.run(
            [*uv, "pip", "list", "-q", *there, "--format", "json"],
            check=True, env=settings, capture_output=True, text=True,
        )  # fmt: skip
        versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
        report = folder / f"{place.name}.xml"
        report.unlink(missing_ok=True)
        tests = ["-m", "pytest", "-q", "-W", "default", "-n", "auto", "-p", "no:cacheprovider"]
        subprocess.run(
            [python, *tests, "--tb=short", f"--junitxml={report}", *arguments],
            cwd=ROOT,
            check=False,
        )
        version = subprocess.run([python, "--version"], check=True, capture_output=True, text=True)
        return read(report, {**versions, "Python": version.stdout.split()[-1]})
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def read(report: Path, versions: Mapping[str, str]) -> Outcome:
    """Read what pytest reported."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    return Outcome(versions, len(cases) - len(skipped) - len(failed), len(skipped), names)


def row(cells: Sequence[object]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Run what is asked for and print the table."""
    import tomllib  # not in Python 3.10, where the tests import this file

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="where environments are made")
    parser.add_argument("--only", action="append", help="the row to run; can be given again")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = environments(project)
    if unknown := {*(options.only or ())} - {one.name for one in rows}:
        parser.error(f"no such rows: {unknown}; there are {[one.name for one in rows]}")
    options.folder.mkdir(parents=True, exist_ok=True)
    outcomes = {
        one.name: run(one, options.folder.resolve(), options.pytest, keep=options.keep)
        for one in rows
        if not options.only or one.name in options.only
    }
    head = ("environment", "Python", *COLUMNS, "passed", "skipped", "failed")
    print(row(head), row(["---"] * len(head)), sep="\n")
    for name, found in outcomes.items():
        versions = [found.versions.get(column, "") for column in ("Python", *COLUMNS)]
        print(row([name, *versions, found.passed, found.skipped, len(found.failed)]))
    for name, found in outcomes.items():
        print(*(f"{name}: {failed}" for failed in found.failed), sep="\n")
    return int(any(found.failed for found in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
