"""Protects against untrusted chat templates, and against control tokens in untrusted text.

A chat template is a program from the model's directory. transformers renders it in Jinja's sandbox, which blocks access
to Python and files but does not limit computation; `rendered` does. Messages are text from tasks, tools and policies:
`mark` and `encode` of `ControlTokens` ensure that a control token spelled out in them is encoded as plain text.
"""

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

MAX_STEPS = 1_000_000  # lines and calls of a template's code in one rendering; real templates take thousands
MAX_TEXT = 5_000_000  # characters in the result of one rendering
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode reserves for internal use
_NONE = str.maketrans("", "", OPEN + CLOSE)


def unmarked(text: str) -> str:
    """Return rendered text without the marks of spelled-out control tokens."""
    return text.translate(_NONE)


class TemplateLimit(ValueError):
    """A chat template computes too long, or produces more text than any model reads."""


def check_template(source: str) -> None:
    """Reject templates with the power operator ``**``: one power of large numbers can block the interpreter for hours,
    and cannot be interrupted.

    Raises:
        TemplateLimit: the template uses ``**``.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        powers = [line for line, kind, value in Environment().lex(source) if (kind, value) == ("operator", "**")]
    except TemplateSyntaxError:
        return  # rendering reports the syntax error
    if powers:
        raise TemplateLimit(f"line {powers[0]} uses the power operator **, which is not allowed in chat templates")


def rendered(render: Callable[[], str]) -> str:
    """Return the result of ``render``, with bounded cost. The limit counts steps, not seconds, so it does not depend on
    the load of the machine.

    Raises:
        TemplateLimit: more than `MAX_STEPS` steps or `MAX_TEXT` characters, or not enough memory.
    """
    steps = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise TemplateLimit(f"rendering is not finished after {MAX_STEPS:,} steps")
        return count if frame.f_code.co_filename == "<template>" else None  # in library code, count only calls

    before = sys.gettrace()
    sys.settrace(count)
    try:
        text = render()
    except (OverflowError, MemoryError, RecursionError) as error:
        raise TemplateLimit(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
    finally:
        sys.settrace(before)
    if len(text) > MAX_TEXT:
        raise TemplateLimit(f"the result has {len(text):,} characters, more than {MAX_TEXT:,}")
    return text


class ControlTokens:
    """The control tokens of a chat format, which separate the messages: a tokenizer's special tokens.

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        special: the texts of all control tokens, the longest first.
    """

    def __init__(self, tokenizer: Any):
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: i for i, token in added.items() if token.special and token.content}
        self._ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        written = {**{i: token.content for i, token in added.items()}, **{i: text for text, i in self._ids.items()}}
        self._known = {i for i, text in written.items() if text.strip()}  # some vocabularies add tokens of spaces
        texts = sorted({text for text in written.values() if text.strip()}, key=len, reverse=True)
        self._written = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._tokenizer = tokenizer
        self.special = sorted(self._ids, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self._marked = re.compile(f"{OPEN}({self._any.pattern}){CLOSE}|[{OPEN}{CLOSE}]")

    def holds(self, token: int) -> bool:
        """Return whether an id is a control token or another added token. Added tokens of white space do not count."""
        return token in self._known

    def first(self, text: str) -> str:
        """Return the first control or added token in rendered text in front of the first mark; empty if there is none.

        It is what the tokenizer finds, which splits text at these tokens before all else.
        """
        found = self._written.search(text.partition(OPEN)[0])
        return found[0] if found else ""

    def mark(self, value: Any) -> Any:
        """Return messages or tools in which every spelled-out control token is marked."""
        if isinstance(value, str):
            if not self._any.search(value):
                return value
            text = value.replace(OPEN, "").replace(CLOSE, "")  # the text itself must not contain marks
            return self._any.sub(f"{OPEN}\\g<0>{CLOSE}", text)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def removed(self, text: str) -> str:
        """Return a text without its control tokens."""
        return self._any.sub("", text)

    def encode(self, text: str, after: str = "") -> list[int]:
        """Return the ids of rendered text. Control tokens written by the template get their own id; marked ones are
        encoded as plain text.

        Args:
            text: the text.
            after: a control token that stands before the text, and whose id is not returned. Some tokenizers add a
                space at the beginning of a text, but not behind a control token.
        """
        first, *rest = self._marked.split(text)
        ids = self._behind(first, after)
        for token, behind in zip(rest[::2], rest[1::2], strict=True):
            ids += self._spelled(token) if token else []
            ids += self._behind(behind, after)
        return ids

    def _behind(self, text: str, after: str) -> list[int]:
        ids = self._tokenizer.encode(after + text, add_special_tokens=False)
        if not after:
            return ids
        if ids[:1] == [self._ids.get(after)]:
            return ids[1:]
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _spelled(self, token: str) -> list[int]:
        own = self._ids[token]
        ids = self._plain([token])
        if own in ids:  # the token is also an ordinary word of the vocabulary
            ids = self._plain(token)  # encode letter by letter
        return [i for i in ids if i != own]

    def _plain(self, texts: Iterable[str]) -> list[int]:
        encode = self._tokenizer.encode
        return [i for text in texts for i in encode(text, add_special_tokens=False, split_special_tokens=True)]
