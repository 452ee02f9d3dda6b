"""Checkpoints are whole or do not exist: every damage is seen, failures harm nothing, the best and the newest stay."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from data.errors import UserError
from tests.conftest import SHARD, figures
from tests.distributed import launch
from tests.worker import carry_out
from train import manifest
from train.checkpoint import Checkpoints
from train.evaluation import Evaluator

NOTHING: Any = None
"""No checkpoint is written or read."""
MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def interrupted(make_config: MakeConfig, tmp_path: Path) -> dict[str, Any]:
    """A run that was stopped after update 12, with checkpoints after updates 10 and 12."""
    config = make_config(checkpoint__every=5, data__validation=None)
    assert carry_out(config, stop_after=12) == 0
    assert names(tmp_path / "out") == ["update-00000010", "update-00000012"]
    return config


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(bytes(content))


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = (truncate, flip, empty, Path.unlink)


def damaged_copies(output: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """Yield the folder of checkpoints with each file of the newest damaged in each way, one at a time."""
    newest = output / "checkpoints" / "update-00000012"
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert files == ["manifest.json", f"model/{SHARD}", f"optimizer/{SHARD}", "state.json"]
    for name in files:
        for damage in DAMAGES:
            copy = work / f"{name.replace('/', '-')}-{damage.__name__}"
            shutil.copytree(output / "checkpoints", copy)
            damage(copy / "update-00000012" / name)
            yield name, copy


def test_every_damage_is_seen_and_said(
    interrupted: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate import Accelerator

    accelerator, seen = Accelerator(cpu=True), 0
    for name, folder in damaged_copies(tmp_path / "out", tmp_path / "copies"):
        caplog.clear()
        checkpoints = Checkpoints(folder, accelerator, NOTHING, keep=2, best=None, higher_is_better=True, patience=None)
        with caplog.at_level(logging.WARNING, "train"):
            assert checkpoints.newest() == 10
        assert f"rejected the checkpoint update-00000012: {name} is " in caplog.text
        assert (folder / "damaged-update-00000012").is_dir()
        seen += 1
    assert seen >= 4 * len(DAMAGES)


def test_an_added_file_is_seen(interrupted: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoints" / "update-00000012"
    assert manifest.problem(folder) is None
    (folder / "extra.bin").write_text("x")
    assert manifest.problem(folder) == "extra.bin does not belong there"


@pytest.mark.parametrize("older", ["no shards", "state"])
def test_a_checkpoint_of_another_version_says_so(older: str, interrupted: dict[str, Any], tmp_path: Path) -> None:
    """One that is whole: written by Accelerate's save_state, as before there were shards; or with an unknown state."""
    folder = tmp_path / "out" / "checkpoints" / "update-00000012"
    if older == "state":
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**state, "epoch": 1}))
    else:
        shutil.move(folder / "model" / SHARD, folder / "model.safetensors")
        shutil.rmtree(folder / "model")
        shutil.move(folder / "optimizer" / SHARD, folder / "optimizer.bin")
        shutil.rmtree(folder / "optimizer")
    (folder / "manifest.json").unlink()
    writing = folder.with_name("again")
    folder.rename(writing)
    manifest.publish(writing, folder)
    with pytest.raises(UserError, match=r"is whole, but another version of this program wrote it .* train anew"):
        carry_out(interrupted)
    assert folder.is_dir(), "it is not taken for damaged"


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_goes_on_from_what_is_whole(
    damaged: int, interrupted: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    for name in names(tmp_path / "out")[-damaged:]:
        flip(tmp_path / "out" / "checkpoints" / name / "model" / SHARD)
    assert carry_out(interrupted) == 0
    undisturbed = make_config(checkpoint__every=5, data__validation=None, output=str(tmp_path / "undisturbed"))
    assert carry_out(undisturbed) == 0
    for file in ("model/model.safetensors", "metrics.jsonl"):
        if file.endswith("jsonl"):
            assert figures(tmp_path / "out", "train/loss") == figures(tmp_path / "undisturbed", "train/loss")
        else:
            assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def test_a_failed_save_stops_nothing_and_harms_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Checkpoints._write

    def full(self: Checkpoints, writing: Path, *what: Any) -> None:
        real(self, writing, *what)
        if self.state.update in (10, 15):
            (writing / "model" / SHARD).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_write", full)
    config = make_config(checkpoint__every=5, checkpoint__keep=9, data__validation=None)
    assert carry_out(config) == 0  # the last one was written
    assert names(tmp_path / "out") == ["update-00000005", "update-00000020"]
    assert caplog.text.count("No space left on device") == 2


def test_a_failed_save_stops_nothing_where_the_disk_does_not_answer_either(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when it is cut off for a while: two saves fail, the last one does not."""
    gone, real = FileNotFoundError(2, "No such file or directory"), Checkpoints._write

    def write(self: Checkpoints, writing: Path, *given: Any) -> None:
        if "00000006" not in writing.name:
            raise gone
        real(self, writing, *given)

    def usage(folder: Path) -> NoReturn:
        raise gone

    monkeypatch.setattr(Checkpoints, "_write", write)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert carry_out(make_config(updates=6, checkpoint__every=2, data__validation=None)) == 0
    assert names(tmp_path / "out") == ["update-00000006"]
    said = [message for message in caplog.messages if "could not be written" in message]
    assert len(said) == 2 and all("the disk does not answer: [Errno 2]" in message for message in said)


def test_the_run_ends_non_zero_if_the_last_save_failed(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(writing: Path, final: Path) -> None:
        raise PermissionError(13, "Permission denied", str(final))

    monkeypatch.setattr(manifest, "publish", broken)
    assert carry_out(make_config(updates=3)) == 1
    output = tmp_path / "out"
    assert names(output) == []
    assert not (output / "DONE").exists()
    assert (output / "model" / "model.safetensors").exists()


def test_a_stop_whose_save_failed_does_not_promise_more_than_is_there(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(checkpoint__every=2, data__validation=None)
    real = manifest.publish

    def full(writing: Path, final: Path) -> None:
        if final.name.endswith("5"):
            raise OSError(28, "No space left on device")
        real(writing, final)

    monkeypatch.setattr(manifest, "publish", full)
    assert carry_out(config, stop_after=5) == 1
    told = "stopped after update 5; the same command goes on from the newest checkpoint, since its own could not be"
    assert told in capsys.readouterr().out and names(tmp_path / "out")[-1] == "update-00000004"
    assert carry_out(config, stop_after=6) == 0
    assert "stopped after update 6; the same command goes on from there" in capsys.readouterr().out


def test_a_really_full_disk(make_config: MakeConfig, tmp_path: Path) -> None:
    """On a file system with room for one checkpoint and a half, the first one stays whole and the run ends non-zero."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        changes = {"updates": 6, "checkpoint__every": 2, "checkpoint__keep": 9, "data__validation": None}
        config = make_config(output=str(small / "out"), **changes)
        assert carry_out(config, stop_after=1) == 0
        first = small / "out" / "checkpoints" / "update-00000001"
        room = shutil.disk_usage(small).free
        (small / "ballast").write_bytes(bytes(room - sum(file.stat().st_size for file in first.rglob("*")) // 2))
        assert carry_out(config) == 1
        assert names(small / "out") == ["update-00000001"]
        assert manifest.problem(first) is None
        (small / "ballast").unlink()
        assert carry_out(config) == 0
        assert (small / "out" / "DONE").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_best_and_newest_stay_and_the_best_is_exported(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        evaluate__every=2, checkpoint__every=2, checkpoint__keep=2, checkpoint__best="loss", optim__lr=0.02
    )
    assert carry_out(config) == 0
    output = tmp_path / "out"
    losses = figures(output, "validation/loss")
    best = min(losses, key=lambda update: losses[update])
    result = json.loads((output / "result.json").read_text())
    assert result["best_update"] == best
    assert result["metrics"]["validation/loss"] == pytest.approx(losses[best], rel=1e-12)
    assert set(names(output)) == {"update-00000018", "update-00000020", f"update-{best:08d}"}


def test_early_stopping(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(updates=60, evaluate__every=2, checkpoint__best="loss", checkpoint__patience=2, optim__lr=0.05)
    assert carry_out(config) == 0
    output = tmp_path / "out"
    losses = figures(output, "validation/loss")
    result = json.loads((output / "result.json").read_text())
    assert result["updates"] < 60
    assert result["updates"] == result["best_update"] + 4
    assert min(losses.values()) == losses[result["best_update"]]
    assert (output / "DONE").exists()
    assert "stopped early (checkpoint.patience): 2 evaluations in a row were no better" in capsys.readouterr().out


def test_a_figure_that_is_never_a_number_is_told(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    judged = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda *given: {**judged(*given), "validation/loss": math.nan})
    config = make_config(updates=60, evaluate__every=2, checkpoint__best="loss", checkpoint__patience=2)
    assert carry_out(config) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["updates"], result["best_update"]) == (4, None)
    assert "checkpoint.best: no evaluation gave a number for validation/loss; the last model is exported" in caplog.text
    assert "stopped early" in capsys.readouterr().out


def test_a_best_is_not_chosen_by_other_rows(make_config: MakeConfig, tmp_path: Path) -> None:
    """Validation rows that change between two starts are refused where the best so far was found by them."""
    config = make_config(evaluate__every=4, checkpoint__best="loss")
    assert carry_out(config, stop_after=8) == 0
    file = Path(config["data"]["validation"])
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-3]))
    with pytest.raises(UserError, match=r"data\.validation: the rows are not those by which checkpoint\.best"):
        carry_out(config)
    assert carry_out(config, stop_after=10, resume_anyway=True) == 0
    file.write_text(whole)
    without = {**config, "checkpoint": {**config["checkpoint"], "best": None}}
    assert carry_out(without) == 0


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(evaluate__every=4)
    assert carry_out(config, stop_after=8) == 0
    assert list(figures(tmp_path / "out", "validation/loss")) == [4]
    assert carry_out(config) == 0
    whole = make_config(evaluate__every=4, output=str(tmp_path / "whole"))
    assert carry_out(whole) == 0
    assert figures(tmp_path / "out", "validation/loss") == figures(tmp_path / "whole", "validation/loss")


def test_a_stop_in_the_last_update_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """What is left, to judge and to export, is done when the run goes on."""
    results = []
    for place, stop in enumerate((None, 12)):
        output = tmp_path / str(place)
        config = make_config(updates=12, evaluate__every=4, checkpoint__best="loss", output=str(output))
        assert carry_out(config, stop_after=stop) == 0
        assert (output / "DONE").exists() == (stop is None)
        assert stop is None or carry_out(config) == 0
        assert (output / "DONE").exists()
        assert list(figures(output, "validation/loss")) == [4, 8, 12]
        results.append((output / "model" / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_a_save_that_fails_on_the_main_process_does_not_hang_the_others(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(updates=4, checkpoint__every=2, data__validation=None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("in the way")
    launch([{"config": config, "code": 1}], 2, tmp_path)
    assert list(figures(tmp_path / "out", "train/loss")) == [1, 2, 3, 4]


def best_at_8(make_config: MakeConfig) -> dict[str, Any]:
    return make_config(
        updates=12, evaluate__every=4, checkpoint__every=4, checkpoint__best="loss", optim__lr=0.02, checkpoint__keep=1
    )


def test_a_best_that_could_not_be_saved_is_no_best(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoints._write

    def full(self: Checkpoints, writing: Path, *what: Any) -> None:
        real(self, writing, *what)
        if self.state.update == 12 and self.state.best_update == 12:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_write", full)
    monkeypatch.setattr(Checkpoints, "judge", lambda self, update, found: better_and_better(self, update))
    assert carry_out(best_at_8(make_config)) == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["best_update"] == 8
    assert names(tmp_path / "out") == ["update-00000008"]


def better_and_better(checkpoints: Checkpoints, update: int) -> None:
    checkpoints.state.evaluated = checkpoints.state.best_update = update
    checkpoints.state.best_value = -float(update)


def test_a_damaged_best_is_said_and_not_exported(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def judge(self: Checkpoints, update: int, found: Any) -> None:
        self.state.evaluated = update
        if update == 4:
            better_and_better(self, update)

    monkeypatch.setattr(Checkpoints, "judge", judge)
    config = best_at_8(make_config)
    assert carry_out(config, stop_after=9) == 0
    flip(tmp_path / "out" / "checkpoints" / "update-00000004" / "model" / SHARD)
    assert carry_out(config) == 0
    assert f"the best checkpoint, of update 4, is lost: model/{SHARD} is damaged" in caplog.text
    last = (tmp_path / "out" / "checkpoints" / "update-00000012" / "model" / SHARD).read_bytes()
    assert len(last) > 1000
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "out" / "model" / "model.safetensors")
    kept = load_file(tmp_path / "out" / "checkpoints" / "update-00000012" / "model" / SHARD)
    assert all(exported[name].equal(kept[name]) for name in kept)


def test_another_run_is_kept_out_of_the_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another run is writing to"):
        carry_out(make_config(updates=2))
    assert carry_out(make_config(updates=2)) == 0


def test_what_a_kill_left_is_swept_up(interrupted: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints" / ".update-00000007.writing").mkdir()
    assert carry_out(interrupted) == 0
    assert not list((tmp_path / "out" / "checkpoints").glob(".*"))


def test_fewer_updates_than_were_made_end_the_run(interrupted: dict[str, Any], tmp_path: Path) -> None:
    assert carry_out({**interrupted, "updates": 11}, resume_anyway=True) == 0
    assert (tmp_path / "out" / "DONE").exists()
