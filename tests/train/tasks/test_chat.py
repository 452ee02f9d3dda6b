"""Chat: packed as if alone, cut at the end, bad rows named; a model that is trained a little ends its turn."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

from data.encode import encode_sources
from data.encoded import Encoded
from data.errors import UserError
from data.source import Rows
from data.tokenizer_training import TokenizerTraining, train_tokenizer
from tests.conftest import WORDS, figures
from tests.train.tasks.chat_templates import byte_tokenizer
from tests.train.tasks.test_causal_lm import FAMILIES
from tests.worker import carry_out
from train import predict
from train.inspect import main as inspect_data
from train.tasks.chat import Chat, Config

MakeConfig = Callable[..., dict[str, Any]]
Talk = list[dict[str, str]]
JINJA = str(Path(__file__).parents[2] / "every_task" / "chat.jinja")


def talks(count: int, seed: int) -> list[Talk]:
    """Conversations of very different lengths, a few characters a turn."""
    generator = random.Random(f"talks {seed}")
    found = []
    for _ in range(count):
        talk = []
        for _ in range(generator.choice((1, 1, 2, 3))):
            for role in ("user", "assistant"):
                talk.append({"role": role, "content": "the hello é 42"[: generator.randint(1, 14)].strip()})
        found.append(talk)
    return found


def prepared(tokenizer: Any, columns: dict[str, list[Any]], **config: Any) -> tuple[Chat, Rows]:
    rows = Rows(Dataset.from_dict(columns), "talks.jsonl")
    return Chat.prepare(Config(**config), [rows], tokenizer), rows


def encoded(task: Chat, rows: Rows, cache: Path, size: int = 128, *, skip_bad: bool = False) -> Encoded:
    return encode_sources([[rows]], task, task.tokenizer, size, skip_bad=skip_bad, cache=cache)


def predicted(task: Chat, found: Encoded, model: Any) -> tuple[list[dict[str, Any]], dict[str, Any], torch.Tensor]:
    """Records, outputs, and the loss that training would use: of all examples in one batch."""
    tensors = task.collate(found.features(np.arange(len(found.dataset))))
    with torch.no_grad():
        arrays = {name: value.numpy() for name, value in task.predict(model, tensors).items()}
    return list(task.records(arrays, found)), task.outputs(arrays, found), task.loss(model, tensors)


def family_model(family: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    sizes = {**FAMILIES[family], **dict.fromkeys({"n_positions", "max_position_embeddings"} & {*FAMILIES[family]}, 256)}
    settings = transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), **special, **sizes)
    return transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_has_the_same_loss_packed_padded_and_alone(family: str, tmp_path: Path) -> None:
    """And the same gradient; the padding is the token that ends a turn, and that is learned."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    model = family_model(family, tokenizer)
    given = talks(24, 0)
    losses, gradients, outputs = {}, {}, {}
    for packing in ("documents", "none"):
        task, rows = prepared(tokenizer, {"messages": given}, packing=packing, template="chatml")
        task.check_model(model)
        found = encoded(task, rows, tmp_path)
        assert (len(found.dataset) < len(given)) == (packing == "documents")
        records, outputs[packing], loss = predicted(task, found, model)
        assert [record["row"] for record in records] == list(range(len(given)))
        losses[packing] = [[record["loss"], record["tokens"], record["accuracy"]] for record in records]
        gradients[packing] = torch.autograd.grad(loss, list(model.parameters()))
        assert sum(record["loss"] for record in records) == pytest.approx(loss.item(), rel=1e-12)
    alone = []
    for talk in given:
        text = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = (torch.tensor(text[name]) for name in ("input_ids", "assistant_masks"))
        with torch.no_grad():
            chances = model(ids[None, :-1], use_cache=False).logits[0].log_softmax(1)
        mine = learned[1:] == 1
        hits = (chances.argmax(1) == ids[1:])[mine].double().mean().item()
        loss = -chances[range(len(ids) - 1), ids[1:]][mine].sum().item()
        alone.append([loss, int(mine.sum()), round(hits, 6)])
    for packing in losses:
        for one, other in zip(losses[packing], alone, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        assert outputs[packing]["losses"].sum() == pytest.approx(sum(each[0] for each in alone), rel=1e-9)
        assert outputs[packing]["targets"].sum() == sum(each[1] for each in alone)
        assert outputs[packing]["hits"].sum() == round(sum(each[1] * each[2] for each in alone))
        said = sum(len(turn["content"].encode()) for talk in given for turn in talk if turn["role"] == "assistant")
        assert outputs[packing]["bytes"].sum() == said
    for one, other in zip(gradients["documents"], gradients["none"], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-8)


def test_long_conversations_are_cut_at_the_end_and_what_leaves_nothing_to_learn_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    talk = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "abc"},
        {"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "de"},
    ]  # fmt: skip
    task, rows = prepared(tokenizer, {"messages": [talk, talk[2:]]}, template="chatml")
    whole = task.encode(rows.dataset[:1], tokenizer, 128)
    labels = whole["labels"][0]
    assert tokenizer.decode([token for token in labels if token != -100]) == "abc<|im_end|>de<|im_end|>"
    assert whole["targets"] == [7] and whole["bytes"] == [5] and whole["length"] == [len(whole["input_ids"][0])]
    begins = next(place for place, label in enumerate(labels) if label != -100)
    cut = task.encode(rows.dataset[:1], tokenizer, begins + 2)
    assert tokenizer.decode([token for token in cut["labels"][0] if token != -100]) == "ab"
    assert cut["bytes"] == [2] and cut["length"] == [begins + 2]
    with pytest.raises(UserError) as caught:
        encoded(task, rows, tmp_path, begins + 2)
    assert str(caught.value).startswith(
        "talks.jsonl, row 1 (from 0): what comes before the assistant's turn is 39 tokens and fills the whole length "
        f"(data.max_length is {begins + 2})"
    )


def test_bad_rows_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    bad: list[Any] = [
        None, [], good[:1], [good[0], {"role": "critic", "content": "x"}, good[1]],
        [good[0], {"role": "assistant", "content": " "}],
    ]  # fmt: skip
    task, rows = prepared(tokenizer, {"messages": [good, *bad, good]}, template="chatml")
    found = encoded(task, rows, tmp_path, skip_bad=True)
    assert [note.partition(": ")[2] for note in found.skipped] == [
        "'messages' must be a list of messages, not None",
        "'messages' is empty",
        "message 1 of 'messages', the assistant's, is empty",
        "there is no turn of the assistant to learn: the roles are user",
        "the template refuses it: role critic is unknown; known are system, user, assistant, tool",
    ]
    assert found.dataset["rows"][:] == [[0, 6]] and found.dataset["counts"][:] == [[2, 2]]
    task, rows = prepared(tokenizer, {"messages": ["hi"]}, template="chatml")
    assert task.problem(rows.dataset[0]) == "'messages' must be a list of messages, not 'hi'"
    pairs = {"prompt": ["a", "a", " "], "completion": ["b", "", "b"]}
    task, rows = prepared(tokenizer, pairs, template="chatml")
    found = encoded(task, rows, tmp_path, skip_bad=True)
    assert [note.partition(": ")[2] for note in found.skipped] == ["'completion' is empty", "'prompt' is empty"]
    with pytest.raises(UserError, match=r"has no column 'messages'; it has text"):
        prepared(tokenizer, {"text": ["a"]}, template="chatml")
    with pytest.raises(UserError, match=r"has no column 'completion'; it has prompt"):
        prepared(tokenizer, {"prompt": ["a"]}, template="chatml", prompt="prompt")


def test_prompts_are_read_and_completions_are_learned() -> None:
    tokenizer = byte_tokenizer()
    talk = talks(9, 4)[-1]
    assert len(talk) >= 2
    talk = [*talk, {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    columns = {"question": [talk[:-1]], "answer": [talk[-1:]], "messages": [talk]}
    task, rows = prepared(tokenizer, columns, template="chatml", prompt="question", completion="answer")
    found = task.encode(rows.dataset[:], tokenizer, 512)
    assert tokenizer.decode([token for token in found["labels"][0] if token != -100]) == "no<|im_end|>"
    texts, rows = prepared(tokenizer, {"prompt": ["hi"], "completion": ["yo"]}, template="chatml")
    found = texts.encode(rows.dataset[:], tokenizer, 512)
    shown = tokenizer.decode(found["input_ids"][0])
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"
    tools = [json.dumps([{"name": "f"}])]
    task, rows = prepared(tokenizer, {"messages": [talk], "tools": tools}, template="chatml")
    assert '"name": "f"' in tokenizer.decode(task.encode(rows.dataset[:], tokenizer, 512)["input_ids"][0])
    assert task.columns == ("messages", "tools") and task.identity != texts.identity


def test_the_template_is_part_of_what_encoded_rows_are_known_by() -> None:
    ones, others = (
        prepared(byte_tokenizer(), {"messages": talks(2, 0)}, template=name)[0] for name in (None, "chatml")
    )
    assert ones.identity != others.identity


def test_a_tokenizer_is_made_of_what_is_said(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "abab"}, {"role": "assistant", "content": "cdcd"}]
    rows = [
        Rows(
            Dataset.from_dict(
                {
                    "id": ["zzz"],
                    "messages": [
                        talk,
                    ][:1],
                }
            ),
            "talks.jsonl",
        )
    ]
    made = train_tokenizer(TokenizerTraining(kind="char"), rows, tmp_path, Config().text_columns)
    assert {*"abcd", *"user", *"assistant"} <= set(made.get_vocab()) and "z" not in made.get_vocab()


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """The assistant says the word that it hears, and the next one."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(generator.choice((1, 2))):
            place = generator.randrange(10)
            messages += [
                {"role": "user", "content": WORDS[place]},
                {"role": "assistant", "content": f"{WORDS[place]} {WORDS[place + 1]}"},
            ]
        rows.append({"messages": messages})
    return rows


@pytest.fixture
def configure(tmp_path: Path, tiny_decoder: str) -> MakeConfig:
    for role, count in (("train", 120), ("validation", 24)):
        lines = [json.dumps(row) + "\n" for row in pairs(count, count)]
        (tmp_path / f"{role}.jsonl").write_text("".join(lines))

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "output": str(tmp_path / "out"), "seed": 3, "batch_size": 8, "updates": 160, "precision": "fp32",
            "task": {"name": "chat", "template": JINJA, "generation": {"max_new_tokens": 8}},
            "data": {
                **{role: str(tmp_path / f"{role}.jsonl") for role in ("train", "validation")},
                "cache": str(tmp_path / "cache"), "max_length": 32,
            },
            "model": {"path": tiny_decoder},
            "optim": {"lr": 1e-2, "warmup": "10%"},
            "evaluate": {"every": 160},
            **changes,
        }  # fmt: skip

    return make


def test_a_model_that_is_trained_a_little_ends_its_turn(configure: MakeConfig, tmp_path: Path) -> None:
    """It writes the two words that it should, and stops: in evaluation, and exported."""
    assert carry_out(configure()) == 0
    lines = (tmp_path / "out" / "predictions" / "validation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["row"] for record in records] == list(range(24))
    references = [row["messages"][-1]["content"] for row in pairs(24, 24)]
    assert [record["reference"] for record in records] == references
    right = sum(record["prediction"] == record["reference"] for record in records)
    assert right >= 22, [(record["prediction"], record["reference"]) for record in records]
    assert figures(tmp_path / "out", "validation/token_accuracy")[160] > 0.95
    talk = transformers.pipeline("text-generation", model=str(tmp_path / "out" / "model"), device="cpu")
    said = [talk(row["messages"][:-1])[0]["generated_text"][-1] for row in pairs(24, 24)]
    assert [each["content"].strip() for each in said] == [record["prediction"] for record in records]
    assert "apply_chat_template" in (tmp_path / "out" / "model" / "README.md").read_text()
    assert talk.tokenizer.chat_template == Path(JINJA).read_text()


def test_packed_apart_and_asked_the_same_texts_are_drawn(configure: MakeConfig, tmp_path: Path) -> None:
    """What is drawn follows from the row's place alone: neither its company nor rows that are skipped matter."""
    lines = [json.dumps(row) + "\n" for row in pairs(24, 24)]
    for place in (1, 9):
        lines.insert(place, '{"messages": []}\n')
    (tmp_path / "validation.jsonl").write_text("".join(lines))
    (tmp_path / "shorter.jsonl").write_text("".join(line for line in lines if line != '{"messages": []}\n'))
    config = configure(updates=1, precision="fp64", optim={"lr": 1e-30}, evaluate={"every": 1})  # learns nothing
    config["data"]["on_bad_row"] = "skip"
    config["model"]["config"] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    drawn: dict[str, dict[int, str]] = {}
    for packing in ("documents", "none"):
        config["task"] |= {"packing": packing, "generation": {"max_new_tokens": 8, "temperature": 1.0}}
        config["output"] = str(tmp_path / packing)
        assert carry_out(config) == 0
        drawn[packing] = answers(tmp_path / packing / "predictions" / "validation.jsonl")
    for name in ("validation", "shorter"):
        options = ["--input", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / f"{name}-asked.jsonl")]
        options += ["--cache", str(tmp_path / "cache"), "--on-bad-row", "skip", "--precision", "fp64"]
        assert predict.main([str(tmp_path / "none"), *options]) == 0
        drawn[name] = {row: text.strip() for row, text in answers(tmp_path / f"{name}-asked.jsonl").items()}
    assert len(drawn["none"]) == 24 and {1, 9}.isdisjoint(drawn["none"])
    assert len({*drawn["none"].values()}) > 20, "little is drawn"
    assert drawn["documents"] == drawn["none"] == drawn["validation"]
    assert [*drawn["shorter"].values()] != [*drawn["none"].values()], "another place, other texts"


def test_tools_of_those_who_ask_are_read_or_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    """From any file, as in training; a column of them that training had not, or under another name, is spoken of."""
    tokenizer, talk = byte_tokenizer(), talks(1, 0)
    model = family_model("llama", tokenizer)
    tools = [json.dumps([{"name": "f"}])]
    caplog.clear()
    plain, calling, named = (
        prepared(tokenizer, {"messages": talk, **more}, template="chatml", **config)
        for more, config in (
            ({}, {"generation": {"max_new_tokens": 9}}),
            ({"tools": tools}, {"generation": {"max_new_tokens": 9}}),
            ({"functions": tools}, {"tools": "functions", "generation": {"max_new_tokens": 9}}),
        )
    )
    for rows in ([plain[1], calling[1]], [calling[1], plain[1]]):
        assert calling[0].asked(model, tokenizer, rows).columns == ("messages", "tools")
    assert calling[0].asked(model, tokenizer, [plain[1]]).columns == ("messages",)
    assert not caplog.messages
    for task, said in ((plain[0], "none was read in training"), (named[0], "--column functions=tools")):
        assert task.asked(model, tokenizer, [plain[1], calling[1]]).columns == ("messages",)
        assert "the column 'tools' is not read" in caplog.messages[-1] and said in caplog.messages[-1]


def answers(file: Path) -> dict[int, str]:
    """Return the prediction of each row."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["row"]: record["prediction"] for record in records}


def test_no_turn_is_written_past_the_models_end(
    configure: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes 64 tokens: by default there is room behind the longest prompt; too much asked is told at the start."""
    long = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": " ".join(["w2"] * 34)}]]
    asked = [[{"role": "user", "content": " ".join(["w2"] * 40)}, {"role": "assistant", "content": "w1"}]]
    for role, given in (("train", long), ("validation", [*long, *asked])):
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in given * 9))
    config = configure(updates=1, evaluate={"every": 1})
    config["data"]["max_length"] = 60
    config["task"]["generation"] = {"max_new_tokens": 23}
    with pytest.raises(
        UserError, match=r"max_new_tokens: 23 tokens are more .* has 42\. Lower data\.max_length, which cuts"
    ):
        carry_out(config)
    assert not Path(config["output"]).exists()
    config["data"]["max_length"] = 64
    for generation in ({"max_new_tokens": 22, "min_new_tokens": 22}, {"min_new_tokens": 22}):
        config["task"]["generation"] = generation
        caplog.clear()
        assert carry_out(config) == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert model.generation_config.max_new_tokens == 22
        assert ("a turn ends after 22 tokens, there are some of 35" in caplog.text) == (len(generation) == 1)
        config["output"] = str(tmp_path / "out")
        shutil.rmtree(config["output"])


def test_a_model_of_our_own_goes_on_with_conversations(configure: MakeConfig, tmp_path: Path) -> None:
    """Pretrained on texts with a tokenizer of its own, which then gets the tokens of the template."""
    base = configure(updates=2)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{word} and"}) + "\n" for word in WORDS))
    first = {
        **base, "output": str(tmp_path / "first"), "task": {"name": "causal_lm"},
        "data": {"train": str(tmp_path / "texts.jsonl"), "cache": str(tmp_path / "cache"), "max_length": 32},
        "model": {
            "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "max_position_embeddings": 256},
            "tokenizer": {"train": {"kind": "bpe", "size": 300}},
        },
    }  # fmt: skip
    first.pop("evaluate")
    assert carry_out(first) == 0
    second = configure(updates=2, task={"name": "chat", "template": "chatml"}, evaluate={"every": 2})
    second["model"] = {"path": str(tmp_path / "first" / "model"), "add_tokens": ["<|im_start|>", "<|im_end|>"]}
    second["data"]["max_length"] = 128
    assert carry_out(second) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    talk = tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], add_generation_prompt=True)
    shown = tokenizer.decode(talk["input_ids"])
    assert shown == "<|bos|><|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    del second["model"]["add_tokens"]
    with pytest.raises(UserError, match=r"ends a turn with '<\|im_end\|>', which is no token.*model.add_tokens"):
        carry_out({**second, "output": str(tmp_path / "third")})


def test_inspect_shows_what_is_learned(
    configure: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import write_config

    file = write_config(configure(), tmp_path / "chat.yaml")
    assert inspect_data([str(file), "-n", "1", "task.packing=none"]) == 0
    shown = capsys.readouterr().out
    assert "chat: messages; the assistant's turns, marked by the template chat.jinja, each with its end <end>" in shown
    row = shown.split("== validation")[0].split("(row ")[1].split(")")[0]
    talk = pairs(120, 120)[int(row)]["messages"]
    wanted = " ".join(
        f"w0 [{turn['content']} <end>]" if turn["role"] == "assistant" else f"w1 {turn['content']}" for turn in talk
    )
    assert wanted in shown
