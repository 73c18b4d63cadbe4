"""`nybble plan`: which ways of using and training a model fit into a machine's memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .quantize import parse_size

if TYPE_CHECKING:
    from ..planning import Estimate, Plan, Row, Step


#: Bytes. What is less was meant in another unit: no plan is for so little.
_LEAST_MEMORY = 1_000_000


def command(
    model: Annotated[
        str, typer.Argument(help="A directory with config.json, that file, or a name such as Llama-3.1-8B.")
    ],
    memory: Annotated[
        str | None, typer.Option(help="Of the machine or GPU, such as 24GB; by default this machine's.")
    ] = None,
    seq: Annotated[
        int | None,
        typer.Option(help="Tokens in a row; by default 2048, or the model's longest text if that is less."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows in a forward pass.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or unified (memory that CPU and GPU share).")] = "cpu",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Of LoRA and DoRA.")] = 16,
    size: Annotated[int, typer.Option(help="Of bottlenecks.")] = 64,
    tokens: Annotated[int, typer.Option(help="Virtual tokens of prefixes and prompts.")] = 20,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, lion or sgd.")] = "adamw",
    loss_chunk: Annotated[int, typer.Option(help="Tokens whose logits exist at once.")] = 256,
    ranks: Annotated[
        int | None, typer.Option(help="Processes, one a GPU: also the memory of a rank, bytes sent, time of a step.")
    ] = None,
    sharding: Annotated[str, typer.Option(help="With --ranks: fsdp or ddp.")] = "fsdp",
    tflops: Annotated[
        float, typer.Option(help="With --ranks: what a rank reaches, in 10^12 operations a second.")
    ] = 400,
    bandwidth: Annotated[
        str, typer.Option(help="With --ranks: bytes a second that a rank receives, such as 50GB.")
    ] = "50GB",
    why: Annotated[
        list[str] | None, typer.Option(help="Show the arithmetic of a method, such as qlora; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """What fits: the memory of every method for a model, from its config.json alone, and the command to run."""
    import torch

    from ..backends.products import emulated
    from ..introspection import active_isa
    from ..planning import Cluster, plan, scaled_rows

    work: dict[str, Any] = {"batch": batch, "rank": rank, "size": size, "tokens": tokens, "optimizer": optimizer}
    work |= {"loss_chunk": loss_chunk, "device": device}
    if device == "cpu":
        work |= {"matrix_unit": active_isa() == "amx", "widened": emulated(torch.bfloat16)}
    if seq is not None:
        work["seq"] = seq
    found = plan(model, None if memory is None else _memory(memory), **work)
    explained = [found.row(key) for key in why or ()]
    steps = {}
    if ranks is not None:
        cluster = Cluster(ranks, sharding, tflops * 1e12, parse_size(bandwidth))
        steps = scaled_rows(found, cluster)
    if as_json:
        content = found.to_dict()
        if explained:
            content["why"] = {row.way.key: [_lines(e) for e in _both(row)] for row in explained}
        if steps:
            content["ranks"] = {key: step.to_dict() for key, step in steps.items()}
        typer.echo(json.dumps(content, indent=2))
        return
    show(found, explained)
    if steps:
        _show_ranks(found, steps, why or ())


def _memory(text: str) -> float:
    """Bytes; ValueError also for what is a number of gigabytes without its unit."""
    size = parse_size(text)
    if size < _LEAST_MEMORY:
        number = text.strip().rstrip("bB ")
        raise ValueError(f"memory {text!r} is {size:,.0f} bytes; say the unit, such as {number if size else 24}GB")
    return size


def _both(row: Row) -> list[Estimate]:
    return [row.plain] if row.checkpointed is None else [row.plain, row.checkpointed]


def _lines(found: Estimate) -> dict[str, Any]:
    return {
        "checkpointing": found.checkpointing,
        "phase": found.phase,
        "lines": [{"part": line.part, "formula": line.formula, "bytes": line.bytes} for line in found.lines],
    }


def show(found: Plan, explained: list[Row]) -> None:
    """The plan on a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..checkpoint.report import format_bytes

    console = Console(soft_wrap=True, highlight=False)
    shape, work, memory = found.shape, found.work, found.memory
    system = f", {format_bytes(memory.system)} of it the system's (assumed)" if memory.system else ""
    console.print(
        f"[bold]{escape(shape.name)}[/bold]: {shape.parameters:,} parameters ({escape(shape.source)}); "
        f"{shape.layers} layers of {shape.hidden:,}, ffn {shape.ffn:,}, {shape.heads} heads, {shape.kv_heads} of keys"
    )
    console.print(f"{format_bytes(memory.bytes)} ({escape(memory.found)}{system}), device {work.device}")
    console.print(f"a step of {work.batch} x {work.seq:,} tokens, {work.optimizer}\n")
    table = Table()
    columns = ("method", "trained", "of all", "memory", "checkpointing", "fits", "when to use it")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if 0 < i < 5 else "left", no_wrap=i < 6)
    for row in found.rows:
        plain = row.plain
        table.add_row(
            row.way.label,
            _count(plain.trained),
            _share(plain.share),
            format_bytes(plain.total),
            "" if row.checkpointed is None else format_bytes(row.checkpointed.total),
            {"yes": "[green]yes[/green]", "no": "[red]no[/red]"}.get(row.fits, "[yellow]checkpointing[/yellow]"),
            row.way.when,
        )
    wide = Console(width=max(console.width, 132), highlight=False)
    wide.print(table)
    _print_commands(console, found)
    for row in explained:
        for estimate in _both(row):
            _print_arithmetic(wide, row, estimate)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)


def _show_ranks(found: Plan, steps: Mapping[str, Step], explained: Collection[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..checkpoint.report import format_bytes

    cluster = next(iter(steps.values())).cluster
    console = Console(highlight=False)
    wide = Console(width=max(console.width, 132), highlight=False)
    table = Table(
        title=f"{cluster.ranks} ranks, {cluster.sharding}, {found.work.batch} x {found.work.seq:,} tokens each, with "
        f"checkpointing; assumed: {cluster.flops / 1e12:g} TFLOP/s and {format_bytes(cluster.bandwidth)}/s a rank",
        title_justify="left",
    )
    for column in ("method", "memory a rank", "fits", "received a rank", "computing", "sending", "step", "tokens/s"):
        table.add_column(column, justify="left" if column in ("method", "fits") else "right", no_wrap=True)
    for key, step in steps.items():
        table.add_row(
            found.row(key).way.label,
            format_bytes(step.rank.total),
            "[green]yes[/green]" if step.rank.total <= found.memory.free else "[red]no[/red]",
            format_bytes(step.received),
            _seconds(step.computing),
            _seconds(step.sending),
            f"{_seconds(step.least)} to {_seconds(step.most)}",
            f"{step.tokens / step.most:,.0f} to {step.tokens / step.least:,.0f}",
        )
    wide.print(table)
    for key in explained:
        row = found.row(key)
        if row.way.key in steps:
            _print_arithmetic(wide, row, steps[row.way.key].rank)
    console.print(
        "note: no such machine was measured; rates are assumptions, bytes and memory are arithmetic", markup=False
    )


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def _print_commands(console: Any, found: Plan) -> None:
    training = [row for row in found.rows if row.fits != "no" and row.checkpointed is not None]
    best = found.recommended
    shown: list[Row] = []
    if training:
        shown.append(training[0])
    if best is not None and best not in shown:
        shown.append(best)
    for row in shown:
        lightest = bool(training) and row is training[0]
        reason = "the lightest training" if lightest else "the usual choice of those that fit"
        if lightest and row is best:
            reason += ", and the usual choice of those that fit"
        console.print(f"{row.way.label}, {reason}{':' if row.commands else ''}")
        for line in row.commands:
            console.print(f"  {line}", markup=False)
    if not training:
        console.print("no training fits; what would:")
        for line in found.advice:
            console.print(f"  {line}", markup=False)


def _print_arithmetic(console: Any, row: Row, found: Estimate) -> None:
    from rich.table import Table

    from ..checkpoint.report import format_bytes

    how = (
        "" if row.checkpointed is None else ", with checkpointing" if found.checkpointing else ", without checkpointing"
    )
    table = Table(title=f"{row.way.label}{how}: the peak is at: {found.phase}", title_justify="left")
    for column in ("part", "how", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    for line in found.lines:
        table.add_row(line.part, line.formula, f"{line.bytes:,}")
    table.add_section()
    table.add_row("sum", "", f"{found.total:,}")
    console.print(table)
    if len(found.phases) > 1:
        phases = "; ".join(f"{name} {format_bytes(count)}" for name, count in found.phases.items())
        console.print(f"moments of a step: {phases}", markup=False)


def _count(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count) if count else "nothing"


def _share(share: float) -> str:
    return "" if not share else f"{100 * share:.3g}%"


def register(app: typer.Typer) -> None:
    """Add `nybble plan`."""
    app.command("plan")(command)
