"""The bench against peers: the same rows for all, and figures that mean what they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.compare import __main__ as program
from benchmarks.compare import figures, machine, options, plot, work, workloads
from benchmarks.compare.meter import Meter
from benchmarks.compare.workloads import SHAPES, WORKLOADS, Workload

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["sst2-minilm", "imdb-minilm"])
def test_rows_have_the_lengths_of_real_ones(name: str, tmp_path: Path) -> None:
    """Each word is one token, so that the tokenizer gives back the lengths that were drawn."""
    work = WORKLOADS[name]
    drawn = workloads.draw(work)
    assert len(drawn) == work.rows and np.array_equal(drawn, workloads.draw(work))
    rows = [json.loads(line) for line in workloads.write_rows(work, tmp_path).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(workloads.minilm())
    found = [len(ids) for ids in tokenizer([row["text"] for row in rows]).input_ids]
    assert found == np.maximum(drawn, 3).tolist()
    assert {row["label"] for row in rows} == {"good", "bad"}


@pytest.mark.parametrize(("name", "mean"), [("sst2", 13.32), ("imdb", 274.9), ("chat", 240.8)])
def test_lengths_are_those_that_are_said(name: str, mean: float) -> None:
    tokens, rows = np.loadtxt(workloads.LENGTHS / f"{name}.txt").T
    assert np.average(tokens, weights=rows) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("name", ["toy-chat", "toy-packed", "toy-modernbert"])
def test_made_up_rows_have_the_lengths_that_were_drawn(name: str, tmp_path: Path) -> None:
    """With all that the template adds; the end of a document is for the task to add."""
    each = WORKLOADS[name]
    rows = [json.loads(line) for line in workloads.write_rows(each, tmp_path).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(workloads.model_folder(each, tmp_path))
    if each.task == "chat":
        found = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows]
    else:
        found = [len(ids) + (each.task == "causal_lm") for ids in tokenizer([row["text"] for row in rows]).input_ids]
    assert found == np.maximum(workloads.draw(each), 3).tolist()


def test_packed_rows_hold_as_many_tokens_as_those_apart() -> None:
    for each in WORKLOADS.values():
        if each.suite == "gpu" and each.conversations:
            assert workloads.positions(each).mean() * each.conversations == pytest.approx(
                each.batch * each.longest, rel=0.03
            )
            assert each.conversations % each.parts == 0


def shape(name: str) -> Any:
    return AutoConfig.for_model(**SHAPES[name])


def test_work_of_an_encoder() -> None:
    """BERT-base at 128 tokens: 525 million operations a token (docs of the field: 85.1 M parameters in its layers)."""
    assert work.flops(shape("bert-base"), np.full(4, 128)) / (4 * 128) == pytest.approx(525e6, rel=0.01)


def test_work_of_a_decoder() -> None:
    """Llama-3.2-1B by hand; the output layer counts although its matrix is the embedding's."""
    layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
    many = 16 * layer + 2048 * 128256
    assert work.matrices(shape("llama-1b")) == many == 1_235_746_816
    expected = 6 * many * 400 + 6 * 16 * 2048 * (100**2 + 300**2)
    assert work.flops(shape("llama-1b"), np.array([100, 300])) == expected
    adapters = 16 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
    learned = (4 * many + 6 * adapters) * 400 + 6 * 16 * 2048 * (100**2 + 300**2)
    assert work.flops(shape("llama-1b"), np.array([100, 300]), rank=16) == learned


@pytest.mark.parametrize("name", ["llama-1b", "qwen-0.6b"])
def test_matrices_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(name))
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(module.weight.numel() for module in linear) == work.matrices(shape(name))


def test_work_within_a_window() -> None:
    """ModernBERT sees 64 tokens to either side in two layers of three."""
    config = shape("modernbert")
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    assert (len(windows), sum(windows)) == (22, 14)
    places = np.arange(200)
    near = int((np.abs(places[:, None] - places[None]) <= 64).sum())
    expected = 6 * work.matrices(config) * 200 + 12 * 768 * (14 * near + 8 * 200**2)
    assert work.flops(config, np.array([200])) == expected


def test_meter(capsys: pytest.CaptureFixture[str]) -> None:
    """What comes before the updates that are counted is not; micro-batches of an update are added up."""
    meter = Meter(warm=1, updates=3)
    for number in range(3):
        meter.saw(torch.tensor(10 + number), 20, 5)
        meter.saw(1, 2, torch.tensor(1))
        for part in (0.25, 0.5):
            meter.lose(torch.tensor(part))
        meter.tick()
    meter.report(matmul=1e9)
    told = json.loads(capsys.readouterr().out.removeprefix("FIGURES "))
    assert (told["tokens"], told["targets"], told["all_tokens"], told["all_targets"]) == (25, 12, 36, 18)
    assert told["efficiency"] == pytest.approx(25 / 44) and told["losses"] == [0.75] * 3
    assert (told["warm"], told["matmul"]) == (1, 1e9) and told["memory"] > 50


def test_ratios() -> None:
    """Round by round; the interval of equal rounds is a point, of unequal ones it holds the median."""
    assert figures.ratio([2.0] * 5, [1.0] * 5) == (2.0, 2.0, 2.0)
    median, low, high = figures.ratio([2.0, 2.2, 1.8, 2.1, 1.9], [1.0] * 5)
    assert 1.8 <= low < median == 2.0 < high <= 2.2


TOLD = {
    "tokens": 100,
    "targets": 40,
    "seconds": 2.0,
    "efficiency": 0.5,
    "memory": 300.0,
    "first_update": 4.0,
    "losses": [9.0, *[1.0] * 10, *[0.5] * 10],
    "warm": 1,
    "matmul": 1e9,
    "others": 0.01,
}
OTHERS = ["", "Of the processors others took 1.0% while a peer learned, at most 1.0%."]


def test_table() -> None:
    slow = {**TOLD, "seconds": 4.0, "others": 0.3}
    rounds = {"ours": [TOLD], "slow": [slow], "broken": [None], "left out": []}
    lines = figures.table(rounds, work_per_token=1e6, stated=2e9)
    assert lines[2] == ("| ours | 50 | 20 | 1.00 | 0.50 | 0.03 | 0.05 | 300 MB | 4.0 s | 0.7500 | 0.5000 |")
    assert lines[3].startswith("| slow | 25 | 10 | 2.00 |")
    assert lines[4].startswith("| broken | failed |") and lines[5].startswith("| left out | not begun |")
    assert {line.count("|") for line in lines[:6]} == {12}
    assert lines[6:] == [
        "",
        "Of the processors others took 15.5% while a peer learned, at most 30.0%.",
        "",
        "broken: failed, measured in 0 of 1 rounds.",
        "left out: for want of time, measured in 0 of 1 rounds.",
    ]
    unstated = figures.table(rounds, work_per_token=1e6, stated=None)
    assert "| 0.50 | – | 0.05 |" in unstated[2]


def test_a_round_that_failed_is_not_compared() -> None:
    lines = figures.table({"ours": [None, TOLD], "other": [TOLD, TOLD]}, work_per_token=1e6, stated=None)
    assert "| 1.00 |" in lines[3] and lines[4:] == [*OTHERS, "", "ours: failed, measured in 1 of 2 rounds."]
    lines = figures.table({"ours": [None], "other": [TOLD]}, work_per_token=1e6, stated=None)
    assert lines[2].startswith("| ours | failed |") and lines[3].startswith("| other | 50 | 20 | – |")


def test_best_matmul_is_the_median_of_all_peers_rounds() -> None:
    """So that what a busy moment costs one of them does not change what all are held to."""
    rounds = {
        "ours": [TOLD, {**TOLD, "matmul": 2e9}],
        "other": [{**TOLD, "matmul": 2e9}, TOLD, {**TOLD, "matmul": 2e9}],
    }
    lines = figures.table(rounds, work_per_token=1e6, stated=None)
    assert "| – | 0.03 |" in lines[2] and "| – | 0.03 |" in lines[3]


@pytest.mark.parametrize("each", WORKLOADS.values(), ids=WORKLOADS.keys())
def test_sorted_rows_are_counted_by_whole_turns(each: Workload) -> None:
    """What transformers sorts by length goes from long to short: a part of it would not be the data set."""
    assert (each.updates - each.warm) % each.sorted_updates == 0 and each.warm >= 1
    if each.suite != "toy":
        assert each.rows >= 4 * each.together * each.sorted_updates


@pytest.mark.parametrize(("name", "least"), [("sst2-minilm", 0.93), ("sst2-bert-base", 0.93), ("imdb-minilm", 0.98)])
def test_the_tuned_trainer_pads_as_little_as_with_the_real_data_set(name: str, least: float) -> None:
    """SST-2 has 67,349 rows, of which `group_by_length` leaves 0.95; of 448 rows it was 0.60."""
    each = WORKLOADS[name]
    lengths = np.maximum(workloads.draw(each), 3)
    order = get_length_grouped_indices(lengths.tolist(), each.batch, generator=torch.Generator().manual_seed(0))
    rows = lengths[order][each.warm * each.batch : each.updates * each.batch].reshape(-1, each.batch // each.parts)
    assert rows.sum() / (rows.max(1) * rows.shape[1]).sum() >= least
    assert rows.mean() == pytest.approx(lengths.mean(), rel=0.1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--peers ours trainer_tund", "--peers: no such name: trainer_tund; did you mean trainer_tuned?"),
        ("--workloads sst2", "--workloads: no such name: sst2; "),
        ("--peers raw ours", "--peers: the first must be ours"),
        ("--rounds 0", "--rounds: at least 1, not 0"),
        ("--seconds 0", "--seconds: more than 0, not 0"),
        ("--seconds nan", "--seconds: more than 0, not nan"),
        ("--limit -1", "--limit: more than 0, not -1"),
        ("--micro 0", "--micro: at least 1 token, not 0"),
        ("--updates 1", "--updates: at least 2"),
    ],
)
def test_what_makes_no_sense_is_said(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        options.parse("", given.split())
    assert raised.value.code == 2 and said in capsys.readouterr().err


def test_without_a_gpu_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be measured, and why; exit code 1. Whoever wants it anyway is let."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"cannot be measured here: chat-llama-1b, .*PyTorch .*--anyway"):
        options.chosen(options.parse("", ["--suite", "gpu"]))
    with pytest.raises(SystemExit, match=r"here: imdb-modernbert\. "):
        options.chosen(options.parse("", ["--workloads", "toy", "imdb-modernbert"]))
    assert len(options.chosen(options.parse("", ["--suite", "gpu", "--anyway"]))) >= 6


def test_peers_that_a_workload_does_not_have(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else True)
    here = options.can_be_measured(WORKLOADS["toy-chat"], ["ours", "usual", "trl"])
    assert here == (["ours"], ["trl"])
    said = capsys.readouterr().out
    assert "not a peer of toy-chat: usual; there are ours, raw, " in said
    assert "toy-chat: not measured: trl: TRL is not installed; pip install 'lockstep[benchmarks]'" in said


def test_what_compiles_is_measured_on_a_cpu_where_it_is_asked_for() -> None:
    each = WORKLOADS["sst2-minilm"]
    assert "trainer_tuned_compiled" not in options.can_be_measured(each, None)[0]
    assert options.can_be_measured(each, ["ours", "trainer_tuned_compiled"]) == (["ours", "trainer_tuned_compiled"], [])


def test_what_others_take_of_the_processors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what this process and its children took, of all processors; what a host keeps counts where it tells."""
    kinds = namedtuple("kinds", "user system idle steal")  # as on Linux, in seconds since the machine was started
    now = [kinds(10.0, 5.0, 0.0, 1.0), 100.0, (4.0, 1.0, 2.0, 1.0, 0.0)]
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: now[0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[1])
    monkeypatch.setattr(machine.os, "times", lambda: now[2])
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    others = machine.Others()
    now[:] = kinds(20.0, 6.0, 5.0, 2.0), 110.0, (5.0, 1.0, 9.0, 1.0, 0.0)  # 12 s were taken in 10 s, 8 of them by us
    assert others.part() == pytest.approx(4 / 20)


def test_a_busy_machine_is_not_measured_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "busy", lambda: "others take 40% of its processors")
    monkeypatch.setattr(sys, "argv", ["compare", "--workloads", "sst2-minilm", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"nothing is measured: others take 40% .* `--busy`"):
        program.main()
    assert not list(tmp_path.iterdir())


def test_a_peer_that_fails_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the table, and by the exit code; the others are measured."""
    monkeypatch.setattr(program, "measure", lambda peer, folder, limit: None if peer == "usual" else TOLD)
    monkeypatch.setattr(plot, "draw", lambda *_: None)
    given = ["compare", "--workloads", "toy", "--peers", "ours", "usual", "--rounds", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match=r"failed: usual \(toy\)"):
        program.main()
    assert "usual: failed, measured in 0 of 2 rounds." in (tmp_path / "toy.md").read_text()
    assert json.loads((tmp_path / "toy.json").read_text()) == {"ours": [TOLD, TOLD], "usual": [None]}
    assert "2 rounds" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.filterwarnings("ignore")
def test_plot(tmp_path: Path) -> None:
    plot.draw({"ours": [TOLD, {**TOLD, "seconds": 2.5}], "broken": [None]}, "toy", tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def learn(tmp_path: Path, *chosen: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Let the peers of a workload learn once; return what each told, and the table."""
    name = chosen[0]
    command = ["-m", "benchmarks.compare", "--workloads", *chosen, "--rounds", "1", "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-1000:]}"
    told = {peer: rounds[0] for peer, rounds in json.loads((tmp_path / f"{name}.json").read_text()).items()}
    assert all(each is not None for each in told.values()), done.stdout
    assert all(each["updates"] == WORKLOADS[name].updates and each["seconds"] > 0 for each in told.values())
    return told, (tmp_path / f"{name}.md").read_text()


@pytest.mark.whole_run
def test_ours_and_peers_end_to_end(tmp_path: Path) -> None:
    """One toy workload with what is installed anyway; in fp32 the plain loop's losses are ours, bit for bit."""
    told, table = learn(tmp_path, "toy", "--peers", "ours", "raw", "trainer_tuned")
    assert set(told) == {"ours", "raw", "trainer_tuned"} and "| trainer_tuned |" in table
    assert told["ours"]["losses"] == told["raw"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "toy-modernbert"])
def test_all_peers_learn_the_same_rows(name: str, tmp_path: Path) -> None:
    exact = WORKLOADS[name].precision == "fp32"
    peers = [*workloads.TEXT_PEERS, *([] if exact else ["trainer_fp32"])]
    told, table = learn(tmp_path, name, "--peers", *peers)
    assert [*told] == peers
    assert told["ours"]["tokens"] == told["raw"]["tokens"]
    if exact:
        assert told["ours"]["losses"] == told["raw"]["losses"]
    assert told["ours"]["losses"] == pytest.approx(told["raw"]["losses"], rel=2e-2)
    assert all(len(each["losses"]) == WORKLOADS[name].updates for each in told.values())
    for each in told.values():
        assert np.mean(each["losses"]) == pytest.approx(np.mean(told["ours"]["losses"]), rel=0.1)
    assert {each["all_tokens"] for each in told.values()} == {int(np.maximum(workloads.draw(WORKLOADS[name]), 3).sum())}
    assert "| usual |" in table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-chat", "toy-chat-lora", "toy-packed"])
def test_ours_and_trl_count_the_same(name: str, tmp_path: Path) -> None:
    """TRL, not packed, goes through all rows once: its tokens and targets are those that ours encodes."""
    pytest.importorskip("trl")
    each = WORKLOADS[name]
    told, table = learn(tmp_path, name, "--peers", *workloads.TOKEN_PEERS[:5])
    assert set(told) == {"ours", "raw", "trl", "trl_tuned", "trl_packed"}
    assert told["ours"]["losses"] == pytest.approx(told["raw"]["losses"], rel=2e-2)
    tokens, targets = encoded(each, tmp_path)
    assert tokens == int(workloads.positions(each).sum())
    for peer in ("trl", "trl_tuned"):
        assert (told[peer]["all_tokens"], told[peer]["all_targets"]) == (tokens, targets)
    assert targets < tokens or each.task == "causal_lm"
    assert np.mean(told["trl"]["losses"]) == pytest.approx(np.mean(told["ours"]["losses"]), rel=0.02)
    assert "| trl_packed |" in table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-modernbert", "toy-chat"])
def test_peers_that_compile(name: str, tmp_path: Path) -> None:
    """Each makes its kernels and learns the same; a minute or two each."""
    if name == "toy-chat":
        pytest.importorskip("trl")
    compiling = [peer for peer in WORKLOADS[name].peers if peer.endswith("_compiled")]
    told, table = learn(tmp_path, name, "--peers", "ours", *compiling)
    assert len(compiling) == {"toy-modernbert": 2, "toy-chat": 3}[name] and [*told] == ["ours", *compiling]
    assert told["ours_compiled"]["losses"] == pytest.approx(told["ours"]["losses"], rel=2e-2)
    for each in told.values():
        assert np.mean(each["losses"]) == pytest.approx(np.mean(told["ours"]["losses"]), rel=0.1)
    assert all(f"| {peer} |" in table for peer in compiling)


def encoded(each: Workload, folder: Path) -> tuple[int, int]:
    """Return tokens and targets of all rows, as ours takes them in."""
    from train.config import validate
    from train.ingredients import read

    train = read(validate(workloads.config(each, folder, folder / "run"), "test")).splits["train"]
    return int(train.column("length").sum()), int(train.column("targets").sum())
