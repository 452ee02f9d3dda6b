"""What a task tries out on its model happens where the model is: no tensor of a check stays on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, LlamaConfig, LlamaForCausalLM

from data.errors import UserError
from train.tasks.causal_lm import CausalLanguageModelling
from train.tasks.causal_lm import Config as CausalConfig
from train.tasks.question_answering import Config as AnswerConfig
from train.tasks.question_answering import QuestionAnswering

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
}  # fmt: skip
CASES = {
    "question_answering": (QuestionAnswering(AnswerConfig(), 0, 1), BertForQuestionAnswering, BertConfig),
    "causal_lm": (CausalLanguageModelling(CausalConfig(), "text", 1, 2, 0), LlamaForCausalLM, LlamaConfig),
}


@pytest.mark.parametrize("name", CASES)
def test_a_check_follows_the_model_to_its_device(name: str) -> None:
    """The meta device stands for a GPU; what comes after the embedding cannot be computed there, and need not."""
    task, model_class, config = CASES[name]
    model: Any = model_class(config(**SIZES)).to("meta")
    seen: list[torch.device] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device))
    with pytest.raises((UserError, NotImplementedError, RuntimeError)):
        task.check_model(model)
    assert seen and {device.type for device in seen} == {"meta"}


@pytest.mark.parametrize("vocabulary", [3, 8])
def test_a_vocabulary_of_few_tokens_can_be_tried(vocabulary: int) -> None:
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "vocab_size": vocabulary})
    QuestionAnswering(AnswerConfig(), 0, 1).check_model(BertForQuestionAnswering(config))
