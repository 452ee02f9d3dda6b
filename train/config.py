"""The config of a run: YAML files and key=value, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, SecretStr, SerializeAsAny, ValidationError, create_model, model_validator

from data.errors import UserError, nearest
from data.section import Section, operational
from data.source import DataConfig
from train import metrics, plugins, tasks
from train.durations import Duration
from train.model import ModelConfig
from train.optim import OptimConfig
from train.tasks.base import TaskConfig
from train.tracking import TrackingConfig

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


class EvaluateConfig(Section):
    """When the model is judged on data.validation, and how much goes through it at once."""

    every: Duration = Field("1 epoch", description="Between evaluations; there is always one at the end.")
    batch_tokens: int = operational(4096, "Tokens, padding counted, in one micro-batch of an evaluation.", ge=1)


class CheckpointConfig(Section):
    """When checkpoints are written, which stay, and when to stop early."""

    every: Duration = operational("1 epoch", "Between checkpoints; there is always one at the end.")
    keep: int = operational(2, "The newest so many stay, and the best.", ge=1)
    best: str | None = Field(None, description="Keep and export the best by this figure, such as accuracy or loss.")
    best_is: Literal["auto", "highest", "lowest"] = Field("auto", description="auto: lowest for losses and errors.")
    patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without a new best.")


def _metric(entry: Any) -> Any:
    metrics.parse(entry)
    return entry


class RunConfig(Section):
    """All that decides what is learned. Where it runs is said to `accelerate launch`, `torchrun` or Slurm."""

    output: str = operational(..., "Folder of everything the run writes.")
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1, description="Examples of one update, over all processes.")
    micro_batch_size: int | None = operational(None, "At most so many examples go through the model at once.", ge=1)
    micro_batch_tokens: int | None = operational(
        None, "At most so many tokens, padding counted, go through the model at once. Default: 16384.", ge=1
    )
    epochs: float | None = Field(None, gt=0)
    updates: int | None = Field(None, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "auto", description="auto: bf16 where the hardware is fast at it, else fp32. accelerate's own setting wins."
    )
    hub_token: SecretStr | None = Field(None, exclude=True, repr=False, description="Never written anywhere.")
    task: SerializeAsAny[TaskConfig]
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    metrics: tuple[Annotated[str | dict[str, Any], BeforeValidator(_metric)], ...] = Field(
        (), description="Names, or mappings of a name and its options. Default: what fits the task."
    )

    @model_validator(mode="after")
    def _between_sections(self) -> RunConfig:
        problems = []
        if (self.epochs is None) == (self.updates is None):
            problems.append("give one of epochs and updates: how long to train")
        if self.micro_batch_size and self.micro_batch_tokens:
            problems.append("give one of micro_batch_size and micro_batch_tokens")
        if self.checkpoint.patience and not self.checkpoint.best:
            problems.append("checkpoint.patience needs checkpoint.best: the figure that should get better")
        if self.checkpoint.best and not self.data.validation:
            problems.append("checkpoint.best needs data.validation: there is nothing to judge on")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def dump(self) -> dict[str, Any]:
        """Return the resolved config as plain values, without secrets."""
        return self.model_dump(mode="json")


def read(file: str, overrides: Sequence[str]) -> RunConfig:
    """Return the config in `file` with `key=value` overrides on top of it.

    Raises `UserError` with all problems at once: dotted key, value, what is allowed, the nearest name.
    """
    return validate(_merge(file, overrides), file)


def validate(content: Mapping[str, Any], file: str) -> RunConfig:
    """Return the config with these contents; `file` names it in messages."""
    model = RunConfig
    try:
        section = content.get("task")
        if isinstance(section, Mapping) and "name" in section:
            task = plugins.load(tasks, "task", str(section["name"])).Config
            model = create_model("RunConfig", __base__=RunConfig, task=(task, ...))
        return model.model_validate(dict(content))
    except ValidationError as error:
        problems = [_explain(model, dict(problem)) for problem in error.errors()]
    except UserError as error:
        problems = [f"task.name: {error}"]
    raise UserError(f"{file}: {len(problems)} problem{'s' * (len(problems) > 1)} in the config:\n" + "\n".join(
        f"  {problem}" for problem in dict.fromkeys(problems)
    ))  # fmt: skip


def changes(old: RunConfig, new: RunConfig) -> list[str]:
    """Return "key: old → new" for every key whose change would change what is learned."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def schema() -> dict[str, Any]:
    """Return the JSON schema of the config, for editors, with the keys of every task."""
    union: Any = None
    for name in plugins.names(tasks):
        config = plugins.load(tasks, "task", name).Config
        union = config if union is None else union | config
    return create_model("RunConfig", __base__=RunConfig, task=(union, ...)).model_json_schema()


def _merge(file: str, overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(file).is_file():
        raise UserError(f"there is no config file {file!r} (looked from {Path.cwd()})")
    try:
        merged = OmegaConf.load(file)
        if not OmegaConf.is_dict(merged):
            raise UserError(f"{file}: a config is a mapping of keys to values")
        for override in overrides:
            key, _, text = override.partition("=")
            OmegaConf.update(merged, key, _value(text), merge=False)
        resolved: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from error
    return dict(resolved)


def _value(text: str) -> Any:
    """Read the right side of key=value as YAML; what is no YAML, such as *.jsonl, is a text."""
    import yaml
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}" if text else "value: null"))["value"]  # type: ignore[index,call-overload]
    except yaml.YAMLError:
        return text


def _explain(model: type[Section], problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    key, kind, message = ".".join(path), problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        fields = _fields(model, path[:-1])
        keys = [*_keys(model)]
        near = nearest(path[-1], fields)
        if not near:  # the right name in the wrong place, or another trainer's name
            there = [known for known in keys if known.split(".")[-1] == path[-1]]
            near = f"; did you mean {there[0]}?" if there else ""
            near = f"; here it is called {ELSEWHERE[path[-1]]}" if path[-1] in ELSEWHERE else near or nearest(key, keys)
        return f"{key}: no such key; {'.'.join(path[:-1]) or 'the config'} has {', '.join(fields)}{near}"
    if kind == "missing":
        return f"{key}: must be given"
    if not path:
        return str(message)
    value = problem["input"]
    quote = (
        " (in YAML, quote words such as no, yes, on and off)" if isinstance(value, bool) and "string" in message else ""
    )
    near = ""
    if kind == "literal_error":
        near = nearest(
            str(value), [part.strip("'") for part in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        )
    return f"{key}: {message}, not {value!r}{near}{quote}"


def _fields(model: type[Section], path: Sequence[str]) -> list[str]:
    section: type[Section] | None = model
    for name in path:
        field = section.model_fields.get(name) if section else None
        section = _section(field.annotation) if field else section  # indices of lists are passed over
    return list(section.model_fields) if section else []


def _keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        yield from _keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]


def _section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def _flat(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys that decide what is learned."""
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if field.exclude or (isinstance(extra, dict) and extra.get("operational")):
            continue
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and all(isinstance(part, Section) for part in value):
            yield f"{prefix}{name}", ", ".join(str(part.model_dump(exclude_none=True)) for part in value)
        else:
            yield f"{prefix}{name}", value
