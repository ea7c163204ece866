"""The number of cases of the fuzz tests, and the texts that they draw from.

``GEAR_FUZZ_CASES=1000000`` runs a million cases over all tests of `test_fuzz.py` instead of the default 12,000.
"""

import contextlib
import os
from collections.abc import Iterator

from deadlines import cheap
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("GEAR_FUZZ_CASES", "12000"))


def cases(share: float) -> settings:
    """Return the settings of a test with this fraction of all cases."""
    return settings(
        max_examples=max(1, round(CASES * share)), deadline=None, suppress_health_check=list(HealthCheck), database=None
    )


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """Fail if the code in this context takes longer than any text may make it take."""
    with cheap(500):  # code with a real problem exceeds this limit by far
        yield


PIECES = [
    "<tool_call>", "</tool_call>", '{"name": "', '", "arguments": ', '"calculator"', '"expression"', "{", "}", "[", "]",
    '"', ":", ",", "\\u", "d800", "NaN", "1e999", "null", "-", "<|im_end|>", "<|im_start|>", "assistant", "\n", " ",
    "<end>", "<act>", "look", "submit", "r1", "e1", "</script>", "<!--", "<img src=x onerror=alert(1)>", "javascript:",
    "\x1b[2J", "\x1b]0;x\x07", "\x9b31m", "\r", "\x00", "\u202e", "\u2028", "\ufdd0", "\ufdd1", "####", "$", "1,000",
    ".", "<<", "=", ">>", "\\boxed{", "(", ")", "**", "//", "%", "9" * 40, "{{", "}}", "{%", "%}", "⌘answer⌘", "../",
    "<answer>", "</answer>", "@DATA@", "@TITLE@", "__class__", "\u0665", "x" * 500,
]  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=8).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | hostile,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile, inner, max_size=3),
    max_leaves=6,
)
