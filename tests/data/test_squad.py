"""SQuAD's json: one row a question, with its place, and what cannot be read named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.source import Rows

Read = Callable[..., list[Rows]]

ANSWER = {"text": "Paris", "answer_start": 0}
ARTICLES: list[dict[str, Any]] = [
    {
        "title": "France",
        "paragraphs": [
            {
                "context": "Paris is a city.",
                "qas": [
                    {"id": "1", "question": "What is a city?", "answers": [ANSWER, ANSWER], "is_impossible": False},
                    {
                        "id": "2",
                        "question": "Who?",
                        "answers": [ANSWER],
                        "plausible_answers": [ANSWER],
                        "is_impossible": "true",
                    },
                ],
            }
        ],
    },
    {"title": "Empty", "paragraphs": []},
    {"paragraphs": [{"context": "Rome.", "qas": [{"question": "Where?", "answers": [{"text": "Rome"}]}]}]},
]


@pytest.fixture
def squad(tmp_path: Path, read: Read) -> Callable[..., Rows]:
    def opened(articles: list[Any], **settings: Any) -> Rows:
        (tmp_path / "dev.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
        (rows,) = read(tmp_path / "dev.json", **settings)
        return rows

    return opened


def test_a_row_for_each_question(squad: Callable[..., Rows]) -> None:
    rows = squad(ARTICLES)
    places = [rows.where(row) for row in range(len(rows.dataset))]
    assert places == [
        "dev.json, article 1, paragraph 1, question 1",
        "dev.json, article 1, paragraph 1, question 2",
        "dev.json, article 3, paragraph 1, question 1",
    ]
    first, second, third = rows.dataset.remove_columns("__line__").to_list()
    assert first == {
        "id": "1",
        "title": "France",
        "context": "Paris is a city.",
        "question": "What is a city?",
        "answers": {"text": ["Paris", "Paris"], "answer_start": [0, 0]},
    }
    assert (second["id"], second["answers"]) == ("2", {"text": [], "answer_start": []})
    assert (third["id"], third["title"]) == (None, None)
    assert third["answers"] == {"text": ["Rome"], "answer_start": []}  # refused by the task


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0,), 7, "article 1: has no list of paragraphs"),
        ((0, "paragraphs"), None, "article 1: has no list of paragraphs"),
        ((0, "paragraphs", 0), "text", r"article 1, paragraph 1: has no list of questions \(qas\)"),
        (
            (0, "paragraphs", 0, "qas", 1),
            "Who?",
            "paragraph 1, question 2: a question must be a JSON object, not 'Who.'",
        ),
        ((0, "paragraphs", 0, "qas", 1, "answers"), "Paris", "question 2: answers must be a list of JSON objects"),
        ((0, "paragraphs", 0, "qas", 1, "answers"), ["Paris"], "question 2: answers must be a list of JSON objects"),
        ((0, "paragraphs", 0, "qas", 1, "question"), 3, "question 2: 'question' holds a number"),
    ],
)
def test_what_is_no_question_is_named(
    squad: Callable[..., Rows], place: tuple[Any, ...], value: Any, message: str
) -> None:
    articles = json.loads(json.dumps(ARTICLES))
    part: Any = articles
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    if place == (0,):  # what comes first decides whether it is SQuAD's shape
        articles[0], articles[1] = articles[1], articles[0]
        message = message.replace("article 1", "article 2")
    with pytest.raises(UserError, match=message):
        squad(articles)
    rows = squad(articles, skip_bad=True)
    assert len(rows.skipped) == 1
    assert 1 <= len(rows.dataset) <= 2


def test_other_documents_with_data_stay_what_they_are(tmp_path: Path, read: Read) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"question": "Who?", "context": "Me."}]}))
    assert read(tmp_path / "x.json")[0].dataset.to_list()[0]["question"] == "Who?"


def test_an_article_without_paragraphs_is_a_bad_row_wherever_it_stands(squad: Callable[..., Rows]) -> None:
    articles = [{"title": "Stub"}, *ARTICLES]
    with pytest.raises(UserError, match=r"dev.json, article 1: has no list of paragraphs"):
        squad(articles)
    rows = squad(articles, skip_bad=True)
    assert rows.dataset["question"][:] == ["What is a city?", "Who?", "Where?"] and len(rows.skipped) == 1
