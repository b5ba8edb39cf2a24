"""Numbers in JSON, no longer than what they tell."""

from typing import Any


def rounded(value: Any, digits: int) -> Any:
    """``value``, of dicts and lists, with so many significant digits in each float."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, (list, tuple)) else value
