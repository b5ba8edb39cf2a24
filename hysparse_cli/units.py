"""Writes numbers for people: bytes, token counts, times, and floats of a few digits."""

from typing import Any

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """Bytes in powers of 1024, with three digits: ``1.5 MiB``."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_BYTES) - 1:
        value, unit = value / 1024, unit + 1
    digits = f"{value:.0f}" if value >= 100 or not unit else f"{value:.3g}"
    return f"{digits} {_BYTES[unit]}"


def format_tokens(count: int) -> str:
    """A length in tokens: ``8k`` for 8192, ``1,000`` for 1000."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def format_seconds(seconds: float) -> str:
    """A time in its nearest unit: ``90 s``, ``12 min`` or ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rounded(value: Any, digits: int) -> Any:
    """``value``, of dicts and lists, with so many significant digits in each float."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, (list, tuple)) else value
