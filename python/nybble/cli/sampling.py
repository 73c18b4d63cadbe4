"""The options of commands that write text, by which the next token is chosen."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens of this probability together.")]
MinP = Annotated[float, typer.Option(help="Only tokens this many times as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that occurred are less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer. May be given several times.")]
Seed = Annotated[int, typer.Option(help="For temperatures above 0.")]
