"""The command line: fast help, JSON on stdout, one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tdabench.cli import COMMANDS, LazyGroup, cli, main
from tdabench.cli.common import emit_json
from tdabench.registry import configure

HEAVY = ("torch", "transformers", "numpy", "scipy", "rich")


@pytest.fixture(autouse=True)
def _forget_plugins():
    yield
    configure((), ())


def imported_by(*arguments: str) -> set[str]:
    """Which heavy packages `tdabench ARGUMENTS` loads."""
    code = f"""
import sys
from tdabench.cli import main
main({list(arguments)!r})
print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_loads_nothing_heavy_and_is_quick():
    assert imported_by("--help") == set()
    assert not imported_by("run", "--help") & {"torch", "transformers"}
    seconds = []
    for _ in range(5):
        start = time.process_time_ns(), time.perf_counter()
        command = [sys.executable, "-c", "from tdabench.cli import main; main(['--help'])"]
        before = os.times().children_user + os.times().children_system
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(os.times().children_user + os.times().children_system - before)
        assert start
    assert min(seconds) < 0.4


@pytest.mark.parametrize("arguments", [["methods"], ["plugins", "--json"], ["suites"]])
def test_listing_loads_neither_torch_nor_transformers(arguments: list[str]):
    assert not imported_by(*arguments) & {"torch", "transformers"}


def test_every_command_in_the_table_has_help(capsys):
    context = click.Context(cli)
    names = cli.list_commands(context)
    assert {"run", "methods", "benchmarks", "suites", "plugins", "doctor", "show"} <= set(names)
    for name in names:
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("Usage: tdabench")
    assert set(names) <= set(COMMANDS)


@pytest.mark.parametrize("command", ["run", "methods", "suites", "show", "completion", "doctor"])
def test_help_gives_examples(command: str, capsys):
    main([command, "--help"])
    assert f"tdabench {command}" in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runn"], "unknown command 'runn'. Did you mean 'run'"),
        (["run", "--job", "2", "x"], "--jobs"),  # suggested; older clicks word it otherwise
        (["run", "extra"], "unexpected extra argument"),
        (["run", "--jobs", "0"], "0 is not in the range x>=1"),
        (["run", "--memory", "lots"], "'lots' is not a size such as 4G or 500M"),
        (["run", "--memory", "-1G"], "'-1G' is not a size such as 4G or 500M"),
        (["run", "--methods", "traak"], "unknown method 'traak'. Did you mean 'trak'"),
        (["run", "--methods", ","], "',' contains no name"),
        (["run", "--suite", "pockett"], "unknown suite 'pockett'. Did you mean 'pocket'?"),
        (["run", "--suite", "no/such.toml"], "there is no suite file no/such.toml"),
        (["run", "--benchmarks", "ldz"], "unknown benchmark 'ldz'. Did you mean 'lds'"),
        (["run", "--target", "instrukt"], "unknown target of suite pocket 'instrukt'"),
        (["run", "--methods", "tfidf", "--set", "tfidf.poling=sum"], "Did you mean 'pooling'?"),
        (["run", "--methods", "tfidf", "--set", "tfidf.temperature=hot"], "not of the type float"),
        (
            ["run", "--methods", "tfidf", "--set", "bm25.k1=1"],
            "unknown method or benchmark in --set 'bm25'",
        ),
        (["run", "--from", "nowhere.json"], "nowhere.json is missing"),
        (["methods", "tfid"], "unknown method 'tfid'. Did you mean 'tfidf'"),
        (["benchmarks", "ld"], "unknown benchmark 'ld'. Did you mean 'lds'"),
        (["suites", "packet"], "unknown suite 'packet'. Did you mean 'pocket'"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
        (["show", "--run", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("tdabench: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group", [[], ["new"], ["truth"], ["index"]])
def test_a_group_without_arguments_shows_its_help_on_stderr(group, capsys):
    assert main([*group, "--help"]) == 0
    shown = capsys.readouterr().out
    assert main(group) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == shown
    assert "\nCommands:\n" in shown


def test_an_unexpected_error_is_one_line_and_debug_shows_where(capsys, monkeypatch):
    def broken(self: LazyGroup, ctx: click.Context, name: str) -> click.Command:
        raise RuntimeError("boom\nmore")

    monkeypatch.setattr(LazyGroup, "get_command", broken)
    assert main(["methods"]) == 1
    err = capsys.readouterr().err
    assert err == "tdabench: unexpected RuntimeError: boom. Show the traceback with: --debug\n"
    with pytest.raises(RuntimeError, match="boom"):
        main(["methods", "--debug"])


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    parameters = {p["name"]: p for p in rows["tfidf"]["parameters"]}
    assert parameters["pooling"]["default"] == "sum"
    assert parameters["temperature"]["type"] == "float"


@pytest.mark.parametrize("command", ["benchmarks", "suites", "plugins"])
def test_lists_as_json_and_as_tables(command: str, capsys):
    assert main([command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert main([command]) == 0
    table = capsys.readouterr().out
    for row in rows:
        assert str(row.get("name", row.get("plugin"))) in table


def test_one_method_and_one_benchmark_in_full(capsys):
    main(["methods", "tfidf"])
    out = capsys.readouterr().out
    assert "pooling" in out
    assert "tdabench run --methods tfidf" in out
    main(["benchmarks", "lds"])
    assert "replicates" in capsys.readouterr().out


def test_every_parameter_of_trak_is_described(capsys):
    assert main(["methods", "trak", "--json"]) == 0
    found = {p["name"]: p["description"] for p in json.loads(capsys.readouterr().out)["parameters"]}
    assert len(found) == 14
    assert all(found.values())
    assert found["rank"].startswith("project each layer's sides first")  # its own, not its base's
    assert found["sketch"].endswith("(dense, as in the paper; much slower)")
    assert main(["methods", "trak"]) == 0
    out = capsys.readouterr().out
    assert out.count("checkpoint of the target at which gradients are computed") == 1
    assert out.count("sketch dimension") == 1
    assert "proj_dim  int  [default: 2048]\n    sketch dimension\n" in out


@pytest.mark.parametrize("kind", ["methods", "benchmarks"])
def test_every_parameter_is_described(capsys, kind):
    assert main([kind, "--json"]) == 0
    for shown in json.loads(capsys.readouterr().out):
        lacking = [p["name"] for p in shown["parameters"] if not p["description"]]
        assert not lacking, shown["name"]


def test_a_description_is_wrapped_between_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["methods", "trak"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["methods", "trak"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
    assert narrow.split() == whole.split()


def test_doctor_names_what_is_wrong(capsys, tmp_path, monkeypatch):
    assert main(["doctor", "--json"]) in (0, 1)
    rows = {r["what"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["python"]["status"] == "ok"
    assert rows["torch"]["status"] == "ok"
    assert rows["plugins"]["status"] == "ok"
    bad = tmp_path / "bad.py"
    bad.write_text("import not_there")
    monkeypatch.setenv("COLUMNS", "300")  # paths of temporary folders are long
    assert main(["doctor", "--plugin", str(bad)]) == 1
    assert "No module named 'not_there'" in capsys.readouterr().out


def test_doctor_names_cuda_that_came_along_for_nothing(monkeypatch, tmp_path):
    from importlib.metadata import distributions

    from tdabench.cli import doctor

    def install(name, *files):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "RECORD").write_text("".join(f"{path},,{size}\n" for path, size in files))

    monkeypatch.setattr(doctor, "distributions", lambda: distributions(path=[str(tmp_path)]))
    monkeypatch.setattr("tdabench.run.environment.gpu", lambda: "")
    install("torch", ("torch/lib/libtorch_cpu.so", 400_000_000))
    install("numpy", ("numpy/core.so", 900_000_000))
    assert doctor.unused_cuda() == []  # the build for processors
    install("nvidia-cublas", ("nvidia/cublas/lib/libcublas.so.13", 600_000_000))
    install("triton", ("triton/_C/libtriton.so", 300_000_000), ("triton/empty.py", ""))
    ((status, what, found, remedy),) = doctor.unused_cuda()
    assert (status, what) == ("note", "cuda")
    assert found.startswith("0.9 GB of CUDA libraries")
    assert "CPU build" in remedy
    monkeypatch.setattr("tdabench.run.environment.gpu", lambda: "Some GPU")
    assert doctor.unused_cuda() == []


def test_doctor_knows_the_unrelated_trak(monkeypatch):
    from tdabench.cli import doctor

    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    (found,) = doctor.unrelated_trak()
    assert found[0] == "wrong"
    assert "is not TRAK and hides it" in found[2]


def test_a_broken_plugin_is_one_warning_and_the_rest_works(capsys, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import not_there")
    assert main(["methods", "--plugin", str(bad)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("bad.py") == 1
    assert "is broken: importing it failed: ModuleNotFoundError" in captured.err
    assert "tfidf" in captured.out


def test_plugins_are_left_out_by_option_and_environment(capsys, monkeypatch):
    main(["methods", "--no-plugin", "text"])
    assert "tfidf" not in capsys.readouterr().out
    monkeypatch.setenv("TDABENCH_DISABLE_PLUGINS", "controls, text")
    configure((), ())
    main(["methods"])
    out = capsys.readouterr().out
    assert "tfidf" not in out
    assert "random" not in out
    assert "graddot" in out


def test_a_plugin_may_add_a_command(capsys, tmp_path):
    (tmp_path / "extra.py").write_text(
        "import click\n"
        "from tdabench.api import hookimpl\n"
        "@hookimpl\n"
        "def tdabench_commands(cli):\n"
        "    @cli.command('hello')\n"
        "    def hello():\n"
        "        click.echo('hello from a plugin')\n"
    )
    configure((), [str(tmp_path / "extra.py")])
    try:
        assert main(["hello"]) == 0
        assert capsys.readouterr().out == "hello from a plugin\n"
    finally:
        cli.commands.pop("hello", None)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys):
    assert main(["completion", shell]) == 0
    assert "_TDABENCH_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tdabench me", {"methods"}),
        ("tdabench run --methods tfi", {"tfidf"}),
        ("tdabench run --methods tfidf,bm", {"tfidf,bm25"}),
        ("tdabench run --suite po", {"pocket"}),
        ("tdabench run --benchmarks ld", {"lds"}),
    ],
)
def test_completion_of_names_without_torch(line: str, expected: set[str]):
    words = line.split()
    env = {
        **os.environ,
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TDABENCH_COMPLETE": "bash_complete",
    }
    code = (
        "import sys\nfrom tdabench.cli import main\n"
        "try:\n    main([])\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    found = {w.partition(",")[2] for w in done.stdout.split()}
    assert expected <= found
    assert "True" not in done.stderr


def test_a_closed_pipe_is_no_error():
    code = "import sys; from tdabench.cli import main; sys.exit(main(['methods', '--json']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait() in (0, 141)
    assert err == b""


def test_show_explains_a_failure(capsys, tmp_path: Path):
    record = {
        "schema": 1, "key": "abcd" * 4, "status": "failed", "reason": "returned NaN for 3 queries",
        "log_tail": ["last words"], "primary": "", "metrics": {}, "notes": [], "cost": {},
        "method": {"name": "demo", "label": "demo", "version": 1, "plugin": "mine",
                   "params": {"a": 1, "b": 2}, "passed": {"a": 1}},
        "target": {"label": "tiny", "name": "tiny", "regime": "", "fingerprint": "f"},
        "benchmark": {"name": "lds", "version": 1, "params": {}}, "seed": 0,
        "corpus": {"train": "t", "queries": "q"}, "truth": None, "versions": {}, "hardware": {},
        "git": "", "started": "2025-01-01T00:00:00Z", "seconds": 1.0,
    }  # fmt: skip
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{record['key']}.json").write_text(json.dumps(record))
    for name in ("demo", "abcd"):
        assert main(["show", name, "--run", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "returned NaN for 3 queries" in out
        assert "last words" in out
        assert "a = 1  (passed)" in out
        assert "b = 2  (default)" in out
    assert main(["show", "--run", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [record]
    assert main(["show", "dmo", "--run", str(tmp_path)]) == 2
    assert "Did you mean 'demo'" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["", "abc", "-5", "80"])
def test_any_width_of_the_terminal_is_accepted(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["methods"]) == 0
    assert "tfidf" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_json_is_valid_whatever_stdout_can_encode(encoding, monkeypatch):
    value = {"words": "é – 数学 🙂 \x1b[0m \u202e"}
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    emit_json(value)
    out.flush()
    text = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert json.loads(text) == value
    assert "\x1b" not in text
    assert ("数学" in text) == (encoding == "utf-8")


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(command line, help at 80 columns) of a command and all commands below it."""
    context = click.Context(command, info_name=path[-1], terminal_width=80, max_content_width=100)
    yield " ".join(path), command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below
            yield from commands(below, (*path, name))


def test_help_fits_a_terminal_of_80_columns_without_cut_sentences():
    for name, text in commands(cli, ("tdabench",)):
        assert max(map(len, text.splitlines())) <= 80, name
        assert not re.search(r"(?m)^  \w.*\.\.\.$", text), name  # a list of commands


def test_examples_of_help_stay_commands_when_wrapped():
    texts = dict(commands(cli, ("tdabench",)))
    assert (
        "    tdabench run --model org/name --train train.jsonl --queries q.jsonl \\\n"
        "        --truth-groups 50\n"
    ) in texts["tdabench run"]
    assert "run every default method; resumes\n" + " " * 43 + "after" in texts["tdabench"]
