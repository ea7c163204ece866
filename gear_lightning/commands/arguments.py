"""What the command line does before anything is imported: help, and errors in keys, files and names."""

from ..errors import UserError
from ..hints import close, did_you_mean, some
from ..recipes.options.check import CONFIG, Check, check_files
from ..recipes.options.pages import overview, page
from ..recipes.options.sections import OWN, STAGES
from ..recipes.options.signatures import signature
from ..recipes.options.source import NoSourceError
from ..recipes.options.study_check import check_study
from ..recipes.options.tree import known_classes
from ..recipes.rule_arguments import split
from .parsers import PARSERS, WITH_RECIPE

CREDIT = "gear_lightning.credit.base.CreditAssigner"
HELP = ("--help", "-h")
PATHS = {"compare": ["runs"], "credit": ["run"], "recredit": ["run"], "export": ["checkpoint"]}  # that must exist
ONLY_RECIPE = (*STAGES, *OWN)  # commands all of whose options are those of a recipe, and their own


def topics(arguments: list[str]) -> list[str] | None:
    """Return what a command line asks help for: the words after ``--help``; None if it asks for no help."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in HELP:
            following = [value] if equals else []
            for word in arguments[place + 1 :]:
                if word.startswith("-") and not (word.startswith("--") and word == arguments[-1] and not following):
                    break
                following.append(word)
            return following
    return None


def look_at(command: str, arguments: list[str]) -> str | None:
    """Check a command line, or answer it if it asks for help, as `_look_at` does, if source files are installed."""
    try:
        return _look_at(command, arguments)
    except NoSourceError:  # an installation of compiled files only: the parser answers, after its imports
        return None


def _look_at(command: str, arguments: list[str]) -> str | None:
    """Check a command line, or answer it if it asks for help.

    Args:
        command: the command.
        arguments: its arguments.

    Returns:
        The help; None if the command is to run.

    Raises:
        UserError: an option, a class or a file does not exist.
        SystemExit: the parser of the command has printed its help.
    """
    asked = topics(arguments)
    takes_recipe = command in ONLY_RECIPE or command in WITH_RECIPE
    if asked and (takes_recipe or command in ("study", "recredit")):
        return "\n".join(page(command if command in ONLY_RECIPE else "fit", topic) for topic in asked)
    if asked is not None and command in ONLY_RECIPE:
        return overview(command)
    if takes_recipe or (command == "study" and asked is None):  # first, because it is quick
        check_files(arguments, (*CONFIG, "--cluster") if command == "slurm" else CONFIG)
    if command in ONLY_RECIPE:
        Check(command).arguments(arguments)
    elif command in PARSERS:
        _parse(command, arguments)
    elif command == "study" and asked is None:
        check_study(arguments)
    return None


def _parse(command: str, arguments: list[str]) -> None:
    """Parse the arguments of a command with its own parser, which the command does again, after its imports."""
    known = PARSERS[command]()
    if command in WITH_RECIPE:
        _, rest = known.parse_known_args(arguments)
        own = [o.removeprefix("--") for action in known._actions for o in action.option_strings if o.startswith("--")]
        Check("fit", own).arguments([argument for argument in rest if argument != "--"])
        return
    rest, rules = split(arguments) if command == "recredit" else (arguments, {})
    options = known.parse_args(rest)
    for name in PATHS.get(command, ()):
        given = getattr(options, name)
        for path in given if isinstance(given, list) else [given]:
            if not path.exists():
                names = "; --names takes comma-separated names: --names A,B" if getattr(options, "names", None) else ""
                raise UserError(f"{path}: no such file or directory{names}")
    _check_rules(rules)


def _check_rules(rules: dict[str, list[str]]) -> None:
    """Check the options of the credit rules that ``recredit`` names, if these are rules of this package."""
    for name, typed in rules.items():
        keys = [argument.partition("=")[0] for argument in typed]
        named = [argument.removeprefix(f"{name}=") for argument in typed if argument.startswith(f"{name}=")]
        rule = known_classes(CREDIT).get(named[-1]) if named else None
        if rule is None:
            continue
        options = signature(rule).options
        for key in keys:
            option = key.removeprefix(f"{name}.").removeprefix("init_args.")
            if key != name and option not in (*options, "help"):
                question = did_you_mean(key, [f"{name}.{one}" for one in options])
                raise UserError(f"{key}: Option '{option}' is not accepted{question} ({rule.name} has {some(options)})")


def unknown_command(name: str, known: list[str]) -> UserError:
    """Return the error for a command that does not exist."""
    meant = close(name, known)
    question = f"did you mean {meant}? There" if meant else "there"
    return UserError(f"no command {name!r}; {question} are {', '.join(known)}")
