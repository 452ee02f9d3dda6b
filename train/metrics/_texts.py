"""What all metrics of written texts have in common."""

from __future__ import annotations

from typing import Any


def columns() -> tuple[Any, Any]:
    """Return the types of a text and of its reference."""
    from datasets import Value

    return Value("string"), Value("string")
