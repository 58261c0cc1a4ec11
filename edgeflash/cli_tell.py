"""The commands that measure and tell; they change nothing but the reports they write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from edgeflash.arguments import (
    Floors,
    On,
    Prompts,
    Set,
    finite,
    own_runtime,
    read_counts,
    read_floors,
    read_options,
    read_runtime,
    read_size,
    typed,
)
from edgeflash.errors import EdgeflashError

telling = typer.Typer()
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@telling.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    on: On = None,
    floor: Floors = None,
    bisect: Annotated[
        Path | None, typer.Option(help="fp32 bundle to find the first wrong operator by.")
    ] = None,
    set_: Set = None,
) -> None:
    """Climb the parity ladder on the files that ship. Exit code 2 below a floor."""
    from edgeflash.bundle import Bundle
    from edgeflash.inspect import ladder
    from edgeflash.verify import refuse_below
    from edgeflash.verify import verify as climb

    opened = Bundle.open(bundle, check="sha256")
    runtime, floors = read_runtime(on, opened, set_), read_floors(floor)
    reference = None
    if bisect:
        from edgeflash.export.bisect import check_pair, told_by_component

        reference = Bundle.open(bisect)
        check_pair(opened, reference)
    figures = climb(opened, runtime, floors)
    out.print(ladder(figures))
    if reference:
        for line in told_by_component(opened, reference, figures):
            print(line)
    refuse_below(figures, bundle)


@telling.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    on: On = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Report folder.")] = Path("report"),
    steps: Annotated[str | None, typer.Option(help="Step counts, as in 1,2,4.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Counted runs.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before those.")] = 2,
    minutes: Annotated[
        float,
        typer.Option(callback=finite, min=0, help="Then on and on, without a pause."),
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images a run.")] = 1,
    guidance: Annotated[float | None, typer.Option(callback=finite, help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image.")] = 0,
    low_memory: Annotated[bool, typer.Option(help="Load one component at a time.")] = False,
    prompt: Prompts = None,
    set_: Set = None,
) -> None:
    """Measure latency, memory and size here: bundle folder -> report.json and report.html."""
    from edgeflash.bundle import Bundle
    from edgeflash.report import SystemsTable
    from edgeflash.runtimes.bench import bench as measure
    from edgeflash.runtimes.bench import default_prompts
    from edgeflash.runtimes.measure import Job

    opened = Bundle.open(bundle)
    job = Job(
        bundle=str(bundle),
        runtime=own_runtime(opened) if on is None else on,
        options=read_options(set_),
        prompts=tuple(prompt or default_prompts(opened)),
        batch=batch,
        guidance=guidance,
        seed=seed,
        warmup_runs=warmup,
        runs=runs,
        minutes=minutes,
        low_memory=low_memory,
    )
    with err.status("measuring") as status:
        report = measure(
            job,
            out_dir,
            steps=read_counts(steps) or (),
            command=typed(bundle),
            tell=lambda name, done, of: status.update(escape(f"{name}: {done}/{of}")),
        )
    out.print(SystemsTable(report))
    for note in report.notes:
        out.print(note, style="dim", markup=False)
    print(f"wrote {out_dir / 'report.json'} and {out_dir / 'report.html'}")


@telling.command()
def score(
    bundle: Annotated[Path, typer.Argument(help="Bundle of a shapes model.")],
    on: On = None,
    steps: Annotated[str | None, typer.Option(help="Step counts, as in 1,2,4.")] = None,
    images: Annotated[int, typer.Option(min=20, help="Prompts; FD needs 500.")] = 2000,
    task: Annotated[
        str | None, typer.Option(help="text, inpaint, enlarge or edges; default: its own.")
    ] = None,
    set_: Set = None,
) -> None:
    """Prompt accuracy and Fréchet distance of a bundle of the embedded models."""
    from edgeflash.bundle import Bundle
    from edgeflash.inspect import verdicts
    from edgeflash.score import check
    from edgeflash.score import score as judge
    from edgeflash.shelf import require

    require("score", ["torch", "diffusers"])  # of the judge
    opened = Bundle.open(bundle)
    runtime = read_runtime(on, opened, set_)
    counts = read_counts(steps) or tuple(sorted(opened.manifest.schedules))
    check(opened, runtime, counts, task)
    found = {}
    with err.status("drawing") as status:
        for count in counts:
            found[count] = judge(
                opened,
                runtime,
                steps=count,
                images=images,
                task=task,
                tell=lambda done, of, n=count: status.update(f"{n} steps: {done}/{of}"),  # type: ignore[misc]
            )
    out.print(verdicts(found))


@telling.command()
def compare(
    a: Annotated[Path, typer.Argument(help="report.json")],
    b: Annotated[Path, typer.Argument(help="report.json")],
) -> None:
    """Put two reports side by side, as ratios."""
    from edgeflash.comparison import compare as put
    from edgeflash.comparison import comparison_table
    from edgeflash.report import read_report

    out.print(comparison_table(put(read_report(a), read_report(b)), a.name, b.name))


@telling.command()
def price(
    student: Annotated[
        str, typer.Option(help="sdxs-512, bk-sdm-tiny …, a UNet's config.json, or a folder.")
    ],
    decoder: Annotated[str | None, typer.Option(help="kl, tiny or lite.")] = None,
    size: Annotated[str | None, typer.Option(help="In px, as in 512 or 512x768.")] = None,
    steps: Annotated[str, typer.Option(help="Step counts, as in 1,2,4.")] = "1,2,4",
    on: Annotated[str, typer.Option(help="Runtimes, as in onnx,openvino.")] = "onnx",
    precision: Annotated[str, typer.Option(help="Of each, as in fp32,int8.")] = "fp32",
    device: Annotated[list[str] | None, typer.Option(help="Estimate it there.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Counted runs.")] = 5,
    out_dir: Annotated[Path, typer.Option("--out", help="Report folder.")] = Path("price"),
    set_: Set = None,
) -> None:
    """Tell what a student will cost before it is trained: random weights, real export, real run."""
    from edgeflash.devices import Device
    from edgeflash.price import Way, asked_for, price_tables
    from edgeflash.price import price as ask

    asked, options = asked_for(student, decoder), read_options(set_)  # of the runtimes
    ways = [Way(name, kind, options) for name in on.split(",") for kind in precision.split(",")]
    counts, devices = read_counts(steps) or (), [Device.timed(name) for name in device or ()]
    report = ask(
        asked,
        ways,
        out_dir,
        steps=counts,
        size=read_size(size),
        runs=runs,
        devices=devices,
        command=typed(),
    )
    out.print(price_tables(report, devices))
    print(f"wrote {out_dir / 'report.json'} and {out_dir / 'report.html'}")


@telling.command()
def search(
    budget_ms: Annotated[float, typer.Option(callback=finite, min=0, help="Of a picture.")],
    teacher: Annotated[
        str, typer.Option(help="sd15 …, a UNet's config.json, or a folder: its weights then tell.")
    ] = "sd15",
    decoder: Annotated[str | None, typer.Option(help="kl, tiny or lite.")] = None,
    size: Annotated[str | None, typer.Option(help="In px, as in 512 or 512x768.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of a picture.")] = 1,
    on: Annotated[str | None, typer.Option(help="Runtime to measure blocks on, here.")] = None,
    precision: Annotated[str | None, typer.Option(help="There, as in int8. Default fp32.")] = None,
    device: Annotated[str | None, typer.Option(help="Or: estimate them there.")] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="There, of whole students: counted ones. Default 5.")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Its folder.")] = Path("search"),
) -> None:
    """Search what to remove from a UNet, under a budget: a student's architecture, and why."""
    from edgeflash.devices import Device
    from edgeflash.price import Way, asked_for
    from edgeflash.search import FILE, found_tables
    from edgeflash.search import search as look
    from edgeflash.search_walk import Wish
    from edgeflash.shelf import require

    require("search", ["torch", "diffusers", "transformers"])
    for flag, value in {"--precision": precision, "--runs": runs}.items():
        if value and not on:
            raise EdgeflashError(f"{flag}: goes with --on alone, where something is measured")
    way = Way(on, precision or "fp32") if on else None
    there = Device.timed(device) if device else None
    wish = Wish(budget_ms, steps, way, there, read_size(size))
    found = look(
        asked_for(teacher, decoder), wish, out_dir, runs=runs or 5, command=typed(), console=err
    )
    out.print(found_tables(found))
    print(f"wrote {out_dir / FILE} and {out_dir / 'search.json'}; to train it:")
    print(f"edgeflash distill --by blocks --set blocks.architecture={out_dir / FILE} …")


@telling.command()
def lint(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    device: Annotated[list[str], typer.Option(help="May be given several times.")],
) -> None:
    """Tell whether a bundle fits a device, without the device. Exit code 2 where it does not."""
    from edgeflash.bundle import Bundle
    from edgeflash.devices import Device
    from edgeflash.inspect import judgement
    from edgeflash.runtimes.lint import judge, look, refuse_unfit

    devices = [Device.of(name) for name in dict.fromkeys(device)]
    seen = look(Bundle.open(bundle))
    judged = [judge(seen, each) for each in devices]
    for each in judged:
        out.print(judgement(each))
    refuse_unfit(judged, bundle)


@telling.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="The folder, or a single-file checkpoint.")],
) -> None:
    """Tell what a student, bundle, diffusers folder or checkpoint holds."""
    from edgeflash.inspect import tell

    out.print(tell(folder))


@telling.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="A method, target or runtime.")] = None,
) -> None:
    """Show the shelf, or one plug-in with its options."""
    from edgeflash.inspect import one_plugin, the_shelf

    out.print(one_plugin(name) if name else the_shelf())


@telling.command()
def doctor() -> None:
    """Tell what is installed, what is usable here, and what to install for the rest."""
    from edgeflash.inspect import health

    out.print(health())
