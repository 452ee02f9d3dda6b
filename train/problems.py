"""What pydantic finds wrong with a config, in the words of the one who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from data.errors import nearest
from data.section import Section
from train.overrides import SECRETS

ELSEWHERE = {  # what other trainers call it
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "num_train_epochs": "epochs",
    "max_steps": "updates",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "output_dir": "output",
    "model_name_or_path": "model.path",
    "max_seq_length": "data.max_length",
    "bf16": "precision",
    "fp16": "precision",
}

WANTED = {  # by the beginning of pydantic's name for the problem
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "string_pattern_mismatch": "a text of the form {pattern}",
    "literal_error": "{expected}",
}

WORDS = " (in YAML, quote words such as no, yes, on and off to have the word)"


@dataclass(frozen=True)
class _Place:
    """Where a problem is: its dotted path as the user wrote it, the section and field there, and the choice of types
    (its path) that it is one way out of."""

    path: tuple[str, ...]
    section: type[Section] | None
    field: Any
    choice: tuple[str, ...] | None


def explain(model: type[Section], content: Mapping[str, Any], problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each problem: dotted path, what is wanted, what was given, the nearest name.

    `problems` are pydantic's about `content`. Types of which any would do make one line together.
    """
    places = [_place(model, content, problem["loc"]) for problem in problems]
    deeper = {place.choice for place in places if place.choice and len(place.path) > len(place.choice)}
    lines: list[str] = []
    together: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for place, problem in zip(places, problems, strict=True):
        if place.choice is None:
            lines.extend(_line(model, place, [problem]))
        elif len(place.path) > len(place.choice) or place.choice not in deeper:
            together.setdefault(place.path, []).append(problem)
    for place in {place.path: place for place in places}.values():
        if place.path in together:
            lines.extend(_line(model, place, together[place.path]))
    return lines


def truths(model: type[Section], content: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line for every true or false that stands for a number: pydantic would take them for 1 and 0."""
    if isinstance(content, list | tuple):
        for place, entry in enumerate(content):
            yield from truths(model, entry, f"{prefix}{place}.")
    for name, value in content.items() if isinstance(content, Mapping) else ():
        field = model.model_fields.get(name)
        if field is None:
            continue
        types = {field.annotation, *get_args(field.annotation)}
        if isinstance(value, bool) and types & {int, float} and not types & {bool, str}:
            yield f"{prefix}{name}: must be a number, not {value}{WORDS}"
        elif section := find_section(field.annotation):
            yield from truths(section, value, f"{prefix}{name}.")


def _place(model: type[Section], content: Any, location: Sequence[Any]) -> _Place:
    """Follow pydantic's location through types and contents: they tell its parts that the user wrote from those that
    pydantic added, which are types of a choice and the place in a list that was written without brackets."""
    section: type[Section] | None = model
    field, given, path = None, content, []
    for number, part in enumerate(location):
        if isinstance(part, int):
            if isinstance(given, list | tuple):
                path.append(str(part))
                given = given[part] if part < len(given) else None
            continue
        path.append(str(part))
        field = section.model_fields.get(part) if section else None
        given = given.get(part) if isinstance(given, Mapping) else None
        section = find_section(field.annotation) if field else section if number == len(location) - 1 else None
        if field and _is_choice(field.annotation) and number + 1 < len(location):
            return _Place((*path, *map(str, location[number + 2 :])), section, field, tuple(path))
    return _Place(tuple(path), section, field, None)


def _is_choice(annotation: Any) -> bool:
    """Whether a value may be of several types, not counting null."""
    members = [member for member in get_args(annotation) if member is not NoneType]
    return get_origin(annotation) in (Union, UnionType) and len(members) > 1


def _line(model: type[Section], place: _Place, problems: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    key, problem = ".".join(place.path), problems[0]
    if not place.path:
        yield from problem["msg"].removeprefix("Value error, ").splitlines()
    elif problem["type"] == "extra_forbidden":
        yield _no_such_key(model, place)
    elif problem["type"] == "missing":
        described = place.field is not None and not place.path[-1].isdecimal() and place.field.description
        meaning = f": {place.field.description}" if described else ""
        yield f"{key}: must be given{meaning}"
    else:
        value = problem["input"]
        shown = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
        shown = "what was given" if place.path[0] in SECRETS else shown
        if problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{key}: {message}" if shown in message else f"{key}: {message}; got {shown}"
            return
        wanted = " or ".join(dict.fromkeys(_wanted(place, each) for each in problems))
        near = nearest(str(value), re.findall(r"'(.*?)'", wanted)) if isinstance(value, str) else ""
        hint = ""
        if isinstance(value, bool):
            hint = WORDS
        elif isinstance(value, int | float) and "a text" in wanted:
            hint = " (in YAML, write it in quotes to have the text)"
        yield f"{key}: must be {wanted}, not {shown}{near}{hint}"


def _wanted(place: _Place, problem: Mapping[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "model_type" and place.section is not None:
        return f"a mapping ({', '.join(place.section.model_fields)})"
    for beginning in sorted(WANTED, key=len, reverse=True):
        if kind.startswith(beginning):
            return WANTED[beginning].format(**context)
    return f"otherwise ({problem['msg']})"


def _no_such_key(model: type[Section], place: _Place) -> str:
    key, name, above = ".".join(place.path), place.path[-1], place.path[:-1]
    fields, keys = list(place.section.model_fields) if place.section else [], [*_keys(model)]
    beside = [".".join((*above, field)) for field in difflib.get_close_matches(name, fields, n=1)]
    same = [known for known in keys if known.split(".")[-1] == name]  # the right name in the wrong place
    near = [*beside, *([ELSEWHERE[name]] if name in ELSEWHERE else same or difflib.get_close_matches(key, keys, n=1))]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}: no such key{hint} ({'.'.join(above) or 'a config'} has {', '.join(fields)})"


def _keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = find_section(field.annotation)
        yield from _keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]


def find_section(annotation: Any) -> type[Section] | None:
    """Return the section in a type such as `tuple[Source, ...] | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := find_section(part))), None)
