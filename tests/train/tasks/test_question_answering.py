"""Question answering: windows, offsets in any script, losses, the best spans, no answer, and what cannot be used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from data.encode import encode_sources
from data.encoded import Encoded
from data.errors import UserError
from data.source import Rows
from tests.every_task.question_answering import rows as sample_rows
from tests.worker import carry_out
from train.tasks._spans import best_spans, logits, losses
from train.tasks._windows import answers, misplaced
from train.tasks.question_answering import Config, QuestionAnswering

TEXT = (
    "Le café\u0301 de Montréal coûte 3 € 👩‍👩‍👧 au thé. 北京是中国的首都。 مُحَمَّد كتب رسالة "
    "हिन्दी भाषा है ❤️ fin; naïve  doubleblank\tTabbed “quoted” ﬁn İstanbul x\u200by."
)


def trained(kind: str) -> Any:
    """Return a tokenizer of a family, trained on TEXT: pieces with the blank in them, bytes, stripped accents."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    elif kind.startswith("bytes"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, unk_token="[UNK]", special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    if kind == "bytes trimmed":
        tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2), trim_offsets=True)
    else:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def words(tiny_model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def row(context: str, *answers: str, question: str = "q") -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


def prepared(rows: list[dict[str, Any]], tokenizer: Any, **config: Any) -> QuestionAnswering:
    return QuestionAnswering.prepare(Config(**config), [Rows(Dataset.from_list(rows), "rows.jsonl")], tokenizer)


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in ("question", "context", "answers")}


def encoded(
    rows: list[dict[str, Any]], tokenizer: Any, folder: Path, max_length: int = 24, **config: Any
) -> tuple[QuestionAnswering, Encoded]:
    part, task = Rows(Dataset.from_list(rows), "rows.jsonl"), prepared(rows, tokenizer, **config)
    whole = encode_sources([[part]], task, tokenizer, max_length, skip_bad=False, cache=folder)
    informed = task.informed(whole)
    assert isinstance(informed, QuestionAnswering)
    return informed, whole


def oracle(task: QuestionAnswering, whole: Encoded, *, null: float = -1.0) -> dict[str, np.ndarray[Any, Any]]:
    """Return the predictions of a model that gives 1 to the right span of each window that holds it, else 0."""
    features = whole.features(np.arange(len(whole.dataset)))
    size = len(features["start"])
    right = features["start"] != features["null"]
    first = features["first"]
    return {
        "scores": np.stack([right.astype(float), np.zeros(size)], axis=1),
        "starts": np.stack([np.where(right, features["start"] - first, 0), np.zeros(size, int)], axis=1),
        "ends": np.stack([np.where(right, features["end"] - first, 0), np.zeros(size, int)], axis=1),
        "null_scores": np.where(right, null, 1.0),
    }


def test_windows_are_those_of_the_tokenizer_itself(words: Any) -> None:
    rows = sample_rows(200, 1)
    for length, stride in ((24, 6), (17, 0), (40, 20), (64, 30)):
        features = prepared(rows, words, stride=stride).encode(columns(rows), words, length)
        theirs = words(
            [row["question"] for row in rows], [row["context"] for row in rows], truncation="only_second",
            max_length=length, stride=stride, return_overflowing_tokens=True,
        )  # fmt: skip
        assert features["input_ids"] == theirs["input_ids"]
        assert features["row"] == theirs["overflow_to_sample_mapping"]
        assert features["unusable"] == []
        assert features["length"] == [len(ids) for ids in theirs["input_ids"]]


def test_the_answer_is_found_in_the_windows_that_hold_it_whole(words: Any) -> None:
    context = " ".join(f"w{number}" for number in range(1, 31))
    rows = [row(context, "w10 w11 w12"), row(context, "w29", "w2"), row(context)]
    features = prepared(rows, words, stride=4).encode(columns(rows), words, 14)  # 10 tokens of context, in steps of 6
    targets = list(zip(features["row"], features["start"], features["end"], strict=True))
    assert targets == [
        (0, 0, 0), (0, 6, 8), (0, 0, 0), (0, 0, 0), (0, 0, 0),
        (1, 4, 4), (1, 0, 0), (1, 0, 0), (1, 0, 0), (1, 7, 7),
        (2, 0, 0), (2, 0, 0), (2, 0, 0), (2, 0, 0), (2, 0, 0),
    ]  # fmt: skip
    for ids, start, end in zip(features["input_ids"], features["start"], features["end"], strict=True):
        assert words.decode(ids[start : end + 1]) in ("[CLS]", "w10 w11 w12", "w29", "w2")
    assert features["golds"][:6] == ['["w10 w11 w12"]', "", "", "", "", '["w29", "w2"]']
    assert features["golds"][10] == "[]"


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "bytes trimmed", "unigram"])
def test_answers_come_back_in_any_script(kind: str, tmp_path: Path) -> None:
    """Every run of words of the text is asked for; with perfect scores it comes back as it stands there."""
    tokenizer = trained(kind)
    pieces = TEXT.split(" ")
    texts = [" ".join(pieces[start : start + size]) for start in range(len(pieces)) for size in (1, 2, 3)]
    texts = [text for text in texts if text.strip() == text and text]
    rows = [row(TEXT, text) for text in dict.fromkeys(texts)]
    assert len(rows) > 60
    task, whole = encoded(rows, tokenizer, tmp_path, max_length=70, stride=50)
    assert len(whole.dataset) > len(rows)
    records = list(task.records(oracle(task, whole), whole))
    assert [record["prediction"] for record in records] == [record["reference"][0] for record in records]
    for record, given in zip(records, rows, strict=True):
        best = record["n_best"][0]
        assert TEXT[best["start"] :].startswith(best["text"])
        assert given["answers"]["text"] == record["reference"]


def test_parts_of_words_come_back_too(tmp_path: Path) -> None:
    rows = [row(TEXT, text) for text in ("首都", "Montréal", "رسالة", "doubleblank", "3 €", "“quoted”")]
    task, whole = encoded(rows, trained("bytes"), tmp_path, max_length=300)
    outputs = task.outputs(oracle(task, whole), whole)
    assert [each["text"] for each in outputs["predictions"]] == [each["answers"]["text"][0] for each in rows]


class Fixed(torch.nn.Module):
    """A model whose logits are given."""

    def __init__(self, start: torch.Tensor, end: torch.Tensor) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, **inputs: Any) -> Any:
        return type("Output", (), {"start_logits": self.start, "end_logits": self.end})


def test_the_loss_counts_the_context_and_the_null_position_only() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(2, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 7, dtype=torch.float64)
    labels = torch.tensor([[0, 2, 6, 3, 4], [0, 3, 5, 0, 0]])
    model = Fixed(start, end)
    found = logits(model, {"input_ids": labels, "labels": labels})
    loss = losses(*found[:2], labels)
    places = [[0, 2, 3, 4, 5], [0, 3, 4]]
    for window, allowed in enumerate(places):
        expected = 0.0
        for scores, place in ((start, labels[window, 3]), (end, labels[window, 4])):
            chosen = scores.detach()[window, allowed].log_softmax(0)
            expected += -float(chosen[allowed.index(int(place))]) / 2
        assert loss.detach()[window].item() == pytest.approx(expected, abs=1e-12)
    loss.sum().backward()
    assert start.grad is not None and torch.isfinite(start.grad).all()
    assert (start.grad[0] != 0).tolist() == [place in places[0] for place in range(7)]


@torch.no_grad()
def test_padding_changes_no_loss_and_no_prediction(tiny_model: str, words: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(tiny_model, dtype=torch.float64).eval()
    task, whole = encoded(sample_rows(40, 2), words, tmp_path, stride=6)
    features = whole.features(np.arange(len(whole.dataset)))
    together = task.predict(model, task.collate(features))
    total = task.loss(model, task.collate(features))
    assert total.item() == pytest.approx(float(together["loss"].sum()), abs=1e-9)
    for example in range(len(whole.dataset)):
        alone = task.predict(model, task.collate(whole.features(np.array([example]))))
        assert float(alone["loss"]) == pytest.approx(float(together["loss"][example]), abs=1e-9)
        assert float(alone["null_scores"]) == pytest.approx(float(together["null_scores"][example]), abs=1e-9)
        real = torch.isfinite(alone["scores"][0])
        size = int(real.sum())
        for name in ("starts", "ends"):
            assert alone[name][0][real].tolist() == together[name][example][:size].tolist()
        assert together["scores"][example][:size].tolist() == pytest.approx(alone["scores"][0][real].tolist(), abs=1e-9)


def test_the_best_spans_are_those_of_all() -> None:
    generator = random.Random(0)
    torch.manual_seed(0)
    for _ in range(300):
        length, longest, most = generator.randint(1, 12), generator.randint(1, 15), generator.randint(1, 9)
        start, end = torch.randn(2, 1, length, dtype=torch.float64)
        context = torch.rand(1, length) < 0.7
        scores, starts, ends = best_spans(start, end, context, longest, most)
        real = torch.isfinite(scores[0])
        found = list(zip(scores[0][real].tolist(), starts[0][real].tolist(), ends[0][real].tolist(), strict=True))
        inside = context[0].nonzero().flatten().tolist()
        every = [
            (float(start[0, first] + end[0, last]), first, last)
            for first in inside for last in inside if first <= last < first + longest
        ]  # fmt: skip
        assert found == sorted(every, reverse=True)[:most]


def test_scores_are_taken_over_all_windows_and_a_place_is_listed_once(words: Any, tmp_path: Path) -> None:
    context = " ".join(f"w{number}" for number in range(1, 19))  # windows: w1 to w10, w7 to w16, w13 to w18
    task, whole = encoded([row(context), row("w1 w2", "w1")], words, tmp_path, max_length=14, stride=4, n_best=2)
    nan = float("nan")
    found = {
        "scores": np.array([[1.0, 0.5], [3.0, 0.75], [2.0, nan], [nan, nan]]),
        "starts": np.array([[6, 0], [0, 2], [0, -100], [-100, -100]]),
        "ends": np.array([[7, 0], [1, 3], [1, -100], [-100, -100]]),
        "null_scores": np.array([4.0, 2.5, 5.0, 1.0]),
    }
    first, second = task.records(found, whole)
    assert first["n_best"] == [
        {"text": "w7 w8", "start": 18, "score": 3.0},  # in two windows: the better counts
        {"text": "w13 w14", "start": context.index("w13"), "score": 2.0},
    ]
    assert first["null_odds"] == -0.5 and first["prediction"] == "w7 w8" and first["reference"] == []
    assert (second["n_best"], second["prediction"], second["null_odds"]) == ([], "", 0.0)
    assert (first["row"], second["row"]) == (0, 1)


def test_whether_there_may_be_no_answer_is_learned_from_the_training_rows(words: Any, tmp_path: Path) -> None:
    always = [row("w1 w2 w3", "w2"), row("w3 w4", "w3")]
    task, whole = encoded(always, words, tmp_path / "always")
    assert str(task) == "question answering: question + context → answers, every question has an answer"
    found = {**oracle(task, whole), "null_scores": np.full(2, 100.0)}
    assert [each["text"] for each in task.outputs(found, whole)["predictions"]] == ["w2", "w3"]
    with pytest.raises(UserError, match=r"task\.null_threshold cannot take effect: every training row has an answer"):
        encoded(always, words, tmp_path / "fixed", null_threshold=1.0)
    task, whole = encoded([*always, row("w5")], words, tmp_path / "some")
    assert str(task).endswith("some questions have no answer")
    assert task.balance(whole) == {"windows with the answer": 2, "without": 1}
    found = {**oracle(task, whole), "null_scores": np.array([3.0, 4.0, 7.0])}
    assert task.threshold == 0.0
    tuned = task.tuned(found, whole)
    assert tuned.threshold == 5.0  # the odds are 2, 3 and 7
    assert [each["text"] for each in tuned.outputs(found, whole)["predictions"]] == ["w2", "w3", ""]
    fixed, whole = encoded([*always, row("w5")], words, tmp_path / "given", null_threshold=2.5)
    assert fixed.tuned(found, whole) is fixed
    assert [each["text"] for each in fixed.outputs(found, whole)["predictions"]] == ["w2", "", ""]


def test_marks_show_what_is_learned(words: Any, tmp_path: Path) -> None:
    task, whole = encoded([row("w1 w2 w3", "w2 w3"), row("w5")], words, tmp_path)
    marks = [task.marks(task.collate(whole.features(np.array([place]))), words) for place in (0, 1)]
    assert [learned for _, learned in marks[0] if learned] == ["w2", "w3"]
    assert marks[1][-1] == ("", "no answer")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": " "}, "'question' is empty"),
        ({"question": None}, "'question' must be text, not None"),
        ({"context": ""}, "'context' is empty"),
        ({"context": None}, "'context' must be text, not None"),
        ({"answers": None}, "'answers' must be {text: [...], answer_start: [...]}, both empty where"),
        ({"answers": "w2"}, "'answers' must be {text: [...], answer_start: [...]}, both empty where"),
        ({"answers": {"text": "w2", "answer_start": 3}}, "'answers' must be {text: [...], answer_start"),
        ({"answers": {"text": ["w2"]}}, "'answers' must be {text: [...], answer_start: [...]}"),
        ({"answers": {"text": ["w2", "w2"], "answer_start": [3]}}, "'answers': has 2 texts and 1 starts"),
        ({"answers": {"text": ["  "], "answer_start": [2]}}, "an answer must be text that is not empty, not '  '"),
        ({"answers": {"text": ["w2"], "answer_start": ["3"]}}, "answer_start must be a whole number, not '3'"),
        ({"answers": {"text": ["w2"], "answer_start": [4]}}, "the answer 'w2' does not stand at answer_start 4: there "
         "stands '2 '; the answer stands first at 3 (characters are counted from 0"),
        ({"answers": {"text": ["w2"], "answer_start": [-5]}}, "at answer_start -5: there stands nothing; the answer"),
        ({"answers": {"text": ["w2"], "answer_start": [99]}}, "at answer_start 99: there stands nothing; the answer"),
        ({"answers": {"text": ["w9"], "answer_start": [3]}}, "there stands 'w2'; the answer stands nowhere in the"),
        ({"answers": [{"text": "w2"}]}, "answer_start must be a whole number, not None"),
        ({}, None),
        ({"answers": {"text": [], "answer_start": []}}, None),
        ({"answers": [{"text": "w2", "answer_start": 3}]}, None),
        ({"answers": []}, None),
    ],
)  # fmt: skip
def test_problems_of_rows_are_named(change: dict[str, Any], problem: str | None, words: Any) -> None:
    good = row("w1 w2 w3", "w2")
    found = prepared([good], words).problem({**good, **change})
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_rows_that_do_not_fit_are_named(words: Any, tmp_path: Path) -> None:
    long, good = " ".join(["w1"] * 40), row("w1 w2", "w2")
    with pytest.raises(
        UserError, match=r"row 1 \(from 0\): 'question' alone fills data.max_length \(24 tokens\): short"
    ):
        encoded([good, row("w1 w2", "w2", question=long)], words, tmp_path, stride=6)
    message = (
        r"row 1 \(from 0\): 'question' leaves 6 of 24 tokens for the context, no more than task.stride \(6\): shorten "
        r"it, raise data.max_length or lower task.stride"
    )
    with pytest.raises(UserError, match=message):
        encoded([good, row(long, "w1", question=" ".join(["w5"] * 15))], words, tmp_path, stride=6)
    fits = row("w1 w2 w3 w4", "w2", question=" ".join(["w5"] * 15))
    assert len(encoded([fits], words, tmp_path, stride=20)[1].dataset) == 1  # no windows, so the stride is no matter
    invisible = trained("wordpiece")
    with pytest.raises(UserError, match="'context' holds nothing that the tokenizer knows"):
        encoded([row("\u200b\u200b")], invisible, tmp_path)
    with pytest.raises(UserError, match="'answers' holds nothing that the tokenizer knows"):
        encoded([row("ab \u200b", "\u200b")], invisible, tmp_path)


def test_columns_are_chosen_and_missed(words: Any) -> None:
    good = row("w1 w2", "w2")
    renamed = {"q": good["question"], "context": good["context"], "answers": good["answers"]}
    assert prepared([renamed], words, question="q").columns == ("q", "context", "answers")
    with pytest.raises(UserError, match=r"no column 'question'; it has q, context, answers"):
        prepared([renamed], words)
    with pytest.raises(
        UserError, match=r"task.answers\): rows.jsonl has no column 'answers'; it has question, context"
    ):
        prepared([{"question": "q", "context": "c"}], words)


def run_config(tmp_path: Path, model: str, **changes: Any) -> dict[str, Any]:
    for name, count in (("train", 120), ("validation", 30), ("test", 25)):
        lines = [json.dumps(each) + "\n" for each in sample_rows(count, len(name))]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return {
        "output": str(tmp_path / "out"), "batch_size": 16, "updates": 6, "precision": "fp32",
        "task": {"name": "question_answering", "stride": 6, "max_answer_length": 4},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl"),
                 "test": str(tmp_path / "test.jsonl"), "cache": str(tmp_path / "cache"), "max_length": 24},
        "model": {"path": model}, "optim": {"lr": 5e-3}, **changes,
    }  # fmt: skip


def test_the_threshold_of_the_validation_rows_judges_the_test_rows(tiny_model: str, tmp_path: Path) -> None:
    assert carry_out(run_config(tmp_path, tiny_model, checkpoint={"best": "f1"})) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    threshold = found["validation/best_threshold"]
    assert found["validation/f1"] == pytest.approx(found["validation/best_f1"], abs=1e-12)
    for role in ("validation", "test"):
        text = (tmp_path / "out" / "predictions" / f"{role}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines:
            silent = line["null_odds"] > threshold
            assert line["prediction"] == ("" if silent else line["n_best"][0]["text"])
        right = sum(bool(line["prediction"] in (line["reference"] or [""])) for line in lines)
        assert found[f"{role}/exact_match"] == pytest.approx(right / len(lines))
    assert found["test/f1"] <= found["test/best_f1"]


def test_bad_rows_are_refused_by_name_or_skipped(tiny_model: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, tiny_model)
    file = tmp_path / "train.jsonl"
    lines = file.read_text().splitlines()
    wrong = {"question": "w1", "context": "w1 w2", "answers": {"text": ["w2"], "answer_start": [0]}}
    long = {"question": "w1 " * 30, "context": "w1 w2", "answers": {"text": ["w2"], "answer_start": [3]}}
    file.write_text("\n".join([json.dumps(wrong), json.dumps(long), *lines]) + "\n")
    with pytest.raises(UserError, match=r"train.jsonl, line 1: 'answers': the answer 'w2' does not stand at answer_st"):
        carry_out(config)
    assert not (tmp_path / "out").exists()
    config["data"]["on_bad_row"] = "skip"
    assert carry_out(config) == 0
    skipped = (tmp_path / "out" / "skipped_rows_train.txt").read_text().splitlines()
    assert [line[:20] for line in skipped] == ["train.jsonl, line 1:", "train.jsonl, line 2:"]


def test_models_that_read_from_left_to_right_are_refused(tiny_decoder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: GPT2ForQuestionAnswering reads from left to right: its first"):
        carry_out(run_config(tmp_path, tiny_decoder))


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Roberta", {"max_position_embeddings": 66, "pad_token_id": 0, "type_vocab_size": 1}),
    ("ModernBert", {"max_position_embeddings": 64, "pad_token_id": 0, "global_attn_every_n_layers": 2}),
    ("DebertaV2", {"max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("DistilBert", {"max_position_embeddings": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
]


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_other_families_are_trained_and_exported(
    family: str, settings: dict[str, Any], tiny_model: str, tmp_path: Path
) -> None:
    import transformers
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes = {} if family == "DistilBert" else sizes
    config = getattr(transformers, f"{family}Config")(vocab_size=65, **sizes, **settings)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "start")
    assert carry_out(run_config(tmp_path, str(tmp_path / "start"))) == 0
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out" / "model")
    line = json.loads((tmp_path / "out" / "predictions" / "test.jsonl").read_text().splitlines()[0])
    given = sample_rows(25, len("test"))[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    with torch.no_grad():
        out = model(**tokenizer(given["question"], given["context"], return_tensors="pt"))
    assert torch.isfinite(out.start_logits).all()
    assert line["reference"] == given["answers"]["text"]


def test_other_spellings_of_no_answer_and_of_a_start() -> None:
    context = "Paris is a city."
    assert answers({"text": [""], "answer_start": [-1]}) == answers([]) == ([], [])
    texts, starts = answers([{"text": "city", "answer_start": 11.0}]) or ([], [])
    assert (texts, starts) == (["city"], [11]) and misplaced(context, texts, starts) is None
    assert "answer_start must be a whole number, not 11.5" in str(misplaced(context, ["city"], [11.5]))
    assert answers({"text": "city", "answer_start": 11}) is None and answers(None) is None
