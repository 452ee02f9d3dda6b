"""What the assistant writes, and nothing else, is learned: by the templates of five families, marked or not."""

from __future__ import annotations

import json
import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from tests.train.tasks.chat_templates import CHATML, SPECIAL, TEMPLATES, byte_tokenizer
from train.tasks._chat import BUILT_IN, Conversation, Template, ask, choose, render
from train.tasks._messages import Unusable, messages, tools

Turns = list[tuple[str, str]]

TALK: Turns = [
    ("user", "  Hello the 2\n"), ("assistant", "Good  the morning \N{WAVING HAND SIGN}\N{VARIATION SELECTOR-16}é"),
    ("user", "And?"), ("assistant", " Yes\n"), ("user", "So"), ("assistant", "ok "),
]  # fmt: skip
END = {
    "chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"
}  # fmt: skip
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
    {"role": "tool", "content": '{"sun": true}'},
    {"role": "assistant", "content": "It is the sun."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def said(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def learned(tokenizer: Any, template: Template, conversation: Conversation) -> list[str]:
    """The texts that are learned, decoded from the tokens: one for each run of them."""
    found = render(tokenizer, template, [conversation])[0]
    assert not isinstance(found, str), found
    assert tokenizer.decode(found.ids) == found.text
    pairs = groupby(zip(found.learned, found.ids, strict=True), key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in group]) for is_learned, group in pairs if is_learned]


def problem(tokenizer: Any, template: Template, conversation: Conversation) -> str:
    found = render(tokenizer, template, [conversation])[0]
    assert isinstance(found, str)
    return found


def expected(name: str, text: str) -> str:
    if name in ("llama3", "gemma"):
        text = text.strip()
    return (" " if name == "mistral" else "") + text + END[name]


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turns_of_the_assistant_are_learned_with_their_ends(name: str, trims: bool) -> None:
    """Several turns, blanks at their edges, characters of several tokens; the end is EOS and padding as well."""
    tokenizer = byte_tokenizer(name, adds_bos=True, trims=trims)
    template = choose(tokenizer, None)
    assert not template.marked and template.end == tokenizer.eos_token == END[name]
    tokenizer.pad_token = template.end
    wanted = [expected(name, text) for role, text in TALK if role == "assistant"]
    if name == "qwen3":
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    assert learned(tokenizer, template, Conversation(said(TALK))) == wanted
    found = render(tokenizer, template, [Conversation(said(TALK))])[0]
    bos = found.ids.count(tokenizer.bos_token_id)  # type: ignore[union-attr]
    assert bos == (1 if name in ("llama3", "mistral", "gemma") else 0)
    last = learned(tokenizer, template, Conversation(said(TALK), first=4))
    assert last == wanted[-1:]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_calls_of_tools_are_learned_and_their_results_are_not(name: str) -> None:
    tokenizer = byte_tokenizer(name)
    template = choose(tokenizer, None, with_tools=True)
    conversation = Conversation(messages(CALLING, "messages"), tools([WEATHER], "tools"))
    call = CALL if name != "llama3" else '{"name": "weather", "parameters": {"city": "Rome"}}'
    answer = "<think>\n\n</think>\n\nBye" if name == "qwen3" else "Bye"
    assert learned(tokenizer, template, conversation) == [text + END[name] for text in (call, "It is the sun.", answer)]
    text = render(tokenizer, template, [conversation])[0].text  # type: ignore[union-attr]
    assert '"name": "weather"' in text and '"type": "function"' in text


def test_thoughts_of_earlier_turns_are_not_learned_where_the_template_leaves_them_out() -> None:
    tokenizer = byte_tokenizer("qwen3")
    template = choose(tokenizer, None)
    talk: Turns = [
        ("user", "2+2?"), ("assistant", "<think>\nadd\n</think>\n\n4"), ("user", "3+3?"),
        ("assistant", "<think>\nadd again\n</think>\n\n6"),
    ]  # fmt: skip
    found = learned(tokenizer, template, Conversation(said(talk)))
    assert found == ["4<|im_end|>", "<think>\nadd again\n</think>\n\n6<|im_end|>"]
    thinking = [
        *said(talk[:1]), {"role": "assistant", "content": "<think>\nlook\n</think>\n\n", "tool_calls": [WEATHER]},
        {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sun."},
    ]  # fmt: skip
    thinking = messages(thinking, "messages")
    now = learned(tokenizer, template, Conversation(thinking))
    assert now[0].startswith("<think>\nlook\n</think>\n\n<tool_call>") and len(now) == 2
    later = Conversation([*thinking, *said(talk[:1]), *said(talk[1:2])])
    assert "with what comes after it the text before it is another one" in problem(tokenizer, template, later)


def test_templates_that_rewrite_what_was_said_are_refused_with_the_remedy() -> None:
    tokenizer = byte_tokenizer()
    loud = CHATML.replace("assistant\\n' + content", "assistant\\n' + (content if loop.last else content | upper)")
    tokenizer.chat_template = loud
    template = choose(tokenizer, None)
    assert learned(tokenizer, template, Conversation(said(TALK[:2]))) == [TALK[1][1] + "<|im_end|>"]
    found = problem(tokenizer, template, Conversation(said(TALK)))
    assert "written otherwise when others follow" in found and "{% generation %}" in found
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}{%- endif %}", "assistant\\n<think>' }}{%- endif %}")
    with pytest.raises(UserError, match=r"does not mark what the assistant writes.*\{% generation %\}"):
        choose(tokenizer, None)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_built_in_template_marks_what_is_learned(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    template = choose(tokenizer, "chatml")
    assert template.marked and tokenizer.chat_template == template.text and tokenizer.eos_token == "<|im_end|>"
    talk = said([("system", "Be brief."), *TALK])
    wanted = [text + "<|im_end|>" for role, text in TALK if role == "assistant"]
    assert learned(tokenizer, template, Conversation(talk)) == wanted
    assert learned(tokenizer, template, Conversation(talk, first=3)) == wanted[1:]
    found = render(tokenizer, template, [Conversation(talk)])[0]
    assert found.ids.count(tokenizer.bos_token_id) == adds_bos  # type: ignore[union-attr]
    calling = Conversation(messages(CALLING, "messages"), tools(json.dumps([WEATHER]), "tools"))
    assert learned(tokenizer, template, calling) == [text + "<|im_end|>" for text in (CALL, "It is the sun.", "Bye")]
    whole = tokenizer.apply_chat_template(calling.messages, tools=calling.tools, tokenize=False)
    assert whole == render(tokenizer, template, [calling])[0].text  # type: ignore[union-attr]
    odd = Conversation([{"role": "critic", "content": "No"}, *talk])
    assert problem(tokenizer, template, odd) == (
        "the template refuses it: role critic is unknown; known are system, user, assistant, tool"
    )


def test_a_token_of_header_and_turn_is_learned() -> None:
    """As in transformers: here the line break that ends the header is one token with that of the turn."""
    tokenizer = byte_tokenizer()
    talk = Conversation(said([("user", "Hi"), ("assistant", "\n\nYes")]))
    assert learned(tokenizer, choose(tokenizer, "chatml"), talk) == ["\n\n\nYes<|im_end|>"]


def test_marks_and_proof_agree() -> None:
    """The same template with and without its marks; what transformers itself takes for the assistant's is the same."""
    tokenizer = byte_tokenizer()
    marked = choose(tokenizer, "chatml")
    calling = Conversation(messages(CALLING, "messages"), tools([WEATHER], "tools"))
    given = tokenizer.apply_chat_template(
        calling.messages, tools=calling.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    found = render(tokenizer, marked, [calling])[0]
    assert not isinstance(found, str)
    assert found.ids == given["input_ids"] and found.learned == [bool(mark) for mark in given["assistant_masks"]]
    bare = marked.text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    tokenizer.chat_template = bare
    assert render(tokenizer, choose(tokenizer, None), [calling])[0] == found


def test_the_refusals_of_a_template_are_told() -> None:
    gemma, mistral, qwen3 = (byte_tokenizer(name) for name in ("gemma", "mistral", "qwen3"))
    system = Conversation(said([("system", "x"), *TALK]))
    assert problem(gemma, choose(gemma, None), system) == "the template refuses it: System role not supported"
    tool = Conversation(said([TALK[0], ("tool", "x"), TALK[1]]))
    assert "roles must alternate" in problem(mistral, choose(mistral, None), tool)
    odd = Conversation(said([TALK[0], ("critic", "x"), TALK[1]]))
    found = problem(qwen3, choose(qwen3, None), odd)
    assert found == "the template leaves out message 1: role 'critic' is unknown to it"
    none = problem(qwen3, choose(qwen3, None), Conversation(said([("user", "x"), ("model", "y")])))
    assert none == "there is no turn of the assistant to learn: the roles are user, model"


def test_what_a_template_leaves_out_is_told() -> None:
    """Some know neither tools nor calls, some no content that is a text: the assistant would learn to say nothing."""
    tokenizer = byte_tokenizer()
    calling = Conversation(messages(CALLING, "messages"))
    for template in (CHATML, BUILT_IN["chatml"]):
        tokenizer.chat_template = template.replace("message.tool_calls or []", "[]")
        told = problem(tokenizer, choose(tokenizer, None), calling)
        assert told == "the template leaves out what message 1 says: 'weather'"
    tokenizer.chat_template = CHATML.replace("if tools", "if false")
    told = problem(tokenizer, choose(tokenizer, None), Conversation(said(TALK[:2]), tools([WEATHER], "tools")))
    assert told == "the template leaves out the tools: it does not know 'weather'"
    tokenizer.chat_template = CHATML.replace("message.content or ''", "message.content[0].text or ''")
    with pytest.raises(UserError, match=r"the template leaves out what message 0 says: 'Hello'"):
        choose(tokenizer, None)


def test_what_is_asked_is_looked_through_in_the_same_way() -> None:
    """What training refuses is refused where an answer is wanted: a role, tools or a call that nobody would see."""
    tokenizer = byte_tokenizer("qwen3")
    template, turns = choose(tokenizer, None), said([("system", "x"), *TALK[:3]])
    odd = said([TALK[0], ("critic", "x"), TALK[2]])
    ids, refused = ask(tokenizer, template, [Conversation(turns), Conversation(odd)])
    shown = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == shown and refused == "the template leaves out message 1: role 'critic' is unknown to it"
    tokenizer.chat_template = CHATML.replace("if tools", "if false").replace("message.tool_calls or []", "[]")
    calling = messages(CALLING, "messages")[:3]
    given = [Conversation(turns, tools([WEATHER], "tools")), Conversation(calling)]
    assert ask(tokenizer, choose(tokenizer, None), given) == [
        "the template leaves out the tools: it does not know 'weather'",
        "the template leaves out what message 1 says: 'weather'",
    ]


def test_templates_that_a_tokenizer_cannot_use_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"no chat template; set task.template=chatml"):
        blank = byte_tokenizer()
        blank.chat_template = None
        choose(blank, None)
    with pytest.raises(UserError, match=r"neither a built-in template nor a file 'chatlm'.*did you mean 'chatml'"):
        choose(byte_tokenizer(), "chatlm")
    with pytest.raises(UserError, match=r"ends a turn with '<\|im_end\|>', which is no token.*model.add_tokens: \["):
        choose(byte_tokenizer("mistral"), "chatml")
    added = byte_tokenizer("mistral")
    added.add_tokens(["<|im_end|>"])
    with caplog.at_level(logging.WARNING, "train"):
        template = choose(added, "chatml")
    assert "writes <|im_start|>, no tokens of this tokenizer" in caplog.text
    assert added.decode(added("a<|im_end|>")["input_ids"], skip_special_tokens=True) == "a"
    assert learned(added, template, Conversation(said(TALK[:2]))) == [TALK[1][1] + "<|im_end|>"]
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match=r"own.jinja does not mark .* so that 'assistant:' would be learned too"):
        choose(byte_tokenizer(), str(file))
    file.write_text(
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"nobody would learn to end a turn: .*the token that ends its turn inside"):
        choose(byte_tokenizer(), str(file))
    file.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match=r"own.jinja cannot be used: it is no Jinja: line 1"):
        choose(byte_tokenizer(), str(file))
    file.write_text("<s>" + TEMPLATES["mistral"])
    with pytest.raises(UserError, match=r"begins it with two '<s>'"):
        choose(byte_tokenizer("mistral"), str(file))


def test_the_date_is_the_same_on_any_day() -> None:
    tokenizer = byte_tokenizer("llama3")
    found = render(tokenizer, choose(tokenizer, None), [Conversation(said(TALK))])[0]
    assert "Today Date: 26 Jul 2024" in found.text  # type: ignore[union-attr]
    assert "strftime_now" in tokenizer.chat_template


def test_every_family_has_its_tokens() -> None:
    assert set(SPECIAL) == set(TEMPLATES) == set(END) and len(TEMPLATES) == 5


CALL_TEXT = '{"name": "weather", "arguments": {"city": "Rome"}}'


def test_messages_are_read_from_the_columns_that_data_have() -> None:
    assert messages("Hi", "prompt") == [{"role": "user", "content": "Hi"}]
    assert messages("Hi", "completion", "assistant") == [{"role": "assistant", "content": "Hi"}]
    filled = [
        {"role": "user", "content": "x", "tool_calls": None, "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": None, "function": {"name": "f", "arguments": {"a": 1, "b": None}}}],
        },
    ]
    assert messages(filled, "messages") == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
    ]
    call = messages([{"role": "tool_call", "content": CALL_TEXT}], "messages")
    assert call == messages([CALLING[1]], "messages")
    wrapped = [{"type": "function", "function": WEATHER}]
    assert tools([WEATHER], "tools") == tools(json.dumps(wrapped), "tools") == wrapped
    assert tools(None, "tools") is tools([], "tools") is tools("[]", "tools") is tools("", "tools") is None


@pytest.mark.parametrize(
    "value, told",
    [
        (None, "'messages' must be a list of messages, not None"),
        (" ", "'messages' is empty"),
        ([], "'messages' is empty"),
        (["hi"], "message 0 of 'messages' must have a role and a content, not 'hi'"),
        ([{"from": "human", "value": "x"}], "message 0 of 'messages' must have a role and a content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 of 'messages': content must be text, not"),
        ([{"role": "user", "content": None}], "message 0 of 'messages' has no content"),
        ([{"role": "assistant", "content": " "}], "message 0 of 'messages', the assistant's, is empty"),
        ([{"role": "tool_call", "content": "weather"}], "message 0 of 'messages' has role tool_call, but is no JSON"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "message 0 of 'messages': a tool call must have a name"),
    ],
)
def test_problems_of_messages_are_named(value: Any, told: str) -> None:
    with pytest.raises(Unusable, match=f"^{told.replace('[', '.').replace('(', '.')}"):
        messages(value, "messages")
    with pytest.raises(Unusable, match="'tools' must be a list of tools, or JSON of one, not 'x'"):
        tools("x", "tools")
