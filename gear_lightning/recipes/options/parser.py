"""The parser of commands that take no recipe: no abbreviations, and errors in one line that say what was meant."""

import argparse
import re
from typing import Any, NoReturn

from ...errors import UserError
from ...hints import close


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`.

    Args:
        command: name of the command.
        options: see `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, **options: Any):
        super().__init__(f"gear-lightning {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._question(message)} ({self.prog} --help)")

    def _question(self, message: str) -> str:
        names = [option for action in self._actions for option in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (-[^\s=]+)", message)
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        meant = close(unknown[1], names) if unknown else None
        if choice:
            meant = close(choice[1], [word.strip("' ") for word in choice[2].split(",")])
        return f"; did you mean {meant}?" if meant else ""
