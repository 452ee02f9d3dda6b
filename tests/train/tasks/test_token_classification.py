"""Token classification: every word counts once, whatever the tokenizer makes of it and however long its row is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from data.encode import encode_sources
from data.encoded import Encoded
from data.errors import UserError
from data.source import Rows
from tests.conftest import WORDS
from tests.worker import carry_out
from train import metrics
from train.tasks import _words
from train.tasks.token_classification import Config, TokenClassification

MakeConfig = Callable[..., dict[str, Any]]

KINDS = ("wordpiece", "byte_level", "byte_level_split", "metaspace", "characters")
TEXT = [
    "the cat sat on the mat",
    "New York , said Mary , is big",
    "naïve café 東京 Zürich's",
    "x1 2 33 hello world again",
]


def tokenizer_of(kind: str) -> Any:
    """Return a tokenizer made from TEXT: one that knows the blanks between words in each of the ways there are."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    settings: dict[str, Any] = {"special_tokens": specials, "vocab_size": 300, "show_progress": False}
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(**settings)
    elif kind == "metaspace":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", **settings)
    elif kind == "characters":
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        trainer = trainers.BpeTrainer(**{**settings, "vocab_size": 40})
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "byte_level_split":
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ?[a-zA-Z]+| ?[^a-zA-Z ]+", "isolated"), made.pre_tokenizer]
            )
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def encoded_of(rows: list[dict[str, Any]], tokenizer: Any, cache: Path, max_length: int, **config: Any) -> Any:
    """Return (task, its encoded rows)."""
    files = [Rows(Dataset.from_list(rows), "rows.jsonl")]
    task = TokenClassification.prepare(Config(**config), files, tokenizer)
    return task, encode_sources([files], task, tokenizer, max_length, skip_bad=False, cache=cache)


def perfect(task: TokenClassification, encoded: Encoded) -> dict[str, Any]:
    """Return what a model that knows every target would have predicted."""
    labels = task.collate(encoded.features(np.arange(len(encoded.dataset))))["labels"].numpy()
    return {"tags": labels, "loss": np.zeros(len(labels))}


@pytest.mark.parametrize("kind", KINDS)
def test_the_label_stands_on_the_first_piece_of_its_word(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    words = ["New", "York", ",", "the", "naïve", "東京", "x1", "Zürich's", "hello"]
    rows = [{"tokens": words, "tags": [f"t{place}" for place in range(len(words))]}]
    task, encoded = encoded_of(rows, tokenizer, tmp_path, 512)
    features = encoded.features(np.arange(1))
    ids, places = features["input_ids"][0], features["places"][0]
    assert ids.tolist() == tokenizer(" ".join(words))["input_ids"], "what a pipeline makes of the text"
    offsets = tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    text, starts = " ".join(words), [len(" ".join(words[:place])) + bool(place) for place in range(len(words))]
    assert features["words"][0].tolist() == list(range(len(words)))
    for start, place in zip(starts, places, strict=True):
        assert offsets[place][0] <= start < offsets[place][1] or text[slice(*offsets[place])].strip() == text[start]
        assert offsets[place - 1][1] <= start, "the piece before is of another word"
    tensors = task.collate(features)
    assert (tensors["labels"] != -100).sum().item() == len(words)
    assert features["targets"].tolist() == [len(words)]


def test_windows_hold_every_word_once_where_it_has_most_context() -> None:
    generator, several = random.Random(0), 0
    for _ in range(1500):
        room = generator.randint(1, 12)
        sizes = np.array([generator.randint(1, min(room, 4)) for _ in range(generator.randint(0, 40))], dtype=np.int64)
        windows = _words.windows(sizes, room, generator.randint(0, room - 1))
        assert sorted(word for window in windows for word in window.judged.tolist()) == list(range(len(sizes)))
        assert windows[0].first == 0 and all(sizes[window.first : window.end].sum() <= room for window in windows)
        assert all(len(window.judged) for window in windows) or not len(sizes)

        def context(word: int, window: _words.Window, sizes: Any = sizes) -> float:
            left = sizes[window.first : word].sum() if window.first else np.inf
            return float(min(left, sizes[word + 1 : window.end].sum() if window.end < len(sizes) else np.inf))

        for window in windows:
            for word in window.judged.tolist():
                others = [context(word, other) for other in windows if other.first <= word < other.end]
                assert context(word, window) == max(others)
                several += len(others) > 1
    assert several > 5000


STRANGE = ("", " ", "\u200b", "\ufe0f", "\u00ad", "the" * 30, "東" * 50, "[SEP]", "\u2028", "e\u0301")


@pytest.mark.parametrize("scheme", ["entities", "tags"])
@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_over_all_words_of_the_raw_rows(kind: str, scheme: str, tmp_path: Path) -> None:
    """Also of words of which nothing is left, of words longer than a window, and in rows of nothing else."""
    generator, tokenizer = random.Random(kind), tokenizer_of(kind)
    names = ["O", "B-X", "I-X", "B-Y", "I-Y"] if scheme == "entities" else ["N", "V", "A"]
    rows = [{"tokens": [word], "tags": [names[1]]} for word in STRANGE]
    for _ in range(60):
        words = [generator.choice([*STRANGE, *" ".join(TEXT).split()]) for _ in range(generator.randint(1, 60))]
        rows.append({"tokens": words, "tags": [generator.choice(names) for _ in words]})
    task, encoded = encoded_of(rows, tokenizer, tmp_path, 24)
    assert len(encoded.dataset) > len(rows) and encoded.column("length").max() <= 24
    found = perfect(task, encoded)
    outputs = task.outputs(found, encoded)
    truth = [tag for row in rows for tag in row["tags"]]
    assert [task.labels.names[number] for number in outputs["references"]] == truth
    readable = int((outputs["predictions"] >= 0).sum())
    assert readable == int(encoded.column("targets").sum()) == (found["tags"] != -100).sum()
    assert 0.5 < readable / len(truth) < 1
    assert (outputs["predictions"] == outputs["references"]).sum() == readable
    figures = metrics.compute([metrics.load(metrics.Choice("accuracy"))], outputs, task.kind)
    assert figures["accuracy"] == readable / len(truth)
    records = list(task.records(found, encoded))
    assert [record["row"] for record in records] == list(range(len(rows)))
    assert [record["reference"] for record in records] == [row["tags"] for row in rows]
    for record, row in zip(records, rows, strict=True):
        tagged = list(zip(record["prediction"], row["tags"], row["tokens"], strict=True))
        assert all(given in (None, true) for given, true, _ in tagged)
        assert all(given is None for given, _, word in tagged if word == "" or len(word) > 80)
        assert all(given is not None for given, _, word in tagged if word in ("cat", "York"))
    if scheme == "entities":
        assert outputs["tag_references"] == [row["tags"] for row in rows] and outputs["scheme"] == task.scheme
        figures = metrics.compute([metrics.load(metrics.Choice("seqeval"))], outputs, "entities")
        assert figures["accuracy"] == readable / len(truth) and 0 < figures["recall"] < 1


def test_a_batch_without_any_target_divides_by_one(tmp_path: Path) -> None:
    rows = [{"tokens": ["", "\u200b"], "tags": ["N", "V"]}, {"tokens": ["the"], "tags": ["N"]}]
    task, encoded = encoded_of(rows, tokenizer_of("wordpiece"), tmp_path, 16)
    features = encoded.features(np.array([0]))
    assert (features["targets"].tolist(), task.count(features)) == ([0], 1)
    assert features["input_ids"][0].tolist() == [2, 3]


@pytest.mark.parametrize(("kind", "family"), [("wordpiece", "bert"), ("byte_level", "gpt2")])
def test_padding_changes_no_loss(kind: str, family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForTokenClassification

    generator, tokenizer = random.Random(1), tokenizer_of(kind)
    vocabulary = " ".join(TEXT).split()
    rows = [{"tokens": [generator.choice(vocabulary) for _ in range(size)]} for size in (1, 3, 9, 20, 33)]
    rows = [{**row, "tags": [generator.choice(["N", "V", "A"]) for _ in row["tokens"]]} for row in rows]
    task, encoded = encoded_of(rows, tokenizer, tmp_path, 20)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if family == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), pad_token_id=0, **shape, **task.model_config)
    model = AutoModelForTokenClassification.from_config(config).double().eval()
    ids = np.arange(len(encoded.dataset))
    together = task.loss(model, task.collate(encoded.features(ids)))
    alone = [task.loss(model, task.collate(encoded.features(ids[[one]]))) for one in ids]
    assert together.item() == pytest.approx(sum(part.item() for part in alone), rel=1e-12)
    predicted = task.predict(model, task.collate(encoded.features(ids)))
    assert predicted["loss"].tolist() == pytest.approx([part.item() for part in alone], rel=1e-9)
    counts = (predicted["tags"] != -100).sum(1)
    assert counts.tolist() == encoded.column("targets").tolist() and counts.sum() == sum(len(r["tags"]) for r in rows)


def prepare(features: dict[str, Any], columns: dict[str, Any], **config: Any) -> TokenClassification:
    dataset = Dataset.from_dict(columns, features=Features(features) if features else None)
    return TokenClassification.prepare(Config(**config), [Rows(dataset, "rows.parquet")], tokenizer_of("wordpiece"))


def test_columns_labels_and_schemes_are_found() -> None:
    words = {"tokens": [["a", "b"], ["c", "d"]]}
    names = ["O", "B-PER", "I-PER"]
    declared = {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))}
    classes = prepare(declared, {**words, "ner_tags": [[0, 1], [2, 0]]})
    assert (classes.labels.names, classes.scheme, classes.kind) == (tuple(names), "iob2", "entities")
    assert classes.default_metrics == ("seqeval",)
    assert str(classes) == "token classification: tokens → ner_tags, 3 tags (O, B-PER, I-PER), IOB2"
    equal = {**words, "tags": [[0, 1], [1, 0]]}  # lists of 0 and 1, equally long
    numbers = prepare({}, equal)
    assert (numbers.labels.names, numbers.scheme, numbers.kind) == (("0", "1"), None, "tags")
    assert numbers.default_metrics == ("accuracy",) and "2 tags (0, 1), of no scheme; task.labels gives" in str(numbers)
    assert prepare({}, equal, labels=["O", "I-X"]).scheme == "iob1"
    both = {**words, "upos": [["N", "V"], ["N", "N"]], "ner_tags": [["O", "O"], ["S-X", "O"]]}
    assert (prepare({}, both).tags, prepare({}, both).scheme) == ("ner_tags", "bioes")
    assert (prepare({}, both, tags="upos").tags, prepare({}, both, tags="upos").kind) == ("upos", "tags")
    assert prepare({}, both, scheme="none").kind == "tags"
    first = {"words": words["tokens"], "tags": [["O", "I-X"], ["I-X", "O"]]}
    assert (prepare({}, first).tokens, prepare({}, first).scheme) == ("words", "iob1")
    assert prepare({}, first, scheme="iob2").scheme == "iob2"
    config = classes.model_config
    assert config["id2label"] == {0: "O", 1: "B-PER", 2: "I-PER"} and config["label2id"]["I-PER"] == 2


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"text": ["a"], "tags": [["x", "y"]]}, {}, r"no column 'tokens'; it has text, tags"),
        ({"tokens": [["a"]], "tag": [["x"]]}, {"tags": "tgs"}, r"no column 'tgs'.*did you mean 'tag'"),
        ({"tokens": [["a"]], "tags": [["x"]]}, {}, r"'tags' holds one label only: x.*task\.labels.*task\.tags"),
        ({"tokens": [["a"]], "tags": [["x", "y"]]}, {"scheme": "iob2"}, r"iob2 has O and tags .* B-, I-; .* has x, y"),
        ({"tokens": [["a"]], "tags": [["O", "E-X"]]}, {"scheme": "iob1"}, r"iob1 has O .* 'tags' has E-X, O"),
        ({"tokens": [["a"]], "tags": [["O", "B-X", "I-X", "o"]]}, {}, r"B-X, I-X spell entities, but not 'o'"),
        ({"tokens": [["a"]], "tags": [["O", "B-X", "U-X", "E-X"]]}, {}, r"B-X, E-X, U-X spell .* letters of several"),
        ({"tokens": [["a"]], "tags": [["O", "b-x", "i-x"]]}, {}, r"b-x, i-x spell entities, in lower case"),
        ({"tokens": [["a"]], "tags": [[0, 1, -100]]}, {}, r"holds -100, the mark of pieces without a tag"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(columns: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare({}, columns, **config)


def test_a_conll_file_with_the_ending_of_plain_text_is_not_read_as_lines() -> None:
    rows = [Rows(Dataset.from_dict({"text": ["EU B-ORG", "rejects O"]}), "data/train.txt")]
    with pytest.raises(UserError, match=r"train.txt: of a .txt file each line is a text. Give .* the ending .conll"):
        TokenClassification.prepare(Config(), rows, tokenizer_of("wordpiece"))


def test_problems_of_rows_are_named() -> None:
    task = prepare({}, {"tokens": [["a", "b"]], "tags": [["noun", "verb"]]})
    good = {"tokens": ["a", ""], "tags": ["noun", "verb"]}
    assert task.problem(good) is None
    assert task.problem({**good, "tags": ["noun"]}) == "2 words in 'tokens' but 1 tags in 'tags'"
    assert task.problem({"tokens": [], "tags": []}) == "'tokens' is empty"
    assert task.problem({**good, "tokens": "a b"}) == "'tokens' must be a list, one entry a word, not 'a b'"
    assert task.problem({**good, "tokens": None}) == "'tokens' must be a list, one entry a word, not 'None'"
    assert task.problem({**good, "tags": None}) == "'tags' must be a list, one entry a word, not 'None'"
    assert task.problem({**good, "tokens": ["a", None]}) == "word 2 in 'tokens' is None, not text"
    unknown = task.problem({**good, "tags": ["noun", "nuon"]})
    assert unknown == "tag 'nuon' of word 2, '', is not one of: noun, verb; did you mean 'noun'?"
    assert "tag None of word 1, 'a', is not one of" in str(task.problem({**good, "tags": [None, "verb"]}))


def test_windows_need_room(tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "cat"], "tags": ["N", "V"]}]
    with pytest.raises(UserError, match=r"task.stride: 14 must be less than the 14 pieces data.max_length leaves"):
        encoded_of(rows, tokenizer_of("wordpiece"), tmp_path, 16, stride=14)
    _, narrow = encoded_of([{"tokens": ["the"] * 40, "tags": ["N", "V"] * 20}], tokenizer_of("wordpiece"), tmp_path, 12)
    _, wide = encoded_of(
        [{"tokens": ["the"] * 40, "tags": ["N", "V"] * 20}], tokenizer_of("wordpiece"), tmp_path, 12, stride=8
    )
    assert len(wide.dataset) > len(narrow.dataset) > 4
    assert wide.column("targets").sum() == narrow.column("targets").sum() == 40


def run_rows(count: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    words = [[generator.choice(WORDS) for _ in range(generator.randint(1, 30))] for _ in range(count)]
    return [{"tokens": row, "tags": ["low" if int(word[1:]) < 30 else "high" for word in row]} for row in words]


def test_a_run_from_conll_with_bad_rows_named(make_config: MakeConfig, tmp_path: Path) -> None:
    def conll(rows: list[dict[str, Any]]) -> str:
        pairs = (zip(row["tokens"], row["tags"], strict=True) for row in rows)
        return "\n".join("".join(f"{word} {tag}\n" for word, tag in pair) for pair in pairs)

    train, validation = run_rows(120, 1), run_rows(20, 2)
    (tmp_path / "train.conll").write_text(conll(train))
    (tmp_path / "validation.conll").write_text("w1 hgih\nw2 low\n\n" + conll(validation))
    config = make_config(task={"name": "token_classification"}, data__max_length=16, updates=30, optim__lr=2e-2)
    config["data"] |= {role: str(tmp_path / f"{role}.conll") for role in ("train", "validation")}
    with pytest.raises(UserError, match=r"validation.conll, lines 1 to 2: tag 'hgih' of word 1, 'w1', is not one of"):
        carry_out(config)
    assert not (tmp_path / "out").exists()
    config["data"]["on_bad_row"] = "skip"
    assert carry_out(config) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/predictions/validation.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 21))
    assert [line["reference"] for line in lines] == [row["tags"] for row in validation]
    pairs = [pair for line in lines for pair in zip(line["prediction"], line["reference"], strict=True)]
    accuracy = sum(given == true for given, true in pairs) / sum(len(row["tags"]) for row in validation)
    figures = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    assert figures["validation/accuracy"] == pytest.approx(accuracy) and accuracy > 0.9
    assert "lines 1 to 2" in (tmp_path / "out" / "skipped_rows_validation.txt").read_text()


def test_a_validation_set_without_any_readable_word_is_judged(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(task={"name": "token_classification"}, data__max_length=16, updates=1)
    for role, rows in (("train", run_rows(40, 0)), ("validation", [{"tokens": [""], "tags": ["low"]}])):
        Path(config["data"][role]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert carry_out(config) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]["validation/loss"] == 0.0


def test_inspect_marks_first_pieces_and_counts_tags(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("wordpiece")
    task, encoded = encoded_of([{"tokens": ["the", "café"], "tags": ["D", "N"]}], tokenizer, tmp_path, 16)
    marks = task.marks(task.collate(encoded.features(np.arange(1))), tokenizer)
    assert [learned for _, learned in marks if learned] == ["D", "N"] and marks[0] == ("[CLS]", None)
    assert task.balance(encoded) == {"D": 1, "N": 1}
