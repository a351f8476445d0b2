"""`tdabench completion`: prints a script for shell completion of commands and names."""

from __future__ import annotations

import click


@click.command(
    epilog="""\b
Examples:
  eval "$(tdabench completion bash)"        in ~/.bashrc
  eval "$(tdabench completion zsh)"         in ~/.zshrc
  tdabench completion fish > ~/.config/fish/completions/tdabench.fish
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    from tdabench.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "tdabench", "_TDABENCH_COMPLETE").source())
