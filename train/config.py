"""The config of a run: YAML files and key=value, checked before anything slow is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)  # fmt: skip

from data.errors import UserError
from data.section import Section, operational
from data.source import DataConfig
from train import metrics, overrides, plugins, streaming_rules, tasks
from train.adapter_config import AdapterConfig, between_adapter, between_task
from train.durations import Interval, Seconds
from train.model_config import ModelConfig, between
from train.optim import OptimConfig, between_optim
from train.problems import explain, truths
from train.tasks.base import TaskConfig
from train.tracking import TrackingConfig


class EvaluateConfig(Section):
    """When the model is judged on data.validation, and how much goes through it at once."""

    every: Interval = Field(
        "1 epoch", description="Between evaluations; there is always one at the end. Default of a stream: 10%."
    )
    batch_tokens: int = operational(
        4096, "Tokens in one micro-batch of an evaluation; padding counts where it is computed.", ge=1
    )


class CheckpointConfig(Section):
    """When checkpoints are written, which stay, and when to stop early."""

    every: Interval = operational(
        "1 epoch", "Between checkpoints; there is always one at the end. Default of a stream: 10%."
    )
    keep: int = operational(2, "The newest so many stay, and the best.", ge=1)
    background: bool = operational(
        True, "Training goes on while one is written, from a copy in the machine's memory. False: it waits."
    )
    best: str | None = Field(None, description="Keep and export the best by this figure, such as accuracy or loss.")
    best_is: Literal["auto", "highest", "lowest"] = Field("auto", description="auto: lowest for losses and errors.")
    patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without a new best.")


class DistributedConfig(Section):
    """How several processes deal with each other."""

    timeout: Seconds = operational(
        600.0,
        "A process of several that shows no sign of life for so long (600, '10 minutes') writes its stacks to "
        "output/logs and ends. Raise it where one update, one save or a first compile takes longer.",
    )


def _metric(entry: Any) -> Any:
    metrics.parse(entry)
    return entry


def _metrics(value: Any) -> Any:
    """Accept one metric without brackets."""
    return [value] if isinstance(value, str | Mapping) else value


Metric = Annotated[str | dict[str, Any], BeforeValidator(_metric)]
Metrics = Annotated[tuple[Metric, ...], BeforeValidator(_metrics)]


class RunConfig(Section):
    """All that decides what is learned. Where it runs is said to `accelerate launch`, `torchrun` or Slurm."""

    output: Annotated[str, AfterValidator(os.path.expanduser)] = operational(
        ..., "Folder of everything the run writes.", min_length=1
    )
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1, description="Examples of one update, over all processes.")
    micro_batch_size: int | None = operational(None, "At most so many examples go through the model at once.", ge=1)
    micro_batch_tokens: int | None = operational(
        None,
        "At most so many tokens go through the model at once; padding counts where it is computed (see padding_free). "
        "Default: 16384.",
        ge=1,
    )
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False, description="How long to train; or give updates.")
    updates: int | None = Field(None, ge=1, description="How long to train; or give epochs.")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "auto", description="auto: bf16 where the hardware is fast at it, else fp32. accelerate's own setting wins."
    )
    compile: bool = operational(
        False,
        "Compile the model's layers (torch.compile): the same losses but for rounding, dropout included. Takes a C++ "
        "compiler and a minute or more at the start. On a CPU it has brought nothing, and an encoder then computes "
        "padding (see padding_free), so that dropout falls otherwise; on an H200 a decoder of 1 B was about 1.4 "
        "times as fast, and a ModernBERT about 1.5 times.",
    )
    activation_checkpointing: Literal["auto"] | bool = operational(
        "auto",
        "Keep only what goes into each layer, and compute the layers again in the backward pass: the same losses and "
        "gradients to the last bit, less memory, slower. auto: on a GPU whose memory would not suffice otherwise, by "
        "an estimate.",
    )
    padding_free: bool = operational(
        True,
        "Let an encoder compute real tokens only, where that is tried and gives the same but for rounding and where "
        "dropout falls: on a CPU; on a GPU in half precision, if its attention has no dropout.",
    )
    hub_token: SecretStr | None = Field(None, exclude=True, repr=False, description="Never written anywhere.")
    task: SerializeAsAny[TaskConfig]
    data: DataConfig
    model: ModelConfig
    adapter: AdapterConfig | None = None
    optim: OptimConfig = OptimConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    distributed: DistributedConfig = DistributedConfig()
    metrics: Metrics = Field(
        (), description="Names, or mappings of a name and its options. Default: what fits the task."
    )

    @model_validator(mode="after")
    def _between_sections(self) -> RunConfig:
        problems = _between(self.model_dump())
        if isinstance(self.task, TaskConfig):  # one that there is
            problems += between_task(self.task.name, self.task.whole, self.adapter)
            problems += streaming_rules.between_task(self.task.refers) if self.data.streaming else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def dump(self) -> dict[str, Any]:
        """Return the resolved config as plain values, without secrets."""
        return self.model_dump(mode="json")


def read(file: str, assignments: Sequence[str], previous: str | None = None) -> RunConfig:
    """Return the config in `file` with `key=value` on top of it, and `previous` where it says `${previous}`.

    Raises `UserError` with all problems at once: dotted key, value, what is allowed, the nearest name.
    """
    content, problems = overrides.load(file, assignments, previous)
    return validate(content, file, problems)


def validate(content: Any, file: str, problems: Sequence[str] = ()) -> RunConfig:
    """Return the config with these contents; `file` names it in messages, `problems` are known already."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: a config is a mapping of names to values, such as `batch_size: 32`")
    content, found = streaming_rules.with_intervals(content), list(problems)
    if isinstance(content.get("task"), str):
        content["task"] = {"name": content["task"]}
    model = RunConfig
    try:
        model = _with_task(content.get("task"))
    except UserError as error:  # the other keys are checked all the same
        found.append(f"task.name: {error}")
        model = create_model("RunConfig", __base__=RunConfig, task=(Any, ...))
    found += truths(model, content)
    try:
        config = model.model_validate(content)
    except ValidationError as error:
        whole = any(not problem["loc"] for problem in error.errors())
        found += [*explain(model, content, error.errors()), *([] if whole else _between(content))]
    if not found:
        return config
    found = list(dict.fromkeys(found))
    lines = "".join(f"\n  {problem}" for problem in found)
    raise UserError(f"{file}: {len(found)} problem{'s' * (len(found) > 1)} in the config:{lines}")


def changes(old: RunConfig, new: RunConfig) -> list[str]:
    """Return "key: old → new" for every key whose change would change what is learned."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def schema() -> dict[str, Any]:
    """Return the JSON schema of the config, for editors, with the keys of every task and all short forms."""
    union: Any = None
    for name in plugins.names(tasks):
        config = plugins.load(tasks, "task", name).Config
        union = config if union is None else union | config
    model: type[RunConfig] = create_model("RunConfig", __base__=RunConfig, task=(union, ...))
    whole: dict[str, Any] = model.model_json_schema()
    task, listed = whole["properties"]["task"], whole["properties"]["metrics"]
    _allow(whole["properties"], "task", {"enum": plugins.names(tasks)}, task)
    _allow(whole["properties"], "metrics", listed["items"], listed)
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    roles = whole["$defs"]["DataConfig"]["properties"]
    for role in ("train", "validation", "test"):
        null = [{"type": "null"}] if role != "train" else []
        _allow(roles, role, source, {"type": "array", "items": source, "minItems": 1}, *null)
    return whole


def _allow(properties: dict[str, Any], name: str, *forms: Mapping[str, Any]) -> None:
    """Let a property have any of these forms, and keep what is said about it."""
    about = {key: value for key, value in properties[name].items() if key in ("description", "title", "default")}
    inner = [{key: value for key, value in form.items() if key not in about} for form in forms]
    properties[name] = {**about, "anyOf": inner}


def _with_task(section: Any) -> type[RunConfig]:
    """Return the config's type with the keys of the task that is named; those of any task, where none is."""
    if not isinstance(section, Mapping) or "name" not in section:
        return RunConfig
    return _of(plugins.load(tasks, "task", str(section["name"])).Config)


@cache
def _of(task: type[TaskConfig]) -> type[RunConfig]:
    return create_model("RunConfig", __base__=RunConfig, task=(task, ...))


def _between(content: Mapping[str, Any]) -> list[str]:
    """Return what is wrong between keys that may each be right. `content` is not checked yet: anything may be in it."""

    def given(*path: str) -> Any:
        value: Any = content
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    problems = []
    if (given("epochs") is None) == (given("updates") is None):
        problems.append("epochs, updates: give one of them: how long to train")
    if given("micro_batch_size") and given("micro_batch_tokens"):
        problems.append("micro_batch_size, micro_batch_tokens: give one of them")
    problems += [*between(given("model")), *between_adapter(content), *streaming_rules.between_streaming(content)]
    problems += between_optim(given("optim"), given("adapter"))
    best, sources = given("checkpoint", "best"), given("data", "train")
    if given("checkpoint", "patience") and not best:
        problems.append("checkpoint.patience needs checkpoint.best: the figure that should get better")
    if best and not given("data", "validation"):
        problems.append("checkpoint.best needs data.validation: there is nothing to judge on")
    figures = _figures(given("metrics"))
    if twice := sorted({name for name in figures if figures.count(name) > 1}):
        problems.append(
            f"metrics: two report {twice[0]!r}; tell them apart with a prefix: {{name: ..., prefix: other_}}"
        )
    every = metrics.reported([metrics.Choice(name) for name in metrics.names()])
    try:
        metrics.check_best(best if isinstance(best, str) else "loss", figures if given("metrics") else every)
    except UserError as error:
        problems.append(str(error))
    if isinstance(sources, list | tuple):
        weights = [isinstance(source, Mapping) and source.get("weight") is not None for source in sources]
        if any(weights) and not all(weights):
            problems.append("data.train: give every source a weight, or none")
    return problems


def _figures(entries: Any) -> list[str]:
    """Return the names of the figures that these metrics report; nothing where only a run can tell."""
    try:
        choices = [metrics.parse(entry) for entry in _metrics(entries) or ()]
    except (UserError, TypeError):  # told elsewhere
        return []
    return metrics.reported(choices)


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
