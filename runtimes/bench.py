"""Bundle -> figures: every step count in a process of its own, one report of them all.

What is measured, and how:

- *cold load*: opening all components in a fresh process, the import of the vendor's runtime
  included; the page cache is as it is, so a file read lately comes from memory;
- *warm load*: closing and opening again in the same process, median of three;
- *first image*: the first after the cold load; then the warm-up runs, not counted; then the runs;
- *latency*: prompt to pixels of one batch; *stages*: the parts of it, for the denoiser and its
  cached graph one step;
- *drift*: after the runs, drawing without a pause for as long as is asked for: by how much the
  last twentieth of it is slower than the first;
- *peak RSS*: of the measured process, interpreter and vendor's runtime included, before the
  warm loads; not the memory of a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeflash import shelf, talk
from edgeflash.bundle import Bundle
from edgeflash.disk import MANIFEST, check_writable, sha256_of
from edgeflash.errors import EdgeflashError
from edgeflash.machine import Machine
from edgeflash.report import (
    PRECISION,
    REPORT,
    Conditions,
    Percentiles,
    Report,
    Sustained,
    System,
)
from edgeflash.report_html import write_html
from edgeflash.roles import Runtime
from edgeflash.runtimes.measure import Job, Measured, request_of
from edgeflash.runtimes.pipeline import TextToImage
from edgeflash.runtimes.room import check_batch

Tell = Callable[[str, int, int], None]
PAGE = "report.html"
PROMPT = "a photograph of a red ball on a wooden table"  # where the bundle has no goldens


def bench(
    job: Job, out: Path, *, steps: Sequence[int] = (), command: str | None = None, tell: Tell
) -> Report:
    """Measures the bundle and writes `report.json`, `report.html` and the pictures below ``out``.

    Args:
        job: what to measure; its ``steps`` and ``images`` are set here.
        steps: step counts, a system each; none given: the bundle's default.
        command: that makes this report again, for the record.
        tell: called as ``tell(system, images done, images in all)``.

    Raises:
        EdgeflashError: the bundle cannot be run like this, or the measured process was killed.
    """
    machine = Machine.here()  # before the work, so that the load is that of others
    bundle = Bundle.open(job.bundle)
    counts = steps or (bundle.manifest.default_steps,)
    cut = _check(bundle, job, counts)
    check_writable(out)
    systems = [
        _system(bundle, job.model_copy(update={"steps": count}), out, f"images/{i}", tell)
        for i, count in enumerate(counts)
    ]
    report = Report(
        title=f"{bundle.manifest.name} on {job.runtime}",
        command=command,
        machine=machine,
        prompts=job.prompts,
        systems=tuple(systems),
        notes=_notes(bundle, shelf.make(Runtime, job.runtime, job.options), machine, cut),
    )
    report.save(out / REPORT)
    write_html(report, out / PAGE)
    return report


def _check(bundle: Bundle, job: Job, counts: Sequence[int]) -> list[str]:
    """Asks for every step count before the first is measured.

    Returns:
        The ends of prompts that the text encoder will not see.

    Raises:
        EdgeflashError: the bundle cannot be run like this, or not here.
    """
    pipeline = TextToImage(bundle, shelf.make(Runtime, job.runtime, job.options))
    for count in counts:
        pipeline.check(request_of(bundle, job.model_copy(update={"steps": count}), job.prompts))
    check_batch(bundle, job.batch)
    return [cut for prompt in job.prompts if (cut := pipeline.prompts.unread(prompt))]


def _system(bundle: Bundle, job: Job, out: Path, images: str, tell: Tell) -> System:
    """One step count; its pictures go to the folder ``out / images``."""
    manifest = bundle.manifest
    precision = bundle.denoiser.precision
    name = f"{manifest.name} {precision}, {job.steps} step{'s' * (job.steps != 1)} on {job.runtime}"
    job = job.model_copy(update={"images": str(out / images)})
    found = run_apart(job, lambda done, of: tell(name, done, of))
    return system_of(name, bundle, job, found, tuple(f"{images}/{file}" for file in found.images))


def default_prompts(bundle: Bundle) -> tuple[str, ...]:
    """The prompts of the bundle's goldens, four at the most."""
    goldens = dict.fromkeys(golden.prompt for golden in bundle.manifest.goldens)
    return tuple(goldens)[:4] or (PROMPT,)


def run_apart(job: Job, tell: Callable[[int, int], None]) -> Measured:
    """`measure` in a fresh process.

    Raises:
        EdgeflashError: what went wrong there.
    """
    command = [sys.executable, "-m", "edgeflash.runtimes.measure"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads would fill and block
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as child,
    ):
        assert child.stdin and child.stdout
        try:
            child.stdin.write(job.model_dump_json())
            child.stdin.close()
            found = _listen(child.stdout, tell)
        except BaseException:
            child.kill()
            raise
        if found is None:
            code = child.wait()
            errors.seek(0)
            raise EdgeflashError(_why(code, errors.read()))
    return found


def _listen(lines: Any, tell: Callable[[int, int], None]) -> Measured | None:
    for line in lines:
        message = talk.heard(line)
        if "error" in message:
            raise EdgeflashError(message["error"])
        if "measured" in message:
            return Measured.model_validate(message["measured"])
        if "done" in message:
            tell(message["done"], message["of"])
    return None


def _why(code: int, complaint: str) -> str:
    last = complaint.strip().splitlines()[-1:] or ["it said nothing"]
    if code == talk.KILLED:
        return "bench: the measured process was killed, most likely out of memory: try --low-memory"
    return f"bench: the measured process ended with code {code}: {last[0]}"


def system_of(
    name: str, bundle: Bundle, job: Job, found: Measured, images: tuple[str, ...] = ()
) -> System:
    """The figures of one measured process, under a name; ``images`` relative to the report."""
    latency = Percentiles.of(found.runs_ms)
    parts = bundle.manifest.components
    return System(
        name=name,
        steps=found.steps,
        latency_ms_p50=latency.p50_ms,
        latency_ms_p90=latency.p90_ms,
        images_per_s=job.batch * 1000 / latency.p50_ms,
        cold_load_ms=found.cold_load_ms,
        warm_load_ms=found.warm_load_ms,
        first_image_ms=found.first_image_ms,
        size_mib=bundle.bytes / 2**20,
        sizes_mib={part.name: sum(f.bytes for f in part.files) / 2**20 for part in parts},
        peak_rss_mib=found.peak_rss_mib,
        stages={stage: Percentiles.of(samples) for stage, samples in found.stages_ms.items()},
        calls={stage: calls for stage, calls in _calls(found).items() if calls > 1},
        sustained=Sustained.of(found.sustained_ms) if found.sustained_ms else None,
        manifest_sha256=sha256_of(bundle.folder / MANIFEST),
        conditions=_conditions(job, found),
        images=images,
        extra={PRECISION: bundle.denoiser.precision},
    )


def _calls(found: Measured) -> dict[str, int]:
    """How often each stage ran for an image."""
    return {stage: len(ms) // len(found.runs_ms) for stage, ms in found.stages_ms.items()}


def _conditions(job: Job, found: Measured) -> Conditions:
    return Conditions(
        runtime=job.runtime,
        device=found.device,
        options=found.options,
        height=found.height,
        width=found.width,
        batch=job.batch,
        seed=job.seed,
        guidance_scale=found.guidance_scale,
        low_memory=job.low_memory,
        warmup_runs=job.warmup_runs,
        runs=job.runs,
        minutes=job.minutes,
    )


def timed_on(name: str, options: dict[str, Any]) -> Runtime:
    """A runtime whose times are those of a device.

    Raises:
        EdgeflashError: they are not, or options that it has not.
    """
    runtime = shelf.make(Runtime, name, options)
    if runtime.untimed:
        raise EdgeflashError(f"--on {name}: {runtime.untimed}, or leave it out")
    return runtime


def _notes(
    bundle: Bundle, runtime: Runtime, machine: Machine, cut: Sequence[str]
) -> tuple[str, ...]:
    notes = [
        "Cold load: a fresh process with the page cache as it was; files read lately come from it.",
        "Peak RSS: of the measured process, interpreter included; not the memory of a GPU.",
    ]
    if runtime.untimed:
        notes.append(f"Times: {runtime.untimed}.")
    if machine.busy:
        notes.append(
            f"The machine was busy: load {machine.load_1min:g} on {machine.cores} cores before the "
            "first run. These times are longer than those of an idle machine."
        )
    if bundle.manifest.conditions:
        notes.append("The network sees a picture too: it was given patches of colour.")
    if bundle.controlnet:
        notes.append(
            f"{bundle.denoiser.name} is timed with its ControlNet, which saw the edges of patches "
            "of colour."
        )
    elif bundle.steering:
        notes.append("Its adapter saw the edges of patches of colour.")
    if cut:
        notes.append(
            f"Prompts longer than this bundle reads: {len(cut)}; not seen of the first: {cut[0]!r}."
        )
    return tuple(notes)
