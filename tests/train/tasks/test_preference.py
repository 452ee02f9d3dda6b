"""Preference: each loss by hand, the starting model asked once and never again, what a pair is, models of use."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

from data.encode import encode_sources
from data.encoded import Encoded
from data.errors import UserError
from data.plan import Bounds
from data.source import Rows
from tests.conftest import figures, write_config
from tests.distributed import launch
from tests.every_task.preference import rows as counting
from tests.train.tasks.chat_templates import byte_tokenizer
from tests.train.test_documents import kernel
from tests.worker import carry_out
from train import documents, ingredients, predict, reference, varlen
from train.config import validate
from train.tasks.preference import Config, Preference

MakeConfig = Callable[..., dict[str, Any]]
LENGTH = 24
USER, BOT = ({"role": role, "content": text} for role, text in (("user", "hello"), ("assistant", "good")))


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def prepare(tokenizer: Any, examples: list[dict[str, Any]], **config: Any) -> Preference:
    return Preference.prepare(Config(**config), [Rows(Dataset.from_list(examples), "rows.jsonl")], tokenizer)


def encoded_by(task: Preference, examples: list[dict[str, Any]], tokenizer: Any, cache: Path) -> Encoded:
    rows = [[Rows(Dataset.from_list(examples), "rows.jsonl")]]
    return encode_sources(rows, task, tokenizer, LENGTH, skip_bad=False, cache=cache)


@pytest.fixture
def tokenizer(tiny_decoder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_decoder)


@pytest.fixture
def config_of(make_config: MakeConfig, tiny_decoder: str) -> MakeConfig:
    """Return a function that gives the config of a run on pairs that can be learned."""

    def make(task: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        settings = {
            "precision": "fp32",
            "updates": 12,
            "data__max_length": LENGTH,
            "metrics": ["preference"],
            **changes,
        }
        config = make_config(task={"name": "preference", **(task or {})}, **settings)
        if "model" not in changes:
            config["model"] = {"path": tiny_decoder}
        for role, count in (("train", 150), ("validation", 31)):
            Path(config["data"][role]).write_text("".join(json.dumps(row) + "\n" for row in counting(count, len(role))))
        return config

    return make


LOSSES: list[dict[str, Any]] = [
    {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.7},
    {"loss": "ipo", "beta": 0.3},
    {"loss": "orpo", "beta": 0.3},
]


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: str(config["loss"]))
@pytest.mark.parametrize("flat", [False, True])
def test_shorter_ways_change_nothing(
    config: dict[str, Any], flat: bool, tokenizer: Any, tiny_decoder: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Losses, rewards and every gradient: with logits of answers alone, and with a kernel that knows documents (of
    which another takes the place here) without padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_decoder, attn_implementation="sdpa").double().eval()
    if flat:
        monkeypatch.setattr(varlen, "available", lambda model: True)
        monkeypatch.setattr(varlen, "_kernel", kernel)
    examples = counting(9, 0)
    task = prepare(tokenizer, examples, **config)
    features = encoded_by(task, examples, tokenizer, tmp_path).features(np.arange(9))
    tensors = task.collate(features)
    tensors["reference"] = -torch.rand(9, 2, dtype=torch.float64) * 20

    def learned() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model.zero_grad()
        task.loss(model, tensors).backward()
        found = {name: value.detach() for name, value in task.predict(model, tensors).items()}
        return found, {name: value.grad.clone() for name, value in model.named_parameters()}

    expected, slopes = learned()
    task.check_model(model)
    given: list[tuple[int, ...]] = []
    logits: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(
        lambda _, inputs, named: given.append((*inputs, named.get("input_ids"))[0].shape), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, inputs, output: logits.append(inputs[0].shape))
    found, learnt = learned()
    real, padded = int(tensors["attention_mask"].sum()), (18, tensors["input_ids"].shape[2])
    assert int(features["real_tokens"].sum()) == real < int(features["length"].sum())
    assert given == [(1, real) if flat else padded] * 2 and real < math.prod(padded)
    assert all(shape[1] == 1 for shape in logits)  # of a single place a row: what is asked is computed elsewhere
    answers = int(tensors["answers"].sum())
    assert len(tensors["places"]) == (answers if config["loss"] != "orpo" else real - 18)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    for name, slope in slopes.items():
        torch.testing.assert_close(learnt[name], slope, rtol=1e-9, atol=1e-12, msg=name)


def test_a_kernel_that_leaks_is_not_used(tokenizer: Any, tiny_decoder: str, monkeypatch: Any) -> None:
    """Pairs are then computed as padded rows."""

    def leaking(query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
        starts = torch.tensor([0, len(query)], dtype=torch.int32)
        return kernel(query, key, value, starts, starts, len(query), len(query), **options)

    monkeypatch.setattr(varlen, "available", lambda model: True)
    monkeypatch.setattr(varlen, "_kernel", leaking)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_decoder, attn_implementation="sdpa").double()
    prepare(tokenizer, counting(9, 0)).check_model(model)
    assert not documents.enabled(model)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]


def logps_by_hand(model: Any, ids: list[int], first: int) -> list[float]:
    """The log-probability of each token from `first` on, one sequence alone."""
    with torch.no_grad():
        chances = model(torch.tensor([ids])).logits[0].log_softmax(1)
    return [float(chances[place - 1, ids[place]]) for place in range(first, len(ids))]


@pytest.mark.parametrize(
    "config",
    [
        {"loss": "dpo"},
        {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.7},
        {"loss": "ipo", "beta": 0.3},
        {"loss": "ipo", "sft_weight": 0.7},
        {"loss": "orpo", "beta": 0.3},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_losses_by_hand(config: dict[str, Any], tokenizer: Any, tiny_decoder: str, tmp_path: Path) -> None:
    start = transformers.AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float64).eval()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(start.config).double().eval()
    examples = counting(9, 0)
    task = prepare(tokenizer, examples, **config)
    encoded = encoded_by(task, examples, tokenizer, tmp_path)
    features = encoded.features(np.arange(9))
    tensors = task.collate(features)
    assert (tensors["attention_mask"] == 0).any() and tensors["input_ids"].shape[:2] == (9, 2)
    with torch.no_grad():
        tensors["reference"] = task.reference(start, tensors)
        found = task.predict(model, tensors)
        assert task.loss(model, tensors).item() == pytest.approx(float(found["loss"].sum()), rel=1e-12)
    beta = config.get("beta", 0.1)
    for place, example in enumerate(examples):
        prompt = tokenizer(example["prompt"])["input_ids"]
        both = [
            [*prompt, *tokenizer(example[side])["input_ids"], tokenizer.eos_token_id][:LENGTH]
            for side in ("chosen", "rejected")
        ]
        assert features["input_ids"][place].tolist() == both[0] and features["rejected"][place].tolist() == both[1]
        new, old = ([logps_by_hand(one, ids, len(prompt)) for ids in both] for one in (model, start))
        sums, before = ([math.fsum(each) for each in side] for side in (new, old))
        ratios = [one - other for one, other in zip(sums, before, strict=True)]
        sizes = [len(each) for each in new]
        means = [total / size for total, size in zip(sums, sizes, strict=True)]
        rewards = [beta * ratio for ratio in ratios]
        if config["loss"] == "dpo":
            right = 1 / (1 + math.exp(rewards[1] - rewards[0]))
            smoothing = config.get("label_smoothing", 0.0)
            loss = -(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right)
        elif config["loss"] == "ipo":
            loss = (ratios[0] / sizes[0] - ratios[1] / sizes[1] - 1 / (2 * beta)) ** 2
        else:
            odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
            whole = logps_by_hand(model, both[0], 1)
            loss = -math.fsum(whole) / len(whole) + beta * math.log(1 + odds[1] / odds[0])
            rewards = [beta * mean for mean in means]
        loss -= config.get("sft_weight", 0.0) * means[0]
        assert float(found["loss"][place]) == pytest.approx(loss, rel=1e-9)
        assert found["rewards"][place].tolist() == pytest.approx(rewards, rel=1e-8, abs=1e-10)
        assert found["logps"][place].tolist() == pytest.approx(sums, rel=1e-9)


def test_a_likely_answer_has_finite_odds() -> None:
    """exp of its mean log-probability is 1 to the last bit: neither inf nor a gradient of nan."""
    from train.tasks._preference import odds_ratio

    for dtype in (torch.float32, torch.float64):
        means = torch.tensor([[0.0, -1e-9], [-1e-30, -50.0], [-0.69, -0.7]], dtype=dtype, requires_grad=True)
        losses = odds_ratio(means)
        losses.sum().backward()
        assert torch.isfinite(losses).all() and means.grad is not None and torch.isfinite(means.grad).all()


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("bf16", 1e-2)])
def test_the_first_update_begins_where_the_starting_model_is(
    precision: str, tolerance: float, config_of: MakeConfig
) -> None:
    """Without dropout nothing differs yet: log 2, in bf16 but for the rounding of other company."""
    config = config_of({"beta": 1.0}, precision=precision, updates=1)
    config["model"]["config"] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    assert carry_out(config) == 0
    assert figures(Path(config["output"]), "train/loss") == {1: pytest.approx(math.log(2), abs=tolerance)}


def test_the_starting_model_is_asked_once(config_of: MakeConfig, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that goes on takes what is kept; where that is lost, it asks the starting weights, not the trained ones."""
    asked: list[int] = []
    real = reference._ask

    def ask(task: Any, model: Any, encoded: Any, *others: Any) -> Any:
        asked.append(len(encoded.dataset))
        return real(task, model, encoded, *others)

    monkeypatch.setattr(reference, "_ask", ask)
    config = config_of(updates=8, checkpoint__every=4)
    kept = Path(config["data"]["cache"]) / "references"
    assert carry_out({**config, "output": str(tmp_path / "whole")}) == 0
    assert asked == [150, 31]
    files = {file.name: file.read_bytes() for file in kept.glob("*.npy")}
    assert len(files) == 2
    for name, lost in (("found", False), ("lost", True)):
        run = {**config, "output": str(tmp_path / name)}
        asked.clear()
        assert carry_out(run, stop_after=5) == 0
        assert asked == []
        if lost:
            shutil.rmtree(kept)
        assert carry_out(run) == 0
        assert asked == ([150, 31] if lost else [])
        whole, resumed = (tmp_path / each / "model" / "model.safetensors" for each in ("whole", name))
        assert whole.read_bytes() == resumed.read_bytes()
        assert records(tmp_path / "whole") == records(tmp_path / name)
    assert {file.name: file.read_bytes() for file in kept.glob("*.npy")} == files
    next(iter(kept.glob("*.npy"))).write_bytes(b"torn")
    asked.clear()
    other = {**config, "output": str(tmp_path / "other")}
    assert carry_out(other, stop_after=1) == 0
    assert len(asked) == 1, "a torn file is made again, the other is not"
    weights = tmp_path / "whole" / "model"
    assert carry_out({**config, "output": str(tmp_path / "on"), "model": {"path": str(weights)}}, stop_after=1) == 0
    assert asked[1:] == [150, 31], "other weights are another starting model"


def test_what_the_starting_model_says_depends_neither_on_the_cut_nor_on_the_processes(
    config_of: MakeConfig, tmp_path: Path
) -> None:
    config = config_of(precision="fp64", updates=2)
    found = ingredients.read(validate(config, "test"))
    values = []
    for tokens in (64, 4096):
        bounds, cache = Bounds(tokens=tokens, overhead=12), tmp_path / f"cut-{tokens}"
        splits = reference.referred(found.task, found.model, found.splits, found.accelerator, "fp64", bounds, cache)
        assert splits["train"].features(np.array([3, 1]))["reference"].shape == (2, 2)
        values.append(np.concatenate([splits[role].beside["reference"] for role in ("train", "validation")]))
    assert np.abs(values[0] - values[1]).max() < 1e-10 and not found.model.training
    config["evaluate"] = {"batch_tokens": 64}
    jobs = {**config, "output": str(tmp_path / "two"), "data": {**config["data"], "cache": str(tmp_path / "cache-2")}}
    launch([{"config": jobs}], 2, tmp_path)
    shared, alone = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "references").glob("*.npy")}
        for name in ("cache-2", "cut-64")
    )
    assert len(shared) == 2 and shared == alone, "two processes, the same cut: the same to the last bit"


def test_inspect_asks_no_model(config_of: MakeConfig, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    from train import inspect

    monkeypatch.setattr(reference, "_ask", None)
    file = write_config(config_of(), tmp_path / "config.yaml")
    assert inspect.main([str(file), "-n", "1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "task    preference, dpo, beta 0.1: prompt → chosen rather than rejected"
    at = next(place for place, line in enumerate(shown) if line.startswith("example"))
    row = counting(150, len("train"))[int(shown[at].split()[1])]
    assert shown[at + 1].strip() == row["prompt"]
    for line, side in zip(shown[at + 2 : at + 4], ("chosen", "rejected"), strict=True):
        assert line.strip() in (f"{side}: [{row[side]} <end>]", f"{side}: [{row[side]}]")


def test_dpo_learns_to_prefer_and_the_best_is_kept(config_of: MakeConfig) -> None:
    config = config_of(updates=40, optim__lr=1e-3, evaluate__every=10, checkpoint__best="reward_accuracy")
    assert carry_out(config) == 0
    result = json.loads((Path(config["output"]) / "result.json").read_text())
    assert result["metrics"]["validation/reward_accuracy"] > 0.9
    assert result["metrics"]["validation/reward_margin"] > 0
    found = records(Path(config["output"]))
    hits = [line["chosen_reward"] > line["rejected_reward"] for line in found]
    assert sum(hits) / len(hits) == pytest.approx(result["metrics"]["validation/reward_accuracy"])
    assert all(
        line["margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"], abs=2e-6) for line in found
    )


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_reward_model_ranks_the_same_when_it_is_loaded_elsewhere(
    family: str, config_of: MakeConfig, tiny_model: str, tiny_decoder: str, tmp_path: Path
) -> None:
    """Both kinds: scored at the last token, or at the first."""
    path = {"gpt2": tiny_decoder, "bert": tiny_model}[family]
    config = config_of({"loss": "reward"}, updates=60, optim__lr=3e-3, checkpoint__best="reward_accuracy")
    config["model"] = {"path": path}
    assert carry_out(config) == 0
    output = Path(config["output"])
    result = json.loads((output / "result.json").read_text())["metrics"]
    assert result["validation/reward_accuracy"] > 0.8
    model = transformers.AutoModelForSequenceClassification.from_pretrained(output / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "model")
    assert model.config.num_labels == 1
    begin, end = (
        ([], [tokenizer.eos_token_id]) if family == "gpt2" else ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    )
    for line, row in zip(records(output), counting(31, len("validation")), strict=True):
        for side in ("chosen", "rejected"):
            text = f"{row['prompt']} {row[side]}"
            ids = [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], *end][:LENGTH]
            with torch.no_grad():
                score = model(torch.tensor([ids])).logits.item()
            assert line[f"{side}_reward"] == pytest.approx(score, abs=1e-4)
        assert "chosen_logp" not in line
    for side in ("chosen", "rejected"):  # and by `train.predict`, one answer a row, which stands in "chosen"
        single = [{"prompt": row["prompt"], "chosen": row[side]} for row in counting(31, len("validation"))]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
        answers = tmp_path / f"{side}.jsonl"
        options = [
            "--input",
            str(tmp_path / "rows.jsonl"),
            "--output",
            str(answers),
            "--cache",
            str(tmp_path / "cache"),
        ]
        assert predict.main([config["output"], *options, "--precision", "fp32"]) == 0
        scores = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
        assert scores == pytest.approx([line[f"{side}_reward"] for line in records(Path(config["output"]))], abs=1e-4)
    card = (output / "model" / "README.md").read_text()
    assert "The score of an answer is the only logit" in card


def test_from_scratch_with_a_tokenizer_of_prompts_and_answers(config_of: MakeConfig) -> None:
    config = config_of({"loss": "orpo", "beta": 0.5}, updates=30, optim__lr=3e-3)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config["model"] = {"config": {"model_type": "llama", **sizes}, "tokenizer": {"train": {"kind": "wordpiece"}}}
    rows = [{**row, "prompt": f"question {row['prompt']}"} for row in counting(150, len("train"))]
    Path(config["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert carry_out(config) == 0
    output = Path(config["output"])
    losses = list(figures(output, "train/loss").values())
    assert losses[-1] < losses[0]
    assert not (Path(config["data"]["cache"]) / "references").exists(), "ORPO has no starting model to compare with"
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "model")
    assert {"question", "w20"} <= set(tokenizer.get_vocab()), "what stands in prompts only"


def test_the_boundary_is_the_prompts_own_end() -> None:
    """A merge over it ("the") is not what a model that was given the prompt can write."""
    tokenizer = byte_tokenizer(adds_bos=True)
    examples = [
        {"prompt": "in t", "chosen": "he end", "rejected": " the end"},
        {"prompt": "in", "chosen": " the end", "rejected": " the end<|im_end|>!"},
    ]
    task = prepare(tokenizer, examples)
    names = list(examples[0])
    features = task.encode({name: [row[name] for row in examples] for name in names}, tokenizer, 64)
    for place, row in enumerate(examples):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side, name in (("input_ids", "chosen"), ("rejected", "rejected")):
            ids = features[side][place]
            mask = features["learned" if side == "input_ids" else "rejected_learned"][place]
            assert ids[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
            assert tokenizer.decode(ids[len(prompt) :]) == row[name] + tokenizer.eos_token
            assert ids.count(tokenizer.bos_token_id) == 1
    assert features["length"] == [2 * size for size in features["longest"]] and features["targets"] == [1, 1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER, BOT, said("more", "user")], "chosen": [said("yes")], "rejected": [said("no")]},
        {"prompt": [USER, BOT, said("more", "user")], "chosen": "yes", "rejected": "no"},
        {
            "chosen": [USER, BOT, said("more", "user"), said("yes")],
            "rejected": [USER, BOT, said("more", "user"), said("no")],
        },
        {
            "prompt": [USER, BOT, said("more", "user")],
            "chosen": [USER, BOT, said("more", "user"), said("yes")],
            "rejected": [USER, BOT, said("more", "user"), said("no")],
        },
    ],
    ids=["prompt", "answers of text", "whole conversations", "both"],
)
def test_conversations_in_all_shapes_are_the_same_pair(row: dict[str, Any]) -> None:
    """The assistant's earlier turns are read, not learned."""
    tokenizer = byte_tokenizer()
    task = prepare(tokenizer, [row])
    assert task.problem(row) is None
    features = task.encode({name: [value] for name, value in row.items()}, tokenizer, 200)
    begin = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\ngood<|im_end|>\n"
    asked = begin + "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    for ids, mask, answer in (("input_ids", "learned", "yes"), ("rejected", "rejected_learned", "no")):
        assert tokenizer.decode(features[ids][0]).startswith(f"{asked}{answer}<|im_end|>")
        learned = [token for token, counts in zip(features[ids][0], features[mask][0], strict=True) if counts]
        assert tokenizer.decode(learned) == f"{answer}<|im_end|>"


def test_a_prompt_of_text_before_messages_is_the_users() -> None:
    tokenizer = byte_tokenizer()
    row = {"prompt": "hello", "chosen": [USER, said("yes")], "rejected": [USER, said("no")]}
    task = prepare(tokenizer, [row])
    assert task.where.pair(row).prompt == [USER] and task.where.pair(row).chosen == [said("yes")]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"chosen": "w1", "rejected": "w1"}, "'chosen' and 'rejected' are the same"),
        ({"chosen": " "}, "'chosen' is empty"),
        ({"rejected": ""}, "'rejected' is empty"),
        ({"prompt": "  "}, "'prompt' is empty"),
        ({"prompt": None}, "'prompt' must be text or a list of messages, not None"),
        ({"chosen": None}, "'chosen' must be text or a list of messages, not None"),
        ({"rejected": 3}, "'rejected' must be text or a list of messages, not 3"),
        ({"chosen": [BOT], "rejected": [said("no")]}, "'chosen' has messages, but the training rows have texts"),
    ],
)
def test_texts_that_are_no_pair(row: dict[str, Any], problem: str, tokenizer: Any) -> None:
    good = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    assert prepare(tokenizer, [good]).problem(good) is None
    assert problem in str(prepare(tokenizer, [good]).problem({**good, **row}))


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"chosen": [USER, BOT], "rejected": [USER, BOT]}, "are the same"),
        ({"chosen": [USER, BOT], "rejected": [said("bye", "user"), BOT]}, "they answer different prompts"),
        ({"chosen": [USER, BOT], "rejected": [USER]}, "'rejected' ends where its prompt ends: it is no answer"),
        (
            {"chosen": [USER, BOT, said("a", "user"), BOT], "rejected": [USER, BOT, said("b", "user"), BOT]},
            "'chosen' goes on after the prompt with a message of the role 'user'",
        ),
        ({"chosen": [USER, said(" ")], "rejected": [USER, BOT]}, "message 1 of 'chosen', the assistant's, is empty"),
        ({"chosen": [], "rejected": [USER, BOT]}, "'chosen' is empty"),
        ({"chosen": [USER, {"content": "x"}], "rejected": [USER, BOT]}, "must have a role and a content"),
        ({"chosen": "good", "rejected": "bad"}, "'chosen' is text and there is no column of prompts"),
    ],
)
def test_conversations_that_are_no_pair(row: dict[str, Any], problem: str) -> None:
    good = {"chosen": [USER, BOT], "rejected": [USER, said("no")]}
    task = prepare(byte_tokenizer(), [good])
    assert task.problem(good) is None
    assert problem in str(task.problem(row))


def test_what_does_not_fit_is_named_with_file_and_row(tokenizer: Any, tmp_path: Path) -> None:
    long = " ".join(["w5"] * LENGTH)
    good = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    for bad, problem in (
        ({"prompt": long}, f"the prompt has {LENGTH} tokens, so that data.max_length {LENGTH} leaves no token of an"),
        (
            {"chosen": f"{long} w1", "rejected": f"{long} w2"},
            f"are the same as far as data.max_length {LENGTH} reaches",
        ),
        ({"chosen": "w2", "rejected": " w2 "}, "are the same tokens"),
    ):
        examples = [good, {**good, **bad}]
        with pytest.raises(UserError, match=rf"rows.jsonl.*row 1 .*{problem}"):
            encoded_by(prepare(tokenizer, examples), examples, tokenizer, tmp_path)
    cut = [good, {**good, "chosen": long}]
    task = prepare(tokenizer, cut)
    features = encoded_by(task, cut, tokenizer, tmp_path).features(np.array([1]))
    assert len(features["input_ids"][0]) == LENGTH and tokenizer.eos_token_id not in features["input_ids"][0]


def test_columns_and_keys_that_cannot_be(tokenizer: Any, make_config: MakeConfig) -> None:
    texts = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}]
    with pytest.raises(UserError, match="no column 'better'; it has prompt, chosen, rejected"):
        prepare(tokenizer, texts, chosen="better")
    with pytest.raises(UserError, match=r"task\.template has no effect: prompts and answers are texts"):
        prepare(tokenizer, texts, template="chatml")
    with pytest.raises(UserError, match="this tokenizer has no chat template"):
        prepare(tokenizer, [{"chosen": [USER, BOT], "rejected": [USER, said("no")]}])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end token"):
        prepare(tokenizer, texts)
    assert (
        prepare(tokenizer, [{"chosen": "w2", "rejected": "w3"}], loss="reward").problem(
            {"chosen": "w", "rejected": "v"}
        )
        is None
    )
    for loss, key, value in (
        ("reward", "beta", 0.2),
        ("orpo", "sft_weight", 1.0),
        ("ipo", "label_smoothing", 0.1),
        ("reward", "sft_weight", 1),
    ):
        task = {"name": "preference", "loss": loss, key: value}
        with pytest.raises(UserError, match=f"{key} has no effect with loss {loss}; it is for dpo"):
            validate(make_config(task=task), "test")


def test_a_first_row_that_is_bad_does_not_decide_the_kind_of_all(tokenizer: Any, tmp_path: Path) -> None:
    texts = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}] * 2
    for bad in ({"chosen": None}, {"prompt": None}, {"rejected": "w2"}):
        examples = [{**texts[0], **bad}, *texts]
        task, rows = prepare(tokenizer, examples), Rows(Dataset.from_list(examples), "rows.jsonl")
        assert task.template is None
        found = encode_sources([[rows]], task, tokenizer, LENGTH, skip_bad=True, cache=tmp_path)
        assert found.dataset["row"][:] == [1, 2] and len(found.skipped) == 1
    talks: list[Any] = [{"chosen": [USER, BOT], "rejected": None}, {"chosen": [USER, BOT], "rejected": [USER, BOT]}]
    talks.append({"chosen": [USER, BOT], "rejected": [USER, said("no")]})
    assert prepare(byte_tokenizer(), talks).problem(talks[-1]) is None
    assert prepare(byte_tokenizer(), talks[:1], template="chatml").problem(talks[-1]) is None


def test_tools_of_prompts_are_read_from_any_file_or_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    made = byte_tokenizer()
    pair = {"chosen": [USER, BOT], "rejected": [USER, said("no")]}
    described = {**pair, "tools": json.dumps([{"name": "f"}])}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    settings = transformers.AutoConfig.for_model("gpt2", vocab_size=len(made), **sizes)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    plain, calling = (Rows(Dataset.from_list([row]), "rows.jsonl") for row in (pair, described))
    for loss in ("dpo", "reward"):
        knows, knows_not = (prepare(made, [row], template="chatml", loss=loss) for row in (described, pair))
        assert "tools" in knows.asked(model, made, [plain, calling]).columns
        assert not caplog.messages
        assert "tools" not in knows_not.asked(model, made, [plain, calling]).columns
        assert caplog.messages == ["the column 'tools' is not read; none was read in training"]
        caplog.clear()
