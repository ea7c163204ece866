"""Evaluates arithmetic expressions in text: a parser over exact rationals with bounded cost. It never calls Python's
parser."""

import re
from fractions import Fraction

MAX_LENGTH = 500  # characters of an expression
MAX_DEPTH = 32  # nested parentheses and stacked exponents
MAX_DIGITS = 40  # digits of a number before its point, and after it; for input and result
MAX_EXPONENT = 256
MAX_BITS = 4096  # numerator and denominator of every intermediate value
EXACT_PLACES = 12  # decimal places up to which a terminating decimal is written in full
SHOWN_PLACES = 6  # significant decimals of all other numbers

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(?P<operator>\*\*|//|[-+*/%^()×·÷−xX]))"
)
_SPELLINGS = {"×": "*", "·": "*", "x": "*", "X": "*", "÷": "/", "−": "-", "^": "**"}


class CalculatorError(ValueError):
    """An expression cannot be evaluated. The message is short enough to show to the agent."""


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression.

    Supports ``+ - * / // % **`` with Python's precedence, parentheses, signs, decimals, thousands commas,
    ``x × · ÷ ^``, and percent: a ``%`` that no number or parenthesis follows divides by 100, so ``20% * 50`` is 10 and
    ``7 % 4`` is 3. Arithmetic is exact; only the result is rounded (see `format_number`).

    Args:
        expression: at most 500 characters.

    Returns:
        The value in decimal notation, which is itself a valid expression.

    Raises:
        CalculatorError: the text is not an expression, divides by zero, or exceeds a limit of this module.
    """
    if not isinstance(expression, str):
        raise CalculatorError("the expression must be text")
    if len(expression) > MAX_LENGTH:
        raise CalculatorError(f"the expression is longer than {MAX_LENGTH} characters")
    return format_number(_Parser(expression).value())


def format_number(value: Fraction) -> str:
    """Return a rational number in decimal notation.

    Integers have no decimal point, decimals of up to 12 places are exact, all others are rounded to 6 places (to 6
    significant decimals below 1).

    Raises:
        CalculatorError: the absolute value is at least 10^40, or below 10^-12 and not zero.
    """
    if abs(value) >= 10**MAX_DIGITS:
        raise CalculatorError(f"the result has more than {MAX_DIGITS} digits")
    if value and abs(value) < Fraction(1, 10**EXACT_PLACES):
        raise CalculatorError("the result is too close to zero")
    if 10**EXACT_PLACES % value.denominator == 0:
        places = EXACT_PLACES
    else:
        places = SHOWN_PLACES
        while abs(value) * 10 ** (places - SHOWN_PLACES + 1) < 1:
            places += 1
    whole, rest = divmod(abs(round(value * 10**places)), 10**places)
    if whole >= 10**MAX_DIGITS:  # rounding can reach the limit
        raise CalculatorError(f"the result has more than {MAX_DIGITS} digits")
    decimals = f"{rest:0{places}d}".rstrip("0")
    return "-" * (value < 0) + str(whole) + ("." + decimals if decimals else "")


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("the numbers become too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise CalculatorError(f"an exponent must be a whole number from -{MAX_EXPONENT} to {MAX_EXPONENT}")
    if not base and exponent < 0:
        raise CalculatorError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if bits * abs(exponent.numerator) > MAX_BITS:  # checked first, because computing the power would be slow
        raise CalculatorError("the numbers become too large")
    return base**exponent.numerator


class _Parser:
    """Recursive-descent parser, one method per precedence level. Depth and size are checked before any computation."""

    def __init__(self, text: str):
        self.tokens = self._split(text)
        self.place = 0
        self.depth = 0

    @staticmethod
    def _split(text: str) -> list[str]:
        tokens, end, size = [], 0, len(text.rstrip())
        while end < size:
            match = _TOKEN.match(text, end)
            if match is None:
                raise CalculatorError(f"cannot read {text[end:].strip()[:12]!r}")
            number, operator = match["number"], match["operator"]
            if number is None:
                tokens.append(_SPELLINGS.get(operator, operator))
            elif max(map(len, number.replace(",", "").split("."))) > MAX_DIGITS:
                raise CalculatorError(f"a number has more than {MAX_DIGITS} digits")
            else:
                tokens.append(number.replace(",", ""))
            end = match.end()
        return tokens

    def value(self) -> Fraction:
        if not self.tokens:
            raise CalculatorError("the expression is empty")
        result = self._sum()
        if self.place < len(self.tokens):
            raise CalculatorError(f"expected an operator before {self._peek()!r}")
        return result

    def _peek(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def _take(self) -> str:
        self.place += 1
        return self.tokens[self.place - 1]

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise CalculatorError(f"nested more than {MAX_DEPTH} deep")

    def _sum(self) -> Fraction:
        result = self._product()
        while self._peek() in ("+", "-"):
            add = self._take() == "+"
            other = self._product()
            result = _bounded(result + other if add else result - other)
        return result

    def _product(self) -> Fraction:
        result = self._signed()
        while self._peek() in ("*", "/", "//", "%"):
            operator, other = self._take(), self._signed()
            if operator == "*":
                result = _bounded(result * other)
            elif not other:
                raise CalculatorError("division by zero")
            elif operator == "/":
                result = _bounded(result / other)
            else:
                result = _bounded(Fraction(result // other) if operator == "//" else result % other)
        return result

    def _signed(self) -> Fraction:
        negative = False
        while self._peek() in ("+", "-"):
            negative ^= self._take() == "-"
        result = self._exponent()
        return -result if negative else result

    def _exponent(self) -> Fraction:
        base = self._percent()
        if self._peek() != "**":
            return base
        self._take()
        self._deeper()
        exponent = self._signed()
        self.depth -= 1
        return _bounded(_power(base, exponent))

    def _percent(self) -> Fraction:
        result = self._atom()
        while self._peek() == "%" and not (self._peek(1)[:1].isdigit() or self._peek(1)[:1] in (".", "(")):
            self._take()
            result /= 100
        return result

    def _atom(self) -> Fraction:
        token = self._peek()
        if token == "(":
            self._take()
            self._deeper()
            result = self._sum()
            if self._peek() != ")":
                raise CalculatorError("a closing parenthesis is missing")
            self._take()
            self.depth -= 1
            return result
        if not token:
            raise CalculatorError("the expression ends too early")
        if token[0].isdigit() or token[0] == ".":
            return Fraction(self._take())
        raise CalculatorError(f"expected a number in place of {token!r}")
