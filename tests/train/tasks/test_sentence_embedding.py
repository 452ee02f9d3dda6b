"""Sentence embeddings: the loss over the whole batch against a plain one, columns and scores, pooling, the export."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from data.batches import Batch, Part
from data.encode import encode_sources
from data.errors import UserError
from data.source import Rows
from tests.conftest import WORDS, figures
from tests.distributed import launch
from tests.every_task import sentence_embedding as sample
from tests.worker import carry_out
from train.coupling import coupled
from train.hardware import seed_dropout
from train.strategy import Prepared
from train.tasks import _contrast
from train.tasks._embedding import Backbone, unit_vectors
from train.tasks.sentence_embedding import Config, SentenceEmbedding
from train.update import Learner

MakeConfig = Callable[..., dict[str, Any]]
Row = dict[str, Any]
PAIR = {"anchor": "w1 w2", "positive": "w3"}
COLUMNS = ("anchor", "positive", "negative")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def prepare(tokenizer: Any, rows: list[Row] | Dataset, **config: Any) -> SentenceEmbedding:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return SentenceEmbedding.prepare(Config(**config), [Rows(dataset, "rows.jsonl")], tokenizer)


def crowded(count: int) -> list[Row]:
    """Rows with hard negatives in which anchors, positives and negatives are the same text now and then."""
    generator = random.Random("crowded")

    def text() -> str:
        return " ".join(generator.choice(WORDS[:6]) for _ in range(generator.choice((1, 1, 2, 3, 9))))

    rows: list[Row] = []
    while len(rows) < count:
        row = {name: text() for name in COLUMNS}
        if row["negative"] != row["positive"]:
            rows.append(row)
    anchors = [row["anchor"] for row in rows]
    assert len(set(anchors)) < count and set(anchors) & {row["positive"] for row in rows}
    return rows


def plain(vectors: dict[str, Tensor], rows: Sequence[Row], scale: float, symmetric: bool) -> list[Tensor]:
    """The loss of each pair, text by text."""

    def found(asked: str, own: str, others: Sequence[tuple[str, bool]]) -> Tensor:
        cosines = [vectors[asked] @ vectors[own]] + [vectors[asked] @ vectors[text] for text, wrong in others if wrong]
        logits = scale * torch.stack(cosines)
        return logits.logsumexp(0) - logits[0]

    losses = []
    for place, row in enumerate(rows):
        rest = [other for at, other in enumerate(rows) if at != place]
        mine = {row["anchor"], row["positive"]}
        answers = [
            (other["positive"], other["positive"] not in mine and other["anchor"] != row["anchor"]) for other in rest
        ]
        hard = [(other["negative"], other["negative"] not in mine) for other in rows if "negative" in other]
        loss = found(row["anchor"], row["positive"], answers + hard)
        if symmetric:
            back = [(o["anchor"], o["anchor"] not in mine and o["positive"] != row["positive"]) for o in rest]
            loss = (loss + found(row["positive"], row["anchor"], back)) / 2
        losses.append(loss)
    return losses


def vectors_of(model: Any, tokenizer: Any, texts: Sequence[str], length: int = 64) -> dict[str, Tensor]:
    """The mean of the tokens' vectors of each text, computed alone, of length 1."""
    given = {}
    for text in dict.fromkeys(texts):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
        mean = model(**ids).last_hidden_state[0].mean(0)
        given[text] = mean / mean.norm()
    return given


SIZES = (64, 8, 1)


@pytest.fixture(scope="module")
def first_update(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[float, Any]]:
    """Return a function (world, micro-batch size, symmetric) → loss and gradients of the first update, by name."""
    folder = tmp_path_factory.mktemp("first-update")
    rows = crowded(61)  # one process has a filler
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(world: int, size: int, symmetric: bool) -> dict[str, Any]:
        return {
            "output": str(folder / f"{world}-{size}-{symmetric}"), "batch_size": 64, "micro_batch_size": size,
            "updates": 1, "precision": "fp64", "task": {"name": "sentence_embedding", "symmetric": symmetric},
            "data": {"train": str(folder / "rows.jsonl"), "cache": str(folder / "cache")},
            "model": {
                "path": tiny_model, "config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            },
            "optim": {
                "name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant",
                "max_grad_norm": None,
            },
            "tracking": {"log_every": 1},
        }  # fmt: skip

    launch([{"config": config(2, size, True)} for size in SIZES], 2, folder)
    before = {name: value.double() for name, value in load_file(Path(tiny_model) / "model.safetensors").items()}

    def found(world: int, size: int, symmetric: bool) -> tuple[float, Any]:
        settings = config(world, size, symmetric)
        assert world == 2 or carry_out(settings) == 0
        after = load_file(Path(settings["output"]) / "model" / "model.safetensors")
        assert not [name for name in after if "pooler" in name] and len(after) > 30
        loss = figures(Path(settings["output"]), "train/loss")[1]
        return loss, {name: before[name] - value for name, value in after.items()}

    return found


@pytest.mark.parametrize("symmetric", [True, False])
def test_loss_and_gradient_are_those_of_the_whole_batch(
    symmetric: bool, first_update: Callable[..., tuple[float, Any]], tiny_model: str, tokenizer: Any
) -> None:
    """Micro-batches of 64, 8 and 1, on one process and on two, in float64: as if all had been computed at once."""
    rows = crowded(61)
    model: Any = AutoModel.from_pretrained(tiny_model, dtype=torch.float64).eval()
    given = vectors_of(model, tokenizer, [row[name] for row in rows for name in COLUMNS])
    loss = torch.stack(plain(given, rows, 20.0, symmetric)).mean()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for world in (1, 2) if symmetric else (1,):
        for size in SIZES:
            found, gradients = first_update(world, size, symmetric)
            assert found == pytest.approx(loss.item(), rel=1e-9)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient, expected[name], rtol=1e-9, atol=1e-10, msg=f"{world} {size} {name}"
                )


def test_both_passes_drop_the_same(tiny_model: str, tokenizer: Any) -> None:
    """With dropout: the gradient is that of the loss at the vectors that this update's masks give, cut by cut."""
    rows = crowded(12)
    task = prepare(tokenizer, rows, scale=5.0)
    encoded = task.encode({name: [row[name] for row in rows] for name in COLUMNS}, tokenizer, 64)
    shares = np.array([3, 0, 7, 5, 1]), np.array([2, 4, 11]), np.array([6, 8, 9, 10])

    def tensors(chosen: Any) -> dict[str, Tensor]:
        taken = {name: [np.array(encoded[name][row]) for row in chosen] for name in ("input_ids", "sizes")}
        return task.collate(taken)

    parts = [Part(tensors(chosen), chosen, False, chosen) for chosen in shares]
    parts.append(Part(tensors(np.array([0])), np.array([0]), True, np.array([0])))
    accelerator = Accelerator(cpu=True)

    def fresh() -> Any:
        return Backbone.from_pretrained(
            tiny_model, config=transformers.AutoConfig.from_pretrained(tiny_model), dtype=torch.float64
        ).train()

    model, twin = fresh(), fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    learner = Learner(
        Prepared(accelerator, *accelerator.prepare(model, optimizer)),
        task.loss, lambda number: 1.0, lambda number: [1.0], seed=5, max_grad_norm=None, max_nonfinite=1,
        anticipate=partial(coupled, task, accelerator),
    )  # fmt: skip
    recut: Any = None  # memory suffices
    report = learner.update(3, Batch(parts, np.arange(12), 12, 100, 100, np.full(12, 8), recut))

    seed_dropout(5, 3, 0)
    units = torch.cat([task.share(twin, part.tensors)["units"] for part in parts[:3]])
    order = np.concatenate(shares)
    given = [dict(zip(COLUMNS, row, strict=True)) for row in units]
    losses = []
    for place, row in enumerate(order):  # as `plain`, but a text has as many vectors as it stands in the batch
        mine = {rows[row]["anchor"], rows[row]["positive"]}
        wrong = [given[at]["negative"] for at, other in enumerate(order) if rows[other]["negative"] not in mine]
        for at, other in enumerate(order):
            if rows[other]["positive"] not in mine and rows[other]["anchor"] != rows[row]["anchor"] and at != place:
                wrong.append(given[at]["positive"])
        logits = 5.0 * torch.stack([given[place]["positive"], *wrong]) @ given[place]["anchor"]
        losses.append(logits.logsumexp(0) - logits[0])
    loss = torch.stack(losses).mean()
    loss.backward()
    assert report.loss.item() / 12 == pytest.approx(loss.item(), rel=1e-12)
    start = fresh()
    changed = 0
    for name, parameter in twin.named_parameters():
        gradient = start.get_parameter(name) - model.get_parameter(name)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
        changed += bool(gradient.any())
    assert changed > 20
    seed_dropout(6, 3, 0)
    other = task.share(twin, parts[0].tensors)["units"]
    assert (other - units[:5]).abs().max() > 1e-3, "nothing was dropped, so nothing is shown"


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(23, 4, 8, dtype=torch.float64), dim=2)
    keys = torch.randint(0, 40, (23, 4))
    whole = _contrast.cached(units, keys, 7.0, symmetric=True)
    counts = _contrast.places(units, keys)
    monkeypatch.setattr(_contrast, "CHUNK", 150)
    for name, values in _contrast.cached(units, keys, 7.0, symmetric=True).items():
        torch.testing.assert_close(values, whole[name], rtol=1e-12, atol=1e-14)
    losses = _contrast.losses(units, keys, 7.0, symmetric=True)
    torch.testing.assert_close(losses, whole["losses"], rtol=1e-12, atol=0.0)
    assert all(torch.equal(one, other) for one, other in zip(_contrast.places(units, keys), counts, strict=True))


def test_places_among_the_different_texts_of_the_set() -> None:
    """Against a plain count; texts that are right for an anchor, or the anchor itself, do not compete."""
    generator = torch.Generator().manual_seed(1)
    table = torch.nn.functional.normalize(torch.randn(9, 3, generator=generator, dtype=torch.float64), dim=1)
    keys = torch.randint(0, 9, (60, 2), generator=generator)
    more, equal = _contrast.places(table[keys], keys)
    texts = {int(key) for key in keys[:, 1]}
    spared = 0
    for row, (anchor, own) in enumerate(keys.tolist()):
        right = {int(key[1]) for key in keys if key[0] == anchor} | {anchor}
        spared += len(right & texts) > 1
        similar = {text: float(table[anchor] @ table[text]) for text in texts if text == own or text not in right}
        assert int(more[row]) == sum(value > similar[own] + 1e-12 for value in similar.values())
        assert int(equal[row]) == 1
    assert spared > 10
    same = torch.ones(4, 2, 1) * torch.arange(8).view(4, 2, 1).sign().clamp(min=1)
    assert [values.tolist() for values in _contrast.places(same, torch.arange(8).view(4, 2))] == [[0] * 4, [4] * 4]
    nothing = torch.full((4, 2, 1), float("nan"))
    assert [values.tolist() for values in _contrast.places(nothing, torch.arange(8).view(4, 2))] == [[3] * 4, [1] * 4]


def test_cosines_are_held_against_scores(tiny_model: str, tokenizer: Any) -> None:
    rows = [
        {"sentence1": one, "sentence2": other, "score": score}
        for one, other, score in (("w1", "w2 w3", 4.0), ("w5 w6", "w5", 0.0), ("w9", "w9 w8 w7", 5.0))
    ]
    task = prepare(tokenizer, rows)
    assert str(task) == "sentence embedding, cosine: sentence1 + sentence2 → score, 0 to 5 as 0 to 1"
    assert (task.kind, task.couples, task.default_metrics) == ("regression", False, ("spearman", "pearson"))
    encoded = task.encode({name: [row[name] for row in rows] for name in rows[0]}, tokenizer, 64)
    taken = {name: [np.array(value) for value in encoded[name]] for name in ("input_ids", "sizes")}
    tensors = task.collate({**taken, "label": np.array(encoded["label"])})
    model: Any = AutoModel.from_pretrained(tiny_model, dtype=torch.float64).eval()
    given = vectors_of(model, tokenizer, [row[name] for row in rows for name in ("sentence1", "sentence2")])
    cosines = [(given[row["sentence1"]] @ given[row["sentence2"]]).item() for row in rows]
    errors = [(cosine - row["score"] / 5) ** 2 for cosine, row in zip(cosines, rows, strict=True)]
    assert task.loss(model, tensors).item() == pytest.approx(sum(errors), rel=1e-6)
    predicted = {name: value.detach().numpy() for name, value in task.predict(model, tensors).items()}
    found = task.completed(predicted)
    assert found["loss"].tolist() == pytest.approx(errors, rel=1e-6)
    assert found["cosines"].tolist() == pytest.approx(cosines, rel=1e-9)


@pytest.mark.parametrize(
    ("scores", "config", "scaled", "outside"),
    [
        ([0.0, 0.4, 1.0], {}, None, 1.5),
        ([-1.0, 0.4], {}, None, -2.0),
        ([1.0, 3.5, 4.75], {}, (0.0, 4.75), 5.0),
        ([-3.0, 2.0], {}, (-3.0, 2.0), 2.1),
        (["1", "4.5"], {}, (0.0, 4.5), "5"),
        ([1, 4], {"range": [1.0, 5.0]}, (1.0, 5.0), 0),
    ],
)
def test_scores_have_a_range(tokenizer: Any, scores: Any, config: Any, scaled: Any, outside: Any) -> None:
    rows = [{"sentence1": "w1", "sentence2": "w2", "label": score} for score in scores]
    task = prepare(tokenizer, rows, **config)
    assert task.pairs.range == scaled and all(task.problem(row) is None for row in rows)
    assert "(see task.range)" in str(task.problem({**rows[0], "label": outside}))
    assert "must be a number" in str(task.problem({**rows[0], "label": None}))


def test_columns_are_found_or_named(tokenizer: Any) -> None:
    task = prepare(tokenizer, [{**PAIR, "negative": "w4", "negative_2": "w5", "id": 7}])
    assert str(task) == "sentence embedding, contrastive: anchor → positive, hard negatives negative, negative_2"
    assert task.columns == ("anchor", "positive", "negative", "negative_2")
    assert task.problem({**PAIR, "negative": "w3", "negative_2": "w5"}) == (
        "'negative' is the same text as 'positive': right and wrong at once"
    )
    assert task.problem({**PAIR, "negative": None, "negative_2": "w5"}) == "'negative' must be text, not None"
    assert prepare(tokenizer, [{"question": "w1", "context": "w2", "label": 1.0}], kind="contrastive").columns == (
        "question", "context",
    )  # fmt: skip
    chosen = prepare(tokenizer, [{"a": "w1", "b": "w2", "c": 0.5}], text=["a", "b"], score="c")
    assert chosen.columns == ("a", "b", "c")
    with pytest.raises(UserError, match="no column 'anchor'; it has ancor, positive; did you mean 'ancor'"):
        prepare(tokenizer, [{"ancor": "w1", "positive": "w2"}])
    with pytest.raises(UserError, match="no column 'score'"):
        prepare(tokenizer, [PAIR], kind="cosine")


@pytest.mark.parametrize("scored", [False, True])
def test_a_text_without_tokens_is_named(scored: bool, tmp_path: Path) -> None:
    """A decoder's tokenizer adds nothing: without a token there is no vector, and one nan would spoil the batch."""
    made = Tokenizer(models.WordLevel({"<pad>": 0, **{word: at for at, word in enumerate(WORDS, 1)}}))
    made.normalizer, made.pre_tokenizer = normalizers.Replace("\u200b", ""), pre_tokenizers.Whitespace()
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    given: list[Row] = [PAIR, {**PAIR, "positive": "\u200b"}, {**PAIR, "anchor": "\u200b"}, {**PAIR, "anchor": "w5"}]
    given = [{**row, "score": at / 4} for at, row in enumerate(given)] if scored else given
    task, rows = prepare(bare, given), Rows(Dataset.from_list(given), "rows.jsonl")
    for asked in (task, task.asked(None, bare, [rows])):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"row 1 .*: the tokenizer leaves nothing of 'positive'"):
            encode_sources([[rows]], asked, bare, 8, skip_bad=False, cache=tmp_path)
        found = encode_sources([[rows]], asked, bare, 8, skip_bad=True, cache=tmp_path)
        assert found.dataset["row"][:] == [0, 3] and found.dataset["input_ids"][:] == [[2, 3, 4], [6, 4]]
        assert [note.partition(": ")[2][-8:] for note in found.skipped] == ["ositive'", "'anchor'"]
    if scored:
        assert encode_sources([[rows]], task, bare, 8, skip_bad=True, cache=tmp_path).column("label").tolist() == [
            0,
            0.75,
        ]


def test_what_cannot_take_effect_is_refused(tokenizer: Any) -> None:
    scored = [{**PAIR, "score": 0.5}]
    with pytest.raises(UserError, match=r"task.scale cannot take effect: the kind is cosine .* for contrastive"):
        prepare(tokenizer, scored, scale=10.0)
    with pytest.raises(UserError, match=r"task.range cannot take effect: the kind is contrastive"):
        prepare(tokenizer, [PAIR], range=[0, 5])
    with pytest.raises(UserError, match=r"task.score cannot take effect"):
        prepare(tokenizer, scored, kind="contrastive", score="score")
    with pytest.raises(UserError, match="must go from a lower to a higher score"):
        prepare(tokenizer, scored, range=[5, 0])
    with pytest.raises(UserError, match="holds no numbers"):
        prepare(tokenizer, [{**PAIR, "label": "yes"}])
    classes = Features({"anchor": Value("string"), "positive": Value("string"), "label": ClassLabel(names=["n", "y"])})
    with pytest.raises(UserError, match=r"'label' holds classes, not scores; set task.kind=contrastive"):
        prepare(tokenizer, Dataset.from_list([{**PAIR, "label": 1}], features=classes))
    halves = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="t5 has encoder and decoder"):
        prepare(tokenizer, [PAIR]).check_model(transformers.T5Model(halves))


def test_a_text_is_what_the_model_sees_of_it(tokenizer: Any) -> None:
    """Of two texts that differ only behind the cut none is a negative of the other."""
    rows = {"anchor": ["w1 w2 w3", "w7"], "positive": ["w4 w5 w6 w8", "w4 w5 w6 w9"]}
    task = prepare(tokenizer, [PAIR], prefixes=["w9 ", "w8 "])
    encoded = task.encode(rows, tokenizer, 5)
    known = tokenizer.get_vocab()
    assert encoded["input_ids"][1][3:] == [known[word] for word in ("w7", "[SEP]")][1:] + [
        known[word] for word in ("[CLS]", "w8", "w4", "w5", "[SEP]")
    ]
    assert encoded["length"] == [10, 10] and encoded["sizes"] == [[5, 5], [4, 5]]
    assert encoded["real_tokens"] == [10, 9]
    keys = task.collate({name: [np.array(row) for row in encoded[name]] for name in ("input_ids", "sizes")})["keys"]
    assert keys[0, 1] == keys[1, 1] and len(set(keys.flatten().tolist())) == 3


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_does_not_matter_to_pooling(pooling: Any, tiny_decoder: str, tiny_model: str) -> None:
    folder = tiny_decoder if pooling == "last" else tiny_model
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 0, 0, 0]])
    found = unit_vectors(model, {"input_ids": ids, "attention_mask": (ids > 0).long()}, pooling)
    for vector, length, row in zip(found, (5, 2), ids, strict=True):
        hidden = model(input_ids=row[None, :length]).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(vector, expected / expected.norm(), rtol=1e-9, atol=1e-12)


PROGRAM = """
import json, sys
from sentence_transformers import SentenceTransformer
texts, folders = json.load(open(sys.argv[1]))
found = {}
for folder in folders:
    model = SentenceTransformer(folder)
    found[folder] = [model.encode(texts).tolist(), model.encode_query(texts).tolist(),
                     model.encode_document(texts).tolist(), model.similarity_fn_name]
json.dump(found, open(sys.argv[2], "w"))
"""
EXPORTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefixed": {"pooling": "cls", "normalize": False, "prefixes": ["w1 ", "w2 w3 "]},
    "decoder": {"pooling": "last", "prefixes": ["w4 ", "w4 "]},
}


def test_one_pair_alone_teaches_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """There is no other text in its batch; with a hard negative there is."""
    pairs = [{"anchor": f"w{row}", "positive": f"w{row + 1}", "negative": f"w{row + 2}"} for row in range(6)]
    for name, columns in (("two", ("anchor", "positive")), ("three", ("anchor", "positive", "negative"))):
        lines = [json.dumps({column: pair[column] for column in columns}) + "\n" for pair in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    given = {"task": {"name": "sentence_embedding"}, "data__validation": None, "updates": 2, "batch_size": 1}
    with pytest.raises(UserError, match="batch_size: one example an update teaches nothing here"):
        carry_out(make_config(data__train=str(tmp_path / "two.jsonl"), **given))
    assert not (tmp_path / "out").exists()
    assert carry_out(make_config(data__train=str(tmp_path / "three.jsonl"), **given)) == 0


@pytest.mark.whole_run
def test_sentence_transformers_gives_the_same_vectors(
    make_config: MakeConfig, tiny_model: str, tiny_decoder: str, tmp_path: Path
) -> None:
    """Of texts that are cut, too; with the prefixes of queries and documents; by an encoder and by a decoder."""
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed: whether it gives the same vectors is not tried")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample.rows(40, 0)))
    texts = ["w1", "w1 w2 w3 w4", " ".join(WORDS[:30]), "w9 w9"]
    runs = {}
    for name, task in EXPORTS.items():
        config = make_config(
            task={"name": "sentence_embedding", **task}, data__train=str(tmp_path / "rows.jsonl"), updates=2,
            output=str(tmp_path / name), data__validation=None, data__max_length=12, precision="fp32",
            model={"path": tiny_decoder if name == "decoder" else tiny_model},
        )  # fmt: skip
        assert carry_out(config) == 0
        runs[str(tmp_path / name / "model")] = task
    (tmp_path / "given.json").write_text(json.dumps([texts, list(runs)]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "given.json", "found.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for folder, options in runs.items():
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        query, document = options.get("prefixes", ("", ""))
        for given, prefix in zip(found[folder], (query if query == document else "", query, document), strict=False):
            for text, vector in zip(texts, given, strict=True):
                ids = torch.tensor([tokenizer(prefix + text, truncation=True, max_length=12)["input_ids"]])
                with torch.no_grad():
                    hidden = model(input_ids=ids).last_hidden_state[0]
                pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[options.get("pooling", "mean")]
                expected = pooled if options.get("normalize") is False else pooled / pooled.norm()
                torch.testing.assert_close(torch.tensor(vector), expected, rtol=1e-5, atol=1e-5)
        assert found[folder][3] == "cosine"
        assert "SentenceTransformer(" in (Path(folder) / "README.md").read_text()
