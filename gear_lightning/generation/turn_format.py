"""Finds out where an assistant turn begins and ends in the text that a chat template renders."""

import re
from typing import Any

from ..environments.base import Message
from ..errors import UserError
from .chat_template import ChatTemplate
from .turn_text import Thinking

HELLO: Message = {"role": "user", "content": "Hello"}
MARK = "zq7answer7qz"  # placeholder of an assistant's text; assumed not to occur in real text
THOUGHT = "zq7thought7qz"  # the same for reasoning

# Marks of reasoning in published templates: texts that the template contains, and the marks.
THINKING_MARKS = [
    (("<|channel|>", "analysis", "<|end|>"), ("<|channel|>analysis<|message|>", "<|end|>")),  # GPT-OSS
    (("<|channel>", "<channel|>"), ("<|channel>thought\n", "<channel|>")),  # Gemma 4
    (("<think>", "</think>"), ("<think>", "</think>")),  # Qwen, DeepSeek, GLM, MiniMax, Nemotron, SmolLM3
    (("[THINK]", "[/THINK]"), ("[THINK]", "[/THINK]")),  # Magistral, Ministral
    (("<seed:think>", "</seed:think>"), ("<seed:think>", "</seed:think>")),
    (("<|START_THINKING|>", "<|END_THINKING|>"), ("<|START_THINKING|>", "<|END_THINKING|>")),  # Command A
    (("<|inner_prefix|>", "<|inner_suffix|>"), ("<|inner_prefix|>", "<|inner_suffix|>")),  # Apertus
    (("[BEGIN FINAL RESPONSE]",), ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]")),  # Apriel 1.6
    (("<|think|>", "<|begin|>assistant"), ("<|think|>", "<|end|><|begin|>assistant")),  # Solar
    (("to=self", "<|eom|>"), (" to=self<|message|>", "<|eom|><|start|>assistant")),  # Muse
]


def shared_length(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def thinking_of(source: str) -> Thinking:
    """Return the marks of reasoning that a template's source contains; ``<think>`` if it contains none."""
    for contained, (opening, closing) in THINKING_MARKS:
        if all(text in source for text in contained):
            return Thinking(opening, closing, native=True, exclusive="<|end|>" not in closing)
    return Thinking()


class MisplacedTurnError(UserError):
    """The chat template renders an assistant turn that does not begin where its generation prompt ends."""


class TurnFormat:
    """The boundaries of an assistant turn.

    Args:
        template: the chat template.
        thinking: the marks of reasoning; None if the text is not to be split.

    Attributes:
        header: text that opens the turn, where the template ignores ``add_generation_prompt``.
        before: text of the format between the generation prompt and the answer, which the policy writes (GPT-OSS's
            channel).
        before_end: white space between the answer and the end token.
        lead: text of the generation prompt behind its last control token.
        end: id of the token that ends a turn.
        end_text: its text.
        shared: whether the end token is the first token of the next message (GLM 4.5).

    Raises:
        UserError: the template cannot be continued turn by turn; the message states what is missing.
    """

    def __init__(self, template: ChatTemplate, thinking: Thinking | None):
        self.template = template
        self.thinking = thinking
        closed = [HELLO, {"role": "assistant", "content": MARK}]
        alone = template.render(closed, generate=False)
        followed = template.render([*closed, HELLO], generate=True)
        if MARK not in alone and MARK not in followed:
            raise UserError("the chat template does not render the text of assistant messages")
        lead, _, after = alone.partition(MARK)
        opened = template.render([HELLO], generate=True)
        self.header = self._find_header(opened, lead, after)
        self._find_end(after, followed.partition(MARK)[2])
        self._check_position(followed)
        core = self.core(opened + self.header)
        if not lead.startswith(core.rstrip()):
            raise UserError(
                "the chat template renders an earlier assistant turn with another beginning "
                f"({lead[shared_length(lead, core) :][:40]!r}) than its generation prompt "
                f"({core[-40:]!r}), so a conversation cannot be continued turn by turn"
            )
        self.before = self.without_thought(lead[shared_length(lead, core) :])
        self._prefilled = (opened + self.header)[len(core) :]
        start = core + _space(self._prefilled)
        self._slack = start[shared_length(start, lead) :]  # white space that earlier turns lack
        special = [opened.rfind(text) + len(text) for text in template.control.special if text in opened]
        self.lead = (opened + self.header)[max(special, default=0) :]
        self._thought_marks = self._learn_thought()

    def _find_header(self, opened: str, lead: str, after: str) -> str:
        """Return the text that opens a turn, if the template ignores ``add_generation_prompt``."""
        if opened != self.template.render([HELLO], generate=False):
            return ""
        if not lead.startswith(opened) or not lead[len(opened) :].strip():
            return ""
        earlier = self.template.render([HELLO, {"role": "assistant", "content": MARK}, HELLO], generate=False)
        if not earlier.partition(MARK)[2].startswith(after):  # the generation prompt is always there (Command R7B)
            return ""
        return lead[len(opened) :]

    def _check_position(self, followed: str) -> None:
        """Check that a user message is rendered in the same way wherever it stands.

        Raises:
            UserError: it is not; a continuation would be rendered for the wrong position.
        """
        turns = [HELLO, {"role": "assistant", "content": "Hi"}, HELLO, {"role": "assistant", "content": MARK}, HELLO]
        deeper = self.template.render(turns, generate=True)
        first, later = (text.rpartition(MARK)[2] for text in (followed, deeper))
        if MARK in deeper and first != later:
            at = max(shared_length(first, later) - 10, 0)
            raise UserError(
                "the chat template renders a message in another way if it stands at another position "
                f"({first[at:][:40]!r}, later {later[at:][:40]!r}), so a conversation cannot be continued turn by "
                "turn; use a template without numbers of messages or rounds"
            )

    def _learn_thought(self) -> tuple[str, str]:
        """Return the texts before and behind reasoning, which the policy writes."""
        if self.thinking is None:
            return "", ""
        text = self.body({"role": "assistant", "content": MARK, "reasoning": THOUGHT})
        found = self.marks_in(text.partition(MARK)[0], self.before)
        return found or (self.thinking.open.rstrip() + "\n", f"\n{self.thinking.close}\n\n")

    def marks_in(self, text: str, behind: str) -> tuple[str, str] | None:
        """Return the texts before and behind reasoning in a turn; None if it is not rendered as reasoning.

        Args:
            text: the text of the turn, with the reasoning `THOUGHT`.
            behind: its text without the reasoning.
        """
        before, found, after = text.partition(THOUGHT)
        if self.thinking is None or not found or not after.endswith(behind):
            return None
        after = after.removesuffix(behind)
        return (
            (before, after) if self.thinking.open.strip() in before and self.thinking.close.strip() in after else None
        )

    def thought(self, reasoning: str, marks: tuple[str, str] | None = None) -> str:
        """Return the text that the policy writes for its reasoning, after what the generation prompt has opened.

        Args:
            reasoning: the reasoning.
            marks: the texts before and behind it, if not those before an answer.
        """
        opened = bool(self.thinking and self.thinking.opened_in(self._prefilled))
        if self.thinking is None or not (reasoning or opened):
            return ""
        before, behind = marks or self._thought_marks
        if not reasoning:
            return behind
        written = before + reasoning + behind
        return written[shared_length(written, self._prefilled) :] if opened else written

    @property
    def closing(self) -> str:
        """The text that ends reasoning; empty if the text is not to be split."""
        return self._thought_marks[1]

    def _find_end(self, alone: str, followed: str) -> None:
        """Find the end token: the first control token behind an answer, with only white space before it (``\\n<|EOT|>``
        of DeepSeek-Coder, ``' </s>'`` of Llama 2)."""
        self.shared = not alone.strip()
        after = followed if self.shared else alone
        if not after.strip():
            raise UserError(
                "the chat template puts no end token after an assistant turn, so the policy could not end its turn"
            )
        control = self.template.control
        ids = self.template.tokenizer.encode(after, add_special_tokens=False)
        self.end = next((i for i in ids if control.holds(i)), ids[0])
        self.end_text = self.template.tokenizer.decode([self.end])
        self.before_end, _, _ = after.partition(self.end_text)
        one_token = control.holds(self.end) or (self.end_text.strip() == after.strip() and not self.shared)
        if self.before_end.strip() or not one_token:
            raise UserError(
                f"the chat template ends an assistant turn with the text {after[:40]!r} and puts no special token "
                "before it, so the policy could not end its turn; use a template that puts a special token (for "
                "example the end-of-sequence token) directly after the answer"
            )

    def opening(self, messages: list[Message], tools: Any = ()) -> str:
        """Return the text of messages, up to the start of the assistant's turn."""
        return self.template.render(messages, generate=True, tools=tools) + self.header

    def core(self, opening: str) -> str:
        """Return an opening without reasoning that the generation prompt opens, or opens and closes."""
        if self.thinking is None:
            return opening
        return re.sub(self._marks() + r"\s*$", "", opening)

    def without_thought(self, text: str) -> str:
        """Return the text of a turn without an empty thought at its beginning."""
        if self.thinking is None:
            return text
        pattern = self._marks(closed=not self.thinking.exclusive)
        closing = rf"\s*{re.escape(self.thinking.close.strip())}\s*"  # the generation prompt opened it
        return re.sub(rf"^\s*(?:{pattern}\s*|{closing})", "", text, count=1)

    def _marks(self, *, closed: bool = False) -> str:
        """Return the pattern of reasoning without text. ``closed``: whether the end mark must be there."""
        opening, closing = (re.escape(m.strip()) for m in (self.thinking.open, self.thinking.close))  # type: ignore[union-attr]
        return rf"\s*{opening}\s*(?:{closing}){'' if closed else '?'}" if opening else r"(?!)"

    def body(self, message: Message, tools: Any = (), before: list[Message] | None = None) -> str:
        """Return the text of an assistant turn as the template renders it, from the answer's beginning on.

        Args:
            message: the assistant message.
            tools: JSON schemas of the tools.
            before: the messages before it.

        Raises:
            MisplacedTurnError: the turn does not begin where the generation prompt ends, so the policy cannot write it.
        """
        context = before or [HELLO]
        opened = self.opening(context, tools)
        core = self.core(opened)
        text = self.template.render([*context, message], generate=False, tools=tools)
        begins = shared_length(core, text)
        start = core + _space(opened[len(core) :])
        missing = start[shared_length(start, text) :]
        spaced = not missing.strip() and (missing == self._slack or self._begins_with_thought(text[begins:]))
        if missing and not spaced:
            raise MisplacedTurnError(
                f"the turn begins with {text[shared_length(start, text) :][:40]!r} where the generation prompt has "
                f"{missing[:40]!r}"
            )
        return text[begins:]

    def _begins_with_thought(self, text: str) -> bool:
        """Return whether a turn begins with a mark of reasoning."""
        return bool(self.thinking) and text.lstrip() != self.without_thought(text).lstrip()


def _space(text: str) -> str:
    """Return the white space at the beginning of a text."""
    return text[: len(text) - len(text.lstrip())]
