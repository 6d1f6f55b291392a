"""Chat templates written for the tests. Each imitates the templates of some model families."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thinking block, but finished turns have no such block (DeepSeek R1).
OPEN = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Like OPEN, but a template variable can close the block (Nemotron 3, MiniCPM5).
SWITCHED = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% else %}<think>\n{% endif %}{% endif %}",
)
# A finished turn without reasoning has only the closing tag, and the reasoning of earlier turns is
# dropped (GLM). A turn ends with the header of the next turn.
NEXT_ROLE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>"
    "{% else %}</think>{% endif %}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}]"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
# The system message is placed directly before a final user message (Mistral).
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# A turn ends with two tokens that stop generation (Phi 3).
TWO_STOPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}"
)
# The text always ends with the header of an assistant turn (Command R7B, Firefunction).
ALWAYS_HEADER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
# No stop token ends a turn (Apertus ends turns with a token that is not among the model's stop
# tokens).
NO_STOP = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# The content of a message is a list of parts (SmolVLM).
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template that supports tools, tool calls whose arguments are a mapping, and tool results.
# Content must be text (Qwen, Hermes).
CALLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like CALLS, but arguments are text (DeepSeek V3) and ids have nine letters (Mistral).
TEXT_CALLS = CALLS.replace(
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}",
    "{{ call.function.name + '\n' + call.function.arguments }}",
)
SHORT_IDS = CALLS.replace(
    "<tool_call>",
    "{% if call.id | length != 9 %}{{ raise_exception('ids of nine letters') }}{% endif %}"
    "<tool_call>",
)
