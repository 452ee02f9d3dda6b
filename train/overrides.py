"""A YAML file, and `key=value` over it, as plain values: what the user wrote, before anything judges it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError

SECRETS = ("hub_token",)
"""Top-level keys whose value no message shows."""


PREVIOUS = "previous"
"""`${previous}`: the model of the stage before."""


def load(file: str, overrides: Sequence[str], previous: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return the contents of a YAML file with `key=value` on top, and what is wrong with the overrides.

    A value replaces what was there, mappings too; `${key}`, `${previous}` and `${oc.env:NAME}` are filled in last. An
    override that is wrong is left out. Raises `UserError`, with the line, for a file that is no YAML mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

    content, problems = _read(file), []
    for override in overrides:
        try:
            _add(content, override, "after the config file come key=value pairs, such as optim.lr=3e-5")
        except UserError as error:
            problems.append(str(error))
    names = {} if previous is None or PREVIOUS in content else {PREVIOUS: previous}
    try:
        resolved = OmegaConf.to_container(OmegaConf.create({**content, **names}), resolve=True)
        return {key: value for key, value in dict(resolved).items() if key not in names}, problems  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        reason = "the ${...} in it cannot be filled in" if _secret(key) else str(error).splitlines()[0]
        if isinstance(error, InterpolationKeyError) and f"'{PREVIOUS}'" in reason:
            reason = (
                "${previous} is the model of the stage before, and no config stands before this one. Name those of "
                f"the stages before it first, as in: python -m train BEFORE.yaml {file}; or say where: {key}=FOLDER"
            )
        raise UserError(f"{file}: {key}: {reason}") from None  # what it comes from may hold a secret


def parse(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what `key=value` pairs say, nested by the dots of their keys; raises `UserError` for one that is none."""
    content: dict[str, Any] = {}
    for override in overrides:
        _add(content, override, "give key=value pairs, such as task.generation.beams=4")
    return content


def _add(content: dict[str, Any], override: str, wanted: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{key!r}: {wanted}")
    _put(content, key, _value(key, text))


def _read(file: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    if not Path(file).is_file():
        raise UserError(f"there is no config file {file!r} (looked from {Path.cwd()})")
    try:
        loaded = OmegaConf.load(file)
        if not OmegaConf.is_dict(loaded) or not all(isinstance(key, str) for key in loaded):
            raise UserError(f"{file}: a config is a mapping of names to values, such as `batch_size: 32`")
        return dict(OmegaConf.to_container(loaded))  # type: ignore[arg-type]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        line = Path(file).read_text(encoding="utf-8").splitlines()[mark.line :][:1] if mark else []
        quotes = "; between { } and [ ], ${...} stands in quotes" if "${" in "".join(line) else ""
        raise UserError(f"{file}{where}: {error.problem}; mend the YAML there or just above{quotes}") from None
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        raise UserError(f"{file}: {key}: {'not readable' if _secret(key) else str(error).splitlines()[0]}") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as YAML: {str(error).splitlines()[0]}") from None


def _value(key: str, text: str) -> Any:
    """Read the right side of key=value as YAML; what is no YAML, such as *.jsonl or #1, is a text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if text.lstrip().startswith("#"):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text or 'null'}"))["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException) as error:
        if isinstance(error, OmegaConfBaseException) or text.startswith(("{", "'", '"')):
            shown = "what was given" if _secret(key) else repr(text)
            problem = f"{key}: {shown} is no YAML value; check its brackets and quotes"
            raise UserError(f"{problem} (on a shell's command line put the whole of key=value in quotes)") from None
        return text


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; sections on the way are made, entries of lists are not."""
    parts = key.split(".")
    node: Any = content
    for place, part in enumerate(parts):
        above, last = ".".join(parts[:place]), place == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                places = ", ".join(f"{above}.{number}" for number in range(len(node))) or "none: it is empty"
                raise UserError(f"{key}: {above} is a list; its places are {places}")
        elif not isinstance(node, dict):
            shown = "a text" if _secret(key) else repr(node)
            raise UserError(f"{key}: {above} is {shown} and has no keys; write {above}={{...}} with all of its keys")
        step: Any = int(part) if isinstance(node, list) else part
        if last:
            node[step] = value
        else:
            child = node[step] if isinstance(node, list) else node.get(step)
            node[step] = {} if child is None else child
            node = node[step]


def _secret(key: str) -> bool:
    return key.split(".")[0] in SECRETS
