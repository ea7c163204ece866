"""Which keys a recipe knows, and errors for the others: what was probably meant, and what there is."""

from collections.abc import Iterable, Iterator

from ...errors import UserError
from ...hints import close, some
from .signatures import signature
from .source import KNOWN, Found, absent, beside, find, steers_imports
from .tree import Node, Takes, import_path, is_abstract, named_class, roots

WITHIN = ("class_path", "init_args", "dict_kwargs")  # keys of a class in a config file


class Options:
    """The options of a command that takes a recipe, for the classes that the recipe names so far.

    Args:
        command: its name.
        own: options that the command has besides those of a recipe.

    Attributes:
        named: dotted key -> the class that it names; None if it names none, or one that is not found.
        foreign: whether classes of other packages may have been imported, whose names are not known here.
        steered: whether such an import may have let modules be found that are not found here.
    """

    def __init__(self, command: str, own: Iterable[str] = ()):
        self.command = command
        self.roots = roots(command) | {name: Node(name, Takes(text=True), "", "", None, "") for name in own}
        self.named: dict[str, Found | None] = {}
        self.unknown: set[str] = set()  # keys whose class is not known
        self.foreign = self.steered = False
        self._imported: set[str] = set()

    def name_class(self, node: Node, kind: Found | None, known: bool = True) -> None:
        """Record the class that an option names.

        Args:
            node: the option.
            kind: the class; None if it names none.
            known: whether that is certain. If not, any keys below it are accepted.
        """
        before = self.named.get(node.path)
        if kind is None or before is None or kind.path != before.path:
            for key in [k for k in self.named if k.startswith(f"{node.path}.")]:
                del self.named[key]
        self.named[node.path] = kind
        (self.unknown.discard if known else self.unknown.add)(node.path)

    def class_of(self, node: Node) -> Found | None:
        """Return the class that an option names at this point: the recipe's, else its default."""
        if node.path in self.named:
            return self.named[node.path]
        return None if node.default_class is None else find(node.default_class)

    def below(self, node: Node | None) -> tuple[dict[str, Node], bool]:
        """Return the options below an option (None: the top level), and whether these are all that it accepts."""
        if node is None:
            return self.roots, True
        if node.takes.any or node.path in self.unknown:
            return {}, False
        kind = self.class_of(node)
        if kind is None and node.takes.bases and node.takes.group is None:
            # without a class, the options are those of the base class, if it can be created
            base = node.takes.bases[0]
            return node.options(base) if len(node.takes.bases) == 1 and not is_abstract(base) else ({}, True)
        return node.options(kind)

    def step(self, node: Node | None, key: str, rest: str, where: str) -> Node | None:
        """Return the option that a key names below another one; None if the other accepts any key.

        Args:
            node: the other option; None: the top level.
            key: the key.
            rest: what follows the key in the user's text, with a leading dot; empty if nothing does.
            where: how the message begins: the option as typed, or file, line and key.

        Raises:
            UserError: there is no such option.
        """
        options, complete = self.below(node)
        if key in options:
            return options[key]
        if not complete:
            return None
        raise UserError(f"{where}: {self._missing(node, key, rest, options)}")

    def _missing(self, node: Node | None, key: str, rest: str, options: dict[str, Node]) -> str:
        dashes = "--" if self.typed else ""
        path = "" if node is None else f"{node.path}."
        near = close(key, options, 0.8)
        places = self._elsewhere(key) if near is None else []
        near = near or (None if places else close(key, options))
        if near is not None:
            meant = [f"{path}{near}{rest}"]
        elif places:
            meant = [f"{place}{rest}" for place in places[:3]]
        else:
            every = {one.path.rpartition(".")[2]: one.path for one in self.every()}
            other = close(key, every, 0.75)
            meant = [] if other is None else [f"{every[other]}{rest}"]
        question = f"; did you mean {' or '.join(dashes + one for one in meant)}?" if meant else ""
        kind = None if node is None else self.class_of(node)
        if node is None:
            there = "" if meant else f"; the sections are {some(n for n, one in options.items() if one.section)}"
            return f"there is no such option{question}{there}"
        if node.takes.bases and node.takes.group is None:
            return self._missing_in_class(node, key, kind, options, question)
        if node.takes.group is None:
            return f"{node.path} is one value, with no options of its own{question}"
        there = "" if meant else f"; {node.path} has {some(options) or 'no options'}"
        return f"{node.path} has no option {key}{question}{there}"

    def _missing_in_class(
        self, node: Node, key: str, kind: Found | None, options: dict[str, Node], question: str
    ) -> str:
        if kind is None and not options:
            text = f"no class is given for {node.path}, so it has no option {key}{question}"
        else:
            name = node.takes.bases[0].name if kind is None else kind.name
            text = f"{name} has no option {key}{question}\n  options of {name}: {some(options) or 'none'}"
        others = [name for name in node.classes if kind is None or name != kind.name]
        if others and not question:
            text += f"\n  {'other ' * (kind is not None)}classes of {node.path}: {some(others)}"
        return f"{text}\n  (gear-lightning {self.command} --help CLASS shows the options of a class)"

    typed = True  # whether options are those of the command line, which begin with dashes

    def every(self) -> Iterator[Node]:
        """Yield all options of the sections, with those of groups and of classes that the recipe names."""
        waiting = [*self.roots.values()]
        while waiting:
            node = waiting.pop(0)
            yield node
            if node.path.count(".") < 4:
                waiting += self.below(node)[0].values()

    def _elsewhere(self, key: str) -> list[str]:
        plain = key.lower().replace("-", "_")
        return [node.path for node in self.every() if node.path.rpartition(".")[2] == plain]

    def check_class(self, node: Node, name: str, where: str) -> None:
        """Record the class that a value names.

        Raises:
            UserError: there is no such class.
        """
        kind, plain = named_class(node, name), "." not in name
        missing = None if plain or kind is not None or self.steered or node.takes.any else absent(name)
        takes_text = node.takes.text and node.path.count(".") != 1  # no name that the trainer knows has a dot
        if not plain:
            self.foreign |= name.partition(".")[0] not in KNOWN
            self.steered |= steers_imports(name.rpartition(".")[0], self._imported)
        if kind is not None:
            usable = not hasattr(kind.node, "value") and signature(kind).complete
            self.name_class(node, kind, usable)
        elif missing is not None and not takes_text:
            raise UserError(self._no_class(node, name, where, missing))
        elif not plain or self.foreign or node.takes.text:
            self.name_class(node, None, False)
        elif node.takes.bases and not node.takes.any and node.takes.group is None:
            raise UserError(self._no_class(node, name, where))

    def _no_class(self, node: Node, name: str, where: str, missing: str | None = None) -> str:
        known = node.classes
        meant = close(name, known) if missing is None else self._meant_path(node, name, missing)
        module = "" if missing in (None, name) else f" (there is no module {missing})"
        question = "; known" if meant is None else f"; did you mean {meant}? Known"
        return (
            f"{where}: No class {name}{module}{question} by name are {some(known)}; others by their import path\n"
            f"  (gear-lightning {self.command} --help CLASS shows the options of a class)"
        )

    def _meant_path(self, node: Node, name: str, missing: str) -> str | None:
        """Return the import path that was probably meant by one whose part ``missing`` does not exist."""
        above, dot, last = missing.rpartition(".")
        near = close(last, beside(missing), 0.75)
        there = None if near is None else f"{above}{dot}{near}{name[len(missing) :]}"
        if there is not None and (name == missing or find(there) is not None):
            return there
        ours = close(name.rpartition(".")[2], node.classes, 0.85)
        return import_path(node.classes[ours]) if ours is not None else near and f"{above}{dot}{near}"
