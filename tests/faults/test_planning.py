"""Strangers' plugins never run in the process that plans: what they do there ends as a warning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdabench import apart
from tdabench.cli import cli, main
from tdabench.registry import configure, registry
from tdabench.run import sandbox

HEAD = """
from __future__ import annotations
import os, sys, time, signal
from dataclasses import dataclass, field
from typing import ClassVar, Literal
import numpy as np
from tdabench.api import RepresentationMethod, hookimpl
"""
METHOD = (
    HEAD
    + """
@dataclass(frozen=True, kw_only=True)
class Mine(RepresentationMethod):
    '''Counts letters.

    width  Number of columns
    '''

    name: ClassVar[str] = "mine"
    version: ClassVar[int] = 7
    summary: ClassVar[str] = "Counts letters."
    grid: ClassVar[dict] = {"width": (4, 8)}
    width: int = 8
    kind: Literal["a", "b"] | None = "a"
    sizes: tuple[int, ...] = (1, 2)
    batch: int = field(default=3, metadata={"changes_scores": False})

    def __post_init__(self):
        if self.width > 100:
            raise ValueError("width is above 100")
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes)))

    def encode(self, context, examples, role):
        rows = [[len(e.prompt) % (i + 2) for i in range(self.width)] for e in examples]
        return np.asarray(rows, np.float32)

@hookimpl
def tdabench_methods():
    return [Mine]
"""
)

OFFENCES = {
    "quits": ("os._exit(0)", "its process ended with exit status 0"),
    "quits-later": ("@hookimpl\ndef tdabench_methods(): os._exit(7)", "exit status 7"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "answers-itself": ("os.write(3, b'x' * 100)", "is not understood"),
    "closes": ("os.close(3); time.sleep(0.1); os._exit(0)", "importing it failed"),
    "raises": ("raise BaseException('no')", "BaseException: no"),
    "writes": ("open('{folder}/written', 'w').write('x')", "PermissionError"),
    "reads": ("open('{folder}/secret').read()", "PermissionError"),
}  # fmt: skip


def tdabench(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tdabench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def plugin(folder: Path, source: str, name: str = "mine") -> str:
    path = folder / f"{name}.py"
    path.write_text(source)
    return str(path)


@pytest.fixture
def planning(monkeypatch):
    """Discovery as the command line does it, in this process."""
    from tdabench.run.third_party import Processes

    monkeypatch.setattr(apart, "keeper", Processes)
    yield
    configure((), ())


@pytest.mark.skipif(not sandbox.abi(), reason="nothing confines a plugin here")
def test_offences_at_import_are_one_warning_each_and_every_command_works(tmp_path):
    (tmp_path / "secret").write_text("the answer")
    options = ["--plugin", plugin(tmp_path, METHOD)]
    for name, (code, _) in OFFENCES.items():
        source = HEAD + code.replace("{folder}", str(tmp_path))
        options += ["--plugin", plugin(tmp_path, source, name)]
    done = tdabench("methods", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert {"mine", "tfidf"} <= {m["name"] for m in json.loads(done.stdout)}
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == len(OFFENCES)
    for name, (_, reason) in OFFENCES.items():
        (line,) = [w for w in warnings if f"/{name}.py" in w]
        assert reason in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "written").exists()


def test_a_plugin_that_hangs_costs_its_time_limit_once(tmp_path, planning, monkeypatch):
    monkeypatch.setattr("tdabench.registry.DISCOVERY_SECONDS", 1.0)
    hangs = "while True:\n    try: time.sleep(9)\n    except BaseException: pass"
    configure((), [plugin(tmp_path, METHOD), plugin(tmp_path, HEAD + hangs, "hangs")])
    assert "mine" in registry().methods
    ((origin, reason),) = registry().problems
    assert origin.plugin.endswith("hangs.py")
    assert "took longer than 1 s" in reason


def test_what_it_prints_and_starts_reaches_neither_stdout_nor_the_future(tmp_path):
    flood = "print('noise' * 100)\nos.write(1, b'noise')\n"
    child = "import subprocess\nsubprocess.Popen(['sleep', '313'], start_new_session=True)\n"
    done = tdabench("methods", "--json", "--plugin", plugin(tmp_path, METHOD + flood + child))
    assert "mine" in {m["name"] for m in json.loads(done.stdout)}
    assert "noise" in done.stderr
    end = time.monotonic() + 10
    while time.monotonic() < end and _running("sleep\x00313"):
        time.sleep(0.05)
    assert not _running("sleep\x00313")


def _running(words: str) -> bool:
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return any(words in f for f in found)


def test_a_stand_in_declares_and_checks_what_the_class_does(tmp_path, planning):
    from tdabench.errors import UsageError

    configure((), [plugin(tmp_path, METHOD)])
    cls = registry().method("mine").cls
    assert (cls.name, cls.version, cls.summary) == ("mine", 7, "Counts letters.")
    assert cls.grid == {"width": (4, 8)}
    made = cls.from_params({"width": "12", "sizes": "3,1", "kind": "none"})
    assert (made.width, made.sizes, made.kind, made.pooling) == (12, (1, 3), None, "sum")
    with pytest.raises(UsageError, match="width is above 100"):
        cls.from_params({"width": 101})
    with pytest.raises(UsageError, match="unknown parameter of mine 'widht'"):
        cls.from_params({"widht": 1})
    with pytest.raises(UsageError, match=r"mine\.kind = 'c' is not of the type"):
        cls.from_params({"kind": "c"})
    with pytest.raises(Exception, match="in another process"):
        made.build(None, ())
    assert "mine" not in sys.modules, "nothing was imported here"


def test_a_run_has_the_keys_that_it_has_where_the_plugin_is_imported(
    tmp_path, planning, monkeypatch
):
    from tdabench.run.plan import Request, make_plan

    configure((), [plugin(tmp_path, METHOD)])
    request = Request(methods=("mine",), benchmarks=("lds", "cost"), sets=("mine.sizes=9,4",))
    described = make_plan(request)
    monkeypatch.setattr(apart, "keeper", None)
    configure((), [plugin(tmp_path, METHOD)])
    imported = make_plan(request)
    assert [c.key for c in described.cells] == [c.key for c in imported.cells]
    assert [c.method.as_dict() for c in described.cells] == [
        c.method.as_dict() for c in imported.cells
    ]
    assert described.cells[0].method.ignored == ["batch"]


def test_an_observer_runs_elsewhere_and_its_plugins_methods_are_not_called_confined(tmp_path):
    observer = """
@hookimpl
def tdabench_record(record, folder):
    (folder / "seen").write_text(record["key"])
    if record["benchmark"]["name"] == "cost":
        os._exit(3)
    raise KeyError("oops")
"""
    done = tdabench(
        *("run", "--plugin", plugin(tmp_path, METHOD + observer), "--methods", "mine"),
        *("--benchmarks", "lds,cost", "--out", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr
    cells = [json.loads(p.read_text()) for p in (tmp_path / "out/cells").glob("*.json")]
    assert {c["isolation"] for c in cells} == {"none"}
    assert (tmp_path / "out/seen").read_text() in {c["key"] for c in cells}
    assert "raised KeyError" in done.stderr
    assert "exit status 3" in done.stderr


def test_a_command_of_a_plugin_imports_it_and_no_other_command_does(tmp_path, monkeypatch, capfd):
    source = HEAD + (
        "import click\n"
        "@hookimpl\ndef tdabench_commands(cli):\n"
        "    @cli.command('greet')\n    def greet(): click.echo(f'hello from {os.getpid()}')\n"
    )
    plugin(tmp_path, source, "greeter")
    info = tmp_path / "greeter-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greeter\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[tdabench]\ngreeter = greeter\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["plugins", "--json"]) == 0
    listed = {p["plugin"]: p for p in json.loads(capfd.readouterr().out)}
    assert listed["greeter"]["hooks"] == ["tdabench_commands"]
    assert "greeter" not in sys.modules
    assert main(["greet"]) == 0
    assert capfd.readouterr().out == f"hello from {os.getpid()}\n"
    del sys.modules["greeter"], cli.commands["greet"]


def test_check_trace_and_tune_load_a_strangers_plugin_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    dies = METHOD.replace("        rows = [[", "        os._exit(0)\n        rows = [[")
    options = ("--plugin", plugin(tmp_path, dies))
    for asked in (
        ("check", "mine", "--law", "same-seed-same-scores"),
        ("trace", "What is the capital of France?", "--response", "Paris", "--methods", "mine"),
    ):
        done = tdabench(*asked, *options)
        assert done.returncode == 1, done.stdout
        assert "process ended with exit status 0" in done.stderr
        assert "Traceback" not in done.stderr


SPIES = """
import ctypes, socket, subprocess

def native(path):
    if ctypes.CDLL(None).open(path.encode(), os.O_CREAT | os.O_WRONLY, 0o600) < 0:
        raise OSError("refused")

def worked(attempts):
    found = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, subprocess.SubprocessError):
            continue
        found.append(name)
    return found


"""
SPYING = """        found = worked({
            "a truth": lambda: open("{truth}", "rb").read(1),
            "a file of the user": lambda: open("{folder}/secret").read(),
            "the cache": lambda: os.listdir("{folder}/cache"),
            "a write": lambda: native("{folder}/written"),
            "a child's write": lambda: subprocess.run(
                ["sh", "-c", "echo x > {folder}/written"], check=True, stderr=-3),
            "a socket": socket.socket,
        })
        if found:
            raise ValueError(f"worked: {found}")
"""


@pytest.mark.skipif(not sandbox.abi(), reason="nothing confines a plugin here")
def test_check_trace_and_tune_confine_a_strangers_plugin(tmp_path, monkeypatch):
    from tdabench.run.sources import load_suite

    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "secret").write_text("the answer")
    truth = load_suite("pocket").target("instruct").truths["tuning"]
    spying = SPYING.replace("{folder}", str(tmp_path)).replace("{truth}", str(truth))
    source = METHOD.replace("        rows = [[", f"{spying}        rows = [[")
    source = source.replace("@dataclass", f"{SPIES}@dataclass", 1)
    options = ("--plugin", plugin(tmp_path, source))
    for asked in (
        ("check", "mine", "--law", "leaves-nothing-running", "--law", "works-confined"),
        ("trace", "What is the capital of France?", "--response", "Paris", "--methods", "mine"),
        ("trace", "What is 2 + 2?", "--response", "4", "--methods", "tfidf>mine@50"),
        ("tune", "mine", "--grid", "width=4,8", "--grid", "pooling=sum,softmax"),
    ):
        done = tdabench(*asked, *options)
        assert done.returncode == 0, (asked, done.stdout, done.stderr)
        assert "worked" not in done.stdout + done.stderr
    assert not (tmp_path / "written").exists()
    asked = ("run", "--methods", "mine", "--benchmarks", "lds", "--isolation", "off")
    done = tdabench(*asked, "--out", str(tmp_path / "out"), *options)
    assert done.returncode == 1  # what is refused above works where nothing confines it
    assert "a truth" in done.stdout
    assert (tmp_path / "written").exists()


def test_no_command_loads_a_strangers_tokenizer_in_the_process_that_plans(
    tiny_target, make_suite, tmp_path, monkeypatch
):
    """Its chat template loops for ever: the limit of time ends the process that tries it."""
    folder = shutil.copytree(tiny_target.folder, tmp_path / "target")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x"
    config["chat_template"] = loops + "{% endfor %}" * 3
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    plan = "[targets.plans.lds]\ngroups = 4\nfraction = 0.6\nseeds = 1\n"
    suite = make_suite(plan)
    text = suite.read_text().replace(str(tiny_target.folder), str(folder))
    suite.write_text(text.replace('regime = "cold"', 'template = "chat"'))
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "6")
    for asked in (
        ("truth", "plan", str(suite)),
        ("truth", "status", str(suite)),
        ("run", "--suite", str(suite), "--methods", "tfidf", "--dry-run"),
        ("suites", str(suite)),
    ):
        done = tdabench(*asked)
        assert done.returncode == 2, (asked, done.stdout, done.stderr)
        assert "took longer than 6 s" in done.stderr, asked
        assert len(done.stderr.splitlines()) == 1, asked


def test_verify_recomputes_a_third_party_benchmark_in_another_process(tmp_path):
    source = HEAD + (
        "from tdabench.api import Benchmark, Metric, Outcome\n"
        "@dataclass(frozen=True)\nclass Mean(Benchmark):\n"
        "    name: ClassVar[str] = 'mean'\n    summary: ClassVar[str] = 'mean score'\n"
        "    def run(self, context):\n"
        "        x = context.index.score(context.queries).mean(1)\n"
        "        return self.of(x, context.queries.ids)\n"
        "    def of(self, x, ids):\n"
        "        return Outcome('mean', {'mean': Metric(float(x.mean()))}, x, tuple(ids),\n"
        "                       arrays={'x': x})\n"
        "    def recompute(self, stored):\n"
        "        return self.of(stored.arrays['x'], stored.query_ids)\n"
        "@hookimpl\ndef tdabench_benchmarks(): return [Mean]\n"
    )
    options = ("--plugin", plugin(tmp_path, source))
    out = ("--out", str(tmp_path / "out"))
    done = tdabench("run", "--methods", "tfidf", "--benchmarks", "mean", *out, *options)
    assert done.returncode == 0, done.stderr
    done = tdabench("verify", str(tmp_path / "out"), *options)
    assert "1 of 1 results agree" in done.stdout, done.stderr
    assert done.returncode == 0


def test_a_step_that_takes_too_long_or_too_much_is_ended(tmp_path, monkeypatch):
    options = ["check", "mine", "--law", "same-seed-same-scores", "--plugin"]
    hangs = METHOD.replace("        rows = [[", "        time.sleep(600)\n        rows = [[")
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "8")
    done = tdabench(*options, plugin(tmp_path, hangs))
    assert done.returncode == 1
    assert "the check took longer than 8 s" in done.stderr
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "")
    monkeypatch.setenv("TDABENCH_LOAD_MEMORY", "1G")
    big = METHOD.replace(
        "        rows = [[", "        b = np.ones(3 << 30, np.uint8)\n        rows = [["
    )
    done = tdabench(*options, plugin(tmp_path, big))
    assert done.returncode == 1
    assert "more than the 1.00 GiB of memory allowed" in done.stderr


def test_a_command_ends_no_process_that_python_had_started_before(tmp_path, capfd):
    """It ends all that the other process has started, and orphans, but nothing else."""
    leaves = METHOD.replace(
        "        rows = [[",
        "        import subprocess\n"
        "        subprocess.Popen(['sleep', '611'], start_new_session=True)\n        rows = [[",
    )
    mine = subprocess.Popen(["sleep", "612"])
    try:
        asked = ["check", "mine", "--law", "same-seed-same-scores"]
        assert main([*asked, "--plugin", plugin(tmp_path, leaves)]) == 0
        assert mine.poll() is None
        lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        assert not any(b"611" in line and b"sleep" in line for line in lines)
    finally:
        mine.kill()
        mine.wait()


def test_the_other_process_passes_on_exit_codes_and_output(tmp_path):
    options = ("--plugin", plugin(tmp_path, METHOD))
    done = tdabench("check", "mine", "--law", "described", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert [r["status"] for r in json.loads(done.stdout)] == ["passed"]
    assert tdabench("check", "mine", "--set", "width=900", *options).returncode == 2
