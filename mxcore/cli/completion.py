"""`mx completion SHELL`: the script that completes `mx` in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

EPILOG = """
\b
Examples:
  mx completion bash > /etc/bash_completion.d/mx
  source <(mx completion zsh)
  mx completion fish > ~/.config/fish/completions/mx.fish
"""


@click.command(epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes `mx` in a shell."""
    from mxcore.cli.main import mx

    if kind := get_completion_class(shell):
        click.echo(kind(mx, {}, "mx", "_MX_COMPLETE").source())
