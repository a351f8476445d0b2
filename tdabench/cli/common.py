"""Shared parts of commands: options, JSON output, names for completion, tables."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdabench.cli import elsewhere
from tdabench.errors import UsageError, clean, notice, wrapped

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console

# C1 controls, zero-width and directional characters, surrogates: JSON leaves them unescaped.
_ACTING = re.compile(
    "[\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def plugin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--plugin` and `--no-plugin`, which take effect before the command starts."""

    def add(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
        state = ctx.meta.setdefault("tdabench.plugins", {"modules": [], "disabled": []})
        state[param.name] += value
        use_plugins(state["disabled"], state["modules"])

    command = click.option(
        "--no-plugin",
        "disabled",
        multiple=True,
        metavar="NAME",
        callback=add,
        expose_value=False,
        is_eager=True,
        help="Leave a plugin out (also: TDABENCH_DISABLE_PLUGINS=a,b).",
    )(command)
    return click.option(
        "--plugin",
        "modules",
        multiple=True,
        metavar="MODULE",
        callback=add,
        expose_value=False,
        is_eager=True,
        help="Add a plugin that is not installed: a module or a Python file.",
    )(command)


OWN_DATA = (
    click.option("--model", metavar="MODEL",
                 help="Your own target: a folder, a hub repository, .gguf, a PEFT adapter."),
    click.option("--train", metavar="FILE", help="Your own training examples (FILE#SPLIT)."),
    click.option("--template", metavar="NAME",
                 help="How the model is prompted: chat, plain, alpaca, question, none.  "
                      "[default: chat if the tokenizer has a template, else plain]"),
    click.option("--max-length", type=click.IntRange(2), metavar="TOKENS",
                 help="Maximum tokens per example.  [default: 512, or the model's maximum]"),
    click.option("--truncate", default="prompt-left", show_default=True, metavar="RULE",
                 help="Longer examples: prompt-left cuts the prompt, error refuses them."),
    click.option("--dtype", default="auto", show_default=True, metavar="NAME",
                 help="Dtype of the model when scoring: float32, bfloat16, float16, auto."),
    click.option("--layout", default="auto", show_default=True, metavar="NAME",
                 help="Layout of the files: native, flan, alpaca, chat, ultrachat, qa, text."),
    click.option("--field", "fields", multiple=True, metavar="ROLE=FIELD",
                 help="Field that holds prompt, response, task or id; repeatable."),
    click.option("--empty", default="error", show_default=True, metavar="RULE",
                 help="Rows without a response: error, keep or skip."),
    click.option("--add-checkpoint", "checkpoints", multiple=True, metavar="NAME=MODEL",
                 help="Further checkpoint of the model to score at; repeatable."),
    click.option("--asset", "assets", multiple=True, metavar="NAME=SOURCE",
                 help="Asset that a method requests, such as airrep=FOLDER; repeatable."),
)  # fmt: skip


def data_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--data-dir`, a folder that is searched before the hub."""
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder with hub files on this machine: DIR/org/name or DIR/name "
        "(also: TDABENCH_DATA_DIR).",
    )(command)


def own_data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options for one's own model and data, passed to the command as the dict `own`."""
    names = ["model", "train", "template", "max_length", "truncate", "dtype", "layout", "fields",
             "empty", "checkpoints", "assets", "data_dir"]  # fmt: skip

    @functools.wraps(command)
    def gathered(**values: Any) -> Any:
        own = {name: values.pop(name) for name in names}
        return command(own=own, **values)

    for option in reversed(OWN_DATA):
        gathered = option(gathered)
    return data_dir_option(gathered)


def chosen_device(device: str) -> str:
    """Resolves `auto` to cuda if torch sees a GPU, else cpu.

    Loads torch only if there is a GPU or one is requested. Raises UsageError for an unknown or
    missing device."""
    if device != "auto":
        check_device(device)
        return device
    devices = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    if not any(Path(p).exists() for p in devices):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises UsageError for an unknown device, or one that this machine lacks."""
    kind, colon, number = device.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu") or (colon and not re.fullmatch("[0-9]+", number)):
        raise UsageError(f"--device {device!r} is not a device", "cpu, cuda, cuda:1 or auto")
    if kind == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UsageError(f"--device {device}: torch has no such device", "Leave it out") from e


def devices(device: str) -> tuple[str, ...]:
    """Expands `cuda` to every GPU. Raises UsageError for a device that torch does not have."""
    if device == "cpu":
        return ("cpu",)
    check_device(device)
    if device == "cuda":
        import torch

        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    return (device,)


def use_plugins(disabled: Iterable[str] = (), modules: Iterable[str] = ()) -> None:
    """Configures discovery from options and the environment."""
    from tdabench.registry import configure

    words = os.environ.get("TDABENCH_DISABLE_PLUGINS", "").replace(",", " ").split()
    configure([*words, *disabled], modules)


def discovered() -> Any:
    """Returns the registry; warns once on stderr about every broken plugin."""
    from tdabench.registry import configuration, registry

    if not configuration()["disabled"]:
        use_plugins((), configuration()["modules"])
    found = registry()
    if not elsewhere.here() and not getattr(found, "warned", False):
        found.warned = True  # type: ignore[attr-defined]
        for origin, reason in found.problems:
            warn(f"plugin {origin} is broken: {reason} (see: tdabench plugins)")
    return found


def warn(message: str) -> None:
    notice(message, "tdabench: warning: ")


def say_run(given: Iterable[Path]) -> None:
    """Prints on stderr which run a command reads, unless one was given."""
    from tdabench.report.records import find_runs

    if not tuple(given):
        notice(f"the newest run: {find_runs()[0]}")


def emit_json(value: Any) -> None:
    """Prints `value` on stdout as one JSON document, with terminal control characters escaped."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):  # a latin-1 terminal: JSON's own escapes are ASCII
        text = json.dumps(value, indent=2, sort_keys=True, default=str)
    click.echo(_ACTING.sub(lambda c: f"\\u{ord(c[0]):04x}", text))


def words(text: str | None) -> tuple[str, ...] | None:
    """Splits a comma-separated option into a tuple; None stays None.

    Raises UsageError for an empty list, which would otherwise mean "nothing".
    """
    if text is None:
        return None
    found = tuple(w.strip() for w in text.split(",") if w.strip())
    if not found:
        raise UsageError(f"{text!r} contains no name", "Give names separated by commas")
    return found


def console(**options: Any) -> Console:
    """Returns a rich console on stdout; plain and as wide as needed if it is not a terminal."""
    from rich.console import Console

    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        options.setdefault("width", (int(columns) if columns.isdecimal() else 0) or 200)
    return Console(highlight=False, **options)


def print_lines(text: str) -> None:
    """Prints lines on stdout; on a terminal they are wrapped between words."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in text.split("\n"):
        click.echo(wrapped(line, width) if width else line)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a plain table: aligned, without a frame, without markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(Text(clean(name)), overflow="fold")
    for row in rows:
        table.add_row(*[Text(clean(cell)) for cell in row])
    console().print(table)


# --------------------------------------------------------------------------- completion


def complete_from(names: Callable[[], Iterable[str]]) -> Callable[..., list[CompletionItem]]:
    """Makes a click completion callback for one name, or the last of a comma-separated list."""

    def complete(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        head, comma, last = typed.rpartition(",")
        taken = set(head.split(","))
        try:
            known = list(names())
        except Exception:
            return []  # completion must never print an error into the prompt
        chosen = [n for n in known if n.startswith(last) and n not in taken]
        return [CompletionItem(head + comma + n) for n in chosen]

    return complete


def _names(kind: str) -> list[str]:
    use_plugins()
    from tdabench.registry import registry

    return list(getattr(registry(), kind))


complete_methods = complete_from(lambda: ["all", *_names("methods")])
complete_benchmarks = complete_from(lambda: _names("benchmarks"))
complete_suites = complete_from(lambda: _names("suites"))


def _runs() -> list[str]:
    from tdabench.report.records import runs_in

    return [str(p) for p in runs_in(Path("runs"))]


complete_runs = complete_from(_runs)
