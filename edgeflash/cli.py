"""The command line: parsing and one-line errors. Here are the commands that make something.

Those that measure and tell are in `cli_tell.py`. Rooms are imported inside the commands, so that
``edgeflash --help`` loads none of them. Both files know all rooms, as do demo, price, score, choice
and planning.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.main import get_command

from edgeflash import __version__
from edgeflash.arguments import (
    Floors,
    On,
    Prompts,
    Recorded,
    Set,
    SetRecipe,
    finite,
    read_counts,
    read_floors,
    read_loras,
    read_options,
    read_recipe,
    read_runtime,
    read_size,
    resolved,
    typed,
    with_precision,
)
from edgeflash.cli_tell import lint, telling
from edgeflash.errors import EdgeflashError, ended_as_by_ctrl_c, in_one_line

if TYPE_CHECKING:
    from edgeflash.runtimes.pipeline import Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Distil a diffusion model BY a method, export it TO a target, run it ON a runtime.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@app.callback()
def edgeflash(
    version: Annotated[bool, typer.Option("--version", help="Print it and stop.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def distill(
    recipe: Annotated[str | None, typer.Argument(help="TOML file, or a shipped recipe.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Student folder.")] = Path("student"),
    by: Annotated[list[str] | None, typer.Option(help="Method, not a recipe; repeatable.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder, checkpoint, hub id or 'embedded'.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of captioned pictures.")] = None,
    set_: SetRecipe = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Train a student: teacher folder -> student folder. Run it again to resume."""
    from edgeflash.disk import check_replaceable

    made = read_recipe(recipe, by or [], teacher, data, set_ or [])
    if dry_run:
        import tomli_w

        print(tomli_w.dumps(resolved(made)), end="")
        return
    check_replaceable(out_dir, kind="student")
    made.methods()  # says which package is missing, before the room is imported
    from edgeflash.distill.run import distill as run

    print(f"wrote {run(made, out_dir)}")


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="Student, diffusers folder or checkpoint.")],
    to: Annotated[str, typer.Option(help="Target; see edgeflash list.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Bundle folder.")] = Path("bundle"),
    precision: Annotated[
        str | None,
        typer.Option(help="Default fp32. fp16, int8 …: edgeflash list TARGET. auto: the best."),
    ] = None,
    prefer: Annotated[
        str | None, typer.Option(help="What auto is to gain: speed, as by default, or size.")
    ] = None,
    timed_with: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of auto: an option of the runtime it times."),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Of auto: what edgeflash bench wrote on the device; may be repeated."),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Step counts to ship, as in 1,2,4.")] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|T,...", help="align-your-steps (10 steps), or numbers, as in 999,499."
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="In px, as in 512 or 512x768.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            callback=finite, min=0, max=100, help="Scale; 1: none; default: the student's."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[=SCALE]", help="Fuse it; may be repeated.")
    ] = None,
    image_to_image: Annotated[bool, typer.Option(help="Ship the encoder too.")] = False,
    keep_timestep: Annotated[
        bool, typer.Option(help="Leave it an input, even of one-step students.")
    ] = False,
    merge_tokens: Annotated[
        float,
        typer.Option(callback=finite, metavar="SHARE", help="Of the denoiser's tokens, as in 0.5."),
    ] = 0.0,
    deep_cache: Annotated[
        int | None,
        typer.Option(metavar="INTERVAL", min=2, help="Run all of the UNet every so many steps."),
    ] = None,
    cache_branch: Annotated[
        int, typer.Option(min=0, help="Of --deep-cache: the skip whose feature is kept.")
    ] = 0,
    gate: Annotated[
        int | None,
        typer.Option(metavar="STEP", min=1, help="Hear the prompt in so many first steps alone."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="As of edgeflash lint: set what suits it, and judge.")
    ] = None,
    prompt: Recorded = None,
    floor: Floors = None,
    set_: Set = None,
) -> None:
    """Lower a student to a target and prove it: student folder -> bundle folder."""
    from edgeflash.choice import plain, suited
    from edgeflash.disk import check_replaceable
    from edgeflash.elsewhere import Elsewhere
    from edgeflash.export import nursery
    from edgeflash.export_options import ExportOptions
    from edgeflash.roles import Target
    from edgeflash.shelf import make
    from edgeflash.student import Student

    auto, options = precision == "auto", read_options(set_)
    for flag, value in {"--prefer": prefer, "--timed-with": timed_with, "--report": report}.items():
        if value and not auto:
            raise EdgeflashError(f"{flag}: goes with --precision auto alone")
    if report and (timed_with or prefer == "size"):
        raise EdgeflashError("--report: goes with neither --timed-with nor --prefer size")
    timed = read_options(timed_with, "--timed-with")
    if precision:
        options = with_precision(to, precision, options)
    if device:
        options = suited(to, device, options, auto=auto)
    target = plain(to, options) if auto else make(Target, to, options)
    elsewhere = Elsewhere.read(report, to) if report else None
    counts, pixels, floors = read_counts(steps), read_size(size), read_floors(floor)
    check_replaceable(out_dir, kind="bundle")
    opened = Student.open(student, read_loras(lora))
    asked = ExportOptions(
        steps=counts,
        timesteps=timesteps,
        guidance=opened.guidance(guidance),
        size=pixels,
        prompts=tuple(prompt or ()),
        image_to_image=image_to_image,
        fold_timestep=not keep_timestep,
        merge_tokens=merge_tokens,
        deep_cache=deep_cache,
        cache_branch=cache_branch,
        gate=gate,
        floors=floors,
        record_all=auto,
    )
    with nursery.begun(opened, target) as imports:  # while this process does so, too
        from edgeflash.export.line import export_student

        lower = partial(export_student, opened, options=asked, lasting=not auto, nursery=imports)
        if auto:
            from edgeflash.choice import choice_table, export_best

            given = (to, options, lower, out_dir, prefer or "speed", err, opened.folder)
            made = export_best(*given, timed_with=timed, floors=floors, report=elsewhere)
            out.print(choice_table(made))
        else:
            lower(target, out_dir)
    print(f"wrote {out_dir}")
    if device:
        lint(out_dir, [device])


@app.command()
def plan(
    student: Annotated[Path, typer.Argument(help="Student, diffusers folder or checkpoint.")],
    to: Annotated[str, typer.Option(help="Target that takes plans: onnx, openvino, tensorrt.")],
    out_toml: Annotated[Path, typer.Option("--out", help="Plan to write.")] = Path("plan.toml"),
    budget_mib: Annotated[
        float | None, typer.Option(callback=finite, min=0, help="Of the bundle.")
    ] = None,
    budget_ms: Annotated[
        float | None, typer.Option(callback=finite, min=0, help="Of a picture, here.")
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="Of the plan, as in int8-weights,int4-weights.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Step counts to ship, as in 1,2,4.")] = None,
    size: Annotated[str | None, typer.Option(help="In px, as in 512 or 512x768.")] = None,
    prompt: Recorded = None,
    report_dir: Annotated[Path, typer.Option("--report", help="Its folder.")] = Path("report"),
    set_: Set = None,
) -> None:
    """Search what to quantize, under a budget: student folder -> plan.toml and a report."""
    from edgeflash.export_options import ExportOptions
    from edgeflash.planning import Budget, Wish, search
    from edgeflash.planning_report import plans_table
    from edgeflash.roles import Target
    from edgeflash.shelf import find
    from edgeflash.student import Student

    budget = Budget(budget_mib, budget_ms)
    asked = ExportOptions(
        steps=read_counts(steps), size=read_size(size), prompts=tuple(prompt or ())
    )
    held = tuple(words.split(",")) if words else ()
    find(Target, to)  # says what is missing, before the work
    wish = Wish(to, read_options(set_), budget, held, asked)
    found = search(Student.open(student), wish, out_toml, report_dir, err, command=typed())
    out.print(plans_table(found))
    print(f"wrote {out_toml}, {report_dir / 'report.json'} and {report_dir / 'report.html'}")


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    on: On = None,
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
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    prompt: Prompts,
    on: On = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Network calls an image.")] = None,
    guidance: Annotated[float | None, typer.Option(callback=finite, help="Guidance scale.")] = None,
    negative: Annotated[str, typer.Option(help="Text to steer away from, where guided.")] = "",
    image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            callback=finite, min=0, max=1, help="How much to repaint: 0.6, with a mask 1."
        ),
    ] = None,
    edit: Annotated[str | None, typer.Option(help="inpaint, colourise or enlarge it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where to paint.")] = None,
    control: Annotated[
        Path | None, typer.Option(help="For what steers it: edges, or what that was made for.")
    ] = None,
    control_scale: Annotated[float, typer.Option(min=0, help="Of what that adds.")] = 1.0,
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
    paths = (image, mask, control)
    picture, painted, steering = (None if path is None else read_picture(path) for path in paths)
    request = Request(
        prompt=tuple(prompt or ()),
        seed=seed,
        steps=steps,
        guidance=guidance,
        negative=negative,
        image=None if edit else picture,
        strength=strength,
        mask=None if edit or painted is None else painted[..., 0] >= 128,
        edit=edit_of(edit, picture, painted, (made.height, made.width)),
        control=steering,
        control_scale=control_scale,
    )
    with TextToImage(opened, runtime, low_memory=low_memory) as pipeline:
        for event in pipeline.stream(request):
            err.print(f"{event.stage} {event.step}/{event.steps}  {event.elapsed_ms:.0f} ms")
    assert event.result is not None
    _tell(event.result, request.prompts, write_pngs(event.result.images, out_png))


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("demo"),
    full: Annotated[bool, typer.Option(help="Rerun the full recipe of the student first.")] = False,
) -> None:
    """Distil, export, verify and bench the embedded models, offline, with a page to look at."""
    from edgeflash.demo import run_demo

    run_demo(out_dir, full=full)


@app.command()
def benchmark_methods(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="Or ablations, of distill/ablations.toml. Default: all methods."),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("benchmark"),
    minutes: Annotated[
        float, typer.Option(callback=finite, min=0.01, help="Of training, each.")
    ] = 20,
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings of each; the table tells their spread.")
    ] = 1,
) -> None:
    """Train every few-step method for an equal time, and judge them. Run it again to resume."""
    from edgeflash.roles import Method
    from edgeflash.shelf import require

    require("benchmark-methods", Method.needs)
    from edgeflash.benchmark import benchmark

    benchmark(out_dir, tuple(methods or ()), minutes=minutes, seeds=seeds)
    print(f"wrote {out_dir / 'RESULTS.md'}")


app.add_typer(telling)


def _tell(result: Result, prompts: tuple[str, ...], places: list[Path]) -> None:
    for place, prompt, cut in zip(places, prompts, result.cut, strict=True):
        print(f"wrote {place}  ({prompt})")
        if cut:
            print(f"the prompt is too long: not seen was {cut!r}", file=sys.stderr)


def main() -> None:
    """Runs the command line; a person's mistake is one line on stderr and exit code 2."""
    with ended_as_by_ctrl_c():
        sys.exit(in_one_line(lambda: get_command(app).main(standalone_mode=False)))
