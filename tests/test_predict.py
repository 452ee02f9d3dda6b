"""`python -m train.predict`: the same file on any number of processes and over kills; bad rows and options."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.plan import MicroBatch
from tests import every_task
from tests.conftest import rows
from tests.distributed import ROOT
from tests.worker import carry_out
from train import predict, prediction
from train.last_layer import enabled
from train.parts import Parts

Config = Callable[..., dict[str, Any]]
OPTIONS = ("--precision", "fp32", "--part-rows", "7", "--batch-tokens", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def classifier(folder: Path, tiny_model: str) -> Path:
    """A trained classifier, and rows.jsonl beside it: 60 texts."""
    write(folder / "train.jsonl", rows("single_label", 80, 1))
    write(folder / "rows.jsonl", [{"text": row["text"]} for row in rows("single_label", 60, 2)])
    config = {
        "output": str(folder / "classifier"),
        "updates": 12,
        "precision": "fp32",
        "task": {"name": "text_classification"},
        "data": {"train": str(folder / "train.jsonl"), "cache": str(folder / "cache")},
        "model": {"path": tiny_model},
        "optim": {"lr": 5e-3},
    }
    assert carry_out(config) == 0
    return folder / "classifier"


@pytest.fixture(scope="module")
def translator(folder: Path, tiny_encoder_decoder: str) -> Path:
    """A trained T5 whose texts are drawn, over fields of a column; pairs.jsonl beside it: 40 sources."""
    sample = every_task.load("seq2seq")
    pairs = [{"translation": {"en": row["source"], "de": row["target"]}} for row in sample.rows(80, 1)]
    write(folder / "pairs-train.jsonl", pairs)
    write(folder / "pairs.jsonl", [{"en": row["source"]} for row in sample.rows(40, 2)])
    how = {"temperature": 0.8, "top_k": 20, "max_new_tokens": 8, "stop": ["w7"]}
    config = {
        "output": str(folder / "translator"),
        "updates": 12,
        "precision": "fp32",
        "task": {"name": "seq2seq", "source": "translation.en", "target": "translation.de", "generation": how},
        "data": {"train": str(folder / "pairs-train.jsonl"), "cache": str(folder / "cache"), "max_length": 16},
        "model": {"path": tiny_encoder_decoder},
        "optim": {"lr": 5e-3},
    }
    assert carry_out(config) == 0
    return folder / "translator"


@pytest.fixture(scope="module")
def assistant(folder: Path, tiny_decoder: str) -> Path:
    """A trained chat model that its run did not let write; talks.jsonl beside it: 30 conversations."""
    sample = every_task.load("chat")
    write(folder / "talks-train.jsonl", sample.rows(60, 1))
    write(folder / "talks.jsonl", sample.rows(30, 2))
    config = {
        "output": str(folder / "assistant"),
        "updates": 6,
        "precision": "fp32",
        "task": {"name": "chat", "template": sample.task["template"]},
        "data": {"train": str(folder / "talks-train.jsonl"), "cache": str(folder / "cache"), "max_length": 48},
        "model": {"path": tiny_decoder},
        "optim": {"lr": 5e-3},
    }
    assert carry_out(config) == 0
    return folder / "assistant"


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(run: Path, given: str, output: Path, *options: str, world: int = 1) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    paths = ["--input", str(run.parent / given), "--output", str(output), "--cache", str(run.parent / "cache")]
    return [sys.executable, *start, "-m", "train.predict", str(run), *paths, *OPTIONS, *options]


def answer(*arguments: Any, world: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = command(*arguments, world=world)
    return subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)


def here(run: Path, given: str, output: Path, *options: str) -> int:
    """The same in this process."""
    return predict.main(command(run, given, output, *options)[3:])


@pytest.mark.whole_run
@pytest.mark.parametrize("kind", [pytest.param("classifier", marks=pytest.mark.slow), "translator"])
def test_processes_do_not_matter(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run, given = request.getfixturevalue(kind), {"classifier": "rows.jsonl", "translator": "pairs.jsonl"}[kind]
    assert here(run, given, tmp_path / "one.jsonl") == 0
    done = answer(run, given, tmp_path / "two.jsonl", world=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = (tmp_path / "one.jsonl").read_bytes()
    assert found == (tmp_path / "two.jsonl").read_bytes()
    lines = [json.loads(line) for line in found.splitlines()]
    assert [line["row"] for line in lines] == list(range({"classifier": 60, "translator": 40}[kind]))
    assert len({line["prediction"] for line in lines}) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"], "something is left behind"
    if kind == "translator":
        assert not any("w7" in line["prediction"].split() for line in lines)


@pytest.mark.whole_run
def test_what_is_drawn_depends_on_the_example_alone(translator: Path, tmp_path: Path) -> None:
    """Other parts and micro-batches, so another company: the same texts. Another seed: others."""
    texts = {}
    for name, options in {
        "usual": (),
        "alone": ("--batch-tokens", "1", "--part-rows", "40"),
        "other": ("task.generation.seed=1",),
        "greedy": ("task.generation.temperature=null", "task.generation.top_k=null"),
    }.items():
        assert here(translator, "pairs.jsonl", tmp_path / name, *options) == 0
        texts[name] = [json.loads(line)["prediction"] for line in (tmp_path / name).read_text().splitlines()]
    assert texts["usual"] == texts["alone"]
    assert texts["usual"] != texts["other"] and texts["usual"] != texts["greedy"]


@pytest.mark.whole_run
def test_a_kill_does_not_matter(classifier: Path, tmp_path: Path) -> None:
    options = ("--part-rows", "1", "--batch-tokens", "1")
    assert here(classifier, "rows.jsonl", tmp_path / "whole.jsonl", *options) == 0
    output, parts = tmp_path / "killed.jsonl", tmp_path / ".killed.jsonl.parts"
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = len([*parts.glob("part-*")])
        process = subprocess.Popen(
            command(classifier, "rows.jsonl", output, *options), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        while len([*parts.glob("part-*")]) < before + 5 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        made = len([*parts.glob("part-*")])
        assert before + 5 <= made < 60 and not output.exists(), "the signal came too late to show anything"
        if number == signal.SIGTERM:
            assert process.returncode == 0 and "goes on from there" in said
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert len(kept) >= 10
    with pytest.raises(SystemExit):
        here(classifier, "rows.jsonl", output, "--part-rows", "0")
    assert here(classifier, "rows.jsonl", output) == 2, "parts of another size were taken for these"
    assert {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")} == kept
    assert here(classifier, "rows.jsonl", output, *options) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not parts.exists()


@pytest.mark.whole_run
def test_a_model_that_did_not_write_in_its_run_writes_and_goes_on_after_a_kill(assistant: Path, tmp_path: Path) -> None:
    """Each process has other hashes: what is found again must not hang on them."""
    options = ("--part-rows", "5", "task.generation.max_new_tokens=4")
    assert here(assistant, "talks.jsonl", tmp_path / "whole.jsonl", *options) == 0
    output, parts = tmp_path / "killed.jsonl", tmp_path / ".killed.jsonl.parts"
    process = subprocess.Popen(
        command(assistant, "talks.jsonl", output, *options), cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    while len([*parts.glob("part-*")]) < 2 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not output.exists() and parts.exists(), "the kill came too late to show anything"
    assert here(assistant, "talks.jsonl", output, *options) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    texts = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert len(texts) == 30 and all(len(text.split()) <= 4 for text in texts)
    assert here(assistant, "talks.jsonl", tmp_path / "none.jsonl", "task.generation=null") == 2


def test_rows_of_any_length_go_through_the_model_at_once(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as tokens allow, and without padding, as in an evaluation: the same answers as of each alone."""
    computed, real = list[tuple[int, bool]](), prediction.predictions

    def counting(model: Any, asked: Any, encoded: Any, piece: MicroBatch, *others: Any) -> Any:
        computed.append((len(piece.rows), enabled(model)))
        return real(model, asked, encoded, piece, *others)

    monkeypatch.setattr(prediction, "predictions", counting)
    found = list[list[dict[str, Any]]]()
    for name, tokens in (("whole", "4096"), ("alone", "1")):
        options = ("--precision", "fp64", "--batch-tokens", tokens, "--part-rows", "60")
        assert here(classifier, "rows.jsonl", tmp_path / name, *options) == 0
        found.append([json.loads(line) for line in (tmp_path / name).read_text().splitlines()])
    assert computed == [(60, True), *[(1, True)] * 60]
    assert found[0] == found[1]


def test_bad_rows(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": "w1"}', '{"text": null}', '{"text": " "}', '{"text": "w2", "label": "unheard of"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "out.jsonl"
    options = [
        "--input",
        str(tmp_path / "bad.jsonl"),
        "--output",
        str(output),
        *OPTIONS,
        "--cache",
        str(tmp_path / "c"),
    ]
    assert predict.main([str(classifier), *options]) == 2
    said = capsys.readouterr().err
    assert "bad.jsonl, line 2: 'text' must be text, not None" in said and "line 3: 'text' is empty" in said
    assert "--on-bad-row skip" in said and "data." not in said
    assert not output.exists() and not [*tmp_path.glob(".out*")]
    assert predict.main([str(classifier), *options, "--on-bad-row", "skip"]) == 0
    assert [json.loads(line)["row"] for line in output.read_text().splitlines()] == [0, 3]
    skipped = (tmp_path / "out.jsonl.skipped_rows.txt").read_text().splitlines()
    assert len(skipped) == 2 and skipped[0].startswith("bad.jsonl, line 2")


def test_columns_may_have_other_names(classifier: Path, tmp_path: Path) -> None:
    write(tmp_path / "reviews.jsonl", [{"review": "w1 w2", "text": 0}, {"review": "w50", "text": 1}])
    options = ["--input", str(tmp_path / "reviews.jsonl"), *OPTIONS, "--cache", str(tmp_path / "cache")]
    output = tmp_path / "out.jsonl"
    assert predict.main([str(classifier), *options, "--output", str(output), "--column", "text=review"]) == 0
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "options, said",
    [
        (["task.threshold=0.3x"], "task.threshold"),
        (["task.label=other"], "task.label: no key of a prediction; this task has none that may be changed"),
        (["task.threshold=0.9"], "task.threshold: no key of a prediction; this task has none that may be changed"),
        (["optim.lr=1"], "optim: no key of a prediction"),
        (["--column", "text"], "--column text: give the name in training and the name here"),
        (["--column", "text=review"], "has no column 'review'; it has text"),
        (["--column", "txt=text"], "txt=text: the model reads no column 'txt', but text; did you mean 'text'?"),
        (["--input", "nowhere.jsonl"], "--input: there is no file 'nowhere.jsonl'"),
        (["--output", "no/such/folder/x.jsonl"], "no/such/folder is no folder that can be written to"),
        (["--output", "pyproject.toml"], "pyproject.toml is there already"),
    ],
)
def test_options_that_are_wrong(
    options: list[str], said: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    assert here(classifier, "rows.jsonl", tmp_path / "out.jsonl", *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ")
    assert [*tmp_path.iterdir()] == []


def test_two_starts_at_once_are_told_apart(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second writes nothing, and its exit code says that another try is worth it."""
    first = Parts(tmp_path / "out.jsonl", [0, 30, 60])
    first.begin({})
    assert here(classifier, "rows.jsonl", tmp_path / "out.jsonl") == 1
    assert "another start is writing" in capsys.readouterr().err
    first.end()
    (first.folder / "plan.json").unlink()
    assert here(classifier, "rows.jsonl", tmp_path / "out.jsonl") == 0
    assert not first.folder.exists() and len((tmp_path / "out.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize("place", ["part", "whole"])
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    place: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    wanted = "part-00000003.jsonl" if place == "part" else output.name

    def replaced(source: Path, target: Path) -> None:
        if Path(target).name == wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replaced)
        assert here(classifier, "rows.jsonl", output) == 2
    said = capsys.readouterr().err
    assert "could not be written: No space left on device" in said and "run the same command again" in said
    there = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not output.exists() and not [name for name in there if name.endswith(".writing")]
    assert len([name for name in there if name.startswith("part-")]) == (3 if place == "part" else 9)
    assert here(classifier, "rows.jsonl", output) == 0
    assert len(output.read_text().splitlines()) == 60


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    arguments = ["--input", "x.jsonl", "--output", str(tmp_path / "out.jsonl")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("output: run\n")
    for folder, said in (
        (tmp_path / "nothing", "there is no folder"),
        (tmp_path / "run", "the run has exported no model yet"),
        (
            Path(tiny_model),
            "there is no lockstep.json that names a task, so it is no model that this program has exported",
        ),
    ):
        assert predict.main([str(folder), *arguments]) == 2
        assert said in capsys.readouterr().err
