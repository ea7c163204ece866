"""Check the keys of a command line and of config files before anything is imported: file, line, and what was meant."""

import copy
from pathlib import Path

import yaml

from ...errors import UserError
from ...hints import close, did_you_mean
from ..packaged import configs
from .known import WITHIN, Options
from .tree import Node
from .values import Loader, check_keys, composed, problem, text_of

CONFIG = ("--config", "-c")


class Check:
    """Checks which keys a recipe uses. What it does not understand it leaves to the parser, which also checks values.

    Args:
        command: the command that takes the recipe.
        own: options that the command has besides those of the recipe.
    """

    def __init__(self, command: str, own: list[str] | None = None):
        self.options = Options(command, own or [])

    def copy(self) -> "Check":
        """Return a check that continues from the classes that have been named so far."""
        other = copy.copy(self)
        other.options = copy.copy(self.options)
        other.options.named, other.options.unknown = dict(self.options.named), set(self.options.unknown)
        return other

    def arguments(self, arguments: list[str]) -> None:
        """Check the options of a command line and the files that it names.

        Raises:
            UserError: a file does not exist or is no YAML; a key, an option or a class is unknown.
        """
        check_files(arguments)
        rest, valueless = list(arguments), ""
        while rest:
            option, equals, value = rest.pop(0).partition("=")
            if not option.startswith("-") or option == "--":
                raise UserError(_stray(option))
            if not equals and option.startswith("--print_config"):
                continue
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else None
                if value is None and not option.endswith(".help"):
                    valueless = valueless or option
            if option in CONFIG:
                self._config(value)
            else:
                self._option(option, value)
        if valueless:
            raise UserError(f"{valueless}: its value is missing")

    def _config(self, value: str | None) -> None:
        if value is None or "://" in value or value == "-":
            return
        if value.startswith(("{", "[")) or "\n" in value:
            self.text(value, "--config")
        elif Path(value).is_file():
            self.file(Path(value))
        else:  # a pipe, which can be read only once
            self._anything()

    def _anything(self) -> None:
        self.options.foreign = self.options.steered = True
        for node in [*self.options.every()]:
            if node.takes.bases:
                self.options.name_class(node, None, False)

    def _option(self, option: str, value: str | None) -> None:
        name = option.removeprefix("--").removesuffix("+")
        if option.startswith("-") and not option.startswith("--"):
            raise UserError(f"{option}: there is no such option; a config file is given by -c or --config")
        keys = name.split(".")
        asks = len(keys) > 1 and keys[-1] == "help"  # jsonargparse answers it
        node, left = None, keys[:-1] if asks else keys
        self.options.typed = True
        while left:
            key, *left = left
            if key == "class_path" and node is not None and node.takes.bases and not left:
                if value is not None:
                    self._class(node, value, option)
                return
            if node is not None and key in WITHIN and (node.takes.bases or node.takes.group) and key != "class_path":
                if key == "dict_kwargs":
                    return
                if not left and value is not None:
                    self._text_value(node, value, option, inside=True)
                continue
            node = self.options.step(node, key, "".join(f".{one}" for one in left), option)
            if node is None:
                return
        if node is not None and value is not None:
            self._text_value(node, value, option)

    def entry(self, key: yaml.Node, value: yaml.Node, name: str) -> None:
        """Check a dotted key of a file with options, and its value.

        Args:
            key: the key.
            value: the value.
            name: name of the file.
        """
        self.options.typed = False
        text = str(key.value)
        self._descend(None, text.removesuffix("+").split("."), value, name, _where(name, key, None, text), set())

    def _text_value(self, node: Node, value: str, option: str, inside: bool = False) -> None:
        if value.lstrip().startswith(("{", "[")):
            try:
                found = yaml.compose(value, Loader)
            except yaml.YAMLError:
                return  # the parser reports it
            if not node.takes.text:
                check_keys(found, option)
            if inside and isinstance(found, yaml.MappingNode):
                self._mapping(node, found, option, set())
            elif found is not None:
                self._value(node, found, option, set())
        else:
            self._class(node, value, option)
            self._single(node, value, option)

    def _single(self, node: Node, value: str | yaml.Node, where: str) -> None:
        if (wrong := problem(node, value, where)) is not None:
            raise UserError(wrong)

    def _class(self, node: Node, value: str, where: str) -> None:
        """Check text that may name a class."""
        if not node.takes.bases and node.takes.group is None:
            return
        if value in ("null", "~", ""):
            self.options.name_class(node, None)
        elif "${" in value or value.endswith((".yaml", ".yml", ".json")) or Path(value).is_file():
            self.options.name_class(node, None, False)
            self.options.foreign = self.options.steered = True
            if value.endswith((".yaml", ".yml", ".json")) and Path(value).is_file():
                composed(text_of(Path(value)), value)
        elif node.takes.bases and value.lower() not in ("true", "false") and value.replace(".", "a").isidentifier():
            self.options.check_class(node, value, where)

    # -- files --------------------------------------------------------------------------------------------------------

    def file(self, path: Path) -> None:
        """Check a config file."""
        self.text(text_of(path), str(path))

    def text(self, text: str, name: str) -> None:
        """Check a config as text.

        Args:
            text: the config.
            name: its name in messages.
        """
        found = composed(text, name)
        if isinstance(found, yaml.MappingNode):
            self.options.typed = False
            self._mapping(None, found, name, set())
            self.options.typed = True
        elif found is not None or text.strip():
            raise UserError(f"{name}: a config must have keys and values, such as `trainer: {{max_epochs: 3}}`")

    def _mapping(self, node: Node | None, found: yaml.MappingNode, name: str, above: set[int]) -> None:
        if id(found) in above:  # an alias inside its own anchor
            return
        above = {*above, id(found)}
        pairs = [(str(key.value), key, value) for key, value in found.value if "merge" not in key.tag]
        if node is not None:
            pairs.sort(key=lambda pair: pair[0] != "class_path")  # the others depend on it
        named = any(key == "class_path" for key, _, _ in pairs)
        for key, place, value in pairs:
            keys = key.removesuffix("+").split(".")
            where = _where(name, place, node, key)
            if node is not None and key in WITHIN and (node.takes.bases or node.takes.group):
                self._part_of_class(node, key, value, name, where, above)
            elif named and node is not None and node.takes.bases:
                raise UserError(self._too_high(node, key, where))
            else:
                self._descend(node, keys, value, name, where, above)

    def _descend(
        self, node: Node | None, keys: list[str], value: yaml.Node, name: str, where: str, above: set[int]
    ) -> None:
        for i, key in enumerate(keys):
            if key in WITHIN and node is not None and (node.takes.bases or node.takes.group):
                if i + 1 == len(keys):
                    self._part_of_class(node, key, value, name, where, above)
                    return
                if key == "dict_kwargs":
                    return
                continue
            try:
                node = self.options.step(node, key, "".join(f".{k}" for k in keys[i + 1 :]), where)
            except UserError as error:
                raise UserError(self._indented(str(error), node, key, value)) from None
            if node is None:
                return
        assert node is not None
        self._value(node, value, name, above)

    def _indented(self, message: str, node: Node | None, key: str, value: yaml.Node) -> str:
        """Add to a message that a line is probably indented wrongly: its key belongs to another level."""
        above = self.options.roots if node is not None else {}
        if key in above and isinstance(value, yaml.MappingNode) and above[key].section:
            return f"{message.partition('; ')[0]}; {key} is a section: it begins at the left margin"
        return message

    def _part_of_class(self, node: Node, key: str, value: yaml.Node, name: str, where: str, above: set[int]) -> None:
        if key == "class_path" and isinstance(value, yaml.ScalarNode):
            self._class(node, str(value.value), where)
        elif key == "init_args" and isinstance(value, yaml.MappingNode):
            self._mapping(node, value, name, above)

    def _too_high(self, node: Node, key: str, where: str) -> str:
        options, _ = self.options.below(node)
        if key in options:
            return f"{where}: must be one level deeper, under init_args: did you mean {node.path}.init_args.{key}?"
        meant = close(key, options)
        hint = did_you_mean(key, WITHIN) if meant is None else f"; did you mean init_args.{meant}?"
        return f"{where}: beside class_path there are only init_args and dict_kwargs{hint}"

    def _value(self, node: Node, value: yaml.Node, name: str, above: set[int]) -> None:
        self._single(node, value, _where(name, value, None, node.path))
        if isinstance(value, yaml.ScalarNode):
            quoted = value.style in ("'", '"')
            text = str(value.value) if quoted or value.tag.endswith(":str") else ""
            if value.tag.endswith((":str", ":null")):
                self._class(node, text, _where(name, value, None, node.path))
        elif isinstance(value, yaml.MappingNode):
            if node.takes.group is not None or node.takes.bases:
                self._mapping(node, value, name, above)
        elif isinstance(value, yaml.SequenceNode) and node.takes.many and node.takes.bases:
            for item in value.value:
                self._value(node, item, name, above)


def _where(name: str, place: yaml.Node, node: Node | None, key: str) -> str:
    full = key if node is None else f"{node.path}.{key}"
    if name.startswith("--"):
        return name if name == f"--{full}" else f"{name}: {full}"
    return f"{name}:{place.start_mark.line + 1}: {full}"


def _stray(argument: str) -> str:
    if Path(argument).is_file() or (configs() / f"{argument.removesuffix('.yaml')}.yaml").is_file():
        return f"{argument}: unexpected; did you mean --config {argument}?"
    return f"{argument}: unexpected; options begin with --, and a recipe is given by --config"


def check_files(arguments: list[str], options: tuple[str, ...] = CONFIG) -> None:
    """Check that the files exist that a command line names.

    Args:
        arguments: the command line.
        options: the options whose value is a file.

    Raises:
        UserError: one does not exist, or is a directory; names one that is similar.
    """
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in options:
            continue
        if not equals:
            if place + 1 == len(arguments) or arguments[place + 1].startswith("--"):
                raise UserError(f"{option}: the name of a file is missing")
            value = arguments[place + 1]
        if not value:
            raise UserError(f"{option}: the name of a file is missing")
        if value.startswith(("{", "[")) or "\n" in value or "://" in value or value == "-":
            continue
        if Path(value).is_dir():
            raise UserError(f"{option} {value}: is a directory; give a file in it")
        if not Path(value).exists():
            raise UserError(f"{option} {value}: no such file{_similar(value)}")


def _similar(value: str) -> str:
    path = Path(value)
    try:
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        beside = []
    if (found := close(path.name, beside, 0.7)) is not None:
        return f"; did you mean {path.with_name(found)}?"
    names = [str(file.relative_to(configs()).with_suffix("")) for file in configs().rglob("*.yaml")]
    return did_you_mean(value.removeprefix("configs/").removesuffix(".yaml"), names)
