"""Third-party plugins in separate processes, never imported in this one.

One process per plugin, a child of a nursery and confined as a contestant is, imports the plugin
and answers in JSON. If it quits, hangs, prints or answers nonsense, the answer is a message.
An observer (`tdabench_record`) has its own process, which is not confined: it writes where it
wants to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdabench import apart, registry
from tdabench.errors import MethodError, TdabenchError, UsageError, brief
from tdabench.io import cache_folder
from tdabench.run import sandbox
from tdabench.run.nursery import Nursery, below, lines
from tdabench.run.protocol import CHANNEL_FD, Channel, Hangup

MOST_SAID = 16 << 20  # bytes of an answer
MOST_PRINTED = 1 << 20  # bytes that plugins may print to stderr; the rest is dropped


class Processes:
    """The processes of one registry's third-party plugins; a `tdabench.apart.Keeper`."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self.configuration = configuration
        self.printed = 0
        self._nursery: Nursery | None = None
        self._folder = ""
        self._open: dict[str, tuple[int, Channel]] = {}
        self._observers: dict[str, tuple[int, Channel]] = {}

    # ------------------------------------------------------------------ requests

    def describe(self, plugins: list[tuple[str, str]]) -> list[Mapping[str, Any] | str]:
        """Describes plugins, given as (name, module), in parallel; failures are texts.

        A process stays only if a class of its plugin has to be asked about parameters.
        """
        rules = self._rules(plugins) if sandbox.abi() and apart.confined else []
        begun: list[tuple[str, tuple[int, Channel] | str]] = []
        for name, module in plugins:
            begun.append((name, self._begin(name, module, rules)))
        found: list[Mapping[str, Any] | str] = []
        for name, process in begun:
            if isinstance(process, str):
                found.append(process)
                continue
            try:
                told = self._answer(*process)
            except _Failed as e:
                self._end(*process)
                found.append(str(e))
                continue
            found.append(told)
            listed = told.get("methods"), told.get("benchmarks")
            entries = [c for part in listed if isinstance(part, list) for c in part]
            if any(isinstance(c, dict) and c.get("asks") for c in entries):
                os.kill(process[0], signal.SIGSTOP)
                self._open[name] = process
            else:
                self._end(*process)
        kept = {pid for pid, _ in self._open.values()}
        for pid in below(self._nursery.pid) if self._nursery is not None else ():
            if pid not in kept:  # the plugin's children
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if not self._open:
            self.close()
        return found

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _constructed(self, plugin: str, kind: str, name: str, params: str) -> Mapping[str, Any]:
        if plugin not in self._open:
            raise UsageError(f"the process of the plugin {plugin} has ended")
        process = self._open[plugin]
        message = {"do": "construct", "kind": kind, "name": name, "params": json.loads(params)}
        try:
            os.kill(process[0], signal.SIGCONT)
            process[1].send(message)
            told = self._answer(*process)
            os.kill(process[0], signal.SIGSTOP)
        except (Hangup, OSError, _Failed) as e:
            self._end(*self._open.pop(plugin))
            raise UsageError(f"{name}: its plugin {plugin} {e or 'has ended'}") from e
        if not isinstance(told.get("params"), dict):
            error = told.get("error")
            said = error if isinstance(error, list) and len(error) == 2 else [str(error), ""]
            raise UsageError(str(said[0])[:2000], str(said[1])[:2000])
        return dict(told["params"])

    def construct(self, plugin: str, kind: str, name: str, params: Mapping[str, Any]) -> Any:
        """Returns the resolved parameters of a class, as JSON. Raises UsageError if refused."""
        return self._constructed(plugin, kind, name, json.dumps(params, sort_keys=True))

    def tell(self, plugin: str, module: str, record: Mapping[str, Any], folder: Path) -> str:
        """Sends a record to a plugin's observer; returns a complaint, or ""."""
        if plugin not in self._observers:
            begun = self._begin(plugin, module, None)
            if isinstance(begun, str):
                return begun
            self._observers[plugin] = begun
            try:
                self._answer(*begun)
            except _Failed as e:
                self._end(*self._observers.pop(plugin))
                return str(e)
        process = self._observers[plugin]
        try:
            process[1].send({"do": "tell", "record": record, "folder": str(folder)})
            return str(self._answer(*process).get("complaint", ""))[:2000]
        except (Hangup, _Failed) as e:
            self._end(*self._observers.pop(plugin))
            return str(e) or "its process has ended"

    # ------------------------------------------------------------------ processes

    def _begin(
        self, name: str, module: str, rules: list[sandbox.Rule] | None
    ) -> tuple[int, Channel] | str:
        """Starts a process that imports the plugin; `rules`: None for an observer's."""
        if self._nursery is None:
            self._nursery = Nursery(hold_stdout=False)
            self._folder = tempfile.mkdtemp(prefix="tdabench-plugins-")
        place = {
            "serves": "tdabench.run.third_party",
            "landlock": sandbox.abi() if rules else 0,
            "rules": [*(rules or ()), (self._folder, "write")],
            "cwd": os.getcwd() if rules is None else self._folder,
            "fork": sys.platform == "linux",
            "environment": {
                "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),
                **({} if rules is None else sandbox.private_environment(Path(self._folder))),
            },
        }
        with contextlib.suppress(OSError):
            Path(self._folder, "cache").mkdir(exist_ok=True)
        try:
            process = self._nursery.start(place)
            message = {"do": "describe", "name": name, "configuration": dict(self.configuration)}
            process[1].send(message)
        except (Hangup, OSError) as e:
            return f"its process cannot be started: {e}"
        return process

    def _rules(self, plugins: list[tuple[str, str]]) -> list[sandbox.Rule]:
        """Returns what third-party plugins may read: libraries and the plugins' own files."""
        suites = Path(registry.__file__).parent / "suites"
        hidden = [str(Path.cwd() / "runs"), str(cache_folder()), str(suites)]
        rules = sandbox.libraries([h for h in hidden if os.path.exists(h)], sys.path)
        for _, module in plugins:
            if module.endswith(".py") and os.path.isfile(module):
                rules += sandbox.granted(module, ())
        return rules

    def _answer(self, pid: int, channel: Channel) -> dict[str, Any]:
        """Waits for an answer within the time limit. Raises _Failed."""
        assert self._nursery is not None
        limit = registry.DISCOVERY_SECONDS
        end = time.monotonic() + limit
        waiting: list[Any] = [channel.end, self._nursery.output]
        while True:
            left = end - time.monotonic()
            ready, _, _ = select.select(waiting, [], [], max(0.0, min(left, 0.5)))
            self._drain()
            if channel.end in ready:
                break
            if left <= 0:
                raise _Failed(f"importing it failed: it took longer than {limit:g} s")
        channel.end.settimeout(1.0)  # an answer is written as a whole
        try:
            head = channel.head(MOST_SAID)
        except MethodError as e:
            raise _Failed(f"its answer is not understood: {e.message}") from e
        except Hangup:
            raise _Failed(self._death(pid)) from None
        channel.end.settimeout(None)
        return dict(head["message"])

    def _death(self, pid: int) -> str:
        assert self._nursery is not None
        found = self._nursery.death(pid, 1.0)
        self._drain()
        if found is None:
            return "importing it failed: it closed its connection"
        code = os.waitstatus_to_exitcode(found["status"])
        if code < 0:
            try:
                return (
                    f"importing it failed: its process was killed by {signal.Signals(-code).name}"
                )
            except ValueError:
                return f"importing it failed: its process was killed by signal {-code}"
        return f"importing it failed: its process ended with exit status {code}"

    def _drain(self) -> None:
        assert self._nursery is not None
        for data in lines(self._nursery.output):
            if self.printed <= MOST_PRINTED:
                sys.stderr.write(data.decode("utf-8", "backslashreplace"))
                sys.stderr.flush()
            self.printed += len(data)

    def _end(self, pid: int, channel: Channel) -> None:
        channel.close()
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        if self._nursery is not None:
            with contextlib.suppress(Hangup):
                self._nursery.death(pid, 1.0)

    def close(self) -> None:
        """Ends every process; observers have a second to finish."""
        for _, channel in self._observers.values():
            channel.close()
        if self._nursery is not None:
            for pid, _ in self._observers.values():
                with contextlib.suppress(Hangup):
                    self._nursery.death(pid, 1.0)
            self._drain()
            for _, channel in self._open.values():
                channel.close()
            self._nursery.close()
            os.close(self._nursery.output)
            shutil.rmtree(self._folder, ignore_errors=True)
        self._nursery = None
        self._open.clear()
        self._observers.clear()


class _Failed(Exception):
    """A plugin's process did not answer; the message says why."""


# --------------------------------------------------------------------------- in the process


def main() -> int:
    """Serves the connection that this process was started with."""
    channel = Channel(socket.socket(fileno=CHANNEL_FD))
    found = None
    try:
        while True:
            message, _ = channel.receive()
            if message["do"] == "describe":
                given = {**message["configuration"], "only": [message["name"]]}
                found = registry.Registry(**given)
                channel.send(_described(found, message["name"]))
            elif message["do"] == "construct":
                assert found is not None
                channel.send(_resolved(found, message))
            elif message["do"] == "tell":
                assert found is not None
                said = found.tell(message["record"], Path(message["folder"]))
                channel.send({"complaint": "; ".join(said)})
    except Hangup:
        return 0


def _described(found: registry.Registry, name: str) -> dict[str, Any]:
    """Describes the plugin `name`, the only one that `found` has imported."""
    from tdabench.standins import described

    plugin = next(p for p in found.plugins if p.origin.plugin == name)
    told: dict[str, Any] = {"methods": [], "benchmarks": [], "commands": found.commands(plugin)}
    for kind in ("method", "benchmark"):
        for listed in getattr(found, f"all_{kind}s").values():
            for entry in listed:
                try:
                    told[f"{kind}s"].append(described(kind, entry.cls))
                except Exception as e:
                    plugin.problems.append(f"{entry.cls.__name__}: {brief(e)}")
    told["suites"] = [str(Path(e.value).absolute()) for v in found.all_suites.values() for e in v]
    return {**told, "hooks": plugin.hooks, "problems": plugin.problems}


def _resolved(found: registry.Registry, message: Mapping[str, Any]) -> dict[str, Any]:
    from tdabench.run.plan import jsonable

    try:
        made = getattr(found, message["kind"])(message["name"]).cls.from_params(message["params"])
        return {"params": jsonable(made.params)}
    except TdabenchError as e:
        return {"error": [e.message, e.remedy]}
    except Exception as e:
        return {"error": [f"{message['name']} refuses its parameters: {e}", ""]}


if __name__ == "__main__":
    sys.exit(main())
