"""Discovery: one broken plugin is a problem that is named, and never keeps others from working."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tdabench.errors import UsageError
from tdabench.registry import Registry, configuration, configure, registry

METHOD = """
from dataclasses import dataclass, field
from typing import ClassVar
from tdabench.api import TDAMethod, hookimpl

@dataclass(frozen=True, kw_only=True)
class Method(TDAMethod):
    name: ClassVar[str] = "{name}"
    def build(self, context, train): ...
    def load(self, context, path): ...

@hookimpl
def tdabench_methods():
    return [{brings}]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., str]:
    """A function from source text to the path of a plugin file that holds it."""

    def make(source: str = "", name: str = "mine", method: str = "", brings: str = "Method") -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(source or METHOD.format(name=method or name, brings=brings))
        return str(path)

    return make


def problem(registry: Registry) -> str:
    (found,) = registry.problems
    return found[1]


def test_the_bundled_plugins_work_and_are_on_the_same_footing():
    registry = Registry()
    assert registry.problems == []
    assert {"tfidf", "random", "trak"} <= set(registry.methods)
    assert "lds" in registry.benchmarks
    assert "pocket" in registry.suites
    for entry in registry.methods.values():
        assert entry.cls.__module__.startswith("tdabench_"), "methods live in plugins"
        assert entry.origin.distribution == "tdabench"


def test_listing_everything_loads_neither_torch_nor_transformers():
    code = """
import sys
from tdabench.registry import registry
r = registry(); r.methods, r.benchmarks, r.suites
print(*[m for m in ("torch", "transformers", "trak") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_plugin_file_is_added(plugin):
    registry = Registry(modules=[plugin()])
    assert registry.problems == []
    assert registry.method("mine").cls.name == "mine"
    assert "tfidf" in registry.methods


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import not_there", "importing it failed: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "importing it failed: SystemExit: 3"),
        ("raise BaseException('no')", "importing it failed: BaseException: no"),
        ("def f(:", "importing it failed: SyntaxError"),
        (
            "from tdabench.api import hookimpl\n@hookimpl\ndef tdabench_metods(): return []",
            "unknown hook 'tdabench_metods'. Did you mean 'tdabench_methods'",
        ),
        ("def tdabench_methods(): return []", "tdabench_methods lacks the decorator @hookimpl"),
        (
            "from tdabench.api import hookimpl\n@hookimpl\ndef tdabench_methods(x): return []",
            "PluginValidationError",
        ),
        (
            "from tdabench.api import hookimpl\n@hookimpl\ndef tdabench_methods(): return 3",
            "tdabench_methods failed: TypeError: 'int' object is not iterable",
        ),
        (
            "from tdabench.api import hookimpl\n@hookimpl\ndef tdabench_methods(): return None",
            "returned None, expected a list",
        ),
        (
            "from tdabench.api import hookimpl\n@hookimpl\ndef tdabench_methods(): 1 / 0",
            "tdabench_methods failed: ZeroDivisionError",
        ),
        (METHOD.format(name="mine", brings="3"), "3 is not a subclass of TDAMethod"),
        (METHOD.format(name="mine", brings="Method()"), "is not a subclass of TDAMethod"),
        (METHOD.format(name="no spaces", brings="Method"), "Method.name is 'no spaces'"),
        (METHOD.format(name="", brings="Method"), "Method.name is ''"),
        (
            METHOD.format(name="mine", brings="TDAMethod"),
            "TDAMethod does not implement build, load",
        ),
        (
            "from tdabench.api import hookimpl\n@hookimpl\n"
            "def tdabench_suites(): return ['no.toml']",
            "the suite file no.toml does not exist",
        ),
    ],
)
def test_a_broken_plugin_is_named_with_its_reason(plugin, source: str, reason: str):
    registry = Registry(modules=[plugin(source)])
    assert reason in problem(registry)
    assert registry.plugins[-1].status == "broken"
    assert registry.plugins[-1].origin.plugin.endswith("mine.py")
    assert "tfidf" in registry.methods


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            "    x: object = field(default_factory=lambda: __import__('numpy').zeros(3))",
            "Odd.x is of the type ndarray",
        ),
        ("    version = 10 ** 100_000", "Odd.version is not an integer of at most nine digits"),
    ],
)
def test_odd_defaults_and_versions_break_their_plugin_only(plugin, fields: str, reason: str):
    source = METHOD.format(name="mine", brings="Odd")
    source += (
        "\n\n@dataclass(frozen=True, kw_only=True, eq=False)\n"
        f"class Odd(Method):\n    name = 'odd'\n{fields}\n"
    )
    registry = Registry(modules=[plugin(source)])
    assert reason in problem(registry)
    assert "tfidf" in registry.methods


def test_a_plugin_that_hangs_is_given_up(plugin, monkeypatch):
    monkeypatch.setattr("tdabench.registry.DISCOVERY_SECONDS", 0.5)
    source = "import time\nwhile True:\n    try: time.sleep(1)\n    except Exception: pass"
    registry = Registry(modules=[plugin(source)])
    assert "it took longer than 0.5 s" in problem(registry)
    assert registry.plugins[-1].status == "broken"


def test_what_is_well_formed_in_a_broken_plugin_still_counts(plugin):
    registry = Registry(modules=[plugin(brings="3, Method")])
    assert "mine" in registry.methods
    assert len(registry.problems) == 1


def test_a_missing_module_is_a_problem():
    assert "No module named 'not_there_at_all'" in problem(Registry(modules=["not_there_at_all"]))
    assert "does not exist" in problem(Registry(modules=["nowhere/x.py"]))


def test_a_name_claimed_twice_is_an_error_only_when_used(plugin):
    registry = Registry(modules=[plugin(method="tfidf")])
    assert registry.problems == []
    assert "tfidf" not in registry.methods
    assert "bm25" in registry.methods
    with pytest.raises(UsageError) as e:
        registry.method("tfidf")
    assert "two plugins provide a method named 'tfidf': text (tdabench" in str(e.value)
    assert "mine.py" in str(e.value)
    assert "--no-plugin" in str(e.value)
    kept = Registry(["text"], [plugin(method="tfidf")])
    assert kept.method("tfidf").origin.plugin.endswith("mine.py")


def test_disabling_by_plugin_or_distribution():
    registry = Registry(disabled=["text"])
    assert "tfidf" not in registry.methods
    assert next(p for p in registry.plugins if p.origin.plugin == "text").status == "disabled"
    assert Registry(disabled=["tdabench"]).methods == {}


def test_an_unknown_method_names_close_ones_and_broken_plugins(plugin):
    with pytest.raises(UsageError, match=r"unknown method 'tfid'\. Did you mean 'tfidf'"):
        Registry().method("tfid")
    registry = Registry(modules=[plugin("import not_there")])
    with pytest.raises(UsageError, match=r"Broken plugins: .*mine\.py"):
        registry.method("zzz")


def test_prints_of_a_plugin_do_not_reach_stdout(plugin, capsys):
    Registry(modules=[plugin("print('noise')")])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "noise" in captured.err


def test_an_observer_that_raises_is_reported_and_others_hear(plugin, tmp_path):
    source = "from tdabench.api import hookimpl\n@hookimpl\ndef tdabench_record(record, folder):\n"
    good = plugin(source + "    record['seen'].append(str(folder))", "good")
    bad = plugin(source + "    raise KeyError('oops')", "bad")
    registry = Registry(modules=[bad, good])
    seen: list[str] = []
    (complaint,) = registry.tell({"seen": seen}, tmp_path)
    assert "bad.py" in complaint
    assert "KeyError" in complaint
    assert seen == [str(tmp_path)]


def test_a_stranger_registers_through_an_entry_point(tmp_path, plugin, monkeypatch):
    plugin(name="stranger")
    info = tmp_path / "stranger-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[tdabench]\nstranger = stranger\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry()
    assert str(registry.method("stranger").origin) == "stranger (stranger 1.2)"
    (tmp_path / "stranger.py").write_text("1 / 0")
    monkeypatch.delitem(sys.modules, "stranger")
    broken = Registry()
    assert str(broken.problems[0][0]) == "stranger (stranger 1.2)"
    assert "ZeroDivisionError" in broken.problems[0][1]


def test_configuration_reaches_the_shared_registry(plugin):
    try:
        configure(["controls"], [plugin()])
        assert "mine" in registry().methods
        assert "random" not in registry().methods
        assert configuration()["disabled"] == ["controls"]
    finally:
        configure((), ())
    assert "random" in registry().methods
