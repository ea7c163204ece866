"""Import rules, read from the folders: no cycles, math only on tensors, and a rollout side that does not import the
learning side."""

import ast
from pathlib import Path

import pytest

import gear_lightning

ROOT = Path(gear_lightning.__file__).parent
PLUGINS = ROOT.parent / "callbacks"  # imported as gear_lightning.callbacks
# folders and top-level modules of the two sides; modules in neither may be used by both
ROLLOUT = {"environments", "generation", "serving", "rewards", "rollout", "data"}
LEARNING = {"credit", "learning", "gear", "loss", "distillation", "models", "optimizers", "teacher", "module"}
MEETING = {"batch", "errors"}  # import nothing of the package
# where the learning side uses the rollout side, and why
EXCEPTIONS = {
    ("learning", "environments.base"): "demonstrations are conversations about tasks",
    ("learning", "generation.chat"): "demonstrations are rendered by the policy's own chat format",
    ("teacher", "environments.base"): "the privileged prompt is made of a task's messages",
    ("teacher", "generation.chat"): "the privileged prompt is rendered by the policy's own chat format",
    ("module", "environments.base"): "types of the privileged prompt's task and messages",
    ("module", "generation.chat"): "the module owns the tokenizer, which comes with the policy",
}
# folders that read whole recipes, and may therefore import the plug-ins
ABOVE = {"callbacks", "commands", "recipes", "study"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    if path.parent == PLUGINS:
        parts = ("gear_lightning", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for p in [*ROOT.rglob("*.py"), *PLUGINS.glob("*.py")]}


def imported(name: str, *, top_level_only: bool = False) -> set[str]:
    """Return the full names of the modules that a module imports; for this package, the names of files."""
    tree = ast.parse(FILES[name].read_text())
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typed = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if typed or (lazy and top_level_only):
            skipped |= {child for child in ast.walk(node) if child is not node}
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
    return found


def short(name: str) -> str:
    return name.removeprefix("gear_lightning.")


def top(name: str) -> str:
    """Return the top folder or module: gear_lightning.environments.base -> environments."""
    return short(name).split(".")[0]


def edges() -> set[tuple[str, str]]:
    """Return pairs (module, imported module of this package), for lazy and top-level imports."""
    return {(name, other) for name in FILES for other in imported(name) if other in FILES}


FOLDERS = {top(name) for name in FILES if "." in short(name)}


def test_the_sides_name_existing_modules():
    assert {top(name) for name in FILES} >= ROLLOUT | LEARNING | MEETING | ABOVE


def test_folders_have_no_import_cycles():
    graph: dict[str, set[str]] = {folder: set() for folder in FOLDERS}
    for name, other in edges():
        if top(name) in FOLDERS and top(other) in FOLDERS and top(name) != top(other):
            graph[top(name)].add(top(other))
    assert sum(map(len, graph.values())) > 20
    _refuse_circles(graph)


def test_modules_have_no_import_cycles():
    graph = {name: {o for o in imported(name, top_level_only=True) if o in FILES} for name in FILES}
    assert sum(map(len, graph.values())) > 50
    _refuse_circles(graph)


def _refuse_circles(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(graph[name]):
            walk(other, (*path, name))
        done.add(name)

    for name in sorted(graph):
        walk(name, ())


def test_the_rollout_side_does_not_import_the_learning_side():
    assert not [(short(a), short(b)) for a, b in edges() if top(a) in ROLLOUT and top(b) in LEARNING]


def test_the_learning_side_imports_only_listed_modules_of_the_rollout_side():
    found = {(top(a), short(b)) for a, b in edges() if top(a) in LEARNING and top(b) in ROLLOUT}
    assert found == set(EXCEPTIONS), "pass data for both sides in the batch; remove unused entries from the list"


@pytest.mark.parametrize("name", sorted(MEETING))
def test_modules_shared_by_both_sides_import_nothing(name):
    assert not {other for other in imported(f"gear_lightning.{name}") if other.startswith("gear_lightning")}


def test_math_uses_only_tensors():
    """gear.py: no project code, no Lightning, no transformers."""
    assert {i.partition(".")[0] for i in imported("gear_lightning.gear")} <= {"math", "typing", "torch", "jaxtyping"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_library_imports_neither_configs_nor_tests(name):
    for other in imported(name):
        assert other.partition(".")[0] not in ("configs", "callbacks", "tests", "benchmarks"), f"{name}: {other}"
        assert other.partition(".")[0] != "pytorch_lightning", f"{name} mixes two Lightning packages"
        if other.startswith("gear_lightning.callbacks"):
            assert top(name) in ABOVE, f"{name} imports the plug-in {other}"
        if other.startswith("gear_lightning.commands"):
            assert top(name) in ("commands", "__main__"), f"{name} imports a command"


def test_a_file_name_does_not_repeat_its_folder():
    for name in FILES:
        folder, _, file = short(name).rpartition(".")
        assert not folder or not file.startswith(f"{folder.rpartition('.')[2].rstrip('s')}_"), name
