"""Guarded discovery of plugins, and the problems of broken ones.

A plugin that cannot be imported, returns invalid objects or raises is recorded as a problem that
names it, its distribution and the reason; everything else works. The harness's own benchmarks and
suites, and the bundled methods, are registered in the same way, in the entry point group
`tdabench`. With a keeper (`tdabench.apart`) plugins that are not tdabench's own are described by
other processes, and their classes here are stand-ins.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from tdabench import apart, hookspecs
from tdabench.errors import MissingExtra, TdabenchError, UsageError, brief, did_you_mean, unknown

GROUP = "tdabench"
OWN = "tdabench"  # the distribution whose plugins are imported everywhere
SUITE_EXTRAS = {"factbook": "factbook"}  # suites that are separate distributions
DISCOVERY_SECONDS = 60.0  # for the import of a plugin, and for each of its hooks
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Origin:
    """The origin of an object: the plugin's name and its distribution."""

    plugin: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        held_by = f" ({self.distribution} {self.version})".replace(" )", ")")
        return self.plugin + (held_by if self.distribution else "")


@dataclass(frozen=True)
class Entry:
    """A method or benchmark class, or a suite's path, with its origin."""

    value: Any
    origin: Origin

    @property
    def cls(self) -> Any:
        return self.value


@dataclass
class Plugin:
    """A discovered plugin: `status` is ok, broken or disabled; `problems` state why."""

    origin: Origin
    module: str
    status: str = "ok"
    problems: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    benchmarks: list[str] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # of a plugin that is not imported
    load: Callable[[], Any] | None = None  # imports a plugin that is not imported

    def __str__(self) -> str:
        return str(self.origin)


class Registry:
    """The contents of all plugins. Names claimed twice are errors only when they are used."""

    def __init__(
        self,
        disabled: Iterable[str] = (),
        modules: Sequence[str] = (),
        only: Iterable[str] | None = None,
        keeper: apart.Keeper | None = None,
    ) -> None:
        self.keeper = keeper
        self.disabled = frozenset(disabled)
        self.only = None if only is None else frozenset(only)
        self.modules = tuple(modules)
        self.plugins: list[Plugin] = []
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self._by_name: dict[str, Plugin] = {}
        # Every entry by name, also of names that two plugins claim.
        self.all_methods: dict[str, list[Entry]] = {}
        self.all_benchmarks: dict[str, list[Entry]] = {}
        self.all_suites: dict[str, list[Entry]] = {}
        for found in sorted(entry_points(group=GROUP), key=lambda e: e.name):
            self._add(_origin(found), found.value, found.load)
        for name in self.modules:
            self._add(Origin(name, "--plugin"), name, functools.partial(import_plugin, name))
        self._collect("tdabench_methods", self._take_method)
        self._collect("tdabench_benchmarks", self._take_benchmark)
        self._collect("tdabench_suites", self._take_suite)
        self._describe()

    # ------------------------------------------------------------------ what there is

    @property
    def methods(self) -> dict[str, Entry]:
        """Method classes by name, without those that two plugins claim."""
        return {k: v[0] for k, v in sorted(self.all_methods.items()) if len(v) == 1}

    @property
    def benchmarks(self) -> dict[str, Entry]:
        return {k: v[0] for k, v in sorted(self.all_benchmarks.items()) if len(v) == 1}

    @property
    def suites(self) -> dict[str, Entry]:
        return {k: v[0] for k, v in sorted(self.all_suites.items()) if len(v) == 1}

    def method(self, name: str) -> Entry:
        """Returns the method `name`. Raises UsageError if unknown, or claimed by two plugins."""
        if ">" in name:
            raise UsageError(
                f"{name!r} is a pipeline, and a single method is needed here",
                "Pipelines run with: tdabench run, tdabench trace",
            )
        return self._one("method", name, self.all_methods, "List them with: tdabench methods")

    def benchmark(self, name: str) -> Entry:
        return self._one("benchmark", name, self.all_benchmarks, "List them: tdabench benchmarks")

    def suite(self, name: str) -> Entry:
        return self._one("suite", name, self.all_suites, "Or give the path of a TOML file")

    @property
    def problems(self) -> list[tuple[Origin, str]]:
        return [(p.origin, reason) for p in self.plugins for reason in p.problems]

    @property
    def clashes(self) -> list[str]:
        """A line for every name that two plugins claim."""
        tables = {
            "method": self.all_methods,
            "benchmark": self.all_benchmarks,
            "suite": self.all_suites,
        }
        return [
            f"{kind} {name!r} is claimed by {' and '.join(str(e.origin) for e in entries)}"
            for kind, table in tables.items()
            for name, entries in sorted(table.items())
            if len(entries) > 1
        ]

    def _one(self, kind: str, name: str, table: dict[str, list[Entry]], see: str) -> Entry:
        entries = table.get(name, [])
        if len(entries) == 1:
            return entries[0]
        if entries:
            a, b = entries[0].origin, entries[1].origin
            raise UsageError(
                f"two plugins provide a {kind} named {name!r}: {a} and {b}",
                f"Leave one out with: --no-plugin {b.plugin}",
            )
        raise self._missing(kind, name, table, see)

    def _missing(
        self, kind: str, name: str, table: dict[str, list[Entry]], see: str
    ) -> TdabenchError:
        if kind == "suite" and name in SUITE_EXTRAS:
            return MissingExtra(f"the suite {name!r}", SUITE_EXTRAS[name])
        error = unknown(kind, name, table, see)
        broken = [p.origin.plugin for p in self.plugins if p.status == "broken"]
        if not self.plugins:
            error.remedy = "No plugin is registered: install tdabench with pip install -e ."
        elif broken:
            error.remedy += f". Broken plugins: {', '.join(broken)} (tdabench plugins)"
        return error

    # ------------------------------------------------------------------ hooks with effects

    def add_commands(self, cli: Any, wanted: str) -> None:
        """Lets plugins add commands to the command line.

        A plugin that was only described is imported if the command `wanted` is its own.
        """
        for plugin in self.plugins:
            if plugin.load is not None and wanted in plugin.commands:
                with self._guard(plugin, "importing it"):
                    self.manager.register(plugin.load(), plugin.origin.plugin)
        for plugin, function in self._implementations("tdabench_commands"):
            with self._guard(plugin, "tdabench_commands"):
                function(cli)

    def commands(self, plugin: Plugin) -> list[str]:
        """Returns the names of the commands that an imported plugin adds."""
        import click

        group = click.Group()
        for other, function in self._implementations("tdabench_commands"):
            if other is plugin:
                with self._guard(plugin, "tdabench_commands"):
                    function(group)
        return sorted(group.commands)

    def tell(self, record: dict[str, Any], folder: Path) -> list[str]:
        """Notifies observers of a finished cell; returns their errors."""
        complaints = []
        for plugin, function in self._implementations("tdabench_record"):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    function(record=record, folder=folder)
            except Exception as e:
                complaints.append(f"the observer of plugin {plugin} raised {brief(e)}")
        for plugin in self.plugins:
            if self.keeper is not None and plugin.load and "tdabench_record" in plugin.hooks:
                told = self.keeper.tell(plugin.origin.plugin, plugin.module, record, folder)
                if told:
                    words = told if told.startswith("the observer") else f"{plugin}: {told}"
                    complaints.append(words)
        return complaints

    def observes(self, origin: Origin) -> bool:
        """Tells whether the plugin of that origin is told of finished cells."""
        hooks = (p.hooks for p in self.plugins if p.origin == origin)
        return any("tdabench_record" in h for h in hooks)

    # ------------------------------------------------------------------ discovery

    def _add(self, origin: Origin, module: str, load: Callable[[], Any]) -> None:
        if self.only is not None and origin.plugin not in self.only:
            return
        plugin = Plugin(origin, module)
        self.plugins.append(plugin)
        if self.disabled & {origin.plugin, origin.distribution, module}:
            plugin.status = "disabled"
            return
        if origin.plugin in self._by_name:
            other = self._by_name[origin.plugin].origin
            self._blame(plugin, f"another plugin has the same name: {other}")
            return
        if self.keeper is not None and origin.distribution != OWN:
            plugin.load = load
            self._by_name[origin.plugin] = plugin
            return
        with self._guard(plugin, "importing it"):
            loaded = load()
            plugin.hooks = _hooks(loaded)
            self.manager.register(loaded, origin.plugin)
            self._by_name[origin.plugin] = plugin

    def _describe(self) -> None:
        """Has the plugins that are not imported described, and makes stand-ins of their classes."""
        waiting = [p for p in self.plugins if p.load is not None]
        if self.keeper is None or not waiting:
            return
        if any(not p.module.endswith(".py") for p in waiting):
            _find_modules_here()
        told = self.keeper.describe([(p.origin.plugin, p.module) for p in waiting])
        for plugin, found in zip(waiting, told):
            if isinstance(found, str):
                self._blame(plugin, found)
                plugin.load = None
                continue
            with self._guard(plugin, "its description"):
                self._take_description(plugin, found)

    def _take_description(self, plugin: Plugin, told: Mapping[str, Any]) -> None:
        from tdabench.standins import stand_in

        assert self.keeper is not None
        ask = functools.partial(self.keeper.construct, plugin.origin.plugin)
        plugin.hooks = [str(h)[:80] for h in told["hooks"]]
        plugin.commands = [str(c)[:80] for c in told["commands"]]
        for reason in told["problems"][:20]:
            self._blame(plugin, str(reason)[:1000])
        for cls in told["methods"]:
            with self._guard(plugin, "tdabench_methods"):
                self._take_method(plugin, stand_in("method", cls, ask))
        for cls in told["benchmarks"]:
            with self._guard(plugin, "tdabench_benchmarks"):
                self._take_benchmark(plugin, stand_in("benchmark", cls, ask))
        for path in told["suites"]:
            with self._guard(plugin, "tdabench_suites"):
                self._take_suite(plugin, path)

    def _implementations(self, hook: str) -> Iterator[tuple[Plugin, Callable[..., Any]]]:
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            yield self._by_name[impl.plugin_name], impl.function

    def _collect(self, hook: str, take: Callable[[Plugin, Any], None]) -> None:
        for plugin, function in self._implementations(hook):
            with self._guard(plugin, hook):
                brought = function()
                if brought is None or isinstance(brought, (str, bytes)):
                    raise TypeError(f"returned {brought!r}, expected a list")
                for item in brought:
                    with self._guard(plugin, hook):
                        take(plugin, item)

    def _take_method(self, plugin: Plugin, cls: Any) -> None:
        from tdabench.method import TDAMethod

        name = _class_name(cls, TDAMethod)
        self.all_methods.setdefault(name, []).append(Entry(cls, plugin.origin))
        plugin.methods.append(name)

    def _take_benchmark(self, plugin: Plugin, cls: Any) -> None:
        from tdabench.benchmark import Benchmark

        name = _class_name(cls, Benchmark)
        self.all_benchmarks.setdefault(name, []).append(Entry(cls, plugin.origin))
        plugin.benchmarks.append(name)

    def _take_suite(self, plugin: Plugin, path: Any) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the suite file {path} does not exist")
        name = _suite_name(path)
        self.all_suites.setdefault(name, []).append(Entry(path, plugin.origin))
        plugin.suites.append(name)

    @contextlib.contextmanager
    def _guard(self, plugin: Plugin, doing: str) -> Iterator[None]:
        """Records any exception of a plugin as a problem. Its output goes to stderr."""
        try:
            with contextlib.redirect_stdout(sys.stderr), time_limit(DISCOVERY_SECONDS):
                yield
        except KeyboardInterrupt:
            raise  # the user's, most likely
        except BaseException as e:
            self._blame(plugin, f"{doing} failed: {brief(e)}")

    def _blame(self, plugin: Plugin, reason: str) -> None:
        plugin.status = "broken"
        plugin.problems.append(reason)


def _origin(found: EntryPoint) -> Origin:
    dist = found.dist
    return Origin(found.name, dist.name if dist else "", dist.version if dist else "")


def _hooks(plugin: Any) -> list[str]:
    """Returns names of the hooks that `plugin` implements. Raises UsageError for unknown hooks."""
    specs = {n for n in vars(hookspecs) if n.startswith("tdabench_")}
    marked = [n for n, v in inspect.getmembers(plugin) if hasattr(v, "tdabench_impl")]
    for name in marked:
        if name not in specs:
            raise UsageError(f"it implements an unknown hook {name!r}", did_you_mean(name, specs))
    unmarked = [
        n for n in specs if inspect.isfunction(getattr(plugin, n, None)) and n not in marked
    ]
    if unmarked:
        raise UsageError(f"{unmarked[0]} lacks the decorator @hookimpl")
    return sorted(marked)


def _suite_name(path: Path) -> str:
    """Returns the name that a suite file declares; the name of its folder or file if it is damaged.

    Listing and finding a suite, and its runs, then use one name.
    """
    try:
        name = tomllib.loads(path.read_text(encoding="utf-8"))["suite"]["name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = None
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    return path.parent.name if path.stem == "suite" else path.stem


def _class_name(cls: Any, base: Any) -> str:
    """Returns the name of a well-formed class; raises TypeError stating the problem otherwise."""
    if not isinstance(cls, type) or base not in cls.__mro__:
        raise TypeError(f"{cls!r} is not a subclass of {base.__name__}")
    if inspect.isabstract(cls):
        lacking = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        raise TypeError(f"{cls.__name__} does not implement {lacking}")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise TypeError(f"{cls.__name__}.name is {name!r}: letters, digits, '.', '_', '-' only")
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass: decorate it with @dataclass")
    version = getattr(cls, "version", None)
    if not isinstance(version, int) or abs(version) >= 10**9:
        raise TypeError(f"{cls.__name__}.version is not an integer of at most nine digits")
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if not _is_plain(default) and default is not MISSING:
            kind = type(default).__name__
            raise TypeError(f"the default of {cls.__name__}.{f.name} is of the type {kind}")
    return name


def _is_plain(value: Any) -> bool:
    """Whether a parameter may have this value: numbers, text, None and tuples of them."""
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


class _TooLong(BaseException):
    """Raised within a plugin that takes too long; not an Exception, which it might catch."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises within after so many seconds, in a main thread that uses no timer of its own."""
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TooLong(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def import_plugin(name: str) -> ModuleType:
    """Imports `--plugin NAME`: a module, or the path of a Python file."""
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"{name} does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look up their module here
        spec.loader.exec_module(module)
        return module
    _find_modules_here()
    return importlib.import_module(name)


def _find_modules_here() -> None:
    """Lets `--plugin MODULE` be a module in the working folder."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


# --------------------------------------------------------------------------- the one registry

_disabled: tuple[str, ...] = ()
_modules: tuple[str, ...] = ()
_only: tuple[str, ...] | None = None
_registry: Registry | None = None


def configure(
    disabled: Iterable[str] | None = None,
    modules: Iterable[str] | None = None,
    only: Iterable[str] | None = None,
) -> None:
    """Sets which plugins to leave out and which modules to add, before or after discovery.

    The path of a file is made absolute: another process, in another folder, finds the same. With
    `only`, no plugin of another name is imported.
    """
    global _disabled, _modules, _only
    _disabled = _disabled if disabled is None else tuple(dict.fromkeys(disabled))
    if modules is not None:
        whole = [os.path.abspath(m) if m.endswith(".py") else m for m in modules]
        _modules = tuple(dict.fromkeys(whole))
    _only = None if only is None else tuple(only)
    forget()


def forget() -> None:
    """Drops the registry and ends the processes that hold third-party plugins."""
    global _registry
    if _registry is not None and _registry.keeper is not None:
        _registry.keeper.close()
    _registry = None


def abandon() -> None:
    """Drops the registry in a process that was forked: what it holds belongs to the other one."""
    global _registry
    _registry = apart.keeper = None


def configuration() -> dict[str, list[str]]:
    """Returns the settings with which a worker process finds the same plugins."""
    return {"disabled": list(_disabled), "modules": list(_modules)}


def registry() -> Registry:
    """Returns the contents of all plugins, discovered on first use."""
    global _registry
    if _registry is None:
        keeper = apart.keeper(configuration()) if apart.keeper is not None else None
        _registry = Registry(_disabled, _modules, _only, keeper)
    return _registry
