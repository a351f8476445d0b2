"""The command line. Commands load on use, so help and completion import nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tdabench import apart
from tdabench.cli import elsewhere
from tdabench.errors import TdabenchError, brief, did_you_mean, notice

# name: (module in this folder, one line of help). Static, so `tdabench --help` loads no command.
COMMANDS = {
    "run": ("run", "Measure methods on a suite and print the board."),
    "trace": ("trace", "Show the training examples behind a model output."),
    "index": ("index", "Index a corpus of any size, and search it."),
    "leaderboard": ("leaderboard", "Print the board of one or more run folders."),
    "show": ("show", "Show one result, or one failure, in full."),
    "compare": ("compare", "Compare two runs or methods with a paired test."),
    "report": ("report", "Write a run as an HTML page or a table."),
    "plot": ("plot", "Draw fidelity against cost."),
    "verify": ("verify", "Recompute a board from its records."),
    "submit": ("submit", "Pack results for a results repository."),
    "board": ("board", "Build or check the board of a results repository."),
    "cite": ("cite", "Print citations, or results for a model's card."),
    "tune": ("tune", "Choose a method's parameters on the tuning queries."),
    "methods": ("methods", "List methods, or the parameters of one."),
    "benchmarks": ("benchmarks", "List benchmarks, or describe one."),
    "suites": ("suites", "List suites, or describe one."),
    "plugins": ("plugins", "List plugins, and why broken ones fail."),
    "truth": ("truth", "Build and verify ground truth by retraining."),
    "new": ("new", "Start a plugin from a template."),
    "check": ("check", "Check that a method meets the interface's contract."),
    "timing": ("timing", "Time the phases of methods."),
    "doctor": ("doctor", "Check this machine for problems."),
    "completion": ("completion", "Print the completion script of a shell."),
}


class HelpFormatter(click.HelpFormatter):
    """Wraps lines of examples, which click leaves as they are, between words."""

    def write_text(self, text: str) -> None:
        before = len(self.buffer)
        super().write_text(text)
        lines = "".join(self.buffer[before:]).split("\n")
        self.buffer[before:] = ["\n".join(_narrowed(line, self.width) for line in lines)]


def _narrowed(line: str, width: int) -> str:
    """Wraps a line of a command, with backslashes, or of a term and its description."""
    if len(line) <= width:
        return line
    two = re.match(r"( *\S.*? {3,})(\S.*)", line)
    if two:
        column = len(two[1])
        if width - column >= 25:
            return textwrap.fill(two[2], width, initial_indent=two[1],
                                 subsequent_indent=" " * column)  # fmt: skip
        more = " " * (len(line) - len(line.lstrip()) + 4)
        rest = textwrap.fill(two[2], width, initial_indent=more, subsequent_indent=more)
        return f"{two[1].rstrip()}\n{rest}"
    indent = " " * (len(line) - len(line.lstrip()))
    if not line.strip().startswith("tdabench "):
        return textwrap.fill(line.strip(), width, initial_indent=indent, subsequent_indent=indent)
    out = [indent]
    argument = r"\"[^\"]*\"|'[^']*'|\S+"
    for word in re.findall(rf"--?[\w-]+ (?!-)(?:{argument})|{argument}", line):
        if out[-1].strip() and len(out[-1]) + len(word) > width - 3:  # room for " \"
            out[-1] += "\\"
            out.append(f"{indent}    ")
        out[-1] += f"{word} "
    return "\n".join(x.rstrip() for x in out)


click.Context.formatter_class = HelpFormatter  # of every command, those of plugins included


class LazyGroup(click.Group):
    """Loads commands from the table above; other names may belong to plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        here = Path(__file__).parent
        return [n for n, (module, _) in COMMANDS.items() if (here / f"{module}.py").exists()]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self.commands:
            return self.commands[name]
        if name not in self.list_commands(ctx):
            from tdabench.registry import registry

            registry().add_commands(self, name)
            return self.commands.get(name)
        module = importlib.import_module(f"tdabench.cli.{COMMANDS[name][0]}")
        for attribute in ("command", name, "cli"):
            found = getattr(module, attribute, None)
            if isinstance(found, click.Command):
                return found
        return next(v for v in vars(module).values() if isinstance(v, click.Command))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = {*self.list_commands(ctx), *self.commands}
            ctx.fail(f"unknown command {name!r}. {did_you_mean(name, known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(n, COMMANDS[n][1]) for n in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


EPILOG = """\b
Examples:
  tdabench run --methods airrep,trak     run two methods on the embedded suite
  tdabench run                           run every default method; resumes after an interruption
  tdabench leaderboard                   print the board again
  tdabench methods trak                  describe a method and its parameters
Plugins may add commands: tdabench plugins lists them.
"""


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="tdabench", prog_name="tdabench")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; allowed anywhere.")
def cli(debug: bool) -> None:
    """Benchmark training-data-attribution methods on language models.

    A method's scores are compared with the results of retraining the model, with intervals and a
    noise ceiling, and its cost is measured as well.
    """


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 1 failed, 2 usage, 130 interrupted."""
    code = 1
    try:
        code = _main(argv)
    finally:
        elsewhere.end(code)
    return code


def _main(argv: list[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    end = args.index("--") if "--" in args else len(args)
    debug = "--debug" in args[:end]
    elsewhere.begin(args)
    args = [a for i, a in enumerate(args) if a != "--debug" or i >= end]
    if isinstance(sys.stdout, io.TextIOWrapper):  # unencodable text is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with one_interrupt(), third_party_apart():
            code = cli.main(args, prog_name="tdabench", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:  # its message is the help of the group
        e.show()
        return 2
    except click.UsageError as e:
        say(_usage(e))
        return 2
    except click.ClickException as e:
        say(e.format_message())
        return e.exit_code
    except (click.Abort, KeyboardInterrupt) as e:
        cause = e if isinstance(e, KeyboardInterrupt) else e.__cause__
        say(". ".join(["interrupted", *getattr(cause, "__notes__", [])]))
        return 130
    except BrokenPipeError:
        return closed_pipe()
    except SystemExit as e:
        if "PacifyFlush" in type(sys.stdout).__name__:  # click noticed the closed pipe first
            return closed_pipe()
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except TdabenchError as e:
        if debug:
            raise
        say(str(e))
        return e.exit_code
    except OSError as e:
        if debug:
            raise
        from tdabench.io import cannot_write

        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        named = isinstance(e.filename, str)
        what = e.filename if named else "a file"
        other = f"{what}: {e.strerror or e}" if named else f"a file operation failed: {e}"
        say(str(cannot_write(what, e)) if full else other)
        return 1
    except Exception as e:
        if debug:
            raise
        say(f"unexpected {brief(e)}. Show the traceback with: --debug")
        return 1


@contextlib.contextmanager
def third_party_apart() -> Iterator[None]:
    """Keeps third-party plugins in other processes within; see `tdabench.apart`."""

    def keeper(configuration: Any) -> Any:
        from tdabench.run.third_party import Processes

        return Processes(configuration)

    before = apart.keeper
    apart.keeper = None if elsewhere.imports() else keeper
    try:
        yield
    finally:
        apart.keeper, apart.confined = before, True
        if found := sys.modules.get("tdabench.registry"):
            found.forget()


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt on the first Ctrl-C; a second one ends the process silently.

    Without this, the second one would land in some `finally` and show a traceback."""

    def first(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def closed_pipe() -> int:
    """Exits like a process ended by SIGPIPE: the reader (head, less) has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes at exit, which must not raise
    return 141


def say(message: str) -> None:
    """Prints one line on stderr."""
    notice(message)


def _usage(e: click.UsageError) -> str:
    message = e.format_message().rstrip()
    if e.ctx is None:
        return message
    dot = "" if message.endswith((".", "?")) else "."
    return f"{message}{dot} See: {e.ctx.command_path} --help"
