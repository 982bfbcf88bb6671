"""Presets: names for a rescaling and a pairing that go together in the literature."""

from __future__ import annotations

from fxgrow.errors import UsageError

PRESETS: dict[str, tuple[str, str]] = {
    "vt": ("default_vt", "vv_z_negz"),  # variance transfer (Yuan et al. 2023)
    "r2wider": ("none", "vv_z_negz"),  # Two-way R2WiderR
    "net2wider": ("none", "replicate"),  # Chen et al. 2016
    "netmorph": ("none", "v_zero"),  # Wei et al. 2016
    "random": ("none", "none"),  # padding with fresh weights; not preserving
}


DEFAULTS = PRESETS["r2wider"]


def settings(
    preset: str | None, rescaling: str | None = None, pairing: str | None = None
) -> tuple[str, str]:
    """Return rescaling and pairing; a preset stands in for what is None or at its default.

    Raises:
        PlanError: no preset of that name.

    Example:
        >>> settings(None), settings("vt"), settings("vt", None, "v_zero")
        (('none', 'vv_z_negz'), ('default_vt', 'vv_z_negz'), ('default_vt', 'v_zero'))
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(
            f"there is no preset {preset!r}.", name=preset, way_out=f"Known: {', '.join(PRESETS)}."
        )
    standing_in = DEFAULTS if preset is None else PRESETS[preset]
    given = (rescaling, pairing)
    first, second = (
        stand_in if value in (None, default) else value
        for value, default, stand_in in zip(given, DEFAULTS, standing_in, strict=True)
    )
    return str(first), str(second)


def check_preset(preset: str | None, rescaling: str | None, pairing: str | None) -> None:
    """Return if a preset and what is asked for beside it do not contradict each other.

    A default that is asked for by name is one of these; :func:`settings` cannot tell it from one
    that is not.

    Raises:
        UsageError: they do.
    """
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
