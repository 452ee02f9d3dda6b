"""The weights that a run starts from: where they lie on this machine, and the hash by which they are known again."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from data import package
from data.errors import UserError
from train.files import sha256

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("train")

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PARTS = "model-*-of-*.safetensors"
"""The parts of weights that are split, and what lies beside them."""
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
"""What peft writes."""


def fingerprint(path: str | None, revision: str | None = None) -> str | None:
    """Return the sha256 of the weights at a model's path, or None if there are none on this machine.

    Of model.safetensors or, where they are split, of the list of the parts' hashes: what
    `sha256sum model-*-of-*.safetensors | sha256sum` prints. Of an adapter, that of its weights' hash and its base's. Of
    a model of the Hub, those in the cache are read.
    """
    try:
        folder = _folder(path, revision) if path else None
        if folder is None:
            return None
        if (folder / WHOLE).is_file():
            return digest(folder / WHOLE)
        if (folder / ADAPTER).is_file():
            about = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            base = fingerprint(about.get("base_model_name_or_path"), about.get("revision"))
            return base and hashlib.sha256(f"{digest(folder / ADAPTER)} on {base}".encode()).hexdigest()
        parts = sorted(folder.glob(PARTS))
        listed = "".join(f"{digest(part)}  {part.name}\n" for part in parts)
        return hashlib.sha256(listed.encode()).hexdigest() if parts else None
    except (OSError, ValueError):  # told by those who load them
        return None


def cached_commit(path: str, revision: str | None = None) -> str | None:
    """Return the commit of the Hub that `fingerprint` reads in the cache; None for a folder, or what is not there."""
    folder = None if Path(package.resolve(path)).is_dir() else _folder(path, revision)
    return None if folder is None else folder.name  # snapshots/COMMIT


def is_adapter(path: str, revision: str | None = None) -> bool:
    """Whether an adapter lies at a model's path, on this machine."""
    folder = _folder(path, revision)
    return folder is not None and (folder / ADAPTER_CONFIG).is_file()


def digest(file: Path) -> str:
    """Return the sha256 of a file. This process reads it once, unless it changes."""
    about = file.stat()
    return _digest(file, about.st_size, about.st_mtime_ns)


def fingerprint_of(model: nn.Module) -> str:
    """Return the sha256 of a model's parameters and buffers as they are now, with their names, types and shapes.

    Reads all of them, from the device too: about a second a gigabyte.
    """
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_same(
    path: str | None, then: str | None, now: str | None, output: Path, *, anyway: bool, speaks: bool
) -> None:
    """Refuse to take the run in `output` for one from the weights at `path`, if it started from others.

    `then` and `now` are their fingerprints; weights that are not known, or gone, have not changed. `anyway`: only say
    so, if this process `speaks`.
    """
    if not then or not now or then == now:
        return
    problem = (
        f"model.path: the weights of {path} are not those that the run in {output} started from: their sha256 is "
        f"{now}, then it was {then}"
    )
    if not anyway:
        raise UserError(
            f"{problem}. Bring them back, or delete the folder {output} to train anew, or go on all the same with "
            "--resume-anyway"
        )
    if speaks:
        log.warning("%s; this run keeps what it has learned from those", problem)


@cache
def _digest(file: Path, size: int, changed_ns: int) -> str:
    return sha256(file)


def _folder(path: str, revision: str | None) -> Path | None:
    """Return the local folder, or that of the Hub's cache. Goes to no network."""
    folder = Path(package.resolve(path))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache  # 0.1 s
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(path, name, revision=revision) for name in (WHOLE, INDEX, ADAPTER)]
    except HFValidationError:  # no name of the Hub: a folder that is gone
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)
