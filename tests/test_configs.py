"""The configs that are shipped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ulmfit
from train import config, stages
from train.idle import idle_keys

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


STAGES = (
    ("ulmfit", ("pretrain", "adapt", "classify")),
    ("ulmfit", ("minilm_adapt", "minilm_classify")),
    ("small", ("pretrain", "chat", "prefer")),
)


def test_there_are_some() -> None:
    assert len(FILES) >= 17


def test_every_stage_belongs_to_a_command() -> None:
    there = {(path.parent.name, path.stem) for path in FOLDER.glob("*/*.yaml")}
    assert there == {(folder, name) for folder, names in STAGES for name in names}


@pytest.mark.parametrize("folder, names", STAGES)
def test_stages(folder: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr(stages, "_check_files", lambda *anything: None)  # of rows that only their owner has
    files = [f"configs/{folder}/{name}.yaml" for name in names]
    found = stages.read(files, [], resume_anyway=False)
    for name, stage, before in zip(names, found, [None, *found], strict=False):
        assert Path(stage.file).read_text().splitlines()[0] == "# yaml-language-server: $schema=../schema.json"
        assert stage.config.output == f"runs/{folder}/{name}"
        assert idle_keys(stage.config) == []
        if before is not None:
            assert stage.config.model.path == f"{before.config.output}/model"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config(file: Path) -> None:
    settings = config.read(str(file), [])
    assert file.read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    assert settings.output == f"runs/{file.stem}"
    assert idle_keys(settings) == []


@pytest.mark.parametrize("stage, variants", [("classify", ulmfit.DECODER), ("minilm_classify", ulmfit.ENCODER)])
def test_every_row_of_the_ablation_is_a_config(stage: str, variants: dict[str, tuple[str, ...]]) -> None:
    found = [
        config.read(str(FOLDER / "ulmfit" / f"{stage}.yaml"), ulmfit.filled(changes, Path("runs")))
        for changes in variants.values()
    ]
    assert len({str(settings.dump()) for settings in found}) == len(variants) >= 2, "two rows are the same run"


def test_schema_is_up_to_date() -> None:
    """If not: make schema."""
    assert json.loads((FOLDER / "schema.json").read_text()) == json.loads(json.dumps(config.schema()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_schema_takes_what_is_shipped(file: Path) -> None:
    from omegaconf import OmegaConf

    assert errors(OmegaConf.to_container(OmegaConf.load(file))) == []


@pytest.mark.parametrize(
    "key, value",
    [
        (["optim", "lrr"], 1),
        (["optim", "lr"], -1),
        (["optim", "schedule"], "linaer"),
        (["optim", "warmup"], "6 per cent"),
        (["task"], "nope"),
        (["task", "kindd"], "auto"),
        (["data", "train"], 3),
        (["data", "train"], [{"path": "x", "spilt": "y"}]),
        (["metrics"], 3),
    ],
)
def test_schema_refuses_what_the_program_refuses(key: list[str], value: Any) -> None:
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / "quickstart.yaml"))
    section = content
    for name in key[:-1]:
        section = section.setdefault(name, {})
    section[key[-1]] = value
    assert errors(content)


@pytest.mark.parametrize(
    "key, value",
    [
        (["task"], "text_classification"),
        (["data", "train"], ["a", {"path": "b", "split": "x"}]),
        (["data", "validation"], None),
        (["metrics"], "f1"),
        (["metrics"], ["f1", {"name": "f1", "average": "macro"}]),
        (["optim", "warmup"], 10),
    ],
)
def test_schema_knows_short_forms(key: list[str], value: Any) -> None:
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / "quickstart.yaml"))
    section = content
    for name in key[:-1]:
        section = section.setdefault(name, {})
    section[key[-1]] = value
    assert errors(content) == []
    config.validate(content, "test")


SCHEMA: dict[str, Any] = config.schema()
TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
    "object": dict,
}  # fmt: skip


def errors(value: Any, schema: dict[str, Any] = SCHEMA, path: str = "") -> list[str]:
    """Return what a value has against the schema: the part of the standard that our schema uses."""
    if "$ref" in schema:
        return errors(value, SCHEMA["$defs"][schema["$ref"].split("/")[-1]], path)
    if "anyOf" in schema and all(errors(value, form, path) for form in schema["anyOf"]):
        return [f"{path}: no form fits"]
    kind = TYPES[schema["type"]] if "type" in schema else object
    if not isinstance(value, kind) or (isinstance(value, bool) and schema.get("type") in ("integer", "number")):
        return [f"{path}: not {schema['type']}"]
    found = []
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        found.append(f"{path}: not allowed")
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{path}: not of the form")
    if isinstance(value, int | float):
        low, above = schema.get("minimum", value), schema.get("exclusiveMinimum")
        found += [f"{path}: too small"] if value < low or (above is not None and value <= above) else []
    if isinstance(value, list):
        items = schema.get("items", {})
        found += [error for place, each in enumerate(value) for error in errors(each, items, f"{path}.{place}")]
        found += [f"{path}: too short"] if len(value) < schema.get("minItems", 0) else []
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, each in value.items():
            rule = known.get(name, others)
            if rule is False:
                found.append(f"{path}.{name}: no such key")
            else:
                found += errors(each, {} if rule is True else rule, f"{path}.{name}")
        found += [f"{path}.{name}: missing" for name in schema.get("required", ()) if name not in value]
    return found
