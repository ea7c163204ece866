"""Coverage-guided fuzzing of the parsers of the policy's text: tool calls and the calculator.

Not a part of the test suite. atheris is not a dependency of the project (it has wheels for Linux, Python 3.11):

    python3.11 -m venv fuzz && fuzz/bin/pip install atheris
    PYTHONPATH=.:tests/support fuzz/bin/python tests/security/fuzz_parsers.py tool_calls -max_total_time=180
    PYTHONPATH=.:tests/support fuzz/bin/python tests/security/fuzz_parsers.py calculator -max_total_time=180

Options after the target are those of libFuzzer. A finding ends the run and writes its input to ``crash-...``; pass that
file as the last argument to reproduce it.
"""

import ast
import json
import operator
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]
from deadlines import cheap

with atheris.instrument_imports(include=["gear_lightning", "json"]):
    from gear_lightning.checks import deeper_than
    from gear_lightning.environments.arithmetic import MAX_BITS, CalculatorError, calculate, format_number
    from gear_lightning.generation.chat import MAX_DEPTH, ToolCallError, parse_tool_calls, parse_words

SEEDS = {
    "tool_calls": [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        'So: <tool_call>[{"name": "f", "arguments": {"x": "a"}}, {"name": "g"}]</tool_call> and',
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": [1e3, null, true]}"}',
        "<tool_call></tool_call><tool_call>",
        '<tool_call>{"name": "\\ud800", "arguments": {"x": NaN, "y": 1e999}}',
        "look r1 e5",
        "submit e5 look r1",
    ],
    "calculator": [
        "(3 + 4.5) * 2",
        "20% * 50",
        "7 % 4",
        "2 ^ -3",
        "1,234,567.5 // 3",
        "−2 × 3 ÷ 4",
        "((((1))))",
        "2**3**2",
    ],
}
DICTIONARY = {
    "tool_calls": ["<tool_call>", "</tool_call>", '"name"', '"arguments"', "\\u", "null", "Infinity", "look", "submit"],
    "calculator": ["**", "//", "%", "^", "x", "X", "×", "·", "÷", "−", "(", ")", ",000", "."],
}
WORDS = {"look": ["relation", "entity"], "submit": ["answer"]}
EXACT = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def tool_calls(text: str) -> None:
    """Check that text is parsed or raises `ToolCallError`, and that written calls are parsed to the same calls."""
    for read in (parse_tool_calls, lambda text: parse_words(text, WORDS)):
        try:
            _, found = read(text)
        except ToolCallError:
            continue
        plain = json.loads(json.dumps(found, allow_nan=False))
        assert plain == found
        assert not deeper_than(MAX_DEPTH + 4, plain)
        for call in found:
            assert isinstance(call["function"]["name"], str)
            assert isinstance(call["function"]["arguments"], dict)
        if "tool_call>" not in json.dumps(found):  # a tag inside an argument ends the call early
            written = "".join(f"<tool_call>{json.dumps(c['function'])}</tool_call>" for c in found)
            assert parse_tool_calls(written) == ("", found)


def calculator(text: str) -> None:
    """Check that text has a value or raises `CalculatorError`, and that a value evaluates to itself and is exact."""
    try:
        value = calculate(text)
    except CalculatorError:
        return
    assert calculate(value) == value
    if set(text) <= set("0123456789.+-*/() "):
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError:  # 007, which Python rejects
            return
        exact = evaluated(tree.body, text.strip())
        assert exact is None or format_number(exact) == value, (text, value, exact)


def evaluated(node: ast.AST, text: str) -> Fraction | None:
    """Return the value of plain arithmetic by Python's own parser; None for expressions without a reference value."""
    if isinstance(node, ast.Constant):
        return Fraction(ast.get_source_segment(text, node) or "")
    if isinstance(node, ast.UnaryOp):
        value = evaluated(node.operand, text)
        return None if value is None else -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = evaluated(node.left, text), evaluated(node.right, text)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.Pow):
            return left**right.numerator if abs(right) * left.numerator.bit_length() <= MAX_BITS else None
        return Fraction(EXACT[type(node.op)](left, right))
    return None


def main() -> None:
    target = {"tool_calls": tool_calls, "calculator": calculator}[sys.argv[1]]

    def once(data: bytes) -> None:
        with cheap(200):  # including the overhead of the instrumentation
            target(data.decode("utf-8", "replace"))

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS[sys.argv[1]]):
            (corpus / str(number)).write_text(seed)
        words = Path(folder) / "words"
        escaped = ["".join(f"\\x{byte:02x}" for byte in word.encode()) for word in DICTIONARY[sys.argv[1]]]
        words.write_text("".join(f'"{word}"\n' for word in escaped))
        again = [x for x in sys.argv[2:] if not x.startswith("-")]
        options = sys.argv[2:] if again else [f"-dict={words}", "-max_len=1200", *sys.argv[2:], str(corpus)]
        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
