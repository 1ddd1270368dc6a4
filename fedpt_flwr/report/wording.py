"""Numbers as a person reads them."""

from __future__ import annotations

MEGA, GIGA = 1e6, 1e9


def count_of(number: int, what: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def short(value: float) -> str:
    """A count with commas, or a measured number with about three digits."""
    if not 1e-3 <= abs(value) < 1e15:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:#.3g}".rstrip(".")


def in_unit(unit: float, value: float) -> float:
    """A value in a larger unit; a count stays a whole number."""
    return value if unit == 1 else value / unit


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f}"


def nats(loss: float) -> str:
    """A loss, or another number of that size."""
    return f"{loss:.4g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that one would say."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
