"""The base of every config section, and the mark of keys that say where or how loudly, not what is learned."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the config: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """Return a field that may change between a run and its resumption, because it cannot change what is learned."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)
