"""The order of the house: imports go one way, no module reaches for another's private names, calls stay readable."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"errors"},
    {"batches", "case", "extras", "files", "journal", "progress"},
    {"console", "fromdiff", "pictures", "prompts"},
    {"model"},
    {"patch"},
    {"bank", "reference"},
    {"attribution", "guards", "measure"},
    {"solver"},
    {"session"},
    {"evaluation", "rebase"},
    {"rules"},
    {"cli"},
]
"""Rooms of `mint`, lowest first: a module imports from its own room and from those above it in this list, no other."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LONG_CALLS = {
    "mint.attribution.rank.attribute",
    "mint.cli.options.load",
    "mint.solver.gate.fit_rows",
}
"""Functions with more parameters than the rest: keywords of a public name, options of the command line, knobs of a fit."""
ON_THE_CPU = {"mint/solver/gate.py", "mint/solver/classifier.py"}
"""Modules whose tensors are all on the CPU: float64 is no question there."""


def modules(folder: str = "mint") -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it); wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names)


def rooms(module: str, names: list[str]) -> set[str]:
    """Rooms of mint that an import enters."""
    parts = module.split(".")
    if parts[0] != "mint":
        return set()
    return {parts[1]} if len(parts) > 1 else {n for n in names if not n.startswith("__")}


def test_imports_go_one_way():
    for name, tree in modules():
        parts = name.split(".")
        if len(parts) == 1 or parts[1].startswith("__"):
            continue
        own = parts[1]
        assert own in LEVEL, f"{own} has no place in ORDER"
        for module, names in imports(tree):
            for room in rooms(module, names) - {own}:
                assert LEVEL[room] < LEVEL[own], f"{name} imports {module}: {room} stands above {own}"


def test_tasks_import_cases_only_and_nothing_imports_scripts():
    for name, tree in modules("tasks"):
        entered = {room for module, names in imports(tree) for room in rooms(module, names)}
        assert entered <= {"case", "errors", "extras", "console"}, name
    for folder in ("mint", "tasks"):
        for name, tree in modules(folder):
            outside = {module.split(".")[0] for module, _ in imports(tree)}
            assert not outside & ({"scripts", "tests"} | ({"tasks"} if folder == "mint" else set())), name


def test_no_module_takes_a_private_name_of_another():
    for folder in ("mint", "tasks", "scripts"):
        for name, tree in modules(folder):
            for module, names in imports(tree):
                private = [n for n in names if n.startswith("_") and not n.startswith("__")]
                assert not private or not module.startswith(("mint", "tasks")), f"{name}: {module} {private}"


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}.{node.name}", node


def test_no_call_takes_more_than_eight_parameters():
    for name, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given = [a for a in arguments if a.arg not in ("self", "cls")]
        command = any(
            isinstance(a.annotation, ast.Attribute | ast.Subscript) and "typer" in ast.dump(a) for a in given
        )
        if not command and name not in LONG_CALLS:
            assert len(given) <= 8, f"{name} takes {len(given)} parameters; group them in a config object"


def test_frozen_records_stay_frozen_and_replace_names_its_fields():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "object.__setattr__", name
                spread = called.split(".")[-1] == "replace" and any(k.arg is None for k in node.keywords)
                assert not spread, (
                    f"{name}: replace with a spread dict hides a wrong field from the type check"
                )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "mint").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_float64_is_asked_of_the_cpu_only(path):
    """Some devices have none: a tensor comes to the CPU first."""
    if str(path.relative_to(ROOT)) in ON_THE_CPU:
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        code = line.split("#")[0]
        bare = re.search(r"(?<!\.cpu\(\))\.double\(\)|\.to\(torch\.float64\)|dtype=torch\.float64", code)
        device = "device=" in code or "sum(" in code
        assert not bare or ("dtype=torch.float64" in bare.group() and not device), (
            f"{path.name}:{number}: {line.strip()}"
        )


def test_no_choice_depends_on_a_models_name():
    """A family is found by its structure; names of families may stand in prose, and in tables of file formats."""
    families = re.compile(
        r"(llama|gpt|qwen|mistral|mixtral|phi|gemma|falcon|bloom|opt|starcoder)[\w.-]*", re.IGNORECASE
    )
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                for text in (n.value for n in ast.walk(node) if isinstance(n, ast.Constant)):
                    assert not (isinstance(text, str) and families.fullmatch(text)), f"{name}: {text}"
