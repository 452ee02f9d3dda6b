"""Several configs in one command: each starts from the model of the one before; what is stale is not taken for done."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from tests import phases
from tests.conftest import figures, write_config
from tests.distributed import ROOT, launch
from tests.test_cli import answer
from tests.test_resume import weights
from tests.worker import carry_out, carry_out_stages
from train import finish, run, stages, update
from train.__main__ import main

MakeConfig = Callable[..., dict[str, Any]]
MakeStages = Callable[..., list[str]]
NAMES = ("pretrain", "adapt", "classify")
UPDATES = (6, 8, 5)


@pytest.fixture
def make_stages(make_config: MakeConfig, tmp_path: Path) -> MakeStages:
    """Return a function that writes the configs of some stages, dropout on, into a folder; keys change all of them."""

    def make(folder: str, count: int = 3, **changes: Any) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        files = []
        for place, name in enumerate(NAMES[:count]):
            config = make_config(
                train=100,
                validation=9,
                output=str(tmp_path / folder / f"{name}-run"),
                updates=UPDATES[place],
                seed=place,
                precision=("fp64", "bf16", "fp32")[place],
                model__config={},
                **changes,
            )
            if place:
                config["model"] = {"path": "${previous}", "tokenizer": "${previous}"}
            files.append(str(write_config(config, tmp_path / folder / f"{name}.yaml")))
        return files

    return make


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back the signal handlers that a run installs."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of all updates that are made."""
    made: list[int] = []
    real = update.Learner.update

    def counted(self: update.Learner, number: int, batch: Any) -> update.Report:
        made.append(number)
        return real(self, number, batch)

    monkeypatch.setattr(update.Learner, "update", counted)
    return made


def command(*arguments: str) -> int:
    """Carry out a command as a process of its own would: without Accelerate's state of the one before."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(arguments)


def output_of(file: str) -> Path:
    return Path(yaml.safe_load(Path(file).read_text())["output"])


def origin(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_of(file) / "result.json").read_text())["started_from"]
    return found


def test_each_stage_starts_from_the_one_before(
    make_stages: MakeStages,
    tiny_model: str,
    updates: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = make_stages("run")
    assert command(*files) == 0
    assert updates == [*range(1, 7), *range(1, 9), *range(1, 6)]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("stage ")] == [
        f"stage {number}/3  {file} → {output_of(file)}" for number, file in enumerate(files, 1)
    ]
    expected = hashlib.sha256(Path(tiny_model, "model.safetensors").read_bytes()).hexdigest()
    assert origin(files[0]) == {"path": tiny_model, "sha256": expected}
    for before, file in pairwise(files):
        model = str(output_of(before) / "model")
        resolved = yaml.safe_load((output_of(file) / "config.yaml").read_text())
        assert resolved["model"]["path"] == resolved["model"]["tokenizer"] == model
        assert "previous" not in resolved
        assert origin(file) == {"path": model, "sha256": weights(output_of(before))}
        assert "base_model" not in (output_of(file) / "model" / "README.md").read_text()
    assert len({weights(output_of(file)) for file in files}) == 3


def test_a_stage_alone_is_the_same_run(make_stages: MakeStages, tmp_path: Path) -> None:
    files = make_stages("run", 2)
    assert carry_out_stages(files) == 0
    config = yaml.safe_load((output_of(files[1]) / "config.yaml").read_text())
    assert carry_out({**config, "output": str(tmp_path / "alone")}) == 0
    assert weights(tmp_path / "alone") == weights(output_of(files[1]))


def test_a_finished_stage_is_not_run_again(
    make_stages: MakeStages, updates: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_stages("run")
    assert command(*files[:2]) == 0
    before = [weights(output_of(file)) for file in files[:2]]
    updates.clear()
    capsys.readouterr()
    assert command(*files) == 0
    assert updates == [1, 2, 3, 4, 5], "only the third"
    assert [weights(output_of(file)) for file in files[:2]] == before
    told = capsys.readouterr().out.splitlines()
    for place in (0, 2):
        assert told[place + 1] == f"this run is finished; its results are in {output_of(files[place // 2])}"
    assert command(*files) == 0
    assert updates == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("this run is finished") == 3


def test_stopped_in_the_second_stage(
    make_stages: MakeStages, updates: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, files = make_stages("whole"), make_stages("stopped")
    assert carry_out_stages(whole) == 0
    updates.clear()
    assert carry_out_stages(files, stop_after=6 + 3) == 0
    assert updates == [*range(1, 7), 1, 2, 3]
    assert "stopped after update 3; the same command goes on from there" in capsys.readouterr().out
    assert not output_of(files[2]).exists()
    assert carry_out_stages(files) == 0
    assert updates[9:] == [*range(4, 9), *range(1, 6)]
    assert [weights(output_of(file)) for file in files] == [weights(output_of(file)) for file in whole]
    assert [origin(file)["sha256"] for file in files] == [origin(file)["sha256"] for file in whole]


def test_stopped_at_the_end_of_the_first_stage(
    make_stages: MakeStages, updates: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked while the model is exported: that is done, and no other stage begins."""
    files = make_stages("run", 2)
    with phases.asked("export", 0):
        assert carry_out_stages(files) == 0
    phases.forget()
    assert (output_of(files[0]) / "DONE").exists() and not output_of(files[1]).exists()
    assert "stopped after stage 1/2; the same command goes on with the next one" in capsys.readouterr().out
    assert updates == [*range(1, 7)]


@pytest.mark.whole_run
def test_two_processes(make_stages: MakeStages, tmp_path: Path) -> None:
    """One process group for all stages. The request to stop reaches one of the processes; a refusal comes from all."""
    whole, files, ended, changed = (make_stages(name) for name in ("whole", "stopped", "ended", "changed"))
    assert carry_out_stages(changed, stop_after=6 + 4) == 0
    spoil(output_of(changed[0]) / "model")
    launch(
        [
            {"files": whole},
            {"files": files, "stop_after": 6 + 3},
            {"files": files},
            {"files": changed, "refused": "adapt.yaml: model.path: the weights of"},
            {"files": ended, "stop_after": 6},
        ],
        2,
        tmp_path,
    )
    assert [weights(output_of(file)) for file in files] == [weights(output_of(file)) for file in whole]
    assert [len(figures(output_of(file), "train/loss")) for file in whole] == list(UPDATES)
    assert json.loads((output_of(whole[2]) / "result.json").read_text())["world_size"] == 2
    assert output_of(ended[0]).exists() and not output_of(ended[1]).exists()
    assert not (output_of(ended[0]) / "DONE").exists(), "asked in the last update: judged and exported when it goes on"


@pytest.mark.whole_run
def test_the_program_under_torchrun(make_stages: MakeStages) -> None:
    files = make_stages("run", 2)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "train"]
    for expected in ("results in", "this run is finished"):
        done = subprocess.run([*command, *files], cwd=ROOT, env=variables, text=True, capture_output=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("stage 1/2") == done.stdout.count("stage 2/2") == 1
        assert done.stdout.count(expected) == 2
        assert "destroy_process_group" not in done.stderr
    assert origin(files[1])["sha256"] == weights(output_of(files[0]))


@pytest.mark.whole_run
def test_a_signal_in_the_first_stage_ends_the_command(make_stages: MakeStages) -> None:
    files = make_stages("run", 2, data__validation=None)
    command = [sys.executable, "-m", "train", *files, "pretrain:updates=100000", "pretrain:optim.warmup=0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, text=True, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (output_of(files[0]) / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "the same command goes on from there" in printed and "stage 2/2" not in printed
    assert not output_of(files[1]).exists()


def test_a_failed_stage_ends_the_command(make_stages: MakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_stages("run", 2)
    monkeypatch.setattr(finish, "export", lambda *arguments: 1 / 0)
    assert carry_out_stages(files) == 1
    assert not output_of(files[1]).exists()


def test_what_a_stage_refuses_names_its_file(make_stages: MakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_stages("run", 2)
    assert command(*files, "adapt:task.text=txt") == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {files[1]}: task ") and "no column 'txt'" in told.err
    assert (output_of(files[0]) / "DONE").exists() and not output_of(files[1]).exists()


# What a stage started from


def spoil(folder: Path) -> None:
    """Make the exported model another one, as good as trained anew."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + 0.001 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.whole_run
def test_a_finished_stage_whose_start_has_changed_is_not_done(
    make_stages: MakeStages,
    updates: list[int],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = make_stages("run")
    assert command(*files) == 0
    then, third = weights(output_of(files[0])), weights(output_of(files[2]))
    shutil.rmtree(output_of(files[0]))
    updates.clear()
    capsys.readouterr()
    changes = ["pretrain:seed=9"]
    assert command(*files, *changes) == 2
    assert updates == [*range(1, 7)], "the first is trained anew"
    now = weights(output_of(files[0]))
    told = capsys.readouterr().err
    for part in (f"error: {files[1]}: model.path", then, now, f"delete the folder {output_of(files[1])}"):
        assert part in told
    assert "--resume-anyway" in told
    assert command(*files, *changes, "--resume-anyway") == 0
    assert now in caplog.text and then in caplog.text
    assert updates == [*range(1, 7)] and origin(files[1])["sha256"] == then, "it says what it did start from"
    shutil.rmtree(output_of(files[1]))
    assert command(*files, *changes) == 2, "the second is trained anew, so that the third is no more what it was"
    assert weights(output_of(files[2])) == third
    assert f"error: {files[2]}: model.path" in capsys.readouterr().err


def test_the_same_start_trained_anew_is_no_change(make_stages: MakeStages, updates: list[int]) -> None:
    files = make_stages("run", 2)
    assert carry_out_stages(files) == 0
    shutil.rmtree(output_of(files[0]))
    updates.clear()
    assert carry_out_stages(files) == 0
    assert updates == [*range(1, 7)]


def test_going_on_from_another_start_is_refused(
    make_stages: MakeStages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = make_stages("run", 2)
    assert carry_out_stages(files, stop_after=6 + 4) == 0
    then = weights(output_of(files[0]))
    checkpoint = output_of(files[1]) / "checkpoints" / "update-00000004" / "state.json"
    assert json.loads(checkpoint.read_text())["started_from"] == then
    spoil(output_of(files[0]) / "model")
    now = weights(output_of(files[0]))
    with pytest.raises(UserError, match=f"(?s)adapt.yaml: model.path.*{now}.*{then}.*--resume-anyway"):
        carry_out_stages(files)
    gc.collect()  # the lock that the error's traceback held
    assert carry_out_stages(files, resume_anyway=True) == 0
    assert now in caplog.text
    assert origin(files[1])["sha256"] == then


def test_a_finished_run_from_a_start_that_is_gone_is_finished(make_stages: MakeStages, updates: list[int]) -> None:
    files = make_stages("run", 2)
    assert carry_out_stages(files) == 0
    (output_of(files[0]) / "model" / "model.safetensors").unlink()
    updates.clear()
    assert carry_out_stages(files) == 0
    assert updates == []


# Refused before the first stage


def test_problems_of_all_stages_are_told_at_once(make_stages: MakeStages, tmp_path: Path) -> None:
    """And quickly, with nothing heavy imported: see `answer`."""
    files = make_stages("run")
    code, text = answer(*files, "adapt:optim.lrr=3", "classify:epochs=1", "classify:model.path=${previous}/x")
    assert code == 2
    assert f"error: {files[1]}: 1 problem in the config:\n  optim.lrr: no such key; did you mean optim.lr?" in text
    assert f"\n{files[2]}: 1 problem in the config:\n  epochs, updates: give one of them" in text
    output_of(files[2]).mkdir()
    (output_of(files[2]) / "thesis.txt").write_text("mine")
    code, text = answer(*files)
    assert code == 2 and f"error: {files[2]}: output: the folder" in text and "is not a run" in text
    assert not output_of(files[0]).exists()


def test_rows_that_are_not_there_are_told_before_the_first_stage(make_stages: MakeStages, tmp_path: Path) -> None:
    files = make_stages("run")
    code, text = answer(*files, f"classify:data.test={tmp_path}/gone.jsonl", f"adapt:data.train={tmp_path}/*.tsv")
    assert code == 2 and f"{files[1]}: data.train: no file matches '{tmp_path}/*.tsv'" in text
    assert f"{files[2]}: data.test: there is no file '{tmp_path}/gone.jsonl'" in text
    assert not output_of(files[0]).exists()
    written_by_the_first = f"adapt:data.test={output_of(files[0])}/predictions/validation.jsonl"
    assert len(stages.read(files, [written_by_the_first, "classify:data.test=org/name"], resume_anyway=False)) == 3


def test_a_mistake_in_one_stage_makes_no_second_one(make_stages: MakeStages) -> None:
    files = make_stages("run", 2)
    assert carry_out_stages(files) == 0
    with pytest.raises(UserError) as caught:
        stages.read(files, ["pretrain:updatess=3"], resume_anyway=False)
    assert "updatess: no such key" in str(caught.value) and "holds another run" not in str(caught.value)


def test_processes_are_counted_for_every_stage(make_stages: MakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    files = make_stages("run")
    with pytest.raises(UserError) as caught:
        stages.read(files, ["adapt:batch_size=3", "classify:batch_size=2"], resume_anyway=False)
    assert f"{files[1]}: batch_size: 3 examples cannot be shared by 4 processes" in str(caught.value)
    assert f"{files[2]}: batch_size: 2 examples" in str(caught.value)


@pytest.mark.parametrize("address", ["", "{0}/", "{0}/inside"])
def test_two_stages_with_one_output(make_stages: MakeStages, tmp_path: Path, address: str) -> None:
    files = make_stages("run", 2)
    shared = str(tmp_path / "shared")
    changes = (
        [f"output={shared}"] if not address else [f"pretrain:output={shared}", f"adapt:output={address.format(shared)}"]
    )
    with pytest.raises(UserError) as caught:
        stages.read(files, changes, resume_anyway=False)
    assert f"{files[1]}: output: " in str(caught.value)
    assert "as in adapt:output=runs/adapt" in str(caught.value)


def test_previous_of_the_first(make_stages: MakeStages, tmp_path: Path) -> None:
    files = make_stages("run", 2)
    with pytest.raises(UserError) as caught:
        stages.read([files[1]], [], resume_anyway=False)
    for part in (f"{files[1]}: model.path: ${{previous}} is the model of the stage before", "model.path=FOLDER"):
        assert part in str(caught.value)
    found = stages.read([files[1]], ["model.path=one", "model.tokenizer=two"], resume_anyway=False)
    assert (found[0].config.model.path, found[0].config.model.tokenizer) == ("one", "two")


def test_previous_may_be_a_part_of_a_value_and_is_no_key(make_stages: MakeStages) -> None:
    files = make_stages("run", 2)
    found = stages.read(files, ["adapt:data.test=${previous}/../predictions/*.jsonl"], resume_anyway=False)
    assert found[1].config.data.test and found[1].config.data.test[0].path == (
        f"{output_of(files[0])}/model/../predictions/*.jsonl"
    )
    with pytest.raises(UserError, match="previous: no such key"):
        stages.read(files, ["adapt:previous=x"], resume_anyway=False)


def test_previous_without_quotes(tmp_path: Path) -> None:
    file = tmp_path / "adapt.yaml"
    file.write_text("epochs: 1\nmodel: {path: ${previous}}\n")
    with pytest.raises(UserError, match=r"line 2, .*between { } and \[ \], \$\{...\} stands in quotes"):
        stages.read([str(file)], [], resume_anyway=False)


# Which stage an assignment is for


def rates(files: list[str], *assignments: str) -> list[float]:
    return [stage.config.optim.lr for stage in stages.read(files, assignments, resume_anyway=False)]


def test_assignments_are_for_all_or_for_one(make_stages: MakeStages) -> None:
    files = make_stages("run")
    assert rates(files, "optim.lr=0.25") == [0.25, 0.25, 0.25]
    assert rates(files, "adapt:optim.lr=0.5") == [5e-3, 0.5, 5e-3]
    assert rates(files, "adapt:optim.lr=0.5", "optim.lr=0.25") == [0.25, 0.5, 0.25], "in any order"
    assert rates(files[:1], "pretrain:optim.lr=0.5") == [0.5]
    found = stages.read(files, ["classify:tracking.name=a:b=c"], resume_anyway=False)
    assert [stage.config.tracking.name for stage in found] == [None, None, "a:b=c"]


def test_assignments_to_no_stage_or_to_two(make_stages: MakeStages) -> None:
    files, others = make_stages("run"), make_stages("other", 1)
    with pytest.raises(UserError) as caught:
        rates(files, "adpat:hub_token=CANARY")
    assert "there is no stage 'adpat'; there are pretrain, adapt, classify; did you mean 'adapt'?" in str(caught.value)
    assert "CANARY" not in str(caught.value)
    with pytest.raises(UserError, match="2 stages are called 'pretrain'; rename their files"):
        rates([*files, *others], "pretrain:optim.lr=1")
    assert len(rates([*files, *others], "optim.lr=1")) == 4


def test_files_and_assignments_in_any_order(make_stages: MakeStages, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_stages("run")
    assert command(files[0], "seed=1", "--traceback", files[1], "nowhere.yaml", "adapt:seeed=2", "oops") == 2
    told = capsys.readouterr().err
    assert "there is no config file 'nowhere.yaml'" in told
    assert "seeed: no such key; did you mean seed?" in told
    assert told.count("'oops': after the config file come key=value pairs") == 2


# One process, several stages


def test_trackers_of_every_stage(make_stages: MakeStages) -> None:
    files = make_stages("run", 2, tracking__trackers=["wandb", "tensorboard"], tracking__mode="offline")
    assert carry_out_stages(files) == 0
    ids = set()
    for file in files:
        assert len(list((output_of(file) / "wandb").glob("offline-run-*"))) == 1
        assert list((output_of(file) / "tensorboard").rglob("events.*"))
        ledger = json.loads((output_of(file) / "tracking.json").read_text())
        assert ledger["sent"] == {"wandb": UPDATES[files.index(file)], "tensorboard": UPDATES[files.index(file)]}
        ids.add(ledger["id"])
    assert len(ids) == 2


def test_the_model_of_a_stage_is_let_go(make_stages: MakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[Any] = []
    seen: list[int] = []
    real = run._learner

    def learner(*arguments: Any) -> Any:
        seen.append(sum(model() is not None for model in alive))
        made = real(*arguments)
        alive.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(run, "_learner", learner)
    assert carry_out_stages(make_stages("run")) == 0
    assert seen == [0, 0, 0]
