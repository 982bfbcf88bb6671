"""Presets: names for a rescaling and a pairing that go together in the literature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fxgrow.errors import UsageError
from fxgrow.plan.by_layer import checked, completed
from fxgrow.plan.pairing import PAIRINGS
from fxgrow.plan.rescaling import RESCALINGS
from fxgrow.registry import Registry

PRESETS: dict[str, tuple[str, str]] = {
    "vt": ("default_vt", "vv_z_negz"),  # variance transfer (Yuan et al. 2023)
    "r2wider": ("none", "vv_z_negz"),  # Two-way R2WiderR
    "net2wider": ("none", "replicate"),  # Chen et al. 2016
    "netmorph": ("none", "v_zero"),  # Wei et al. 2016
    "random": ("none", "none"),  # padding with fresh weights; not preserving
}


DEFAULTS = PRESETS["r2wider"]
T = TypeVar("T")


def settings(
    preset: str | None,
    rescaling: str | Mapping[str, str] | None = None,
    pairing: str | Mapping[str, str] | None = None,
) -> tuple[str | dict[str, str], str | dict[str, str]]:
    """Return rescaling and pairing; a preset stands in for what is None, and for what no glob says.

    Args:
        preset: a name, or None.
        rescaling: a registered name, a mapping of globs over layers to such, or None.
        pairing: likewise, of globs over channel groups.

    Raises:
        UsageError: no preset, rescaling or pairing of that name, what is neither a name nor a
            mapping, or a default that is asked for beside a preset that means something else.

    Example:
        >>> settings(None), settings("vt"), settings("vt", None, "v_zero")
        (('none', 'vv_z_negz'), ('default_vt', 'vv_z_negz'), ('default_vt', 'v_zero'))
        >>> settings("vt", {"fc": "none"})
        ({'fc': 'none', '*': 'default_vt'}, 'vv_z_negz')
    """
    check_preset(preset, rescaling, pairing)
    first, second = DEFAULTS if preset is None else PRESETS[preset]
    return (
        _one("rescaling", RESCALINGS, rescaling, first, "layers", preset is not None),
        _one("pairing", PAIRINGS, pairing, second, "channel groups", preset is not None),
    )


def _one(
    kind: str,
    known: Registry[T],
    given: str | Mapping[str, str] | None,
    default: str,
    over: str,
    has_preset: bool,
) -> str | dict[str, str]:
    """Return one of the two settings.

    Raises:
        UsageError: it is none.
    """
    if given is None:
        return default

    def read(name: object) -> str:
        known[name]  # type: ignore[index]  # raises for what is no name
        return str(name)

    form = f"a name ({', '.join(known)})"
    found = checked(kind, given, read, over=over, form=form)
    return completed(found, default) if has_preset else found


def check_preset(preset: str | None, rescaling: object, pairing: object) -> None:
    """Return if a preset and what is asked for beside it do not contradict each other.

    Raises:
        UsageError: they do, or there is no such preset.
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise UsageError(f"there is no preset {preset!r}.", way_out=f"Known: {', '.join(PRESETS)}.")
    for name, given, default, own in zip(
        ("rescaling", "pairing"), (rescaling, pairing), DEFAULTS,
        PRESETS.get(preset or "", DEFAULTS), strict=True,
    ):  # fmt: skip
        if given == default != own:
            raise UsageError(
                f"--preset {preset} means --{name} {own}, and --{name} {given} is asked for.",
                name=name,
                way_out="Leave out one of the two.",
            )
