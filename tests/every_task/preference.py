"""The chosen answer counts up from the prompt's last word, the rejected one down."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample

LENGTH, BETA = 24, 0.5


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"pairs {seed}")
    result = []
    for _ in range(count):
        prompt = [generator.randrange(20, 40) for _ in range(generator.randint(1, 16))]
        sizes = [generator.randint(1, 12) for _ in range(2)]
        up, down = (
            [prompt[-1] + sign * step for step in range(1, size + 1)] for sign, size in zip((1, -1), sizes, strict=True)
        )
        texts = (" ".join(WORDS[place] for place in places) for places in (prompt, up, down))
        result.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    """Both rewards of each row, each answer alone, from the exported model and the one that it started from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = json.loads((folder.parent / "result.json").read_text())["started_from"]["path"]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (folder, start)]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def logp(model: Any, prompt: str, answer: str) -> float:
        read = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([*read, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id][:LENGTH])
        with torch.no_grad():
            chances = model(ids[None]).logits[0, :-1].log_softmax(1)
        return float(chances[torch.arange(len(ids) - 1), ids[1:]][len(read) - 1 :].sum())

    found = []
    for row in given:
        logps = [[logp(model, row["prompt"], row[key]) for model in models] for key in ("chosen", "rejected")]
        found.append([[BETA * (trained - before) for trained, before in logps], [trained for trained, _ in logps]])
    return found


def expected(record: dict[str, Any]) -> Any:
    return [[record[f"{side}_{figure}"] for side in ("chosen", "rejected")] for figure in ("reward", "logp")]


SAMPLE = Sample(
    inputs=("prompt",),
    asks_the_same=False,
    rows=rows,
    metrics=["preference", "answer_likelihood"],
    reload=reload,
    expected=expected,
    task={"beta": BETA, "sft_weight": 0.1, "label_smoothing": 0.1, "generation": {"max_new_tokens": 5}},
    model="gpt2",
    data={"max_length": LENGTH},
)
