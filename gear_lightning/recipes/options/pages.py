"""The text that ``--help`` prints for commands that take a recipe."""

import re
import shutil
import textwrap

from ...errors import UserError
from ...hints import close
from .known import Options
from .signatures import Option, about, first_sentence, signature
from .source import Found, ancestors, find
from .tree import Node, class_beside, import_path, is_abstract, known_classes, package_classes, takes

WIDEST, NARROWEST = 100, 40
FULL = 4  # an option that can name at most this many classes is shown with the options of all of them
STARTS = {
    "fit": "Train a policy.",
    "validate": "Evaluate a policy on the validation tasks.",
    "test": "Evaluate a policy on the validation tasks, logged as test/...",
    "predict": "Write rollouts of the validation tasks.",
    "teacher-check": "Check before training that a recipe's teacher is informative.",
    "noise-floor": "Measure how rounding changes credit.",
}
MOST_USED = (
    ("config", "RECIPE"), ("trainer.default_root_dir", "DIR"), ("trainer.max_epochs", "N"), ("trainer.devices", "N"),
    ("trainer.strategy", "NAME"), ("model.policy", "CLASS"), ("model.credit", "CLASS"), ("model.optimizer.lr", "RATE"),
    ("data.train_tasks", "CLASS"), ("generation.environment", "CLASS"), ("generation.budgets.context", "TOKENS"),
    ("ckpt_path", "FILE"),
)  # fmt: skip
SHORT_TEXTS = {  # where the first words of the documentation do not say enough on one line
    "trainer.default_root_dir": "run directory: metrics, checkpoints and rollouts",
    "trainer.max_epochs": "number of RL iterations",
    "trainer.devices": "number of processes on this machine, one per GPU",
    "trainer.strategy": "auto, ddp, or a class such as FSDP2 or ZeRO",
    "data.train_tasks": "tasks of training",
    "model.optimizer.lr": "learning rate",
    "ckpt_path": "checkpoint to resume from; last: the newest of the run",
    "config": "file, or a name from `gear-lightning recipes`; can be repeated",
    "trainer": "Lightning's Trainer: devices, precision, strategy, length, callbacks",
}


def width() -> int:
    """Return how wide a page is: as the terminal, within limits."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def overview(command: str) -> str:
    """Return one screen: an example, the options that are used most, and the sections."""
    known = Options(command)
    where = f"gear-lightning {command}"
    usage = f"usage: {where} --config RECIPE [--config MORE ...] [--SECTION.OPTION VALUE ...]"
    lines = [*_filled(usage, ""), ""]
    example = f"{where} --config quickstart --trainer.devices 2 --model.credit Uniform"
    lines += [STARTS[command], "", " \\\n".join(_filled(example, "  ")), ""]
    lines.append("options that are used most")
    for path, value in MOST_USED:
        node = _option(known, path)
        if node is not None:
            lines.append(_line(f"--{path} {value}", SHORT_TEXTS.get(path) or first_words(node.text), 38))
    own = [
        node
        for name, node in known.roots.items()
        if not node.section and name not in (*dict(MOST_USED), "weights_only")
    ]
    lines += [_line(f"--{node.path}", first_words(node.text), 38) for node in own]
    lines += ["", "sections"]
    for name, node in known.roots.items():
        if node.section:
            lines.append(_line(name, SHORT_TEXTS.get(name) or first_words(node.text), 20))
    lines += [
        "",
        "more",
        _line("--help SECTION", "its options with types and defaults: --help model, --help trainer", 20),
        _line("--help OPTION", "an option and the classes that it can name: --help model.credit", 20),
        _line("--help CLASS", "the options of a class: --help GEAR, --help AdamW, --help my_module.MyTasks", 20),
        _line("--help all", "all options", 20),
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, text: str, column: int) -> str:
    """Return a name and its text, in two columns; the text is cut to one line."""
    start = f"  {name:<{column - 3}} "
    if len(start) > column or width() < column + 20:
        return f"  {name}\n" + textwrap.fill(plain(text), width(), initial_indent="      ", subsequent_indent="      ")
    return start + textwrap.shorten(plain(text), width() - column, placeholder=" ...")


def first_words(text: str) -> str:
    """Return the first sentence of a text, without its stop."""
    return first_sentence(text).rstrip(".:")


def plain(text: str) -> str:
    """Return a docstring's text for a terminal."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text)
    return text.replace("``", "`")


def _option(known: Options, path: str) -> Node | None:
    node: Node | None = None
    for key in path.split("."):
        if key in ("init_args", "class_path"):
            continue
        node = known.below(node)[0].get(key)
        if node is None:
            return None
    return node


# -- one topic --------------------------------------------------------------------------------------------------------


def page(command: str, topic: str) -> str:
    """Return what ``--help TOPIC`` prints.

    Args:
        command: the command.
        topic: ``all``, a section, an option's dotted key, or a class by its short name or import path.

    Raises:
        UserError: there is no such topic; names one that is similar.
    """
    known = Options(command)
    name = topic.removeprefix("--").removesuffix(".help")
    if name == "all":
        return "\n".join(_of_node(known, node) for node in known.roots.values())
    node = _option(known, name)
    if node is not None:
        return _of_node(known, node)
    kinds = [kind] if "." in name and (kind := find(name)) is not None else _by_name(known, name)
    if kinds:
        return "\n".join(_of_class(known, kind) for kind in kinds)
    same = [one for one in known.every() if one.path.rpartition(".")[2] == name.lower().replace("-", "_")]
    if same:
        return "\n".join(_of_node(known, one) for one in same)
    raise UserError(f"--help {topic}: {_unknown(known, name)}")


def _unknown(known: Options, name: str) -> str:
    lasts = {node.path.rpartition(".")[2]: node.path for node in known.every()}
    there = "there is no such section, option or class"
    for names in (lasts.values(), package_classes(), lasts):
        if (meant := close(name, names, 0.7)) is not None:
            return f"{there}; did you mean {lasts.get(meant, meant)}?"
    others = {other for base in bases_of(known) for other in known_classes(base)}
    if (meant := close(name, others, 0.7)) is not None:
        return f"{there}; did you mean {meant}?"
    return f"{there}; the sections are {', '.join(n for n, node in known.roots.items() if node.section)}"


def bases_of(known: Options) -> list[str]:
    """Return the import paths of the classes whose subclasses options can name."""
    return sorted({base.path for node in known.every() for base in node.takes.bases})


def _by_name(known: Options, name: str) -> list[Found]:
    ours = package_classes()
    same = {kind.lower(): kind for kind in sorted(ours, reverse=True)}
    exact = ours.get(name) or ours.get(same.get(name.lower(), ""), [])
    found = [kind for path in exact if (kind := find(path)) is not None]
    return found or [*filter(None, (class_beside(base, name) for base in bases_of(known)))][:1]


def _of_node(known: Options, node: Node) -> str:
    """Return the page of an option or a section."""
    lines = [node.path if node.section else f"--{node.path} {_describe(node)}".rstrip()]
    lines += _wrapped(node.text, "    ")
    kind = known.class_of(node)
    if node.takes.group is not None:
        if not node.section and (text := about(node.takes.group)) and text not in node.text:
            lines += _wrapped(text, "    ")
        lines += [""] + [_of_option(known, one) for one in known.below(node)[0].values()]
        return "\n".join(lines) + "\n"
    classes = node.classes
    if classes or node.takes.bases:
        shown = [*classes.values()] if len(classes) <= FULL else [kind] if kind is not None else []
        lines += ["", f"    classes (gear-lightning {known.command} --help CLASS shows the options of one)"]
        lines += [_class_line(one, default=kind is not None and one.path == kind.path) for one in classes.values()]
        for one in shown:
            lines += ["", *(f"    {line}".rstrip() for line in _of_class(known, one, node, 4).splitlines())]
    return "\n".join(lines) + "\n"


def _class_line(kind: Found, default: bool) -> str:
    text = first_words(about(kind)) + (" (default)" if default else "")
    return _line(f"    {kind.name}", text, 28)


def _describe(node: Node) -> str:
    value = "required" if node.default is None else f"default {plain_default(node.default)}" if node.default else ""
    return f"({', '.join(filter(None, [node.kind, value]))})" if node.kind or value else ""


def plain_default(text: str) -> str:
    """Return a default on one line."""
    return textwrap.shorten(text, 160, placeholder=" ...")


def _of_option(known: Options, node: Node) -> str:
    """Return an option in a list: its name, type, default and documentation, and the options of a group."""
    if node.takes.group is not None and node.default is not None:
        inside = known.below(node)[0].values()
        lines = [*_head(node), *_wrapped(node.text, "        "), *(_of_option(known, one) for one in inside)]
        return "\n".join(lines)
    lines = [*_head(node), *_wrapped(node.text, "        ")]
    if node.takes.bases and node.classes:
        lines += _wrapped(f"Classes: {', '.join(node.classes)}", "        ")
    return "\n".join(lines)


def _head(node: Node) -> list[str]:
    return textwrap.wrap(
        f"--{node.path} {_describe(node)}".rstrip(), width(), initial_indent="  ", subsequent_indent="      ",
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _filled(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width() - 2, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _wrapped(text: str, indent: str, shift: int = 0) -> list[str]:
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        if block.strip():
            lines += textwrap.wrap(
                plain(" ".join(block.split())), width() - shift, initial_indent=indent, subsequent_indent=indent,
                break_on_hyphens=False,
            )  # fmt: skip
    return lines


def _of_class(known: Options, kind: Found, node: Node | None = None, shift: int = 0) -> str:
    """Return the page of a class.

    Args:
        known: the options of the command.
        kind: the class.
        node: the option that names it; None to find those that can.
        shift: number of columns by which the page will be indented.
    """
    lines = [f"{kind.name}   ({import_path(kind)})", *_wrapped(about(kind), "    ", shift), ""]
    if node is None:
        users = [one for one in known.every() if _accepts(one, kind)]
        for one in users:
            if one.takes.group is not None:
                lines.append(f"  set by --{one.path}.OPTION VALUE")
            else:
                lines.append(f"  use it by --{one.path} {kind.name}; then --{one.path}.OPTION VALUE")
        lines += [""] if users else []
        node = next((one for one in users if one.takes.group is None), None)
    given = 0 if node is None else node.takes.given
    options = [*signature(kind).options.values()][given:]
    for option in options:
        lines += textwrap.wrap(
            f"{option.name} {option.describe()}", width() - shift, initial_indent="  ", subsequent_indent="      ",
            break_on_hyphens=False,
        )  # fmt: skip
        lines += _wrapped(option.text, "        ", shift) + _classes_of(option, shift)
    if not options:
        lines.append("  It has no options." if signature(kind).complete else "  Its options are not known.")
    elif not signature(kind).complete:
        lines.append("  and others, which it passes on")
    if is_abstract(kind):
        names = ", ".join(known_classes(kind.path))
        lines += ["", *_wrapped(f"It is a base class. Its classes: {names}", "  ")]
    return "\n".join(lines) + "\n"


def _classes_of(option: Option, shift: int) -> list[str]:
    names = [name for base in takes(option.home, option.annotation).bases for name in known_classes(base.path)]
    return _wrapped(f"Classes: {', '.join(names)}", "        ", shift) if names else []


def _accepts(node: Node, kind: Found) -> bool:
    family = {one.path for one in ancestors(kind)[0]}
    if node.takes.group is not None:
        return node.takes.group.path == kind.path
    return any(base.path in family for base in node.takes.bases)
