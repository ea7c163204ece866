"""Text and templates that others wrote, kept from doing what only the chat format may do.

A chat template is a program from the model's directory; transformers renders it in Jinja's sandbox, where it reaches
neither Python nor files. What the sandbox does not bound is its work: `rendered` does. Messages are text from tasks,
tools and policies: `mark` and `split` keep a control token that is spelled out in them from becoming one.
"""

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

MAX_STEPS = 1_000_000  # lines and calls of a template's code in one rendering; real ones take thousands
MAX_TEXT = 5_000_000  # characters that one rendering may give
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: Unicode keeps them for uses like this one


class TemplateLimit(ValueError):
    """A chat template that works without end, or gives more text than any model reads."""


def check_template(source: str) -> None:
    """Refuse ``**``: one power of large numbers holds the interpreter for hours, and nothing can interrupt it.

    Raises:
        TemplateLimit: the template raises to a power.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        powers = [line for line, kind, value in Environment().lex(source) if (kind, value) == ("operator", "**")]
    except TemplateSyntaxError:
        return  # told where it is rendered
    if powers:
        raise TemplateLimit(f"line {powers[0]} raises to a power (**), which no chat template needs")


def rendered(render: Callable[[], str]) -> str:
    """The text that ``render`` makes of a template, at a bounded cost. Steps are counted and not seconds, so that a
    busy machine changes nothing.

    Raises:
        TemplateLimit: more than `MAX_STEPS` steps, `MAX_TEXT` characters, or more memory than there is.
    """
    steps = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise TemplateLimit(f"it is not done after {MAX_STEPS:,} steps")
        return count if frame.f_code.co_filename == "<template>" else None  # of library code the calls alone

    before = sys.gettrace()
    sys.settrace(count)
    try:
        text = render()
    except (OverflowError, MemoryError, RecursionError) as error:
        raise TemplateLimit(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
    finally:
        sys.settrace(before)
    if len(text) > MAX_TEXT:
        raise TemplateLimit(f"it gives {len(text):,} characters")
    return text


class ControlTokens:
    """The tokens by which a chat format tells who speaks: a tokenizer's special tokens.

    Args:
        tokenizer: as transformers gives it.
    """

    def __init__(self, tokenizer: Any):
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: i for i, token in added.items() if token.special and token.content}
        self._ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        written = {**{i: token.content for i, token in added.items()}, **{i: text for text, i in self._ids.items()}}
        self._known = {i for i, text in written.items() if text.strip()}  # some vocabularies add runs of spaces
        self._tokenizer = tokenizer
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marked = re.compile(f"{_OPEN}({self._any.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]")

    def holds(self, token: int) -> bool:
        """Whether an id is a control token, or another token that was added to the vocabulary of text; white space is
        neither."""
        return token in self._known

    def mark(self, value: Any) -> Any:
        """Messages or tools in which every control token that is spelled out is marked."""
        if isinstance(value, str):
            if not self._any.search(value):
                return value
            text = value.replace(_OPEN, "").replace(_CLOSE, "")  # nobody marks but us
            return self._any.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text: control tokens that the template wrote as such, marked ones as their letters."""
        first, *rest = self._marked.split(text)
        ids = self._tokenizer.encode(first, add_special_tokens=False)
        for token, behind in zip(rest[::2], rest[1::2], strict=True):
            ids += self._spelled(token) if token else []
            ids += self._tokenizer.encode(behind, add_special_tokens=False)
        return ids

    def _spelled(self, token: str) -> list[int]:
        own = self._ids[token]
        ids = self._plain([token])
        if own in ids:  # it is a word of the vocabulary, too
            ids = self._plain(token)  # letter by letter
        return [i for i in ids if i != own]

    def _plain(self, texts: Iterable[str]) -> list[int]:
        encode = self._tokenizer.encode
        return [i for text in texts for i in encode(text, add_special_tokens=False, split_special_tokens=True)]
