"""What stands beside an exported model, so that others know what it has learned: `lockstep.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import UserError
from train.files import write_json

NAME = "lockstep.json"


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what is known of the model in `folder`."""
    write_json(folder / NAME, about)


def read(folder: Path) -> dict[str, Any]:
    """Return what is known of the model in `folder`; raises `UserError` where nothing is."""
    try:
        about = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: there is no {NAME}, so it is no model that this program has exported. Name the output folder "
            "of a run that is done, or the folder model in it"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / NAME} cannot be read: {error}") from error
    if not isinstance(about, dict):
        raise UserError(f"{folder / NAME} is not what this program writes")
    return about
