"""Multiple choice: its columns in the shapes of the field's data sets, any number of choices, losses, bad rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer

from data.encode import encode_sources
from data.encoded import Encoded
from data.errors import UserError
from data.source import Rows
from tests import every_task
from tests.conftest import figures
from tests.worker import carry_out
from train.tasks.multiple_choice import Config, MultipleChoice

ROW = {"question": "w1 w2", "choices": ["w3", "w4 w5", "w6"], "label": 1}


class Padding:
    pad_token_id = 0


def prepare(dataset: Dataset | list[dict[str, Any]], **config: Any) -> MultipleChoice:
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.from_list(dataset)
    return MultipleChoice.prepare(Config(**config), [Rows(dataset, "rows.jsonl")], Padding())


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Any:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return AutoTokenizer.from_pretrained(tiny_model, model_input_names=names)


@pytest.mark.parametrize(
    ("row", "config", "columns", "texts", "right"),
    [
        (ROW, {}, ("question", "choices", "label"), ["w3", "w4 w5", "w6"], 1),
        (
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
            {}, ("question", "choices", "answerKey"), ["a", "b"], 1,
        ),
        (
            {"question_stem": "q", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}],
             "answerKey": "A"},
            {}, ("question_stem", "choices", "answerKey"), ["a", "b"], 0,
        ),
        (
            {"article": "long", "question": "q", "options": ["a", "b", "c", "d"], "answer": "D"},
            {}, ("article", "question", "options", "answer"), ["a", "b", "c", "d"], 3,
        ),
        (
            {"sent1": "x", "sent2": "He", **{f"ending{n}": f"e{n}" for n in range(4)}, "label": 2},
            {}, ("sent1", "sent2", "ending0", "ending1", "ending2", "ending3", "label"), ["e0", "e1", "e2", "e3"], 2,
        ),
        (
            {"question": "q", "options": {"A": "a", "B": "b", "C": None}, "answer": "B"},
            {}, ("question", "options", "answer"), ["a", "b"], 1,
        ),
        ({"question": "q", "choices": ["a", "b"], "label": "b "}, {}, ("question", "choices", "label"), ["a", "b"], 1),
        ({"question": "q", "choices": ["a", "b"], "label": 1.0}, {}, ("question", "choices", "label"), ["a", "b"], 1),
        ({"ctx": "c", "endings": ["a", "b"], "label": "1"}, {}, ("ctx", "endings", "label"), ["a", "b"], 1),
        (
            {"premise": "p", "choice1": "a", "choice2": "b", "right": 0},
            {"question": "premise", "choices": ["choice1", "choice2"], "label": "right"},
            ("premise", "choice1", "choice2", "right"), ["a", "b"], 0,
        ),
    ],
    ids=["lists", "arc", "openbookqa", "race", "swag", "medqa", "medmcqa", "gaps", "hellaswag", "columns"],
)  # fmt: skip
def test_the_shapes_of_the_fields_data_sets(
    row: dict[str, Any], config: dict[str, Any], columns: tuple[str, ...], texts: list[str], right: int
) -> None:
    task = prepare([row, row], **config)
    assert task.columns == columns
    stored = Dataset.from_list([row])[0]
    assert task.problem(stored) is None
    assert (task.choices.of(stored)[0], task.choices.right(stored)) == (texts, right)


def test_labels() -> None:
    task = prepare([ROW])

    def right(label: Any, choices: Any = ("a", "b", "c")) -> int | None:
        return task.choices.right({"question": "q", "choices": choices, "label": label})

    assert [right(label) for label in (0, "2", "A", "C", " B ")] == [0, 2, 0, 2, 1]
    assert [right(label) for label in (3, -1, "D", None, True, "", "AB", 1.5)] == [None] * 8
    numbers, letters = ({"text": ["a", "b", "c"], "label": labels} for labels in (["1", "2", "3"], ["B", "C", "A"]))
    assert [right(label, numbers) for label in ("1", 3, 0, "A")] == [0, 2, None, None]
    assert [right(label, letters) for label in ("A", 0, "D")] == [2, 0, None]
    classes = Features(
        {"question": Value("string"), "choices": List(Value("string")), "label": ClassLabel(names=["A", "B"])}
    )
    rows = Rows(Dataset.from_dict({**{k: [v] for k, v in ROW.items()}, "label": [1]}, features=classes), "x.parquet")
    assert task.choices.right({**ROW, "label": classes["label"].int2str(rows.dataset[0]["label"])}) == 1


def test_places_that_can_only_be_counted_from_1() -> None:
    """WinoGrande spells the two options "1" and "2": from 0, every "1" would be read as the second, in silence."""
    rows = [{"sentence": "s _", "option1": "a", "option2": "b", "answer": answer} for answer in ("1", "2", "1", "")]
    columns: dict[str, Any] = {"question": "sentence", "choices": ["option1", "option2"]}
    task = prepare(rows, **columns)
    assert [task.choices.right(row) for row in rows] == [0, 1, 0, None] and "answer (counted from 1)" in str(task)
    assert "none of the 2 choices: 1 to 2, or A B" in str(task.problem(rows[3]))
    assert [prepare(rows[:1], **columns).choices.right(row) for row in rows] == [1, None, 1, None]  # may be from 0
    uneven = [{**ROW, "label": label} for label in (1, 2)] + [{**ROW, "choices": ["a", "b"], "label": 2}]
    assert [prepare(uneven).choices.right(row) for row in uneven] == [0, 1, 1]
    assert [prepare([*uneven, {**ROW, "label": 0}]).choices.right(row) for row in uneven] == [1, 2, None]
    classes = Features({**{k: Value("string") for k in ("question", "a", "b")}, "label": ClassLabel(names=["1", "2"])})
    stored = Dataset.from_dict({"question": ["q"] * 2, "a": ["x"] * 2, "b": ["y"] * 2, "label": [0, 1]}, classes)
    assert prepare(stored, choices=["a", "b"]).choices.first == 1


def test_the_right_choice_may_be_given_as_its_text() -> None:
    """As in DREAM. A text that looks like a place is a text there, since other rows show what is meant."""
    rows = [
        {"question": "q", "choice": ["at home", "at work", "in town"], "answer": "at work"},
        {"question": "q", "choice": ["1", "2", "3"], "answer": "2"},
        {"question": "q", "choice": ["same", "same", "other"], "answer": "same"},
        {"question": "q", "choice": ["x", "y"], "answer": "elsewhere"},
        {"question": "q", "choice": ["None", "y"], "answer": None},
    ]
    task = prepare(rows)
    assert task.choices.reading == "text" and str(task).endswith("→ answer (its text)")
    assert [task.choices.right(row) for row in rows] == [1, 1, None, None, None]
    assert "'answer' is 'elsewhere', which is not the text of one of the 2 choices alone" in str(task.problem(rows[3]))
    assert "'answer' is 'same', which is not the text of one of the 3 choices alone" in str(task.problem(rows[2]))
    numbers = [{"question": "q", "choices": ["12", "2", "0"], "answer": answer} for answer in ("12", "0", "2", "12")]
    assert [prepare(numbers).choices.right(row) for row in numbers] == [0, 2, 1, 0]


@pytest.mark.parametrize("choices", [["b", "a", "c"], ["2", "0", "1"]])
def test_places_and_texts_that_cannot_be_told_apart_are_refused(choices: list[str]) -> None:
    rows = [{"question": "q", "choices": choices, "answer": answer} for answer in choices]
    with pytest.raises(UserError, match=r"may hold places or letters .* task.label_is: from_0, from_1 or text"):
        prepare(rows)
    assert [prepare(rows, label_is="text").choices.right(row) for row in rows] == [0, 1, 2]
    by_place = [int(choice) if choice.isdecimal() else ord(choice) - ord("a") for choice in choices]
    assert [prepare(rows, label_is="from_0").choices.right(row) for row in rows] == by_place
    alike = [{"question": "q", "choices": ["0", "1"], "answer": answer} for answer in ("0", "1")]
    assert prepare(alike).choices.reading == "from_0"  # the same choices are right in either way


def test_what_most_rows_say_decides_from_where_places_are_counted() -> None:
    """One bad label must not move all the others."""
    four = {"question": "q", "choices": ["w", "x", "y", "z"]}
    spoilt = [{**four, "label": label} for label in ("1", "2", "3", "4", "2", "n/a")]
    assert [prepare(spoilt).choices.right(row) for row in spoilt] == [0, 1, 2, 3, 1, None]
    later = [{**four, "label": label} for label in (2, 3, 4, 2)]
    assert [prepare(later).choices.right(row) for row in later] == [1, 2, 3, 1]
    beyond = [{**four, "label": label} for label in (0, 0, 1, 3, 4)]
    assert [prepare(beyond).choices.right(row) for row in beyond] == [0, 0, 1, 3, None]


def test_a_row_may_have_no_context_and_the_column_may_be_left_alone() -> None:
    rows = [{"context": "w9", **ROW}, {"context": " ", **ROW}, {"context": None, **ROW}]
    task = prepare(rows)
    assert [task.problem(row) for row in rows] == [None] * 3
    assert task.problem({**rows[0], "context": 3}) == "'context' must be text, not 3"
    assert prepare(rows, context="").columns == ("question", "choices", "label")


def test_with_a_column_for_each_choice_the_last_may_be_empty() -> None:
    row = {"question": "q", "a": "x", "b": "y", "c": " ", "d": None, "label": 1}
    task = prepare([row], choices=["a", "b", "c", "d"])
    assert task.problem(row) is None and task.choices.of(row) == (["x", "y"], [])
    assert "choice 1 (from 0) is empty" in str(task.problem({**row, "b": "", "c": "z"}))
    assert "none of the 2 choices: 0 to 1, or A B" in str(task.problem({**row, "label": 2}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "'question' is empty"),
        ({"question": None}, "'question' must be text, not None"),
        ({"choices": None}, "'choices': no choices, where at least two are needed"),
        ({"choices": []}, "'choices': no choices, where at least two are needed"),
        ({"choices": ["a"]}, "'choices': one choice, where at least two are needed"),
        ({"choices": ["a", "", "b"]}, "'choices': choice 1 (from 0) is empty"),
        ({"choices": ["a", None]}, "'choices': choice 1 (from 0) must be text, not None"),
        ({"choices": "a, b"}, "'choices' must be a list, not 'a, b'; name a column for each choice with task.choices"),
        ({"label": 3}, "'label' is 3, which is none of the 3 choices: 0 to 2, or A B C"),
        ({"label": None}, "'label' is None, which is none of the 3 choices: 0 to 2, or A B C"),
        ({"choices": {"text": ["a", "b"], "label": ["x", "x"]}}, "2 choices need as many different labels, not x, x"),
        ({"choices": {"text": ["a", "b"], "label": ["x", "y"]}, "label": "z"}, "none of the 2 choices: x, y"),
    ],
)
def test_problems_of_rows_are_named(change: dict[str, Any], message: str) -> None:
    assert message in str(prepare([ROW]).problem({**ROW, **change}))


def test_columns_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match="has no column 'choices'; it has question, label"):
        prepare([{"question": "q", "label": 1}])
    with pytest.raises(UserError, match=r"has no column 'coices'; it has .*did you mean 'choices'"):
        prepare([ROW], choices="coices")
    with pytest.raises(UserError, match="a list names a column for each choice"):
        prepare([ROW], choices=["choices"])


def test_bad_rows_are_refused_or_skipped_by_name(tokenizer: Any, tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "label": 7}, {**ROW, "choices": ["w1"], "label": 0}]
    sources = [[Rows(Dataset.from_list(rows), "rows.jsonl")]]
    task = MultipleChoice.prepare(Config(), sources[0], tokenizer)
    with pytest.raises(
        UserError, match=r"rows.jsonl, row 1 \(from 0\): 'label' is 7.*\n.*row 2 \(from 0\).*one choice"
    ):
        encode_sources(sources, task, tokenizer, 64, skip_bad=False, cache=tmp_path)
    encoded = encode_sources(sources, task, tokenizer, 64, skip_bad=True, cache=tmp_path)
    assert (len(encoded.dataset), len(encoded.skipped)) == (1, 2)


def encoded(
    rows: list[dict[str, Any]], tokenizer: Any, folder: Path, length: int = 64
) -> tuple[MultipleChoice, Encoded]:
    source = [Rows(Dataset.from_list(rows), "rows.jsonl")]
    task = MultipleChoice.prepare(Config(), source, tokenizer)
    return task, encode_sources([source], task, tokenizer, length, skip_bad=False, cache=folder)


def test_pairs_as_the_tokenizer_makes_them(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"context": "w9 w8", **ROW}, {"context": "w7", **ROW, "choices": ["w10", "w11 w12 w13 w14"], "label": 0}]
    task, examples = encoded(rows, tokenizer, tmp_path)
    assert str(task) == "multiple choice: context + question + choices → label"
    features = examples.features(np.arange(2))
    assert features["length"].tolist() == [3 * 9, 2 * 10]  # choices x longest pair
    assert examples.longest == 0, "a row of several pairs is not one long text"
    tensors = task.collate(features)
    assert features["real_tokens"].tolist() == [25, 17] and int(tensors["attention_mask"].sum()) == 25 + 17
    prompts = ["w9 w8 w1 w2"] * 3 + ["w7 w1 w2"] * 2
    choices = [choice for row in rows for choice in row["choices"]]
    plain = tokenizer(prompts, choices, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(tensors[name], plain[name][None])
    assert tensors["pairs"].tolist() == [[0, 1, 2], [3, 4, -1]]
    assert task.balance(examples) == {"choice 0": 1, "choice 1": 1}
    marks = task.marks(task.collate(examples.features(np.array([0]))), tokenizer)
    assert [piece for piece, mark in marks if mark == "right"] == ["[CLS] w9 w8 w1 w2 [SEP] w4 w5 [SEP]"]


def test_of_a_long_pair_the_beginning_of_the_prompt_is_cut(tokenizer: Any, tmp_path: Path) -> None:
    long = " ".join(f"w{number}" for number in range(10, 30))
    rows = [
        {"context": long, "question": "w1 w2", "choices": ["w3", "w4 w5"], "label": 0},
        {"context": "w7", "question": "w1 w2", "choices": ["w3", long], "label": 0},
    ]
    task, examples = encoded(rows, tokenizer, tmp_path, 10)
    side = tokenizer.truncation_side
    tensors = task.collate(examples.features(np.arange(2)))
    texts = [tokenizer.decode(ids).replace(" [PAD]", "") for ids in tensors["input_ids"][0]]
    assert texts[:3] == [
        "[CLS] w26 w27 w28 w29 w1 w2 [SEP] w3 [SEP]",
        "[CLS] w27 w28 w29 w1 w2 [SEP] w4 w5 [SEP]",
        "[CLS] w7 w1 w2 [SEP] w3 [SEP]",
    ]
    assert texts[3] == "[CLS] w7 w1 w2 [SEP] w10 w11 w12 w13 [SEP]"
    assert tensors["token_type_ids"][0, 3].tolist() == [0] * 5 + [1] * 5
    assert side == tokenizer.truncation_side == "right"
    assert examples.longest == 2


def families() -> dict[str, Any]:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 65, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 80, "pad_token_id": 0,
    }  # fmt: skip
    ends = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
    return {
        "bert": transformers.BertConfig(**sizes),
        "roberta": transformers.RobertaConfig(**sizes, type_vocab_size=2),
        "deberta": transformers.DebertaV2Config(**sizes, **relative, type_vocab_size=2),
        "modernbert": transformers.ModernBertConfig(**sizes, **ends),
        "modernbert-mean": transformers.ModernBertConfig(**sizes, **ends, classifier_pooling="mean"),
    }


@pytest.mark.parametrize("family", list(families()))
def test_neither_padding_nor_company_matters(family: str, tokenizer: Any, tmp_path: Path) -> None:
    """The loss of a micro-batch is the sum of its rows' alone, each from its own choices; and so are the gradients."""
    from transformers import AutoModelForMultipleChoice

    task, examples = encoded(every_task.load("multiple_choice").rows(8, 5), tokenizer, tmp_path)
    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(families()[family]).double().eval()

    def tensors(ids: list[int]) -> dict[str, Any]:
        found = task.collate(examples.features(np.array(ids)))
        return {name: value for name, value in found.items() if "modern" not in family or name != "token_type_ids"}

    together = task.loss(model, tensors([*range(8)]))
    together.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    expected = 0.0
    for example in range(8):
        one = tensors([example])
        logits = model(**{name: value for name, value in one.items() if name not in ("labels", "pairs")}).logits
        assert logits.shape == (1, len(one["pairs"][0]))
        loss = torch.nn.functional.cross_entropy(logits, one["labels"])
        loss.backward()
        expected += loss.item()
    assert together.item() == pytest.approx(expected, rel=1e-9)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(gradients[name], value.grad, rtol=1e-9, atol=1e-12)
    found = task.predict(model, tensors([*range(8)]))
    assert found["loss"].sum().item() == pytest.approx(expected, rel=1e-9)
    counts = examples.column("choices")
    assert len(set(counts.tolist())) > 2
    for row, count in enumerate(counts):
        scores = found["scores"][row]
        assert scores[:count].sum().item() == pytest.approx(1, rel=1e-9) and scores[count:].isnan().all()
        assert int(found["predictions"][row]) == int(scores[:count].argmax())


def test_a_run_learns(make_config: Callable[..., Any], tmp_path: Path) -> None:
    import json

    for role in ("train", "validation"):
        rows = every_task.load("multiple_choice").rows(200, len(role))
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {f"data__{role}": str(tmp_path / f"{role}.jsonl") for role in ("train", "validation")}
    config = make_config(task={"name": "multiple_choice"}, updates=40, **data)
    assert carry_out(config) == 0
    assert figures(tmp_path / "out", "validation/accuracy")[40] > 0.8
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "AutoModelForMultipleChoice" in card


def test_a_blank_context_is_the_question_alone(tokenizer: Any, tmp_path: Path) -> None:
    both = encoded([{"context": "", **ROW}, {"context": None, **ROW}], tokenizer, tmp_path)[1]
    alone = encoded([ROW], tokenizer, tmp_path)[1]
    assert both.dataset["input_ids"][:] == alone.dataset["input_ids"][:] * 2
