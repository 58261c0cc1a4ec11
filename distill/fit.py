"""Whether a recipe's methods fit its folders and this machine, asked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeflash import shelf
from edgeflash.control import CALLED
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Recipe
from edgeflash.roles import Method
from edgeflash.schedule import Guidance
from edgeflash.student import Student

from .loop import parts
from .process import FLOW, predicts
from .w_embedding import KEY


def check_kind(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Refuses what would only fail when the student is put together.

    Raises:
        EdgeflashError: a stage that cannot come after those before it, teacher and base of two
            families, or a method that does not know theirs, or not what its denoisers see.
    """
    _check_order(recipe)
    _check_families(recipe, folders)
    _check_conditions(recipe, folders)
    _check_control(recipe, folders)
    _check_told(recipe, folders)


def _check_order(recipe: Recipe) -> None:
    methods = recipe.methods()
    for number, (spec, method) in enumerate(zip(recipe.stage, methods, strict=True)):
        if why := method.refuse_after(methods[:number]):
            raise EdgeflashError(f"stage {number + 1}, {spec.by!r}: {why}")


def _check_families(recipe: Recipe, folders: Sequence[Path]) -> None:
    names = sorted({Student.unfinished(folder).family.name for folder in folders})
    if len(names) > 1:
        raise EdgeflashError(
            f"teacher and base: are of the families {' and '.join(names)}, which do not hear "
            "prompts alike: choose two of one"
        )
    flow = next((folder for folder in folders if predicts(folder) == FLOW), None)
    for spec, method in zip(recipe.stage, recipe.methods(), strict=True):
        if method.families and not set(names) <= set(method.families):
            takers = ", ".join(_takers(names[0], flow is not None))
            raise EdgeflashError(
                f"method {spec.by!r} makes parts of {', '.join(method.families)} alone, not of "
                f"{names[0]}: leave it out; {names[0]} is taken by {takers}"
            )
        if flow and not method.flows:
            raise EdgeflashError(
                f"{flow}: is a flow from picture to noise, which method {spec.by!r} does not learn "
                f"so far: choose {' or '.join(_takers(names[0], True))}"
            )


def _check_conditions(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Refuses methods that show a denoiser nothing but x_t where it sees more, by any stage."""
    students = map(Student.unfinished, folders)
    seeing = next((s for s in students if s.family.conditions(s)), None)
    seen = seeing.family.conditions(seeing) if seeing else ()
    if seeing and any(each.kind == "image" and each.enlarges is None for each in seen):
        raise EdgeflashError(
            f"{seeing.folder}: its denoiser changes a picture that it sees, and no data here have "
            "two of each: it can be exported and run, but teaches nobody so far"
        )
    whose = f"{seeing.folder}" if seeing else ""
    for spec, method in zip(recipe.stage, recipe.methods(), strict=True):
        if whose and not method.conditioned:
            raise EdgeflashError(
                f"{whose}: its denoiser sees a picture beside x_t, which method "
                f"{spec.by!r} does not show it so far: choose another, such as lcm"
            )
        whose = whose or f"method {spec.by!r}" * method.shows_more()


def _check_control(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Refuses methods that do not go with what steers the denoiser, after any stage."""
    has = max((Student.unfinished(folder).family.steering for folder in folders), default="")
    for spec, method in zip(recipe.stage, recipe.methods(), strict=True):
        if has and method.steers and method.steers != has:
            raise EdgeflashError(
                f"method {spec.by!r}: makes a {CALLED[method.steers]}, but a {CALLED[has]} steers "
                "the denoiser already, and no pipeline of diffusers has both: leave one out"
            )
        keeps = method.conditioned and method.keeps_control
        if has and not keeps and not method.steers:
            raise EdgeflashError(
                f"method {spec.by!r}: teaches no denoiser that a {CALLED[has]} steers so far: let "
                "it come before that is made, or choose another, such as lcm"
            )
        has = has or method.steers


def _check_told(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Refuses methods that would train a denoiser without telling it the guidance it is used to."""
    told = any(hears(Student.unfinished(folder)) for folder in folders[-1:])  # the base comes last
    for spec, method in zip(recipe.stage, recipe.methods(), strict=True):
        if told and method.step_counts() is not None and not method.told_scales():
            raise EdgeflashError(
                f"method {spec.by!r}: the denoiser is told its guidance ({KEY}), which lcm with "
                "w_embedding alone does: let that come last"
            )
        told = method.keeps_control and (told or method.told_scales() is not None)


def _takers(family: str, flow: bool) -> list[str]:
    """The methods that make parts of a family, and learn its flow if it is one."""
    methods = {name: shelf.find(Method, name, check=False) for name in shelf.names(Method)}
    takers = {n: m for n, m in methods.items() if not m.families or family in m.families}
    return [name for name, method in takers.items() if method.flows or not flow]


def check_wants(name: str, method: Method, recipe: Recipe) -> None:
    if method.needs_teacher() and not recipe.teacher:
        raise EdgeflashError(f"method {name!r} needs a teacher in the recipe")
    if "shapes" in method.wants and recipe.data.kind != "shapes":
        raise EdgeflashError(f"method {name!r} needs [data] kind = 'shapes'")


def check_guidance(recipe: Recipe, base: Path | None) -> None:
    """Refuses a [sampling] that guides the student otherwise than it is told, if it is told."""
    said, scales = recipe.sampling, _scales(recipe)
    if said is None:
        return
    kept = all(method.keeps_control for method in recipe.methods())  # the base's UNet
    if scales is None and not (base and kept and hears(Student.unfinished(base))):
        if said.guidance == "embedded":
            raise EdgeflashError(
                "[sampling] guidance: 'embedded', but no stage tells the student its guidance: "
                "set lcm.w_embedding, or say 'none' or 'cfg'"
            )
        return
    if said.guidance != "embedded":
        raise EdgeflashError(
            f"[sampling] guidance: {said.guidance!r}, but the student is told its guidance: say "
            "'embedded', and guidance_scale"
        )
    if scales and not scales[0] <= said.guidance_scale <= scales[1]:
        raise EdgeflashError(
            f"[sampling] guidance_scale: {said.guidance_scale:g}, but w_min and w_max tell the "
            f"student scales from {scales[0]:g} to {scales[1]:g} (1 + w)"
        )


def told(recipe: Recipe, before: Student, draft: Path) -> Guidance:
    """How a finished student is guided where the recipe says nothing.

    Args:
        recipe: which scales it was told.
        before: who is guided so far, the base or the student itself.
        draft: the student's folder.
    """
    student, guidance = Student.open(draft), before.guidance()
    if guidance.channels != hears(student):
        guidance = student.guidance()
    if guidance.kind == "embedded" and (scales := _scales(recipe)):
        scale = min(max(guidance.scale, scales[0]), scales[1])
        guidance = guidance.model_copy(update={"scale": scale})
    return guidance


def _scales(recipe: Recipe) -> tuple[float, float] | None:
    """The guidance scales that the last stage to tell the student any did tell it."""
    scales = [method.told_scales() for method in recipe.methods()]
    return next((each for each in reversed(scales) if each), None)


def hears(student: Student) -> int:
    """The width of the waves that tell its denoiser the guidance; 0 where it is not told."""
    return int(student.config(student.family.denoiser).get(KEY) or 0)


def check_parts(recipe: Recipe, methods: list[Method], processes: int) -> None:
    """Refuses batches that the processes cannot share evenly."""
    for spec, method in zip(recipe.stage, methods, strict=True):
        if method.batch_size % parts(method, processes):
            raise EdgeflashError(
                f"{spec.by}.batch_size {method.batch_size}: {processes} processes cannot share it "
                f"in equal parts, {parts(method, processes)} or a multiple"
            )
