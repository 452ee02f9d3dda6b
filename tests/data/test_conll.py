"""CoNLL files: sentences, columns, what is left out, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data.errors import UserError
from data.source import Source, open_rows
from data.text_files import LINE, convert

Read = Callable[..., tuple[list[dict[str, Any]], tuple[str, ...]]]


@pytest.fixture
def rows_of(tmp_path: Path) -> Read:
    """Write a file and return its rows, and what was skipped of it."""

    def read(name: str, content: str, *, skip_bad: bool = False) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        file = tmp_path / name
        file.write_text(content, encoding="utf-8", newline="")
        arrow, skipped = convert(file, tmp_path / "cache", skip_bad=skip_bad)
        return Dataset.from_file(str(arrow)).to_list(), skipped

    return read


NEWS = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
# NN B-NP O

Peter NNP B-NP B-PER
-DOCSTART- -X- -X- O
Blackburn NNP I-NP I-PER
"""


@pytest.mark.parametrize("name", ["x.conll", "x.iob", "x.bio"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("gap", [" ", "  ", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_sentences_of_news(rows_of: Read, name: str, end: str, gap: str, start: str) -> None:
    rows, skipped = rows_of(name, start + NEWS.replace(" ", gap).replace("\n", end))
    assert skipped == ()
    assert rows[0] == {
        "tokens": ["EU", "rejects", "#"],
        "column 2": ["NNP", "VBZ", "NN"],
        "column 3": ["B-NP", "B-VP", "B-NP"],
        "tags": ["B-ORG", "O", "O"],
        LINE: "lines 3 to 5",
    }
    assert [row["tokens"] for row in rows] == [["EU", "rejects", "#"], ["Peter"], ["Blackburn"]]
    assert [row[LINE] for row in rows] == ["lines 3 to 5", "line 7", "line 9"]


def test_two_columns_and_words_with_blanks(rows_of: Read) -> None:
    rows, _ = rows_of("x.conll", "New York\tB-LOC\n\u00a0x\tO\n \n\t\n\nend\tO")
    assert [(row["tokens"], row["tags"]) for row in rows] == [
        (["New York", "\u00a0x"], ["B-LOC", "O"]),
        (["end"], ["O"]),
    ]
    assert set(rows[0]) == {"tokens", "tags", LINE}


def test_comments_before_a_sentence(rows_of: Read) -> None:
    """As MultiCoNER has them; a # that has as many cells as a word is one, as is any within a sentence."""
    first = "# a corpus\n\n# id 5239d808\tdomain=en\n# text of it, and more\n# _ O\nthe _ O\n# _ B-X\n"
    rows, skipped = rows_of("x.conll", f"{first}\n# id 2 domain=en\nend _ O\n")
    assert skipped == () and [row["tokens"] for row in rows] == [["#", "the", "#"], ["end"]]
    assert [row[LINE] for row in rows] == ["lines 5 to 7", "line 10"]
    with pytest.raises(UserError, match="line 8: 4 cells where"):
        rows_of("x.conll", f"{first}# id 2 domain=en\n")


@pytest.mark.parametrize("comment", ["# id 17 domain=en", "# sent_id = 17 x", "#\tnewdoc\tB\tC", "# newdoc"])
def test_comments_as_wide_as_words(rows_of: Read, comment: str) -> None:
    rows, skipped = rows_of("x.conll", f"{comment}\na _ _ O\n# _ _ O\n\n{comment}\nb _ _ B-X\n")
    assert skipped == () and [row["tokens"] for row in rows] == [["a", "#"], ["b"]]


def word(number: str, form: str, upos: str) -> str:
    return "\t".join([number, form, form.lower(), upos, "_", "_", "0", "root", "_", "_"]) + "\n"


def test_universal_dependencies(rows_of: Read) -> None:
    first = word("1-2", "Vámonos", "_") + word("1", "Vamos", "VERB") + word("2", "nos", "PRON") + word("3", "#", "SYM")
    second = word("1", "Sue", "PROPN") + word("1.1", "likes", "VERB") + word("2", "_", "PUNCT")
    rows, skipped = rows_of("x.conllu", f"# sent_id = 1\n# text = x\n{first}\n\n# only a comment\n\n{second}# text\n")
    assert skipped == ()
    assert [row["tokens"] for row in rows] == [["Vamos", "nos", "#"], ["Sue", "_"]]
    assert rows[0]["upos"] == ["VERB", "PRON", "SYM"] and rows[0]["lemmas"] == ["vamos", "nos", "#"]
    assert list(rows[0]) == ["tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel", "deps", "misc", LINE]
    assert [row[LINE] for row in rows] == ["lines 1 to 6", "lines 11 to 14"]


@pytest.mark.parametrize(
    ("name", "bad", "problem"),
    [
        ("x.conll", "c O\nd\ne O\n", "line 5: 'd' stands alone, where a word and its tag are wanted"),
        ("x.conll", "c O\nd X O\n", "line 5: 3 cells where the first line has 2"),
        ("x.conll", "c O\n\tO\n", "line 5: cell 1 is empty"),
        ("x.conll", "c O\nd\0 O\n", "line 5: holds a NUL character"),
        ("x.conllu", word("1", "c", "X") + word("3", "d", "X"), "line 5: the number of the word is '3', not 2"),
        ("x.conllu", word("1", "c", "X") + "2 d X\n", "line 5: 1 cells where CoNLL-U has 10, with tabs between them"),
        ("x.conllu", word("1", "c", "X") + word("2", "", "X"), "line 5: cell 2 is empty"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_its_sentence_can_be_skipped(
    rows_of: Read, tmp_path: Path, name: str, bad: str, problem: str
) -> None:
    good = word("1", "a", "X") + word("2", "b", "X") if name == "x.conllu" else "a O\nb O\n"
    content = f"{good}\n{bad}\n{good}"
    with pytest.raises(UserError, match=problem) as raised:
        rows_of(name, content)
    assert str(tmp_path / name) in str(raised.value) and "data.on_bad_row=skip" in str(raised.value)
    rows, skipped = rows_of(name, content, skip_bad=True)
    assert [row["tokens"] for row in rows] == [["a", "b"], ["a", "b"]]
    assert len(skipped) == 1 and skipped[0].startswith(f"{name}, line 5: ")


def test_a_first_line_without_a_tag_is_the_one_that_is_named(rows_of: Read) -> None:
    with pytest.raises(UserError, match="line 1: 'Title' stands alone"):
        rows_of("x.conll", "Title\n\na O\n")
    assert [row["tokens"] for row in rows_of("x.conll", "Title\n\na O\n", skip_bad=True)[0]] == [["a"]]


def test_as_a_source_with_places(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("a O\nb B-X\n\nc O\n")
    source = Source(path=str(tmp_path / "*.conll"))
    (rows,) = open_rows(source, "train", skip_bad=False, cache=tmp_path / "cache", token=None)
    assert (len(rows.dataset), rows.where(0), rows.where(1)) == (2, "a.conll, lines 1 to 2", "a.conll, line 4")
