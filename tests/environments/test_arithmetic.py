"""The calculator's parser returns correct values at bounded cost, and no text breaks it."""

import ast
import operator
import sys
from fractions import Fraction

import pytest
from deadlines import cheap
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gear_lightning.environments.arithmetic import CalculatorError, calculate


class NoValue(Exception):
    pass


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def reference(text: str) -> Fraction:
    """Return the value by Python's own grammar over fractions: a slow, independent reference."""

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(text, node))
        if isinstance(node, ast.UnaryOp):
            return walk(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        assert isinstance(node, ast.BinOp)
        left, right = walk(node.left), walk(node.right)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > 256:
                raise NoValue
            right = int(right)
        try:
            value = Fraction(OPERATORS[type(node.op)](left, right))
        except ZeroDivisionError:
            raise NoValue from None
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > 4096:
            raise NoValue
        return value

    return walk(ast.parse(text.strip(), mode="eval").body)


def timed(text: str) -> str | None:
    """Return the calculator's result, or None if it raises `CalculatorError`. Check that the call is fast."""
    with cheap(100):  # the worst case takes a few milliseconds
        try:
            return calculate(text)
        except CalculatorError as error:
            message = str(error).encode()
            if not 0 < len(message) < 100:
                pytest.fail("the error message is too long for the agent's context")
            return None


NUMBERS = st.one_of(
    st.integers(0, 20).map(str),
    st.integers(0, 10**12).map(str),
    st.decimals(0, 1000, places=3).map(str),
    st.sampled_from(["0", ".5", "7.", "0.000001", "9" * 40]),
)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    space = st.sampled_from(["", " ", "  "])
    return st.one_of(
        st.builds("{}{}{}{}{}".format, inner, space, st.sampled_from(["+", "-", "*", "/", "//"]), space, inner),
        st.builds("{} % {}".format, inner, NUMBERS),
        st.builds("{} % ({})".format, inner, inner),
        st.builds("{}**{}".format, inner, st.sampled_from(["0", "1", "2", "3", "-1", "-2", "0.5", "300", "2**3"])),
        st.builds("{}{}".format, st.sampled_from(["-", "+", "- -"]), inner),
        st.builds("( {})".format, inner),
    )


@settings(max_examples=600, deadline=None)
@given(st.recursive(NUMBERS, larger, max_leaves=12))
def test_values_match_pythons_grammar_over_fractions(text):
    found = timed(text)
    try:
        expected = reference(text)
    except NoValue:
        assert found is None
        return
    if abs(expected) >= 10**40 or 0 < abs(expected) < Fraction(1, 10**12):
        assert found is None
    elif found is None:
        assert round(abs(expected), 6) == 10**40, "the expression must have a value"
    elif 10**12 % expected.denominator == 0:
        assert Fraction(found) == expected
    else:
        assert abs(Fraction(found) - expected) <= min(Fraction(1, 2 * 10**6), abs(expected) / 10**5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/3", "0.333333"),
        ("2/3", "0.666667"),
        ("-100/7", "-14.285714"),
        ("1/3000", "0.000333333"),
        ("0.1 + 0.2", "0.3"),
        ("2**-12", "0.000244140625"),
        ("10**39", "1" + "0" * 39),
        ("-2**2", "-4"),
        ("2**3**2", "512"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("20% * 50", "10"),
        ("50%", "0.5"),
        ("5%%", "0.0005"),
        ("(20 + 5)% * 8", "2"),
        ("7 % 4", "3"),
        ("7%(4)", "3"),
        ("7 %.5", "0"),
        ("100 - 20%", "99.8"),
        ("7%-3", "-2.93"),
        ("1,000 + 1", "1001"),
        ("1,234,567.5 * 2", "2469135"),
        ("3 × 4 · 2 ÷ 6 − 1", "3"),
        ("2x3X4", "24"),
        ("2^10", "1024"),
        ("\t5\n- -5 ", "10"),
        ("123456789012345678901234567890123456789 / 8", "15432098626543209862654320986265432098.625"),
    ],
)
def test_expressions_as_agents_write_them_are_evaluated(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the expression is empty"),
        ("  ", "the expression is empty"),
        ("1 +", "ends too early"),
        ("(1", "a closing parenthesis is missing"),
        ("1)", "expected an operator before ')'"),
        ("()", "expected a number in place of ')'"),
        ("1 2", "expected an operator before '2'"),
        ("2(3)", "expected an operator before '('"),
        ("1,00", "cannot read ',00'"),
        ("1,0000", "cannot read ',0000'"),
        ("1e5", "cannot read 'e5'"),
        ("sqrt(2)", "cannot read 'sqrt(2)'"),
        ("٣+1", "cannot read '٣+1'"),
        ("2 = 2", "cannot read '= 2'"),
        ("\ud800", "cannot read"),
        ("1/0", "division by zero"),
        ("1//0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0**-1", "division by zero"),
        ("1/(2-2)", "division by zero"),
        ("2**0.5", "an exponent must be a whole number from -256 to 256"),
        ("1**257", "an exponent must be a whole number from -256 to 256"),
        ("10**40", "more than 40 digits"),
        ("10**40 - 1/10**9/3", "more than 40 digits"),
        ("1" * 41, "a number has more than 40 digits"),
        ("1/10**13", "too close to zero"),
    ],
)
def test_invalid_expressions_raise_an_error_with_the_reason(text, message):
    with pytest.raises(CalculatorError) as caught:
        calculate(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("thing", [None, 3, 2.5, ["1+1"], {"a": 1}, b"1+1"])
def test_values_other_than_text_are_rejected(thing):
    with pytest.raises(CalculatorError, match="must be text"):
        calculate(thing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" + "**9" * 30, "an exponent must be"),
        ("9**9**9**9**9", "an exponent must be"),
        ("(9**256)**256", "the numbers become too large"),
        ("(" * 16 + "9" + "**256)" * 16, "the numbers become too large"),
        ("*".join(["(9**250)"] * 50), "the numbers become too large"),
        ("1" + "**1" * 33, "nested more than 32 deep"),
        ("(" * 33 + "1" + ")" * 33, "nested more than 32 deep"),
        ("(" * 500, "nested more than 32 deep"),
        ("2**(" * 120, "nested more than 32 deep"),
        ("1" + "+1" * 250, "longer than 500 characters"),
        ("1" * 10_000_000, "longer than 500 characters"),
    ],
)
def test_cost_is_bounded(text, message):
    with cheap(100), pytest.raises(CalculatorError) as caught:
        calculate(text)
    assert message in str(caught.value)


def test_expressions_within_the_limits_are_evaluated():
    assert calculate("(" * 32 + "1" + ")" * 32) == "1"
    assert calculate("1" + "**1" * 32) == "1"
    assert calculate("-" * 499 + "1") == "-1"
    assert calculate("1" + "+1" * 249) == "250"
    assert calculate("1**256 + 1**-256") == "2"
    assert timed("+".join(f"1/{i}" for i in range(1001, 1071))) is not None, "intermediate denominators may be large"


ATOMS = ["**", "//", "1,000", "1,00", "0.", ".5", "**-", "(9**9)", "%%", "1e9", "0x1f", "__import__('os')", "\ud800"]
PIECES = st.sampled_from([*"0123456789+-*/%^()×·÷−xX,._ \n", *ATOMS])


@settings(max_examples=2500, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(st.characters(codec=None), max_size=600)))
@example("0" * 500)
@example("\x00")
def test_no_text_breaks_the_parser_and_every_result_evaluates_to_itself(text):
    found = timed(text)
    if found is not None:
        assert calculate(found) == found


@pytest.mark.parametrize("text", ["10**40 - 1", "(10**40 - 1) / 8", "(10**40 - 1) / 3", "-(10**39) / 7", "1/3/10**11"])
def test_the_longest_results_are_valid_expressions(text):
    assert calculate(calculate(text)) == calculate(text)


HEARD: list[str] | None = None


def _hear(event: str, _: tuple) -> None:
    if HEARD is not None:
        HEARD.append(event)


sys.addaudithook(_hear)  # an audit hook cannot be removed; it does nothing outside the test below


def test_expressions_never_reach_pythons_eval():
    global HEARD
    HEARD = []
    try:
        for text in ("__import__('os').system('true')", "exec('1')", "(1).__class__", "1 + 1", "[0]", "2**3", "'a'"):
            timed(text)
        found, HEARD = HEARD, []
        eval("1")
        assert "compile" in HEARD, "this test needs an interpreter whose audit hooks report evaluation"
    finally:
        HEARD = None
    assert not {"compile", "exec", "import", "open", "os.system", "subprocess.Popen"} & set(found)
