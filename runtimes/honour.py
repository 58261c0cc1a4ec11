"""Whether a bundle can be honoured here, asked before anything is loaded.

Each refusal is one sentence that names the field of the manifest and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeflash import control
from edgeflash.bundle import ANSWER, DENOISERS, PREDICTING, Bundle, Component, kind_of
from edgeflash.caching import ROLE
from edgeflash.conditioning import FROM_SIZE, JOINT
from edgeflash.conditions import width
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Runtime

OPTIONAL = {JOINT, "timestep", "mask", "pooled", "guidance", *FROM_SIZE}
FED = {  # component -> roles of the inputs that the pipeline knows how to fill
    "text_encoder": {"tokens"},
    "text_encoder_2": {"tokens"},
    "text_encoder_3": {"tokens"},
    **dict.fromkeys(PREDICTING, {"sample", "conditioning"} | OPTIONAL),
    "vae_decoder": {"latent"},
    "vae_encoder": {"image"},
    control.NAME: {"sample", "conditioning", control.PICTURE} | OPTIONAL,
    control.ADAPTER: {control.PICTURE},
}
DTYPES = {"float16", "float32", "float64", "int32", "int64"}
LAYOUTS = {"", "NCHW", "NSC", "NC1S", "NS", "NC", "N"}


def refuse(bundle: Bundle, runtime: Runtime) -> None:
    """Raises the first reason why ``runtime`` cannot run ``bundle``, if there is one."""
    for reason in reasons(bundle, runtime):
        raise EdgeflashError(f"{bundle.folder}: {reason}")


def reasons(bundle: Bundle, runtime: Runtime) -> Iterator[str]:
    """Why not, field by field."""
    manifest = bundle.manifest
    have = {component.name for component in manifest.components}
    for names in (("text_encoder",), DENOISERS, ("vae_decoder",)):
        if not have.intersection(names):
            yield f"components: {' or '.join(names)} is missing; export the student again"
            return
    for component in manifest.components:
        if component.name not in FED:
            yield f"components: {component.name!r} is not known here: pip install -U edgeflash"
        else:
            yield from _about_component(component, runtime)
    told = (_about_prompts, _about_timesteps, _about_guidance, _about_conditions, _about_caches)
    for about in (*told, _about_control):
        yield from about(bundle, bundle.denoiser)


def _about_component(component: Component, runtime: Runtime) -> Iterator[str]:
    where = f"components.{component.name}"
    if component.target not in runtime.opens:
        yield (
            f"{where}.target: is {component.target!r}, which this runtime does not open; "
            f"export --to {' or '.join(runtime.opens)}"
        )
    if not any(spec.role == ANSWER[component.name] for spec in component.outputs):
        yield f"{where}.outputs: none has the role {ANSWER[component.name]!r}; export it again"
    roles = {spec.role for spec in component.inputs}
    optional = OPTIONAL
    if kind_of(component.name) == "denoiser":
        roles = {role for role in roles if not role.startswith(control.ROLE)}
    if kind_of(component.name) == "denoiser_cached":
        roles = {role for role in roles if not role.startswith(ROLE)}
        optional = OPTIONAL | {"conditioning"}
    for role in sorted(roles - FED[component.name]):
        yield f"{where}.inputs: role {role!r} is not known here: pip install -U edgeflash"
    heard = {"conditioning"} if JOINT in roles else set()
    for role in sorted(FED[component.name] - optional - roles - heard):
        yield f"{where}.inputs: none has the role {role!r}; export it again"
    for spec in (*component.inputs, *component.outputs):
        if spec.dtype not in DTYPES:
            known = ", ".join(sorted(DTYPES))
            yield f"{where}.{spec.name}.dtype: {spec.dtype!r} is none of {known}; export it again"
        if spec.layout not in LAYOUTS:
            yield f"{where}.{spec.name}.layout: {spec.layout!r} is not NCHW; export it as NCHW"


def _about_prompts(bundle: Bundle, denoiser: Component) -> Iterator[str]:
    """Whether the text encoders tell the denoiser as much as it takes."""
    told = [spec for component in bundle.text_encoders for spec in component.outputs]
    for role in ("conditioning", "mask", "pooled"):
        spec = denoiser.input(role)
        given = [each.shape[-1] for each in told if each.role == role]
        if spec is None or any(isinstance(width, str) for width in given):
            continue
        takes = spec.shape[1 if spec.layout == "NC1S" else -1]
        if takes != (gives := sum(map(int, given))):
            yield (
                f"components.{denoiser.name}.{spec.name}: takes {takes} numbers of role {role!r}, "
                f"but the text encoders give {gives}; export it again"
            )


def _about_timesteps(bundle: Bundle, denoiser: Component) -> Iterator[str]:
    times = {step.t for table in bundle.manifest.schedules.values() for step in table.steps}
    spec = denoiser.input("timestep")
    if spec is None and len(times) > 1:
        yield (
            f"schedules: they use {len(times)} timesteps, but components.{denoiser.name} has its "
            "timestep folded in; export it again, for one step or with a timestep input"
        )
    if spec is not None and spec.dtype.startswith("int") and any(t % 1 for t in times):
        odd = next(t for t in sorted(times) if t % 1)
        yield (
            f"components.{denoiser.name}.{spec.name}.dtype: {spec.dtype} cannot hold the timestep "
            f"{odd:g} of the schedules; export it with a float timestep"
        )


def _about_guidance(bundle: Bundle, denoiser: Component) -> Iterator[str]:
    guidance = bundle.manifest.guidance
    spec = denoiser.input("guidance")
    if (guidance.kind == "embedded") != (spec is not None):
        takes = "no input" if spec is None else "an input"
        yield (
            f"guidance.kind: is {guidance.kind!r}, but components.{denoiser.name} has {takes} "
            "of role 'guidance'; export it again"
        )
    elif spec is not None and spec.shape[-1] != guidance.channels:
        yield (
            f"guidance.channels: is {guidance.channels}, but components.{denoiser.name}."
            f"{spec.name} takes {spec.shape[-1]}; export it again"
        )


def _about_conditions(bundle: Bundle, denoiser: Component) -> Iterator[str]:
    """Whether the denoiser sees the latent and what the manifest says is beside it, no more."""
    conditions, latent = bundle.manifest.conditions, bundle.manifest.latent
    spec, seen = denoiser.input("sample"), latent.channels + width(conditions)
    if spec and isinstance(spec.shape[1], int) and spec.shape[1] != seen:
        yield (
            f"components.{denoiser.name}.{spec.name}: takes {spec.shape[1]} channels, but latent "
            f"and conditions have {seen}; export it again"
        )
    if conditions and not any(c.name == "vae_encoder" for c in bundle.manifest.components):
        yield "conditions: they are of a picture, but vae_encoder is missing; export it again"


def _about_control(bundle: Bundle, denoiser: Component) -> Iterator[str]:
    """Whether what steers gives all that the denoiser takes of it, and nothing in vain."""
    steering = bundle.steering
    gives = {spec.role: spec.shape[1:] for spec in steering.outputs} if steering else {}
    takes = {spec.role: spec.shape[1:] for spec in denoiser.inputs}
    takes = {role: shape for role, shape in takes.items() if role.startswith(control.ROLE)}
    names = [c.name for c in bundle.manifest.components if c.name in control.CALLED]
    if len(names) > 1:
        yield f"components: {' and '.join(names)} both steer, where one is served; export it again"
    elif not steering:
        if takes:
            asked = f"{denoiser.name} asks for a {' or '.join(control.CALLED)}"
            yield f"components: {asked}, but there is none; export it again"
    elif takes != gives:
        role = sorted(takes.items() ^ gives.items())[0][0]
        yield (
            f"components.{steering.name}: gives {list(gives.get(role, ()))} of role {role!r}, but "
            f"components.{denoiser.name} takes {list(takes.get(role, ()))}; export it again"
        )


def _about_caches(bundle: Bundle, denoiser: Component) -> Iterator[str]:
    """Whether the rows' second graph is there, and the denoiser leaves all that it takes."""
    cached = bundle.cached
    tables = bundle.manifest.schedules.values()
    if cached is None:
        if any(step.graph for table in tables for step in table.steps):
            yield "schedules: rows run a cached graph, but components has none; export it again"
        return
    left = {spec.role: spec.shape[1:] for spec in denoiser.outputs}
    for spec in cached.inputs:
        if spec.role.startswith(ROLE) and left.get(spec.role) != spec.shape[1:]:
            yield (
                f"components.{cached.name}.{spec.name}: takes {list(spec.shape[1:])}, but "
                f"components.{denoiser.name} leaves {list(left.get(spec.role, ()))} of role "
                f"{spec.role!r}; export it again"
            )
