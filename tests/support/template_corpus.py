"""The corpus of chat templates, and the table of what works with each of them (docs/reference/chat_templates.md).

Print the table with ``python tests/support/template_corpus.py``.
"""

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from template_families import WRITTEN, Family

from gear_lightning.environments.base import Message
from gear_lightning.errors import UserError
from gear_lightning.generation.chat import Chat, ChatOptions, ToolCallError
from gear_lightning.generation.tool_proof import BOTH

# Templates in TRL's wheel: file -> (family, end-of-sequence token, further stop tokens, options).
_LIST = {"tool_syntax": "json_list"}
_SYSTEM = {"list_tools": "system"}
TRL = {
    "cohere": ("Command R", "<|END_OF_TURN_TOKEN|>", (), _LIST),
    "cohere2": ("Command A (older)", "<|END_OF_TURN_TOKEN|>", (), _LIST),
    "deepseek_r1_distill": ("DeepSeek R1 distilled", "<｜end▁of▁sentence｜>", (), _SYSTEM),
    "deepseekv3": ("DeepSeek V3", "<｜end▁of▁sentence｜>", (), _SYSTEM),
    "gemma": ("Gemma 1 and 2", "<eos>", ("<end_of_turn>",), _LIST),
    "gemma3": ("Gemma 3", "<eos>", ("<end_of_turn>",), _LIST),
    "gemma4": ("Gemma 4", "<eos>", ("<turn|>", "<|tool_response>"), {}),
    "gemma4_v2": ("Gemma 4 (2)", "<eos>", ("<turn|>", "<|tool_response>"), {}),
    "gemma4_v3": ("Gemma 4 (3)", "<eos>", ("<turn|>", "<|tool_response>"), {}),
    "gemma4_v4": ("Gemma 4 (4)", "<eos>", ("<turn|>", "<|tool_response>"), {}),
    "gemma4_v5": ("Gemma 4 (5)", "<eos>", ("<turn|>", "<|tool_response>"), {}),
    "diffusion_gemma": ("Gemma diffusion", "<eos>", ("<turn|>", "<|tool_response>"), {}),
    "glm4moe": ("GLM 4.5", "<|endoftext|>", ("<|user|>", "<|observation|>"), {}),
    "gptoss": ("GPT-OSS", "<|return|>", ("<|call|>",), {}),
    "idefics3": ("Idefics 3", "<end_of_utterance>", (), _LIST),
    "lfm2": ("LFM2", "<|im_end|>", (), {}),
    "lfm2_v2": ("LFM2 (2)", "<|im_end|>", (), {}),
    "lfm2_2_5": ("LFM2.5", "<|im_end|>", (), {}),
    "lfm2_2_5_v2": ("LFM2.5 (2)", "<|im_end|>", (), {}),
    "lfm2_2_5_vl": ("LFM2.5-VL", "<|im_end|>", (), {}),
    "llama3": ("Llama 3", "<|eot_id|>", (), _LIST),
    "llama3_1": ("Llama 3.1, 3.3", "<|eot_id|>", ("<|eom_id|>",), {}),
    "llama3_2": ("Llama 3.2", "<|eot_id|>", ("<|eom_id|>",), {}),
    "llava_next": ("LLaVA-NeXT", "</s>", (), _LIST),
    "muse_glimmer": ("Muse Glimmer", "<|eot|>", (), {}),
    "nemotron_3_nano": ("Nemotron 3 Nano", "<|im_end|>", (), {}),
    "nemotron_3_super": ("Nemotron 3 Super", "<|im_end|>", (), {}),
    "nemotron_3_ultra": ("Nemotron 3 Ultra", "<|im_end|>", (), {}),
    "nemotron_3_5_lightning": ("Nemotron 3.5", "<|im_end|>", (), {}),
    "phi3": ("Phi-3", "<|endoftext|>", ("<|end|>",), _LIST),
    "phi3_5": ("Phi-3.5", "<|endoftext|>", ("<|end|>",), _LIST),
    "qwen2_5": ("Qwen2.5", "<|im_end|>", (), {}),
    "qwen2_5_vl": ("Qwen2.5-VL", "<|im_end|>", (), _LIST),
    "qwen3": ("Qwen3", "<|im_end|>", (), {}),
    "qwen3_instruct_2507": ("Qwen3-2507", "<|im_end|>", (), {}),
    "qwen3_vl": ("Qwen3-VL", "<|im_end|>", (), {}),
    "qwen3_5_nothink": ("Qwen3.5 without thinking", "<|im_end|>", (), {}),
    "qwen3_5_think": ("Qwen3.5", "<|im_end|>", (), {}),
    "qwen3_6": ("Qwen3.6", "<|im_end|>", (), {}),
    "qwen3_8": ("Qwen3.8", "<|im_end|>", (), {}),
    "smolvlm": ("SmolVLM", "<end_of_utterance>", (), _LIST),
}
_ADDED = {
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
}
_SPECIAL = re.compile(
    r"<\|[^|<>\n'\" {}]{1,40}\|>|<｜[^｜\n]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|<(?:start|end)_of_(?:turn|utterance)>|<eos>|<bos>"
    r"|\[gMASK\]|<sop>"
)
# Tokens of vocabularies that the template does not mention.
_GEMMA_4 = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma")
_MORE = {"lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"), **dict.fromkeys(_GEMMA_4, ('<|"|>',))}


def trl_families() -> list[Family]:
    """Return the templates of TRL's wheel."""
    spec = find_spec("trl")
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent / "chat_templates"
    found = []
    for path in sorted(folder.glob("*.jinja")):
        if "_training" in path.stem:  # edited for training, not published
            continue
        name, eos, stops, options = TRL[path.stem]
        source = path.read_text()
        special = {*_SPECIAL.findall(source), *_MORE.get(path.stem, ())} - _ADDED
        added = tuple(sorted(token for token in _ADDED if token in source))
        found.append(Family(name, source, tuple(sorted(special)), added, eos, stops, options))
    return found


@cache
def _backend() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the tool call is name arguments parameter function answer"] * 20, trainer)
    return backend.to_str()


def tokenizer_of(family: Family) -> Any:
    """Return a byte-level tokenizer with a family's special tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_backend())
    special = sorted({*family.special, family.eos, *family.stops} - set(family.added))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    start = next((t for t in special if t in ("<s>", "<bos>") or ("begin" in t and "of" in t)), special[0])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.eos, bos_token=start, pad_token=family.eos
    )
    made.chat_template = family.template
    return made


def chat_of(family: Family, **options: Any) -> Chat:
    """Return the chat format of a family, with the options that its row in the table states."""
    made = tokenizer_of(family)
    stops = made.convert_tokens_to_ids(list(family.stops))
    return Chat(made, ChatOptions(**{**family.options, **options}), stops)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather_now",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city."},
                    "options": {"type": "object", "description": "Options.", "properties": {}},
                    "days": {"type": "integer", "description": "A number."},
                },
                "required": ["city"],
            },
        },
    }
]
USER: Message = {"role": "user", "content": "How is the weather?"}
ONE = {"city": "Zürich"}
NESTED = {"city": 'a "quote", a \\ and\na line', "options": {"a": [1, {"b": None}], "c": True}, "days": 3}
COLUMNS = ("chat", "one call", "two calls", "nested arguments", "system prompt", "thinking", "three turns")


def called(*arguments: dict[str, Any], content: str = "", reasoning: str = "") -> Message:
    """Return an assistant message with calls of the tool."""
    made = [
        {"id": f"call{n:05d}", "type": "function", "function": {"name": "weather_now", "arguments": a}}
        for n, a in enumerate(arguments)
    ]
    message: Message = {"role": "assistant", "content": content, "tool_calls": made}
    return {**message, "reasoning": reasoning} if reasoning else message


def read_back(chat: Chat, message: Message, tools: Any = TOOLS) -> bool:
    """Return whether a message is read from the ids that are written for it."""
    context = chat.prompt([USER], tools)
    ids = chat.write(message)
    found = chat.read(ids, tools, context).message
    calls = [[c["function"] for c in m.get("tool_calls") or []] for m in (found, message)]
    same = found["content"] == message["content"] and found.get("reasoning") == message.get("reasoning")
    return same and calls[0] == calls[1] and ids[-1] in chat.stop_ids and not set(ids[:-1]) & chat.stop_ids


def _two_calls(chat: Chat) -> bool | None:
    """Return None where the template makes one call per turn."""
    message = called(ONE, {"city": "Bern"})
    if chat.tools.native:
        try:
            text = chat.template.render([USER, message], generate=False, tools=TOOLS)
        except UserError:
            return None
        if "Bern" not in text:
            return None
    return read_back(chat, message)


def _three_turns(chat: Chat) -> bool:
    """Play a conversation of three turns with two results, and compare what the policy sees."""
    ids = chat.prompt([USER], TOOLS)
    for number, city in enumerate(("Bern", "Basel")):
        turn = chat.write(called({"city": city}))
        call = chat.read(turn, TOOLS, ids, number).message["tool_calls"][0]
        result = {"role": "tool", "name": "weather_now", "tool_call_id": call["id"], "content": f"rain in {city}"}
        ids = [*ids, *turn, *chat.continuation([result], turn[-1])]
    ids += chat.write({"role": "assistant", "content": "It rains."})
    text = chat.tokenizer.decode(ids, skip_special_tokens=False)
    places = [text.find(part) for part in ("How is", "rain in Bern", "rain in Basel", "It rains.")]
    return -1 not in places and places == sorted(places)


def _system(chat: Chat) -> bool | None:
    """Return None where the template has no system role."""
    try:
        ids = chat.prompt([{"role": "system", "content": "Be brief."}, USER], TOOLS)
    except UserError:
        return None
    text = chat.tokenizer.decode(ids)
    return "Be brief." in text and "weather_now" in text


def _thinking(chat: Chat) -> bool | None:
    """Check reasoning, and that it can be switched off. Return None where the template does not know reasoning."""
    if not (chat.thinking and chat.thinking.native):
        return None
    if "enable_thinking" in chat.template.source:
        quiet = Chat(chat.tokenizer, ChatOptions(template_arguments={"enable_thinking": False}), chat.stop_ids)
        opened = quiet.thinking and quiet.thinking.opened_in(quiet.tokenizer.decode(quiet.prompt([USER])))
        if opened or not read_back(quiet, {"role": "assistant", "content": "It rains."}, ()):
            return False
    answer = {"role": "assistant", "content": "It rains.", "reasoning": "Let me think."}
    if chat.tools.syntax is None or not chat.tools.reads_back(chat.syntax, BOTH[1]):
        return read_back(chat, answer, ())
    quoted = f"I could write {chat.syntax.write([{'name': 'weather_now', 'arguments': ONE}])} now."
    drafted = {"role": "assistant", "content": "It rains.", "reasoning": quoted}
    return all(read_back(chat, m) for m in (answer, drafted, called(ONE, reasoning="Let me look.")))


def differences(chat: Chat, first: Message) -> tuple[list[str], list[tuple[str, str]]]:
    """Compare a conversation that is appended turn by turn with what the template renders for it.

    A part is compared if the template only adds text to what it rendered before, and renders all of the message. An
    empty thought that the template adds to earlier turns does not count.

    Args:
        chat: the chat format.
        first: the first turn, with calls.

    Returns:
        Names of the compared parts, and what differs: pairs (rendered, appended).
    """

    def render(messages: list[Message], generate: bool) -> str:
        text = chat.template.render(messages, generate=generate, tools=TOOLS)
        return text.replace("\ufdd0", "").replace("\ufdd1", "") + chat.turn.header * generate

    compared, found = [], []
    ids, history = chat.prompt([USER], TOOLS), [USER]
    for part, message in (("call", first), ("answer", {"role": "assistant", "content": "It rains."})):
        opening, closed = chat.tokenizer.decode(ids), render([*history, message], False)
        turn = chat.write(message)
        stop = chat.tokenizer.decode(turn[-1:])  # it may be the first token of the next message
        wanted = closed[len(opening) :]
        calls = message.get("tool_calls") or []
        texts = [message["content"], message.get("reasoning") or "", *(c["function"]["name"] for c in calls)]
        if (
            opening == render(history, True)
            and closed.startswith(opening)
            and all(map(wanted.count, filter(None, texts)))
        ):
            compared.append(part)
            got = chat.tokenizer.decode(turn).removesuffix(stop)
            plain = wanted if message.get("reasoning") else chat.turn.without_thought(wanted)
            if not any(
                text.startswith(got) and text[len(got) :].strip()[: len(stop)] in ("", stop) for text in (wanted, plain)
            ):
                found.append((wanted, got + stop))
        behind: list[Message] = [
            {"role": "tool", "name": "weather_now", "tool_call_id": call["id"], "content": f"rain {number}"}
            for number, call in enumerate(calls)
        ] or [USER]
        more = chat.continuation(behind, turn[-1])
        history += [message, *behind]
        wanted, added = render(history, True), chat.tokenizer.decode(more)
        before = closed.rstrip().removesuffix(stop)
        if wanted.startswith(before):
            compared.append(f"behind the {part}")
            if wanted[len(before) :].lstrip().removeprefix(stop) != added:
                found.append((wanted[len(before) :], stop + added))
        ids = [*ids, *turn, *more]
    return compared, found


CHECKS: dict[str, Any] = {
    "chat": lambda chat: read_back(chat, {"role": "assistant", "content": "It rains.\nA lot."}, ()),
    "one call": lambda chat: read_back(chat, called(ONE)),
    "two calls": _two_calls,
    "nested arguments": lambda chat: read_back(chat, called(NESTED)),
    "system prompt": _system,
    "thinking": _thinking,
    "three turns": _three_turns,
}


def row(family: Family) -> dict[str, str]:
    """Return the cells of a family: ``yes``, ``-`` (the template has none), ``refused`` or ``WRONG``."""
    try:
        chat = chat_of(family)
    except UserError as error:
        return {"syntax": "refused", **dict.fromkeys(COLUMNS, "refused"), "reason": str(error)}
    reason = ""
    try:
        chat.check_tools()
    except UserError as error:
        reason = str(error)
    cells = {}
    for name, check in CHECKS.items():
        if reason and name not in ("chat", "thinking"):
            cells[name] = "refused"
            continue
        try:
            found = check(chat)
        except (UserError, ToolCallError) as error:
            found, reason = False, reason or str(error)
        cells[name] = "-" if found is None else "yes" if found else "WRONG"
    syntax = type(chat.tools.syntax).__name__ if not reason else "refused"
    if family.options.get("tool_syntax"):
        syntax = f"{syntax} (`tool_syntax: {family.options['tool_syntax']}`)"
    elif family.options:
        syntax = f"{syntax} (`list_tools: system`)"
    return {"syntax": syntax, **cells, "reason": reason}


def corpus() -> list[Family]:
    """Return all families."""
    return sorted([*trl_families(), *WRITTEN], key=lambda family: family.name.lower())


FAMILIES = {family.name: family for family in corpus()}


def table(rows: dict[str, dict[str, str]]) -> str:
    """Return the table in Markdown."""
    head = ["template", *COLUMNS, "syntax of calls"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, cells in rows.items():
        lines.append("| " + " | ".join([name, *(cells[c] for c in COLUMNS), cells["syntax"]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = {name: row(family) for name, family in FAMILIES.items()}
    print(table(found))
    for name, cells in found.items():
        if cells["reason"]:
            print(f"{name}: {cells['reason'][:300]}", file=sys.stderr)
