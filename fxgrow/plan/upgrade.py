"""Plans of earlier versions, which files hold, as data of today.

Schema 1 said some things twice. Its ``request`` had the fields of all verbs, and those that were
set told the verb. ``inputs``, ``inputs_inferred`` and ``tracer`` were those of the whole network,
or those of all ``submodules`` together. ``norms`` and a group's ``alpha_beta`` followed from other
fields.
Plans of either schema that tell no init were made when that was ``copy_uniform``.

The data may be anybody's. What is left out must say what every planner said; what is of another
type than it should be is passed on, for the checks of schema 2 to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from fxgrow.plan.bounds import refuse
from fxgrow.plan.requests import Convert, Deepen, MorphKernel, Widen

# What the fields of a request held that its verb did not use.
_UNUSED: dict[str, tuple[object, ...]] = {
    "width": ("", {}), "rescaling": ("none",), "pairing": ("vv_z_negz",), "init": ("copy_uniform",),
    "where": ("hidden", "all"), "include": ([],), "exclude": ([],), "gain": (1.0,), "noise": (0.0,),
    "multiple_of": (1,), "grouped": ("width",), "seed": (0,), "compensate": (False,),
    "split_noise": (0.1,), "module": ("",), "blocks": ({},), "method": ("",), "size": ("",),
    "target": ("",),
}  # fmt: skip

_DRAWING = tuple(kind.verb for kind in (Widen, Deepen, Convert))  # whose requests have an init


def is_old(data: Mapping[str, Any]) -> bool:
    """Return whether data is of schema 1."""
    return type(data.get("schema")) is int and data["schema"] == 1


def upgraded(data: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Return data of schema 2 that says what data of schema 1 does.

    Args:
        data: a JSON object, nested no deeper than plans are.
        place: what its fields are called before their names.

    Raises:
        PlanError: it says what no planner said, in a field that schema 2 has not.
    """
    if "scopes" in data:
        refuse(f"{place}scopes", "schema 1 has no such field")
    step = {**data, "schema": 2}
    told = ("inputs", "inputs_inferred", "tracer")
    whole: dict[str, Any] = {name: step.pop(name) for name in told if name in data}
    step["scopes"] = _scopes(whole, step.pop("submodules", []), place)
    if _sorted(step.pop("norms", None)) != _sorted(_norms(data.get("tensors"))):
        refuse(f"{place}norms", "they are not those whose tensors take up a gain")
    if isinstance(data.get("request"), dict):
        step["request"] = _request(data["request"], f"{place}request.")
    step["groups"] = _each(data.get("groups"), lambda group, i: _group(group, f"{place}groups.{i}"))
    step["after"] = _each(
        data.get("after", []),
        lambda first, i: upgraded(first, f"{place}after.{i}.") if is_old(first) else first,
    )
    return step


def _each(found: Any, change: Callable[[dict[str, Any], int], Any]) -> Any:
    """Return a list with another object for each that is in it."""
    if not isinstance(found, list):
        return found
    return [change(part, i) if isinstance(part, dict) else part for i, part in enumerate(found)]


def _request(found: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the request of a verb, without the fields that it did not use."""
    verbs = (("target", Convert), ("blocks", Deepen), ("size", MorphKernel))
    kind = next((kind for name, kind in verbs if found.get(name)), Widen)
    used = {entry.name for entry in fields(kind)} - {"verb"}
    for name, value in found.items():
        if name not in used and value not in _UNUSED.get(name, ()):
            refuse(f"{place}{name}", f"a request to {kind.verb} has no use for it")
    return {name: found[name] for name in found if name in used} | {"verb": kind.verb}


def with_inits(data: dict[str, Any]) -> dict[str, Any]:
    """Return data of schema 2 whose requests tell the init that what tells none was made with."""
    request = data.get("request")
    if isinstance(request, dict) and request.get("verb") in _DRAWING:
        data = {**data, "request": {"init": "copy_uniform", **request}}
    if "after" in data:
        data = {**data, "after": _each(data["after"], lambda first, _: with_inits(first))}
    return data


def _scopes(whole: dict[str, Any], parts: Any, place: str) -> Any:
    """Return what was followed, with what was told of all together in each."""
    if parts == []:
        return [{"module": "", **whole}]
    if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):
        shapes = [part.get("inputs") for part in parts]
        together = {
            "inputs": [shape for found in shapes if isinstance(found, list) for shape in found],
            "inputs_inferred": all(part.get("inputs_inferred") for part in parts),
            "tracer": ", ".join(dict.fromkeys(str(part.get("tracer")) for part in parts)),
        }
        if whole != together:
            refuse(f"{place}inputs", "they are not those of the submodules")
    return parts


def _norms(tensors: Any) -> list[dict[str, Any]]:
    """Return the norms whose running variances take up a gain, as schema 1 listed them."""
    edits = tensors.values() if isinstance(tensors, dict) else ()
    found = [edit.get("absorption") for edit in edits if isinstance(edit, dict)]
    return [
        {"module": str(taken.get("variance")).rpartition(".")[0], "gain": taken.get("gain")}
        for taken in found
        if isinstance(taken, dict) and taken.get("part") == "running_var"
    ]


def _sorted(found: Any) -> list[str] | None:
    """Return what is in a list in an order that depends on nothing else; None for no list."""
    if not isinstance(found, list):
        return None
    return sorted(json.dumps(part, sort_keys=True) for part in found)


def _group(group: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a group without the product of its factors."""
    factors = [group.get("alpha"), group.get("beta")]
    known = [factor for factor in factors if isinstance(factor, (int, float))]
    if group.get("alpha_beta") != (known[0] * known[1] if len(known) == 2 else None):
        refuse(f"{place}.alpha_beta", "it is not the product of alpha and beta")
    return {name: value for name, value in group.items() if name != "alpha_beta"}
