"""The `nybble` command: its subcommands, and how errors reach the user.

A command lives in a module of its own that has `register(app)`; heavy imports are made inside the commands, so that
`nybble --help` answers at once.
"""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console
from rich.markup import escape

from . import (
    chat,
    combine,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    finetune,
    generate,
    import_,
    intrinsic,
    merge,
    plan,
    quantize,
    rank,
)

COMMANDS = (
    plan,
    quantize,
    finetune,
    evaluate,
    compare,
    generate,
    chat,
    rank,
    extract,
    intrinsic,
    merge,
    combine,
    export,
    import_,
    doctor,
    demo,
)


def build() -> typer.Typer:
    """The application with all commands registered."""
    app = typer.Typer(
        name="nybble",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root() -> None:
        """4-bit and 8-bit weights for language models: quantize, run and fine-tune them on the machine you own."""

    for command in COMMANDS:
        command.register(app)
    return app


def main() -> None:
    """Run the command line. An error that a user can mend is one line on stderr, with exit status 1.

    Wrong usage exits with 2 and an interruption with 130; NYBBLE_TRACEBACK=1 shows where an error came from.
    """
    try:
        build()()
    except KeyboardInterrupt:
        sys.exit(130)
    # What the package raises for bad input and for the world's failures (files, memory, missing extras).
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("NYBBLE_TRACEBACK") == "1":
            raise
        message = str(error).strip() or type(error).__name__
        if int(os.environ.get("WORLD_SIZE") or 1) > 1 and os.environ.get("RANK"):
            message = f"process {os.environ['RANK']}: {message}"
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
