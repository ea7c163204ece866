"""Chat templates in the notations of published models, written for the tests: each one renders turns, tool calls and
results like the family it is named after, without its prose. TRL's wheel has the originals of other families."""

from dataclasses import dataclass, field

_CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_ARGUMENTS = "{{ call.function.arguments | tojson }}"


@dataclass(frozen=True)
class Family:
    """A chat format for tests.

    Attributes:
        name: the model family.
        template: its chat template, or several by name.
        special: control tokens of its tokenizer.
        added: tokens of its vocabulary that are not control tokens.
        eos: its end-of-sequence token.
        stops: further stop tokens of its generation configuration.
    """

    name: str
    template: str | dict[str, str]
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    eos: str = "<|im_end|>"
    stops: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)


def _mistral(call: str, result: str, system: bool = True) -> str:
    """``[INST]`` turns without a generation prompt, which end in ``</s>``."""
    return (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}{% if tools and loop.last or tools and messages | length > loop.index and loop.index "
        "<= 2 %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}" + result + "{% elif m.tool_calls %}{{ m.content }}" + call + "{{ eos_token }}"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )


_LLAMA = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}<|eot_id|>{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{% set call = m.tool_calls[0] %}{"name": "{{ call.function.name }}", "parameters": ' + _ARGUMENTS + "}<|eot_id|>"
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_PYTHON_CALLS = (
    "[{% for call in m.tool_calls %}{{ call.function.name }}({% for k, v in call.function.arguments.items() %}{{ k }}="
    "{{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]"
)
_HERMES_TOOL_USE = (
    "<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% for m in messages %}"
    "{% if m.tool_calls %}<|im_start|>assistant\n{% for call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": '
    + _ARGUMENTS
    + "}\n</tool_call>{% if not loop.last %}\n{% endif %}"
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + _CHATML_END
)
_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + _CHATML_END
_GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|observation|>"
    "{% endif %}<tool_response>{{ m.content }}</tool_response>"
    "{% elif m.role == 'assistant' %}<|assistant|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% else %}</think>{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% for k, v in call.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>"
    "{{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>"
    "{% endif %}"
)
_KIMI = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_system|>tool<|im_middle|>## Return of {{ m.tool_call_id }}\n{{ m.content }}<|im_end|>"
    "{% else %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}{% if m.tool_calls %}"
    "<|tool_calls_section_begin|>{% for call in m.tool_calls %}<|tool_call_begin|>functions.{{ call.function.name }}:"
    "{{ loop.index0 }}<|tool_call_argument_begin|>" + _ARGUMENTS + "<|tool_call_end|>{% endfor %}"
    "<|tool_calls_section_end|>{% endif %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
_KIMI_TOKENS = (
    "<|im_system|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)
_MINIMAX = (
    "{% if tools %}]~b]system\n{% for t in tools %}<tool>{{ t.function | tojson }}</tool>\n{% endfor %}[e~[\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}]~b]ai\n{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}{% if m.tool_calls %}\n<minimax:tool_call>\n"
    '{% for call in m.tool_calls %}<invoke name="{{ call.function.name }}">\n{% for k, v in '
    'call.function.arguments.items() %}<parameter name="{{ k }}">{{ v if v is string else v | tojson }}</parameter>\n'
    "{% endfor %}</invoke>\n{% endfor %}</minimax:tool_call>{% endif %}[e~[\n{% elif m.role == 'tool' %}]~b]tool\n"
    "<response>{{ m.content }}</response>[e~[\n{% else %}]~b]{{ m.role }}\n{{ m.content }}[e~[\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)
_GRANITE_3 = (
    "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
_GRANITE_4 = (
    "{% if tools %}<|start_of_role|>system<|end_of_role|>{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|end_of_text|>\n{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|start_of_role|>user<|end_of_role|>\n"
    "<tool_response>\n{{ m.content }}\n</tool_response><|end_of_text|>\n{% else %}<|start_of_role|>{{ m.role }}"
    "<|end_of_role|>{{ m.content }}{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": ' + _ARGUMENTS + "}\n</tool_call>{% endfor %}"
    "<|end_of_text|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>"
    "{% endif %}"
)
_PHI_4_MINI = (
    "{% if tools %}<|system|>{% for t in tools %}<|tool|>{{ t.function | tojson }}<|/tool|>{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|tool_response|>{{ m.content | tojson }}<|end|>{% else %}"
    "<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}<|tool_call|>{{ call.function | tojson }}"
    "<|/tool_call|>{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
_SMOLLM3 = (
    "<|im_start|>system\n{% if xml_tools %}Call a function with <tool_call>\n"
    '{"name": <name>, "arguments": <object>}\n</tool_call>\n{% for t in xml_tools %}{{ t | tojson }}\n{% endfor %}'
    "{% endif %}<|im_end|>\n{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _CHATML_END
)
_SEED = (
    "{% if tools %}<seed:bos>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<seed:eos>{% endif %}"
    "{% for m in messages %}<seed:bos>{{ m.role }}\n{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}"
    "</seed:think>\n{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}\n<seed:tool_call>\n"
    "<function={{ call.function.name }}>\n{% for k, v in call.function.arguments.items() %}<parameter={{ k }}>{{ v }}"
    "</parameter>\n{% endfor %}</function>\n</seed:tool_call>{% endfor %}<seed:eos>{% endfor %}"
    "{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}"
)
_DSML = (
    "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'tool' %}<function_results>\n<result>"
    "{{ m.content }}</result>\n</function_results>\n{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}"
    "{% if m.tool_calls %}\n\n<｜DSML｜function_calls>\n{% for call in m.tool_calls %}<｜DSML｜invoke name="
    '"{{ call.function.name }}">\n{% for k, v in call.function.arguments.items() %}<｜DSML｜parameter name="{{ k }}" '
    'string="{{ "true" if v is string else "false" }}">{{ v if v is string else v | tojson }}</｜DSML｜parameter>\n'
    "{% endfor %}</｜DSML｜invoke>\n{% endfor %}</｜DSML｜function_calls>{% endif %}<｜end▁of▁sentence｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
_DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK_V31 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'tool' %}"
    "<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% elif m.role == 'assistant' %}"
    "{% if loop.index0 and messages[loop.index0 - 1].role == 'user' %}<｜Assistant｜></think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}<｜tool▁call▁begin｜>"
    "{{ call.function.name }}<｜tool▁sep｜>{{ call.function.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'user' %}<｜Assistant｜></think>{% endif %}"
)
_COMMAND = (
    "{{ bos_token }}{% if tools %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "<|END_OF_TURN_TOKEN|>{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|START_OF_TURN_TOKEN|>"
    '<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[{"tool_call_id": "0", "results": {"0": {{ m.content | tojson }}}}]'
    "<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>{% elif m.role == 'assistant' %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    "{% if m.tool_calls %}<|START_ACTION|>[\n{% for call in m.tool_calls %}    "
    '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ call.function.name }}", "parameters": ' + _ARGUMENTS + "}"
    "{% if not loop.last %},\n{% endif %}{% endfor %}\n]<|END_ACTION|>{% else %}<|START_RESPONSE|>{{ m.content }}"
    "<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>{% else %}<|START_OF_TURN_TOKEN|><|{{ m.role | upper }}_TOKEN|>"
    "{{ m.content }}<|END_OF_TURN_TOKEN|>{% endif %}{% endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)
_NO_TOOLS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

_OLD_CALL = (
    "[TOOL_CALLS][{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": ' + _ARGUMENTS + ', "id": "{{ call.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]"
)
_NEW_CALL = "{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]" + _ARGUMENTS + "{% endfor %}"
_ID_CALL = (
    "{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]"
    + _ARGUMENTS
    + "{% endfor %}"
)
_MISTRAL_TOKENS = (
    "<s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[ARGS]",
    "[CALL_ID]",
    "[TOOL_CONTENT]",
    "[THINK]",
    "[/THINK]",
)
_TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")

WRITTEN = [
    Family(
        "Mistral 7B v0.3, Nemo",
        _mistral(
            _OLD_CALL,
            '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]',
        ),
        _MISTRAL_TOKENS,
        eos="</s>",
    ),
    Family(
        "Mistral Small 3.2",
        _mistral(_ID_CALL, "[TOOL_RESULTS]{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}[/TOOL_RESULTS]"),
        _MISTRAL_TOKENS,
        eos="</s>",
    ),
    Family(
        "Ministral 3, Devstral",
        _mistral(_NEW_CALL, "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]") + "{# [THINK] [/THINK] #}",
        _MISTRAL_TOKENS,
        eos="</s>",
    ),
    Family("Llama 4 (JSON)", _LLAMA.replace("ipython", "tool"), _LLAMA_TOKENS, eos="<|eot_id|>", stops=("<|eom_id|>",)),
    Family(
        "Llama 4, 3.2 (Python)",
        _LLAMA.replace(
            _LLAMA[_LLAMA.index("{% if m.tool_calls | length") : _LLAMA.index("<|start_header_id|>assistant")], ""
        ).replace(
            _LLAMA[_LLAMA.index("{% set call") : _LLAMA.index("<|eot_id|>{% elif m.role == 'tool'")], _PYTHON_CALLS
        ),
        _LLAMA_TOKENS,
        eos="<|eot_id|>",
    ),
    Family("Hermes 2 and 3", {"default": _CHATML, "tool_use": _HERMES_TOOL_USE}, ("<|im_start|>",), _TAGS),
    Family(
        "GLM 4.7, GLM 5",
        _GLM,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        (*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        eos="<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
    ),
    Family("Kimi K2", _KIMI, _KIMI_TOKENS),
    Family(
        "MiniMax M2",
        _MINIMAX,
        ("]~b]",),
        ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"),
        eos="[e~[",
    ),
    Family(
        "Granite 3",
        _GRANITE_3,
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        eos="<|end_of_text|>",
    ),
    Family("Granite 4", _GRANITE_4, ("<|start_of_role|>", "<|end_of_role|>"), _TAGS, eos="<|end_of_text|>"),
    Family(
        "Phi-4-mini",
        _PHI_4_MINI,
        (
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|end|>",
            "<|tool|>",
            "<|/tool|>",
            "<|tool_call|>",
            "<|/tool_call|>",
            "<|tool_response|>",
        ),
        eos="<|endoftext|>",
        stops=("<|end|>",),
    ),
    Family("SmolLM3", _SMOLLM3, ("<|im_start|>",), _TAGS),
    Family(
        "Seed-OSS",
        _SEED,
        ("<seed:bos>",),
        ("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
        eos="<seed:eos>",
    ),
    Family(
        "DeepSeek V3.1",
        _DEEPSEEK_V31,
        (
            *_DEEPSEEK_TOKENS,
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
        ),
        ("<think>", "</think>"),
        eos="<｜end▁of▁sentence｜>",
        options={"list_tools": "system"},
    ),
    Family(
        "DeepSeek V3.2, V4",
        _DSML,
        (*_DEEPSEEK_TOKENS, "｜DSML｜"),
        ("<think>", "</think>"),
        eos="<｜end▁of▁sentence｜>",
    ),
    Family(
        "Command R7B",
        _COMMAND,
        (
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            "<|START_TOOL_RESULT|>",
            "<|END_TOOL_RESULT|>",
        ),
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    Family(
        "without tools",
        _NO_TOOLS,
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        options={"tool_syntax": "json_list"},
    ),
]
