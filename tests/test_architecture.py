"""The rules of the design: who imports whom, how light the package is, and whether its maps are true."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pydantic
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "companion"
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py"))

# Which of the package's own modules each may import; what is not named here imports none of them.
ALLOWED = {
    "companion.backend": {"companion.local.process"},
    "companion.chat": {"companion.backend"},
    "companion.retrieval": {"companion.backend"},
    "companion.widgets": {"companion.backend", "companion.chat", "companion.retrieval"},
    "companion.checks": {"companion.backend"},
    "companion.dataset": {"companion.dataset_format"},
    "companion.finetuning": {"companion.backend", "companion.dataset"},
    "companion.plots": {"companion.metrics"},
    "companion.shop.systems": {"companion.json_schema", "companion.shop"},
    "companion.shop.mcp_server": {"companion.shop", "companion.shop.systems"},
    "companion.assistant": {"companion.backend", "companion.retrieval", "companion.shop.systems"},
    "companion.simulation": {"companion.shop", "companion.shop.systems"},
    "companion.comparison": {"companion.metrics"},
    "companion.evaluation_run": {"companion.backend", "companion.evaluation_log"},
    "companion.evaluation": {
        "companion.comparison",
        "companion.evaluation_log",
        "companion.evaluation_report",
        "companion.evaluation_run",
        "companion.metrics",
    },
    "companion.scorers": {
        "companion.backend",
        "companion.evaluation",
        "companion.json_schema",
        "companion.metrics",
    },
    "companion.local.process": {"companion.local.weights"},
    "companion.local.toolcalls": {"companion.local.wire"},
    "companion.local.completions": {
        "companion.local.wire",
        "companion.local.toolcalls",
        "companion.local.engine",
    },
    "companion.local.responses": {"companion.local.wire", "companion.local.completions"},
    "companion.local.store": {"companion.local.weights"},
    "companion.local.files": {"companion.local.wire", "companion.local.store"},
    "companion.local.supervisor": {"companion.local.store", "companion.dataset_format"},
    "companion.local.jobs": {
        "companion.local.wire",
        "companion.local.weights",
        "companion.local.store",
        "companion.local.supervisor",
    },
    "companion.local.training": {
        "companion.local.training",
        "companion.local.memory",
        "companion.local.weights",
        "companion.local.engine",
        "companion.local.toolcalls",
        "companion.local.wire",
    },
    "companion.local.export": {
        "companion.local.weights",
        "companion.local.store",
        "companion.local.supervisor",
        "companion.local.toolcalls",
        "companion.local.training",
        "companion.local.wire",
    },
    "companion.local.gateway": {"companion.local"},
}
FREE = ("companion.cli", "companion.diagnosis", "companion.grading")  # the outermost layer
ONLY = {
    "ipywidgets": {"companion.widgets"},
    "torch": {"companion.local.training"},
    "xllamacpp": {"companion.local.engine"},
    "pytest": {"companion.grading"},
    "mcp": {"companion.shop.mcp_server"},
    "jsonschema": {"companion.json_schema"},
}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, in absolute names, but for what only type checkers see."""
    module = path.relative_to(ROOT).with_suffix("")
    package = list(module.parts[:-1])
    tree = ast.parse(path.read_text())
    unseen = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and getattr(guard.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    names = set()
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return names


def name_of(module: Path) -> str:
    parts = module.parts[:-1] if module.name == "__init__" else module.parts
    return ".".join(parts)


@pytest.mark.parametrize("module", MODULES, ids=map(str, MODULES))
def test_a_module_imports_only_what_its_layer_allows(module):
    name = name_of(module)
    if name.startswith(FREE):
        return
    inside = next((folder for folder in ALLOWED if name.startswith(f"{folder}.")), name)
    allowed = ALLOWED.get(name, ALLOWED.get(inside, set()))
    modules = {name_of(other) for other in MODULES} - {"companion"}
    used = {
        other for other in imported(ROOT / module.with_suffix(".py")) if other in modules and other != name
    }
    wrong = {
        other
        for other in used
        if not any(other == one or other.startswith(f"{one}.") for one in allowed)
        and not any(one.startswith(f"{other}.") for one in allowed)
    }
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("library", ONLY)
def test_a_heavy_library_is_imported_in_one_place(library):
    users = {
        name_of(module)
        for module in MODULES
        if any(name.split(".")[0] == library for name in imported(ROOT / module.with_suffix(".py")))
    }
    wrong = {
        user for user in users if not any(user == one or user.startswith(f"{one}.") for one in ONLY[library])
    }
    assert not wrong


@pytest.mark.parametrize("module", ["companion.assistant", "companion.grading.grade"])
def test_a_schema_is_checked_without_the_grammar_of_iris_which_others_can_still_import(module):
    code = f"import {module}, sys; print('jsonschema' in sys.modules, 'rfc3987_syntax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_importing_the_package_loads_nothing_heavy():
    heavy = "openai numpy scipy pandas sklearn matplotlib ipywidgets fastapi xllamacpp torch httpx typer"
    code = f"import sys, companion; print(' '.join(m for m in {heavy.split()!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_importing_chat_does_not_load_the_sdk():
    code = "import sys, companion.chat; print('openai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_of_the_package_exists_and_is_in_its_map():
    import companion

    for name in companion.__all__:
        assert getattr(companion, name) is not None
        assert re.search(rf"\b{name}\b", companion.__doc__), f"{name} is missing from the package's docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = companion.no_such_name


@pytest.mark.parametrize("module", MODULES, ids=map(str, MODULES))
def test_modules_and_public_functions_say_what_they_do(module):
    found = import_module(name_of(module))
    assert found.__doc__, f"{module} has no docstring"
    public = [
        value
        for name, value in vars(found).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == found.__name__
        and not (
            inspect.isclass(value) and issubclass(value, pydantic.BaseModel)
        )  # the API says what its parts are
    ]
    undocumented = [value.__name__ for value in public if not value.__doc__]
    assert not undocumented


def test_the_readme_shows_the_tree_that_is_on_disk():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("```text\n", 1)[1].split("```", 1)[0]
    stack, named = [], set()
    for line in tree.splitlines():
        entry = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth:] = [entry.strip().rstrip("/")]
        named.add("/".join(stack))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"the README names {missing}"
    modules = {str(m.with_suffix(".py")) for m in MODULES if m.name != "__init__"}
    unnamed = [path for path in modules if path not in named and not path.startswith("companion/grading/")]
    assert not unnamed, f"the README's tree leaves out {unnamed}"


def test_the_project_says_nothing_of_the_machine_it_was_made_on():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert tracked
    bad = re.compile(r"/(?:home|Users|work|root|opt)/\w|\bsk-[A-Za-z0-9]{20}")
    for name in tracked:
        path = ROOT / name
        if not path.is_file() or path.suffix in {".png", ".ico", ".woff2"} or path == Path(__file__):
            continue
        assert not bad.search(path.read_text(errors="ignore")), name
