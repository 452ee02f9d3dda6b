"""SQuAD's own json, {"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]} → one row a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def recognised(content: Any) -> bool:
    """Say whether a JSON document has SQuAD's shape: a list "data" of which some entry has "paragraphs"."""
    articles = content.get("data") if isinstance(content, dict) else None
    return isinstance(articles, list) and any(isinstance(each, dict) and "paragraphs" in each for each in articles)


def flat(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (place, row) for each question, or (place, what is wrong) for what holds none; places count from 1.

    A row has id, title, context, question and answers: {"text": [...], "answer_start": [...]}, empty where the context
    gives no answer. What a row lacks is None: the task says which rows it cannot use.
    """
    for number, article in enumerate(content["data"], 1):
        place = f"article {number}"
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield place, "has no list of paragraphs"
            continue
        for count, paragraph in enumerate(paragraphs, 1):
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list):
                yield f"{place}, paragraph {count}", "has no list of questions (qas)"
                continue
            for each, question in enumerate(questions, 1):
                where = f"{place}, paragraph {count}, question {each}"
                yield where, _row(article.get("title"), paragraph.get("context"), question)


def _row(title: Any, context: Any, question: Any) -> dict[str, Any] | str:
    if not isinstance(question, dict):
        return f"a question must be a JSON object, not {str(question)[:40]!r}"
    given = question.get("answers")
    if given is not None and not (isinstance(given, list) and all(isinstance(answer, dict) for answer in given)):
        return f"answers must be a list of JSON objects, not {str(given)[:40]!r}"
    if str(question.get("is_impossible")).lower() == "true":  # some writers leave plausible answers there
        given = []
    # A key that an answer lacks is left out, so that texts and starts differ in number and the row is refused.
    answers = {key: [answer[key] for answer in given or () if key in answer] for key in ("text", "answer_start")}
    return {
        "id": question.get("id"),
        "title": title,
        "context": context,
        "question": question.get("question"),
        "answers": None if given is None else answers,
    }
