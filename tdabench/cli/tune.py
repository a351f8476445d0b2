"""`tdabench tune`: chooses a method's parameters on the tuning truth."""

from __future__ import annotations

import sys
from typing import Any

import click

from tdabench.cli import elsewhere
from tdabench.cli.common import discovered, emit_json, json_option, plugin_options, print_table
from tdabench.errors import UsageError, notice


@click.command()
@click.argument("method")
@click.option("--suite", default="pocket", show_default=True, help="Suite name or file.")
@click.option("--target", help="Target label (default: the suite's main target).")
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="PARAM=A,B,…",
    help="Values to try; repeat for more parameters. Default: the method's grid.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the method.")
@click.option("--top", default=15, show_default=True, help="Number of rows to print.")
@click.option("--write", is_flag=True, help="Write the best into the suite file.")
@json_option
@plugin_options
def command(
    method: str,
    suite: str,
    target: str | None,
    grids: tuple[str, ...],
    seed: int,
    top: int,
    write: bool,
    as_json: bool,
) -> None:
    """Choose a method's parameters on tuning queries and tuning groups.

    METHOD is a method, or a variant of the suite. Tries every combination on the suite's tuning
    truth, which has no queries, groups or retrainings in common with the test truth, and prints
    the best with lines for the suite file; --write adds them to it.

    \b
    Examples:
      tdabench tune logra
      tdabench tune logra --grid damping=0.01,0.1,1,10 --grid rank=8,16
      tdabench tune tfidf --grid pooling=sum,softmax --grid temperature=auto
      tdabench tune airrep-full --suite runs/variants/suite.toml --write
    """
    from tdabench.io import write_text
    from tdabench.run.contestants import Contestants
    from tdabench.run.sources import load_suite
    from tdabench.run.tune import Trial, default_grid, method_of, tune, with_tuned

    discovered()
    loaded = load_suite(suite, targets=(target,) if target else ())
    variant = loaded.variants.get(method)
    code = elsewhere.carried_out(
        [variant.method if variant else method],
        foreign=elsewhere.is_foreign(suite), what="the tuning",
    )  # fmt: skip
    if code is not None:
        sys.exit(code)
    cls, fixed = method_of(loaded, method)
    grid: dict[str, list[Any]] = {}
    for text in grids:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise UsageError(f"--grid {text!r} does not have the form PARAMETER=A,B,…")
        grid[name.strip()] = [v.strip() for v in values.split(",")]
    grid = grid or {k: v for k, v in default_grid(cls).items() if k not in fixed}
    if not grid:
        raise UsageError(f"{method} declares no values to try", "Give some with --grid")

    def told(trial: Trial) -> None:
        elsewhere.step()
        notice(f"{_words(trial.params)}: {trial.error or f'{trial.lds:.4f}'}", "  ")

    with Contestants([cls.name]) as contestants:
        trials = tune(
            suite, target, method, grid, seed=seed, on_trial=told, contestants=contestants
        )
    label = target or loaded.main_targets[0].label
    best = trials[0]
    if as_json:
        emit_json([{"params": dict(t.params), "lds": t.lds, "error": t.error} for t in trials])
    else:
        print_table(
            ("LDS on tuning", "parameters"),
            [(t.error or f"{t.lds:.4f}", _words(t.params)) for t in trials[:top]],
        )
    if best.error and (write or not as_json):
        raise UsageError(f"every combination failed; the first with: {best.error}")
    typed = cls.from_params({**fixed, **best.params}).params if not best.error else {}
    chosen = {k: typed[k] for k in best.params if k in typed}
    if not as_json:
        table = with_tuned("", label, method, chosen, best.lds).strip()
        click.echo(f"\nFor the suite file:\n{table}")
    if write:
        text = loaded.path.read_text(encoding="utf-8")
        write_text(loaded.path, with_tuned(text, label, method, chosen, best.lds))
        notice(f"written into {loaded.path}", "")


def _words(params: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in params.items()) or "(defaults)"
