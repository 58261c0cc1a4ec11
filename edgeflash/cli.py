"""The command line: parsing and one-line errors. It knows all rooms, as do demo, price, score.

Rooms are imported inside the commands, so that ``edgeflash --help`` loads none of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.main import get_command

from edgeflash.arguments import (
    own_runtime,
    read_counts,
    read_floors,
    read_options,
    read_recipe,
    read_runtime,
    read_size,
    typed,
)
from edgeflash.errors import in_one_line

if TYPE_CHECKING:
    from edgeflash.runtimes.pipeline import Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Distil a diffusion model BY a method, export it TO a target, run it ON a runtime.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Set a plug-in's option.")
]
Floors = Annotated[list[str] | None, typer.Option("--floor", help="As in L4.psnr_db=30.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="May be given several times.")]


@app.command()
def distill(
    recipe: Annotated[str | None, typer.Argument(help="TOML file, or a shipped recipe.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Student folder.")] = Path("student"),
    by: Annotated[list[str] | None, typer.Option(help="Methods, instead of a recipe.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder, checkpoint, hub id or 'embedded'.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of captioned pictures.")] = None,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Train a student: teacher folder -> student folder. Run it again to resume."""
    made = read_recipe(recipe, by or [], teacher, data, set_ or [])
    if dry_run:
        import tomli_w

        print(tomli_w.dumps(made.resolved()), end="")
        return
    made.methods()  # says which package is missing, before the room is imported
    from edgeflash.distill.run import distill as run

    print(f"wrote {run(made, out_dir)}")


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="Student, diffusers folder or checkpoint.")],
    to: Annotated[str, typer.Option(help="Target; see edgeflash list.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Bundle folder.")] = Path("bundle"),
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8; more: edgeflash list TARGET.")
    ] = "fp32",
    steps: Annotated[str | None, typer.Option(help="Step counts to ship, as in 1,2,4.")] = None,
    size: Annotated[str | None, typer.Option(help="In px, as in 512 or 512x768.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Scale; 1: none; default: the student's.")
    ] = None,
    image_to_image: Annotated[bool, typer.Option(help="Ship the encoder too.")] = False,
    keep_timestep: Annotated[
        bool, typer.Option(help="An input even of one-step students.")
    ] = False,
    prompt: Prompts = None,
    floor: Floors = None,
    set_: Set = None,
) -> None:
    """Lower a student to a target and prove it: student folder -> bundle folder."""
    from edgeflash.roles import Target
    from edgeflash.shelf import make
    from edgeflash.student import Student

    target = make(Target, to, {"precision": precision} | read_options(set_))
    counts, pixels = read_counts(steps), read_size(size)
    from edgeflash.export.line import export_student

    opened = Student.open(student)
    export_student(
        opened,
        target,
        out_dir,
        steps=counts,
        guidance=opened.guidance(guidance),
        size=pixels,
        prompts=tuple(prompt or ()),
        image_to_image=image_to_image,
        fold_timestep=not keep_timestep,
        floors=read_floors(floor),
    )
    print(f"wrote {out_dir}")


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    prompt: Prompts,
    on: Annotated[str | None, typer.Option(help="Runtime; default: the bundle's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Network calls an image.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    strength: Annotated[float, typer.Option(min=0, max=1, help="How much to repaint.")] = 0.6,
    edit: Annotated[str | None, typer.Option(help="inpaint, colourise or enlarge it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where inpaint paints.")] = None,
    low_memory: Annotated[bool, typer.Option(help="Load one component at a time.")] = False,
    out_png: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("image.png"),
    set_: Set = None,
) -> None:
    """Draw: bundle folder and prompt -> PNG."""
    from edgeflash.bundle import Bundle
    from edgeflash.png import check_png, read_picture, write_pngs
    from edgeflash.runtimes.edit import edit_of
    from edgeflash.runtimes.pipeline import Request, TextToImage

    check_png(out_png)
    opened = Bundle.open(bundle)
    runtime = read_runtime(on, opened, set_)
    made = opened.manifest.image
    picture, painted = (None if path is None else read_picture(path) for path in (image, mask))
    request = Request(
        prompt=tuple(prompt or ()),
        seed=seed,
        steps=steps,
        guidance=guidance,
        image=None if edit else picture,
        strength=strength,
        edit=edit_of(edit, picture, painted, (made.height, made.width)),
    )
    with TextToImage(opened, runtime, low_memory=low_memory) as pipeline:
        for event in pipeline.stream(request):
            err.print(f"{event.stage} {event.step}/{event.steps}  {event.elapsed_ms:.0f} ms")
    assert event.result is not None
    _tell(event.result, request.prompts, write_pngs(event.result.images, out_png))


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    on: Annotated[str | None, typer.Option(help="Runtime; default: the bundle's own.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Report folder.")] = Path("report"),
    steps: Annotated[str | None, typer.Option(help="Step counts, as in 1,2,4.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Counted runs.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before those.")] = 2,
    minutes: Annotated[float, typer.Option(min=0, help="Then on without a pause.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images a run.")] = 1,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
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
        runtime=on or own_runtime(opened),
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
    print(f"wrote {out_dir / 'report.json'} and {out_dir / 'report.html'}")


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    on: Annotated[str | None, typer.Option(help="Runtime; default: the bundle's own.")] = None,
    set_: Set = None,
) -> None:
    """Make now what the first load would make here: engines for this machine's GPU."""
    from edgeflash.bundle import Bundle

    opened = Bundle.open(bundle)
    runtime = read_runtime(on, opened, set_)
    for component in opened.manifest.components:
        with err.status(f"building {component.name}"):
            told = runtime.build(bundle, component)
        print(told or f"{component.name}: nothing to build")


@app.command()
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
) -> None:
    """Tell what a student will cost before it is trained: random weights, real export, real run."""
    from edgeflash.devices import Device
    from edgeflash.price import Way, asked_for, price_tables
    from edgeflash.price import price as ask

    asked = asked_for(student, decoder)
    ways = [Way(name, kind) for name in on.split(",") for kind in precision.split(",")]
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


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    on: Annotated[str | None, typer.Option(help="Runtime; default: the bundle's own.")] = None,
    floor: Floors = None,
    set_: Set = None,
) -> None:
    """Climb the parity ladder on the files that ship. Exit code 2 below a floor."""
    from edgeflash.bundle import Bundle
    from edgeflash.inspect import ladder
    from edgeflash.verify import refuse_below
    from edgeflash.verify import verify as climb

    opened = Bundle.open(bundle, check="sha256")
    figures = climb(opened, read_runtime(on, opened, set_), read_floors(floor))
    out.print(ladder(figures))
    refuse_below(figures, bundle)


@app.command()
def lint(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    device: Annotated[list[str], typer.Option(help="May be given several times.")],
) -> None:
    """Tell whether a bundle fits a device, without the device. Exit code 2 where it does not."""
    from edgeflash.bundle import Bundle
    from edgeflash.devices import Device
    from edgeflash.inspect import judgement
    from edgeflash.runtimes.lint import judge, look, refuse_unfit

    devices = [Device.of(name) for name in device]
    seen = look(Bundle.open(bundle))
    judged = [judge(seen, each) for each in devices]
    for each in judged:
        out.print(judgement(each))
    refuse_unfit(judged, bundle)


@app.command()
def score(
    bundle: Annotated[Path, typer.Argument(help="Bundle of a shapes model.")],
    on: Annotated[str | None, typer.Option(help="Runtime; default: the bundle's own.")] = None,
    steps: Annotated[str | None, typer.Option(help="Step counts, as in 1,2,4.")] = None,
    images: Annotated[int, typer.Option(min=20, help="Prompts; FD needs 500.")] = 2000,
    set_: Set = None,
) -> None:
    """Prompt accuracy and Fréchet distance of a bundle of the embedded models."""
    from edgeflash.bundle import Bundle
    from edgeflash.inspect import verdicts

    _distill_installed()
    from edgeflash.score import score as judge

    opened = Bundle.open(bundle)
    runtime = read_runtime(on, opened, set_)
    found = {}
    with err.status("drawing") as status:
        for count in read_counts(steps) or tuple(sorted(opened.manifest.schedules)):
            found[count] = judge(
                opened,
                runtime,
                steps=count,
                images=images,
                tell=lambda done, of, n=count: status.update(f"{n} steps: {done}/{of}"),  # type: ignore[misc]
            )
    out.print(verdicts(found))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="The folder, or a single-file checkpoint.")],
) -> None:
    """Tell what a student, bundle, diffusers folder or checkpoint holds."""
    from edgeflash.inspect import tell

    out.print(tell(folder))


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="A method, target or runtime.")] = None,
) -> None:
    """Show the shelf, or one plug-in with its options."""
    from edgeflash.inspect import one_plugin, the_shelf

    out.print(one_plugin(name) if name else the_shelf())


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="report.json")],
    b: Annotated[Path, typer.Argument(help="report.json")],
) -> None:
    """Put two reports side by side, as ratios."""
    from edgeflash.report import compare as put
    from edgeflash.report import comparison_table, read_report

    out.print(comparison_table(put(read_report(a), read_report(b)), a.name, b.name))


@app.command()
def doctor() -> None:
    """Tell what is installed, what is usable here, and what to install for the rest."""
    from edgeflash.inspect import health

    out.print(health())


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("demo"),
    full: Annotated[bool, typer.Option(help="Rerun the full recipe of the student first.")] = False,
) -> None:
    """Distil, export, verify and bench the embedded models, offline, with a page to look at."""
    from edgeflash.demo import run_demo

    run_demo(out_dir, full=full)


def _distill_installed() -> None:
    """Says which package is missing, before a room that needs it is imported."""
    from edgeflash.roles import Method
    from edgeflash.shelf import find

    find(Method, "attributes")


def _tell(result: Result, prompts: tuple[str, ...], places: list[Path]) -> None:
    for place, prompt, cut in zip(places, prompts, result.cut, strict=True):
        print(f"wrote {place}  ({prompt})")
        if cut:
            print(f"the prompt is too long: not seen was {cut!r}", file=sys.stderr)


def main() -> None:
    """Runs the command line; a person's mistake is one line on stderr and exit code 2."""
    sys.exit(in_one_line(lambda: get_command(app).main(standalone_mode=False)))
