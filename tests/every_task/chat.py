"""The assistant says what the user has said, each word moved on by one; a system may speak first."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample

TEMPLATE = str(Path(__file__).with_name("chat.jinja"))


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"talk {seed}")
    result = []
    for _ in range(count):
        messages = []
        if generator.random() < 0.3:
            messages.append({"role": "system", "content": generator.choice(WORDS)})
        for _ in range(generator.choice((1, 1, 2, 3))):
            places = [generator.randrange(len(WORDS) - 1) for _ in range(generator.randint(1, 5))]
            for step, role in enumerate(("user", "assistant")):
                messages.append({"role": role, "content": " ".join(WORDS[place + step] for place in places)})
        result.append({"messages": messages})
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    """Each conversation's loss, computed apart, and its last turn, as the model's card says."""
    import torch
    from transformers import pipeline

    talk = pipeline("text-generation", model=str(folder), dtype=torch.float64, device="cpu")
    model, tokenizer = talk.model, talk.tokenizer
    found = []
    for row in given:
        messages = row["messages"]
        answer = talk(messages[:-1])[0]["generated_text"][-1]["content"].strip()
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = (torch.tensor(encoded[name]) for name in ("input_ids", "assistant_masks"))
        with torch.no_grad():
            chances = model(ids[None, :-1]).logits[0].log_softmax(1)
        losses = -chances[torch.arange(len(ids) - 1), ids[1:]]
        found.append([answer, losses[learned[1:] == 1].sum().item(), int(learned[1:].sum())])
    return found


SAMPLE = Sample(
    inputs=("messages",),
    rows=rows,
    metrics=["perplexity", "token_accuracy", "bits_per_byte"],
    reload=reload,
    expected=lambda record: [record["prediction"], record["loss"], record["tokens"]],
    task={"template": TEMPLATE, "generation": {"max_new_tokens": 6}},
    model="gpt2",
    data={"max_length": 48},
)
