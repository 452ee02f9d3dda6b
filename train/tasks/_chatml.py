"""The built-in chat template: ChatML, with what the assistant writes marked, tools as Hermes and Qwen have them."""

from __future__ import annotations

from typing import Final

START, END = "<|im_start|>", "<|im_end|>"

CHATML: Final = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- 'You may call these functions:\n<tools>\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\n' }}
    {%- endfor %}
    {{- '</tools>\nA call is a JSON object with name and arguments between <tool_call> and </tool_call>.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '\n' if message.content or not loop.first else '' }}
                {{- '<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
                {{- '\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role in ('user', 'tool') or (message.role == 'system' and (not tools or not loop.first)) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('role ' + message.role + ' is unknown; known are system, user, assistant, tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()
"""Roles system, user, assistant and tool; each turn ends with <|im_end|>, which the assistant learns to write."""
