"""Chat template of Libra: the one the authors' release was tuned with, for text and images in any turn.

`SYSTEM USER: <image>\\nQUESTION ASSISTANT: ANSWER </s>USER: ...`; what the assistant writes, the closing end-of-sequence
token included, is marked for assistant masks.
"""

IMAGE_TOKEN = "<image>"
"""Stands for an image in text."""

SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
"""System message of conversations that bring none ("Libra", equation 10)."""

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}
                {{- '<image>\\n' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception("Content must be of type 'text' or 'image', got '" ~ part['type'] ~ "'.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if bos_token -%}
    {{- bos_token ~ ' ' -}}
{%- endif -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = render(messages[0]['content']) -%}
{%- else -%}
    {%- set system = "DEFAULT_SYSTEM_MESSAGE" -%}
{%- endif -%}
{%- if system -%}
    {{- system ~ ' ' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' ~ render(message['content']) ~ ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ render(message['content']) ~ ' ' ~ eos_token -}}
        {%- endgeneration -%}
    {%- elif message['role'] != 'system' or not loop.first -%}
        {{- raise_exception("Messages must be from 'user' or 'assistant', the first one may be from 'system'; message "
            ~ loop.index0 ~ " is from '" ~ message['role'] ~ "'.") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
""".replace("DEFAULT_SYSTEM_MESSAGE", SYSTEM_MESSAGE)
"""Jinja source of the template, saved as `chat_template.jinja`."""
