"""`lab fit`: will it fit? The command, and how its answer looks. What is said is worked out in `lab.pricing`,
`lab.planner` and `lab.remedies`.

Imported for every `lab ... --help`, so that nothing but typer may be imported at the top.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.errors import LabError, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from lab.memory.workload import Workload
    from lab.planner import Answer, Cell
    from lab.remedies import Rung

GIB = 2**30
LISTS = ("models", "methods", "optimizers", "gpus")
ASIDE = ("model", "sweep", "spec", "listed", "quick", "as_json", "snippet", "plot")
"""The parameters of `fit` that are no key of a specification."""
BAR = 24
"""Characters of a full bar."""


# The command ----------------------------------------------------------------------------------------------------


def _option(help: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


def fit(
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="A bundled name, a hub id, or a path to a config.json or its folder."),
    ] = None,
    method: Annotated[
        str | None, _option("full (the default), lora, qlora, ...: --list methods.", metavar="NAME")
    ] = None,
    rank: Annotated[str | None, _option("Of LoRA and its kin. Default 16.", metavar="N")] = None,
    alpha: Annotated[str | None, _option("LoRA's scale. Default 16.", metavar="N")] = None,
    dropout: Annotated[str | None, _option("LoRA's dropout. Default 0.", metavar="P")] = None,
    targets: Annotated[str | None, _option("q_proj,v_proj,... Default: all linear.", metavar="NAMES")] = None,
    virtual_tokens: Annotated[str | None, _option("Of prompt, prefix, ptuning. Default 20.", metavar="N")] = None,
    encoder_hidden_size: Annotated[
        str | None, _option("Of prefix, ptuning. Default: the model's.", metavar="N")
    ] = None,
    projection: Annotated[bool | None, _option("Prefix tuning through an MLP.", "--projection")] = None,
    operator: Annotated[int | None, _option("MoRA's: 1, 2, 3, 4 or 6 (the default).", metavar="N")] = None,
    placement: Annotated[
        str | None, _option("Of adapters: houlsby, pfeiffer (the default), parallel.", metavar="KIND")
    ] = None,
    reduction_factor: Annotated[
        str | None, _option("Of adapters: width over bottleneck. Default 16.", metavar="N")
    ] = None,
    dtype: Annotated[str | None, _option("Of the weights: fp32, bf16 (the default), fp16.", metavar="TYPE")] = None,
    amp: Annotated[str | None, _option("Autocast to bf16 or fp16. Default: none.", metavar="TYPE")] = None,
    quantisation: Annotated[str | None, _option("Of the base: nf4 or int8. Default: none.", metavar="KIND")] = None,
    double_quantisation: Annotated[
        bool | None, _option("Of nf4: quantise its scales too.", "--double-quantisation/--no-double-quantisation")
    ] = None,
    preparation: Annotated[str | None, _option("Of a quantised base: kbit or none.", metavar="KIND")] = None,
    optimizer: Annotated[
        str | None, _option("By its Trainer name. Default adamw_torch; --list optimizers.", metavar="NAME")
    ] = None,
    step: Annotated[str | None, _option("foreach (the default), fused or for-loop.", metavar="KIND")] = None,
    batch: Annotated[str | None, _option("Sequences in a micro-batch. Default 1.", metavar="N")] = None,
    length: Annotated[str | None, _option("Tokens in a sequence. Default 1024.", metavar="N")] = None,
    accumulation: Annotated[str | None, _option("Micro-batches in an update. Default 1.", metavar="N")] = None,
    checkpointing: Annotated[
        bool | None, _option("Activations are computed again in backward.", "--checkpointing/--no-checkpointing")
    ] = None,
    attention: Annotated[str | None, _option("eager, sdpa (the default) or flash_attention_2.", metavar="KIND")] = None,
    loss: Annotated[str | None, _option("full (the default), full-shifted, chunked, fused.", metavar="KIND")] = None,
    gpu: Annotated[str | None, _option("The card by name: --list gpus.", metavar="NAME")] = None,
    vram_gib: Annotated[str | None, _option("The card by its size.", "--vram", metavar="GIB")] = None,
    inference: Annotated[bool | None, _option("Weights and key-value cache, no training.", "--inference")] = None,
    sweep: Annotated[
        list[str] | None,
        _option("A table and a plot: batch=1..64 length=512..8192.", "--sweep", metavar="RANGE..."),
    ] = None,
    spec: Annotated[str | None, _option("JSON objects, one a line; - is standard input.", metavar="FILE")] = None,
    listed: Annotated[str | None, _option(f"What is known: {', '.join(LISTS)}.", "--list", metavar="WHAT")] = None,
    quick: Annotated[bool, _option("Closed form alone: no torch, half a second.", "--quick")] = False,
    as_json: Annotated[bool, _option("Print JSON.", "--json")] = False,
    snippet: Annotated[bool, _option("Print the TrainingArguments that were priced.", "--snippet")] = False,
    plot: Annotated[Path, _option("Of the sweep, SVG or PNG. Default fit-sweep.svg.", metavar="PATH")] = Path(
        "fit-sweep.svg"
    ),
) -> None:
    """Predict peak memory before the run. Exit 0: it fits, or no card was named; 1: it does not; 2: bad input."""
    asked = {name: value for name, value in locals().items() if value is not None and name not in ASIDE}
    names = [word for word in model or () if sweep is None or "=" not in word]
    if listed:
        return _print_list(listed, as_json)
    _quieten()
    if spec:
        if asked or names or sweep:
            raise LabError("spec: the lines say it all. Drop the model and the other options, but for --quick.")
        return _stream(spec, quick)
    if len(names) != 1:
        found = f"{len(names)} models are given: {', '.join(names)}" if names else "no model is given"
        raise LabError(f"{found}. Give one: lab fit MODEL. See lab fit --list models.")

    from lab import planner, pricing
    from lab.snippet import snippet as training_code

    workload = pricing.read_spec({**asked, "model": names[0]})
    if sweep is not None:
        ranges = planner.read_ranges([*sweep, *(word for word in model or () if "=" in word)], workload)
        return _sweep(names[0], workload, ranges, quick, as_json, plot)
    answer = planner.answer(workload, quick)
    if as_json:
        code = {"snippet": training_code(workload, names[0])} if snippet else {}
        print(json.dumps(answer.as_dict() | code, indent=1))
    elif snippet:
        print(f"# {headline(answer)}\n{training_code(workload, names[0])}", end="")
    else:
        _print_answer(names[0], answer)
    raise typer.Exit(1 if answer.fits is False else 0)


def _quieten() -> None:
    """The stack's warnings are for those who train with it; here they would stand between the answers."""
    import os
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# The stream -----------------------------------------------------------------------------------------------------


def _stream(source: str, quick: bool) -> None:
    """Answer every line of a file or of standard input by a line, at once and in order. A mistake costs its line."""
    try:
        lines: Iterator[bytes] = iter(sys.stdin.buffer if source == "-" else Path(source).open("rb"))  # noqa: SIM115
        for number, line in enumerate(lines, 1):
            print(json.dumps(_reply(number, line, quick)), flush=True)
    except BrokenPipeError:
        sys.stdout = None  # who reads has gone; Python would complain once more at the end
    except OSError as error:
        raise LabError(f"spec: {source} cannot be read: {error.strerror}. Correct the path.") from None


def _reply(number: int, line: bytes, quick: bool) -> dict[str, Any]:
    """The answer to one line of the stream."""
    from lab import planner, pricing

    identity = None
    try:
        spec = _parse_line(number, line)
        identity = spec.get("id")
        return {"id": identity, **planner.answer(pricing.read_spec(spec), quick, confirm=False).as_dict()}
    except LabError as error:
        message = str(error)
    except Exception as error:  # whatever it is, the stream goes on
        message = f"line {number}: {type(error).__name__}: {error}"
    return {"id": identity, "error": " ".join(message.split())}


def _parse_line(number: int, line: bytes) -> Mapping[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        spec = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise LabError(f"line {number} is not JSON: {error}. Write one object a line.") from None
    if not isinstance(spec, dict):
        raise LabError(f"line {number} holds a {type(spec).__name__}, not an object. Write one object a line.")
    return spec


# The answer for people ------------------------------------------------------------------------------------------


def headline(answer: Answer) -> str:
    """The answer in one line."""
    needed = f"needs {gib(answer.shown_bytes)}"
    if answer.card_bytes is None or answer.spare_bytes is None:
        return f"N{needed[1:]} on the card. Name one to hear whether it fits: --gpu NAME or --vram GIB."
    of = f"{needed} of {gib(answer.card_bytes)}"
    if answer.fits:
        return f"Fits: {of}, {gib(answer.spare_bytes)} to spare."
    return f"Does not fit: {of}, {gib(max(-answer.spare_bytes, GIB // 100))} too much."


def gib(size: float) -> str:
    """Bytes for people; what is small in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def _print_answer(name: str, answer: Answer) -> None:
    console = _console()
    colour = {True: "bold green", False: "bold red", None: "bold"}[answer.fits]
    console.print(headline(answer), style=colour)
    console.print(describe(name, answer.workload), style="dim")
    console.print()
    _print_parts(console, answer)
    console.print()
    for line in _details(answer):
        console.print(line)
    if answer.card_bytes is not None:
        console.print(_limits(answer))
    if answer.fits is False:
        _print_ladder(console, answer)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def describe(name: str, w: Workload, swept: bool = False) -> str:
    """The workload in one line, without its size where that is `swept`."""
    from lab.methods import RANKED

    rank = f" rank {w.rank}" if w.method in RANKED else ""
    base = f" on {w.held_as}" + (" with double quantisation" if w.double_quantisation else "") if w.held_as else ""
    size = f"{w.batch} x {w.length:,} tokens" + (f" x {w.accumulation}" if w.accumulation > 1 else "")
    card = w.gpu or (f"a card of {w.vram_gib:g} GiB" if w.vram_gib else "")
    if w.inference:
        words = [f"inference in {w.dtype}{base}"]
    else:
        amp = f" under {w.amp} autocast" if w.amp else ""
        words = [f"{w.method}{rank}{base} in {w.dtype}{amp}", w.optimizer, f"{w.attention} attention", f"{w.loss} loss"]
        words += ["checkpointing"] if w.checkpointing else []
    return ", ".join([name, *([] if swept else [size]), *words, *([card] if card else [])])


def _print_parts(console: Console, answer: Answer) -> None:
    """A bar for each part of what the card will show."""
    from lab.cards import CONTEXT_BYTES

    peak = answer.prediction.peak_bytes
    parts = {name.replace("_", " "): size for name, size in answer.prediction.parts.items() if size > 2**20}
    parts |= {"reserved": answer.shown_bytes - peak - CONTEXT_BYTES, "context": CONTEXT_BYTES}
    whole = max(answer.shown_bytes, answer.card_bytes or 0)
    for name, size in parts.items():
        full = round(BAR * size / whole)
        bar = "━" * full + "╌" * (BAR - full)
        share = f"{size / answer.shown_bytes:4.0%}"
        console.print(f"  {name:12} [cyan]{bar}[/cyan] {gib(size):>11} {share}")


def _details(answer: Answer) -> Iterator[str]:
    """Where the peak is, what trains, what the card shows."""
    from lab.cards import CONTEXT_BYTES, cautions

    p = answer.prediction
    if not answer.workload.inference:
        phases = ", ".join(f"{phase} {gib(peak)}" for phase, peak in p.phases.items())
        yield f"Peaks in {p.peak_phase}: {phases}; {gib(p.steady_bytes)} between updates."
        trainable, total = p.parameters["trainable"], p.parameters["total"]
        yield f"Trains {trainable:,} of {total:,} parameters ({trainable / total:.3%}); stores {p.parameters['stored']:,}."
    reserved = answer.shown_bytes - p.peak_bytes - CONTEXT_BYTES
    yield (
        f"The card will show about {gib(answer.shown_bytes)}: {gib(p.peak_bytes)} allocated, {gib(reserved)} that torch "
        f"reserves beyond, {gib(CONTEXT_BYTES)} of CUDA's own."
    )
    if p.host_bytes:
        yield f"Up to {gib(p.host_bytes)} of paged optimizer state more, which moves to the host when the card is full."
    for caution in cautions(answer.workload):
        yield f"Mind: {caution}."


def _limits(answer: Answer) -> str:
    """The largest batch and the longest sequence."""
    w = answer.workload
    batch = f"{answer.largest_batch:,}" if answer.largest_batch else "none, not even 1"
    tokens = f"{answer.longest_sequence:,}" if answer.longest_sequence else "none"
    return f"Largest batch at {w.length:,} tokens: {batch}. Longest sequence at batch {w.batch:,}: {tokens}."


def _print_ladder(console: Console, answer: Answer) -> None:
    from lab.remedies import ladder

    console.print("\nWhat would make it fit, cheapest first, each on top of those before:")
    rungs = 0
    for rungs, rung in enumerate(ladder(answer), 1):
        for line in _rung_lines(rungs, rung):
            console.print(line, style="green" if rung.fits else None)
    if not rungs or not rung.fits:
        console.print("  Nothing here is enough: it takes several cards, or a smaller model.")


def _rung_lines(number: int, rung: Rung) -> Iterator[str]:
    options = f"  {rung.options}" if rung.options else ""
    yield f"{number:3}. {gib(rung.needed_bytes):>10}  {'fits' if rung.fits else '    '}  {rung.name}{options}"
    yield f"{'':23}time: {rung.time}; quality: {rung.quality}"


# Lists and sweeps -----------------------------------------------------------------------------------------------


def _print_list(what: str, as_json: bool) -> None:
    if what not in LISTS:
        raise unknown("list", what, LISTS)
    rows = list(_rows(what))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        name, *facts = row.values()
        words = [f"{fact:>18,}" if isinstance(fact, int) else str(fact) for fact in facts]
        print("  ".join([f"{name:26}", *words]).rstrip())


def _rows(what: str) -> Iterator[dict[str, Any]]:
    """What `--list` tells, a dictionary for each line."""
    from lab import pricing
    from lab.cards import GPUS
    from lab.memory.architecture import Architecture
    from lab.memory.workload import OPTIMIZERS

    match what:
        case "models":
            found = {name: Architecture.of(config) for name, config in pricing.bundled_configs().items()}
            for name, shape in sorted(found.items(), key=lambda entry: entry[1].parameters()):
                yield {"name": name, "parameters": shape.parameters(), "kind": shape.kind}
        case "gpus":
            for gpu in GPUS.values():
                yield {"name": gpu.name, "total_bytes": gpu.total_bytes, "family": gpu.family}
        case _:
            for name in pricing.methods() if what == "methods" else OPTIMIZERS:
                yield {"name": name}


def _sweep(
    name: str, workload: Workload, ranges: Mapping[str, Sequence[int]], quick: bool, as_json: bool, plot: Path
) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import track

    from lab import planner
    from lab.cards import card_bytes, usable_bytes

    batches, lengths = ranges["batch"], ranges["length"]
    found = list(
        track(
            planner.sweep(workload, batches, lengths, quick),
            f"{len(batches) * len(lengths)} predictions",
            total=len(batches) * len(lengths),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
    )
    if as_json:
        print(json.dumps([asdict(cell) for cell in found], indent=1))
        return
    card = card_bytes(workload)
    _print_sweep(describe(name, workload, swept=True), found, batches, lengths)
    draw_sweep(name, found, None if card is None else usable_bytes(card, quick), plot)
    print(f"Plot: {plot}")


def _print_sweep(title: str, found: Sequence[Cell], batches: Sequence[int], lengths: Sequence[int]) -> None:
    """Lengths down, batches across, GiB allocated at the peak; what does not fit is marked."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=200)
    print(f"Peak, GiB allocated: {title}")
    table = Table(caption_justify="left")
    table.add_column("length", justify="right")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    cells = {(cell.batch, cell.length): cell for cell in found}
    for length in lengths:
        row = [cells[batch, length] for batch in batches]
        table.add_row(f"{length:,}", *(_shown(cell) for cell in row))
    if any(cell.fits is False for cell in found):
        table.caption = "* does not fit"
    console.print(table)


def _shown(cell: Cell) -> str:
    size = f"{cell.peak_bytes / GIB:.2f}"
    return f"[red]{size} *[/red]" if cell.fits is False else f"[green]{size}[/green]" if cell.fits else size


def draw_sweep(name: str, found: Sequence[Cell], usable_bytes: int | None, path: Path) -> None:
    """Peak against length, a line for each batch (against batch, if only that was swept), with the card's limit."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": name, "font.size": 10})
    import matplotlib.pyplot as plt

    lengths, batches = sorted({cell.length for cell in found}), sorted({cell.batch for cell in found})
    across, lines = ("length", batches) if len(lengths) > 1 else ("batch", lengths)
    line_of = "batch" if across == "length" else "length"
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    # From pale to dark, as what the lines differ in grows.
    shades = plt.get_cmap("viridis_r")
    for number, value in enumerate(lines):
        cells = [cell for cell in found if getattr(cell, line_of) == value]
        x, y = [getattr(cell, across) for cell in cells], [cell.peak_bytes / GIB for cell in cells]
        colour = shades(0.2 + 0.8 * number / max(1, len(lines) - 1))
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=f"{line_of} {value:,}")
    if usable_bytes is not None:
        axes.axhline(usable_bytes / GIB, color="black", linestyle="--", linewidth=1, label="the card's limit")
    axes.set(title=f"{name}: predicted peak", xlabel=across, ylabel="GiB allocated", xscale="log", yscale="log")
    for axis, ticks in ((axes.xaxis, lengths if across == "length" else batches), (axes.yaxis, None)):
        axis.set_major_formatter("{x:,.4g}")
        axis.set_minor_formatter("{x:,.4g}" if ticks is None else "")
        if ticks:
            axis.set_ticks(ticks)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    try:
        plt.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise LabError(f"plot: cannot write {path}: {error}. Choose a path that ends in .svg or .png.") from None
    finally:
        plt.close(figure)
