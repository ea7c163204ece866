"""Who may import whom: two wings that meet in batch.py, no circles, and no recipes inside the library."""

import ast
from pathlib import Path

import pytest

import gear_lightning

ROOT = Path(gear_lightning.__file__).parent
PLUGINS = ROOT / "callbacks"
ROLLOUT = {"chat", "chat_safety", "engines", "budgets", "rollout", "packing", "iteration_stats", "task_check", "data"}
ROLLOUT |= {"environments"}
LEARNING = {"gear", "credit", "loss", "distillation", "token_stats", "models", "lora", "optimizers", "teacher"}
LEARNING |= {"frozen", "gradients", "lora_base", "module", "module_state"}
MEETING = {"batch", "errors"}
# what crosses today, and why
EXCEPTIONS = {
    ("teacher", "chat"): "the privileged prompt is rendered by the policy's own chat format",
    ("teacher", "environments.base"): "the privileged prompt is made of a task's messages",
    ("module", "chat"): "the module owns the tokenizer, which comes with the policy",
    ("module", "environments.base"): "types of the privileged prompt's task and messages",
}
# built on the command line's parser, or forks of it
COMMANDS = {
    "gear_lightning.recipes.recipe",
    "gear_lightning.commands.probe",
    "gear_lightning.commands.noise_floor",
    "gear_lightning.commands.teacher_check",
    "gear_lightning.study.child",
}
# they read whole recipes
ABOVE = {
    "gear_lightning.recipes.cli",
    "gear_lightning.commands.doctor",
    "gear_lightning.recipes.checks",
    "gear_lightning.recipes.idle_options",
    "gear_lightning.recipes.refusals",
    *COMMANDS,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for p in [*ROOT.rglob("*.py"), *PLUGINS.glob("*.py")]}


def imported(name: str, *, top_level_only: bool = False) -> set[str]:
    """Modules that a module imports, as full names; those of this package as far as the file goes."""
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


def room(module: str) -> str:
    """environments.base -> environments"""
    return module.split(".")[0]


def crossings() -> set[tuple[str, str]]:
    found = set()
    for name in FILES:
        short = name.removeprefix("gear_lightning.")
        for other in imported(name):
            if not other.startswith("gear_lightning."):
                continue
            target = other.removeprefix("gear_lightning.")
            if (room(short) in ROLLOUT and room(target) in LEARNING) or (
                room(short) in LEARNING and room(target) in ROLLOUT
            ):
                found.add((short, target))
    return found


def test_the_rooms_exist():
    rooms = {room(name.removeprefix("gear_lightning.")) for name in FILES}
    assert ROLLOUT | LEARNING | MEETING | {"callbacks", "cli"} <= rooms


def test_the_two_wings_meet_in_batch_alone():
    assert not any(room(source) in ROLLOUT for source, _ in crossings()), "the rollout wing knows who learns from it"
    assert crossings() == set(EXCEPTIONS), (
        "a new crossing belongs into the batch or above; one that is gone, off the list"
    )


def test_the_meeting_room_knows_neither_wing():
    for name in MEETING:
        assert not {i for i in imported(f"gear_lightning.{name}") if i.startswith("gear_lightning.")}


def test_maths_knows_tensors_alone():
    """gear.py: no project code, no Lightning, no transformers."""
    assert {i.partition(".")[0] for i in imported("gear_lightning.gear")} <= {"math", "typing", "torch", "jaxtyping"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_library_imports_neither_configs_nor_plug_ins_nor_tests(name):
    inside = name.startswith("gear_lightning.callbacks")
    for other in imported(name):
        assert other.partition(".")[0] not in ("configs", "callbacks", "tests", "benchmarks"), f"{name}: {other}"
        assert other.partition(".")[0] != "pytorch_lightning", f"{name} mixes two Lightnings"
        if other.startswith("gear_lightning.callbacks"):
            assert inside or name in ABOVE, f"{name} imports the plug-in {other}"
        if other == "gear_lightning.recipes.cli":
            assert name in {"gear_lightning.__main__", *COMMANDS}, f"{name} imports the command line"


def test_no_module_imports_itself_around_a_corner():
    graph = {name: {o for o in imported(name, top_level_only=True) if o in FILES} for name in FILES}
    assert sum(map(len, graph.values())) > 50
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
