"""Presets: names for a rescaling and a pairing that go together in the literature."""

from __future__ import annotations

from fxgrow.errors import PlanError

PRESETS: dict[str, tuple[str, str]] = {
    "vt": ("default_vt", "vv_z_negz"),  # variance transfer (Yuan et al. 2023)
    "r2wider": ("none", "vv_z_negz"),  # Two-way R2WiderR
    "netmorph": ("none", "v_zero"),  # Wei et al. 2016
    "random": ("none", "none"),  # padding with fresh weights; not preserving
}


def settings(preset: str | None, rescaling: str | None, pairing: str | None) -> tuple[str, str]:
    """Return rescaling and pairing; what is given by name wins over the preset.

    Raises:
        PlanError: no preset of that name.

    Example:
        >>> settings(None, None, None), settings("vt", None, "v_zero")
        (('none', 'vv_z_negz'), ('default_vt', 'v_zero'))
    """
    if preset is not None and preset not in PRESETS:
        raise PlanError(
            f"there is no preset {preset!r}.", name=preset, way_out=f"Known: {', '.join(PRESETS)}."
        )
    from_preset = PRESETS["r2wider" if preset is None else preset]
    return rescaling or from_preset[0], pairing or from_preset[1]
