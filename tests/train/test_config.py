from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from train import config, metrics, tasks
from train.config import RunConfig
from train.idle import idle_keys

CONTENT: dict[str, Any] = {
    "output": "out",
    "epochs": 1,
    "task": {"name": "text_classification"},
    "data": {"train": {"path": "some/hub", "split": "train"}, "validation": "dev.jsonl"},
    "model": {"path": "some/model"},
}

SCRATCH = "{{config: {{model_type: gpt2}}, tokenizer: {{train: {{kind: char}}}}, {}}}"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return str(path)


def read(file: str, *overrides: str) -> RunConfig:
    return config.read(file, overrides)


def problems(file: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config.read(file, overrides)
    return str(caught.value)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "written.yaml"
    path.write_text(text)
    return str(path)


# What is accepted


@pytest.mark.parametrize(
    "override, value",
    [
        ("optim.lr=3e-4", lambda c: c.optim.lr == 3e-4),
        ("optim.lr=1e-4", lambda c: c.optim.lr == 1e-4),
        ("data.train=*.jsonl", lambda c: c.data.train[0].path == "*.jsonl" and c.data.train[0].split is None),
        ("data.train=[ab]*.csv", lambda c: c.data.train[0].path == "[ab]*.csv"),
        ("data.train=[a,b]", lambda c: [source.path for source in c.data.train] == ["a", "b"]),
        ("data.train={path: x, split: y}", lambda c: (c.data.train[0].path, c.data.train[0].split) == ("x", "y")),
        ("data.train=x.parquet", lambda c: c.data.train[0].split is None),
        ("data.train.path=x.parquet", lambda c: c.data.train[0].split == "train"),
        ("data.validation=", lambda c: c.data.validation is None),
        ("task=text_classification", lambda c: c.task.kind == "auto"),
        ("task.labels=['no', 'yes']", lambda c: c.task.labels == ("no", "yes")),
        ("task.text=[a,b]", lambda c: c.task.text == ("a", "b")),
        ("model.trust_remote_code=yes", lambda c: c.model.trust_remote_code is True),
        ("output=~/runs", lambda c: not c.output.startswith("~")),
        ("metrics=f1", lambda c: c.metrics == ("f1",)),
        ("metrics={name: f1, average: macro}", lambda c: c.metrics[0]["average"] == "macro"),
        ("output=#1", lambda c: c.output == "#1"),
        ("output=a: b", lambda c: c.output == "a: b"),
        ("output=a=b", lambda c: c.output == "a=b"),
        ("output=runs/${epochs}", lambda c: c.output == "runs/1"),
        ("optim.warmup=0.5 epochs", lambda c: c.optim.warmup == "0.5 epochs"),
        ("model.config.hidden_dropout_prob=0", lambda c: c.model.config == {"hidden_dropout_prob": 0}),
        ("checkpoint.best=f1", lambda c: c.checkpoint.best == "f1"),
    ],
)
def test_values(file: str, override: str, value: Any) -> None:
    assert value(read(file, override))


def test_later_wins_and_entries_of_lists_have_places(file: str) -> None:
    both = "data.train=[{path: a, weight: 1}, {path: b, weight: 1}]"
    settings = read(file, both, "data.train.1.weight=3", "seed=1", "seed=2")
    assert [source.weight for source in settings.data.train] == [1, 3]
    assert settings.seed == 2


def test_precedence(file: str) -> None:
    assert read(file).batch_size == 32
    assert read(file, "batch_size=8").batch_size == 8
    assert read(file).data.train[0].path == "some/hub"


def test_a_sources_short_form_is_the_long_one(file: str) -> None:
    assert read(file, "data.train=x") == read(file, "data.train={path: x}") == read(file, "data.train=[{path: x}]")


# What is refused


@pytest.mark.parametrize(
    "override, parts",
    [
        ("optim.lrr=1", ["optim.lrr: no such key; did you mean optim.lr?", "max_grad_norm"]),
        ("data.train.spilt=x", ["data.train.spilt: no such key; did you mean data.train.split?"]),
        ("data.train=[a, {path: b, spilt: x}]", ["data.train.1.spilt", "data.train.1.split?"]),
        ("task.kindd=auto", ["task.kindd: no such key; did you mean task.kind?"]),
        ("lr=1", ["lr: no such key; did you mean optim.lr?"]),
        ("learning_rate=1", ["learning_rate: no such key; did you mean optim.lr?"]),
        ("optim.learning_rate=1", ["did you mean optim.lr?"]),
        ("task.name=text_clasification", ["task.name", "there is no task", "did you mean 'text_classification'?"]),
        ("task={}", ["task.name: must be given"]),
        ("task=3", ["task: must be a mapping", "not 3"]),
        ("task.kind=multilabel", ["task.kind: must be 'auto'", "did you mean 'multi_label'?"]),
        ("task.kind=no", ["not False", "quote words such as no"]),
        ("task.labels=[no, maybe]", ["task.labels.0: must be a text, not False", "quote"]),
        ("task.text=[a,b,c]", ["task.text: must be a text or a list of at most 2, not ['a', 'b', 'c']"]),
        ("task.class_weights=blanced", ["must be 'balanced' or a mapping, not 'blanced'; did you mean 'balanced'?"]),
        ("task.class_weights={a: x}", ["task.class_weights.a: must be a number, not 'x'"]),
        ("metrics=[{name: f1, averag: macro}]", ["metrics.0", "no option 'averag'", "did you mean 'average'?"]),
        ("metrics=[f1, {nme: f1}]", ["metrics.1", "a metric is a name"]),
        ("metrics=3", ["metrics: must be a list, not 3"]),
        ("optim=adamw", ["optim: must be a mapping (name, lr,"]),
        ("optim=[1]", ["optim: must be a mapping", "not [1]"]),
        ("optim.lr=-3", ["optim.lr: must be greater than 0.0, not -3"]),
        ("optim.lr=inf", ["optim.lr: must be a finite number"]),
        ("optim.lr=fast", ["optim.lr: must be a number, not 'fast'"]),
        ("optim.betas=[0.9]", ["optim.betas.1: must be given"]),
        ("optim.betas=[0.9, 1.0]", ["optim.betas.1: must be less than 1"]),
        ("epochs=inf", ["epochs: must be a finite number"]),
        ("batch_size=1.5", ["batch_size: must be a whole number, not 1.5"]),
        ("batch_size=yes", ["batch_size: must be a number, not True", "quote"]),
        ("seed=no", ["seed: must be a number, not False"]),
        ("optim.lr=on", ["optim.lr: must be a number, not True"]),
        ("data.train=[{path: a, weight: yes}]", ["data.train.0.weight: must be a number, not True"]),
        ("task.label=1", ["task.label: must be a text, not 1 (in YAML, write it in quotes"]),
        ("batch_size=0", ["batch_size: must be at least 1, not 0"]),
        ("data.train=[]", ["data.train: must be a list of at least 1"]),
        ("data.train=3", ["data.train: must be a mapping (path,", "not 3"]),
        ("data.train.0.path=x", ["data.train.0: no such key"]),
        ("data.validation.split=x", ["data.validation is 'dev.jsonl' and has no keys; write data.validation={...}"]),
        ("data.train={path: x", ["data.train: '{path: x' is no YAML value"]),
        ("output=${nope}", ["output", "'nope'"]),
        ("output=", ["output: must be a text, not None"]),
        ("output=''", ["output: must be a text of at least 1 characters"]),
        ("evaluate.every=2 fortnights", ["evaluate.every: a duration is", "not '2 fortnights'"]),
        ("evaluate.every=0", ["evaluate.every: an interval must be more than nothing"]),
        ("optim.warmup=0.1", ["optim.warmup: a duration is", "not 0.1"]),
        ("optim.warmup=true", ["optim.warmup: a duration is", "not True"]),
        ("optim.warmup=101%", ["optim.warmup: a duration is", "not '101%'"]),
        ("tracking.trackers=[wandbb]", ["tracking.trackers.0", "did you mean 'wandb'?"]),
        ("updates=3", ["epochs, updates: give one of them"]),
        ("checkpoint.patience=2", ["checkpoint.patience needs checkpoint.best"]),
        ("checkpoint.best=acuracy", ["no metric of this config reports 'acuracy'", "did you mean 'accuracy'?"]),
        ("metrics=[f1, {name: f1, positive: 0}]", ["metrics: two report 'f1'; tell them apart with a prefix"]),
        ("data.train=[a, {path: b, weight: 2}]", ["data.train: give every source a weight, or none"]),
        ("optim.lr", ["'optim.lr': after the config file come key=value pairs"]),
        ("a..b=1", ["'a..b'"]),
    ],
)
def test_one_problem_each(file: str, override: str, parts: list[str]) -> None:
    message = problems(file, override)
    assert file in message
    for part in parts:
        assert part in message, message
    assert message.count("\n") <= 1, "one problem is one line"


def test_all_problems_at_once(file: str) -> None:
    message = problems(
        file, "optim.lrr=1", "optim.lr=-1", "data.train.spilt=x", "task.name=nope", "metrics=[{name: f1, averag: x}]",
        "evaluate.every=soon", "updates=3", "optim.warmup.x.y=3", "seed", "tracking.trackers.7=x",
        "model.pth=x",
    )  # fmt: skip
    assert "11 problems in the config" in message
    expected = (
        "optim.lrr",
        "optim.lr:",
        "data.train.spilt",
        "task.name",
        "metrics.0",
        "evaluate.every",
        "epochs, updates",
    )
    for part in (*expected, "optim.warmup", "'seed'", "tracking.trackers", "model.pth"):
        assert f"  {part}" in message, message


def test_a_list_wants_a_place(file: str) -> None:
    assert "its places are data.train.0, data.train.1" in problems(file, "data.train=[a,b]", "data.train.path=x")
    assert "its places are data.train.0, data.train.1" in problems(file, "data.train=[a,b]", "data.train.2=x")


def test_best_needs_something_to_judge_on(file: str) -> None:
    assert "checkpoint.best needs data.validation" in problems(file, "data.validation=", "checkpoint.best=loss")
    message = problems(file, "metrics=[accuracy, {name: f1, average: macro, prefix: dev_}]", "checkpoint.best=f1_macro")
    assert "there are loss, accuracy, dev_f1_macro; did you mean 'dev_f1_macro'?" in message
    for best in ("loss", "accuracy", "validation/f1_macro"):
        read(file, "metrics=[accuracy, {name: f1, average: macro}]", f"checkpoint.best={best}")
    per_type = "metrics=[{name: seqeval, per_type: true}]"
    assert read(file, per_type, "checkpoint.best=f1_person").checkpoint.best == "f1_person"
    assert "there are loss, precision, recall, f1, accuracy" in problems(
        file, "metrics=[seqeval]", "checkpoint.best=f1_person"
    )
    assert metrics.reported([metrics.parse("hub/metric")]) == []
    reported = metrics.reported([metrics.parse(name) for name in ("perplexity", "accuracy")])
    with pytest.raises(UserError, match="reports 'bits_per_byte'; there are loss, perplexity, accuracy"):
        metrics.check_best("bits_per_byte", reported)
    assert read(file, "metrics=[hub/metric]", "checkpoint.best=anything").checkpoint.best == "anything"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["output: must be given: Folder", "task: must be given", "epochs, updates"]),
        ("- a\n- b\n", ["a config is a mapping"]),
        ("hello\n", ["hello: no such key"]),
        ("1: x\n", ["a config is a mapping of names"]),
        ("output: x\noptim:\n  lr: 1\n  lr: 2\n", ["line 4", "duplicate key lr"]),
        ("output: x\n\tseed: 3\n", ["line 2", "tab"]),
        ("output: x\noptim: {lr: 1\nseed: 3\n", ["line 3"]),
    ],
)
def test_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = written(tmp_path, text)
    message = problems(file)
    for part in (file, *parts):
        assert part in message, message


def test_no_file(tmp_path: Path) -> None:
    assert "there is no config file 'nope.yaml'" in problems("nope.yaml")
    assert "no config file" in problems(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as YAML" in problems(str(tmp_path / "bytes.yaml"))


# Secrets


@pytest.mark.parametrize(
    "overrides",
    [
        ("hub_token=hf_CANARY", "optim.lrr=1"),
        ("hub_token=[hf_CANARY]",),
        ("hub_token.x=hf_CANARY",),
        ("hub_token={hf_CANARY: ",),
        ("hub_token=hf_CANARY${",),
        ("hub_token=hf_CANARY${nope}",),
        ("hub_token=hf_CANARY", "hub_token.x=3"),
        ("hub_tokn=hf_CANARY",),
    ],
)
def test_no_message_shows_the_token(file: str, overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        config.read(file, overrides)
    error: BaseException | None = caught.value
    while error is not None:  # a traceback shows what an error comes from
        assert "CANARY" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_nothing_written_holds_the_token(file: str) -> None:
    settings = read(file, "hub_token=hf_CANARY")
    assert settings.hub_token is not None and settings.hub_token.get_secret_value() == "hf_CANARY"
    shown = [
        repr(settings),
        str(settings),
        str(settings.dump()),
        settings.model_dump_json(),
        str(settings.model_dump()),
    ]
    assert not any("CANARY" in text for text in shown)
    assert config.changes(read(file), settings) == []


# Round trip and changes


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim.lr=3e-5", "optim.warmup=6%", "metrics=[{name: f1, average: macro}, accuracy]", "task.text=[a,b]"),
        ("data.train=[{path: a, weight: 0.1}, {path: b, weight: 2}]", "task.labels=['no', 'on', '1', 'null']"),
        ("output=~", "output='a: #b'", "model.config={hidden_dropout_prob: 1.0e-12}", "optim.eps=1e-12"),
        ("task.class_weights={neg: 0.1, 'no': 3}", "epochs=0.3333333333333333"),
    ],
)
def test_round_trip(file: str, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    settings = read(file, *overrides)
    text = yaml.safe_dump(settings.dump(), sort_keys=False, allow_unicode=True)
    assert config.validate(yaml.safe_load(text), "config.yaml") == settings
    assert read(written(tmp_path, text)) == settings, "a resolved config can be run again"
    assert idle_keys(read(written(tmp_path, text))) == []


def test_changes_name_the_keys_that_matter(file: str) -> None:
    old = read(file)
    same = read(
        file, "output=elsewhere", "checkpoint.keep=9", "micro_batch_size=3", "tracking.trackers=[wandb]", "data.cache=x"
    )
    assert config.changes(old, same) == []
    new = read(file, "optim.lr=1e-3", "data.train=other", "seed=1", "task.threshold=0.3", "metrics=[f1]")
    found = [line.split(":")[0] for line in config.changes(old, new)]
    assert found == ["data.train", "metrics", "optim.lr", "seed", "task.threshold"]
    assert "optim.lr: 5e-05 → 0.001" in config.changes(old, new)


# Keys without effect


@pytest.mark.parametrize(
    "override, key",
    [
        ("optim.momentum=0.9", "optim.momentum"),
        ("optim={name: sgd, betas: [0.9, 0.99]}", "optim.betas"),
        ("optim={name: sgd, eps: 1e-6}", "optim.eps"),
        ("optim.power=2", "optim.power"),
        ("optim.decay=20%", "optim.decay"),
        ("optim={schedule: constant, min_lr_ratio: 0.1}", "optim.min_lr_ratio"),
        ("tracking.project=x", "tracking.project"),
        ("tracking.mode=offline", "tracking.mode"),
        ("tracking={trackers: [tensorboard], tags: [a]}", "tracking.tags"),
        ("tracking.timeout=3", "tracking.timeout"),
        ("data.window=8", "data.window"),
        ("checkpoint.best_is=lowest", "checkpoint.best_is"),
        ("model={path: 'package:x/y', revision: z}", "model.revision"),
        ("model={path: 'package:x/y', tokenizer: 'package:x/z', revision: z}", "model.revision"),
        (f"model={SCRATCH.format('revision: z')}", "model.revision"),
        (f"model={SCRATCH.format('trust_remote_code: true')}", "model.trust_remote_code"),
        ("data.validation={path: dev.jsonl, weight: 2}", "data.validation.weight"),
        ("data.train={path: a, weight: 2}", "data.train.weight"),
        ("data.train={path: '*.parquet', split: train}", "data.train.split"),
        ("data.train=[a, {path: 'package:x/y', name: z}]", "data.train.1.name"),
    ],
)
def test_what_cannot_take_effect_is_said(file: str, override: str, key: str) -> None:
    assert idle_keys(read(file)) == []
    assert [line.split(":")[0] for line in idle_keys(read(file, override))] == [key]


def test_keys_of_an_evaluation_that_never_is(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("evaluate={every: 10, batch_tokens: 10}", "metrics=[f1]", "data.validation=")
    keys = [line.split(":")[0] for line in idle_keys(read(file, *overrides))]
    assert keys == ["evaluate.every", "evaluate.batch_tokens", "metrics"]
    assert [line.split(":")[0] for line in idle_keys(read(file, *overrides, "data.test=x"))] == ["evaluate.every"]
    asked = idle_keys(read(file, *overrides[::2], "task=preference"))
    assert [line.split(":")[0] for line in asked] == ["evaluate.every"], "the starting model is asked in micro-batches"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert idle_keys(read(file, "precision=bf16")) == idle_keys(read(file)) == []
    assert "accelerate was told bf16" in idle_keys(read(file, "precision=fp32"))[0]


def test_every_task_can_be_read(file: str) -> None:
    names = config.plugins.names(tasks)
    assert "text_classification" in names
    for name in names:
        assert read(file, f"task={name}").task.name == name


def test_metrics_report_what_checkpoint_best_may_name() -> None:
    import importlib

    import numpy as np

    classes, values = np.array([0, 1, 1]), np.array([0.0, 1.0, 1.5])
    for name in config.metrics.names():
        module = importlib.import_module(f"train.metrics.{name}")
        if hasattr(module, "FIGURES"):  # held against what it reports by its own test
            assert config._figures([name]) == list(module.FIGURES)
            continue
        taken = values if "regression" in module.KINDS else classes
        taken = np.array([[0.6, 0.4], [0.2, 0.8], [0.3, 0.7]]) if module.TAKES == "scores" else taken
        references = values[::-1] if "regression" in module.KINDS else classes
        if "texts" in module.KINDS:
            taken, references = ["the cat sat"], ["the cat stood"]
        averages = ["macro", "weighted"] if "average" in module.Options.model_fields else []
        for options in ({}, *({"average": average} for average in averages)):
            reported = module.compute(taken, references, module.Options.model_validate(options))
            assert list(reported) == config._figures([{"name": name, **options}])
