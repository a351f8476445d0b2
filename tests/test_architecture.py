"""The rules that hold the rooms apart, read from the source with `ast`."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / "tdabench"
PLUGINS = ROOT / "plugins"
SAFE_READER = HARNESS / "truth" / "numbers.py"

# What each room may import of the others, beyond the shared base. design.md: "cli -> run, report
# -> benchmarks -> truth, stats, methods -> targets, data".
BASE = {
    "__init__",
    "apart",
    "benchmark",
    "errors",
    "groups",
    "hookspecs",
    "io",
    "limited",
    "method",
    "params",
    "rows",
    "seeds",
    "standins",
    "stats",
}
ALLOWED = {
    "data": set(),
    "targets": {"data"},
    "toolkit": {"data", "targets"},
    "truth": {"data", "targets"},
    "benchmarks": {"data", "targets", "truth", "toolkit"},
    "suites": {"data", "targets", "truth", "toolkit"},
    "run": {"data", "targets", "toolkit", "truth", "benchmarks", "registry"},
    "report": {"data", "benchmarks", "truth", "run", "registry"},
    "results": {"data", "benchmarks", "truth", "run", "report", "registry"},
    # The conformance kit applies the very checks that the harness applies in a run.
    "testing": {"data", "targets", "toolkit", "truth", "benchmarks", "api", "registry", "run"},
}


def sources(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.py")) if "__pycache__" not in p.parts]


def imports(path: Path, at_load: bool = False) -> Iterator[tuple[str, int]]:
    """(module, line) of every import; with `at_load`, only those that run on import."""
    tree = ast.parse(path.read_text(), str(path))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_load and (deferred or typing_only):
            skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield (node.module or "", node.lineno)
            if node.module == "tdabench":
                yield from ((f"tdabench.{a.name}", node.lineno) for a in node.names)


def plugin_packages() -> list[Path]:
    return [p for p in sorted(PLUGINS.iterdir()) if (p / "__init__.py").exists()]


@pytest.mark.parametrize("package", plugin_packages(), ids=lambda p: p.name)
def test_plugins_import_the_public_interface_only(package: Path):
    allowed = ("tdabench.api", "tdabench.testing", package.name)
    for path in sources(package):
        for module, line in imports(path):
            ours = module.split(".")[0].startswith("tdabench")
            fine = module == "tdabench" or module.startswith(allowed)
            assert not ours or fine, f"{path}:{line} imports {module}"


@pytest.mark.parametrize("package", plugin_packages(), ids=lambda p: p.name)
def test_plugins_do_not_load_torch_when_imported(package: Path):
    heavy = ("torch", "transformers", "trak")
    for module, line in imports(package / "__init__.py", at_load=True):
        assert module.split(".")[0] not in heavy, f"{package}/__init__.py:{line}"


def test_the_harness_names_no_plugin():
    names = {p.name for p in plugin_packages()}
    for path in sources(HARNESS):
        for module, line in imports(path):
            assert module.split(".")[0] not in names, f"{path}:{line} imports {module}"


def test_every_bundled_plugin_is_registered_as_a_stranger_would():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    registered = set(project["entry-points"]["tdabench"].values())
    assert {p.name for p in plugin_packages()} <= registered


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_between_rooms_point_one_way(room: str):
    for path in sources(HARNESS / room):
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] != "tdabench" or len(parts) < 2:
                continue
            fine = BASE | ALLOWED[room] | {room}
            assert parts[1] in fine, f"{path}:{line}: {room} must not import {module}"


def test_only_the_command_line_imports_the_command_line():
    for path in sources(HARNESS):
        if HARNESS / "cli" in path.parents or path == HARNESS / "__main__.py":
            continue
        for module, line in imports(path):
            assert not module.startswith("tdabench.cli"), f"{path}:{line} imports {module}"


def files_imported() -> dict[str, set[str]]:
    """Each module of the harness and the plugins -> the modules that its file imports, anywhere.

    Imports inside functions and for type checkers count too: a circle through them is a circle in
    what a reader has to know, although Python starts. A package's `__init__` counts where a name
    is taken from it, not because a module lies in it.
    """
    modules: dict[str, Path] = {}
    for folder, root in ((HARNESS, ROOT), (PLUGINS, PLUGINS)):
        for path in sources(folder):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    named.add(inner if inner in modules else node.module or "")
        graph[name] = (named & set(modules)) - {name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of some circle, or none."""
    left = {node: set(after) for node, after in graph.items()}
    while left:  # what imports nothing that is left cannot lie on a circle
        ends = {node for node, after in left.items() if not after & set(left)}
        if not ends:
            node, walk = min(left), []
            while node not in walk:
                walk.append(node)
                node = min(left[node] & set(left))
            return walk[walk.index(node) :]
        left = {node: after for node, after in left.items() if node not in ends}
    return []


def test_no_file_imports_itself_by_way_of_others():
    graph = files_imported()
    assert "tdabench.run.suite" in graph["tdabench.run.suite_file"]
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("folder", [HARNESS, PLUGINS], ids=lambda p: p.name)
def test_nothing_is_pickled(folder: Path):
    """Reading a stranger's file must run nothing."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in sources(folder):
        for module, line in imports(path):
            assert module.split(".")[0] not in banned, f"{path}:{line} imports {module}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                # One reader of torch files, in its own process, which admits arrays alone.
                safe = path == SAFE_READER and any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    for k in node.keywords
                )
                assert safe or call not in ("torch.load", "torch.save"), f"{path}:{node.lineno}"
                for keyword in node.keywords:
                    unsafe = keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
                    assert not unsafe, f"{path}:{node.lineno}: allow_pickle"
                    trusting = keyword.arg == "trust_remote_code" and isinstance(
                        keyword.value, ast.Constant
                    )
                    assert not (trusting and keyword.value.value), f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", [HARNESS, PLUGINS], ids=lambda p: p.name)
def test_whatever_transformers_loads_is_told_to_run_no_code(folder: Path):
    """Left unsaid, `trust_remote_code` asks at a terminal and weights may be a pickle."""
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                whom = ast.unparse(node.func)
                if "Peft" in whom:
                    continue  # adapters are checked for safetensors before peft sees them
                assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                if "Model" in whom and "gguf_file" not in said:
                    assert said.get("use_safetensors") == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", [HARNESS, PLUGINS], ids=lambda p: p.name)
def test_nothing_seeds_the_global_generators(folder: Path):
    """Every draw comes from a named seed.

    run/meter.py and testing/watch.py seed them to notice who draws.
    """
    watchers = (HARNESS / "run" / "meter.py", HARNESS / "testing" / "watch.py")
    for path in sources(folder):
        if path in watchers:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if call == "torch.manual_seed" and in_fork(path, node.lineno):
                    continue
                banned = ("np.random.seed", "random.seed", "torch.manual_seed", "set_seed")
                assert call not in banned, f"{path}:{node.lineno} calls {call}"


def in_fork(path: Path, line: int) -> bool:
    """Whether a line lies under `with torch.random.fork_rng(...)`, which undoes the seeding."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.With) and "fork_rng" in ast.unparse(node.items[0]):
            if node.lineno <= line <= (node.end_lineno or line):
                return True
    return False
