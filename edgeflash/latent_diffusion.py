"""What all families have in common: text encoders, a denoiser of latents, an autoencoder.

A denoiser is a UNet or a transformer; the autoencoder is an `AutoencoderKL` or an
`AutoencoderTiny`. Tensor names are those of optimum's ONNX pipelines, where these have the family.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeflash.bundle import Latent, TensorSpec
from edgeflash.conditions import width as width_of
from edgeflash.errors import EdgeflashError
from edgeflash.families import Family
from edgeflash.schedule import Guidance
from edgeflash.student import Student

if TYPE_CHECKING:
    from torch import Tensor, nn

Specs = tuple[TensorSpec, ...]
BATCH = "batch_size"
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


class LatentDiffusion(Family):
    """What a family here must still say: how its text encoders and its denoiser are called.

    Attributes:
        classes: of its networks, by folder; one of them each.
    """

    classes: Mapping[str, tuple[str, ...]]

    def check(self, student: Student) -> None:
        for component, classes in self.classes.items():
            if (found := student.class_of(component)[1]) not in classes:
                raise EdgeflashError(
                    f"{student.folder}: {component} is a {found}, where this family has "
                    f"{' or '.join(classes)}"
                )
        config = student.config(self.denoiser)
        channels = self.latent(student).channels
        takes, gives = config["in_channels"], self.out_channels(student)
        if takes != channels + width_of(self.conditions(student)) or gives != channels:
            raise EdgeflashError(
                f"{student.folder}: {self.denoiser} takes {takes} and gives {gives} channels, but "
                f"the vae's latents have {channels}: the two do not belong together (of inpainting "
                "networks model_index.json names a StableDiffusionInpaintPipeline)"
            )

    def out_channels(self, student: Student) -> int:
        """Of the denoiser's prediction."""
        return int(student.config(self.denoiser)["out_channels"])

    def check_guidance(self, student: Student, guidance: Guidance) -> None:
        channels = student.config(self.denoiser).get("time_cond_proj_dim") or 0
        if guidance.channels != channels:
            takes = f"of width {channels}" if channels else "nowhere"
            raise EdgeflashError(
                f"{student.folder}: guidance is {guidance.kind!r}, but the {self.denoiser} takes "
                f"an embedded scale {takes}: ask for guidance "
                f"{'embedded' if channels else 'none or cfg'}"
            )

    def components(self, *, encoder: bool = False) -> tuple[str, ...]:
        readers = tuple(name for name in self.classes if name.startswith("text_encoder"))
        return (*readers, self.denoiser, "vae_decoder") + ("vae_encoder",) * encoder

    def load(self, student: Student, component: str, *, timestep: float | None = None) -> nn.Module:
        from edgeflash.networks_sd import load_network

        folder = component if component in self.classes else "vae"
        network = load_network(student, folder).eval().requires_grad_(False)
        return self.wrap(network, component, timestep)

    def wrap(self, network: Any, component: str, timestep: float | None = None) -> nn.Module:
        from edgeflash.networks_sd import wrap

        return wrap(network, component, timestep)

    def signature(
        self, student: Student, component: str, size: tuple[int, int], *, folded: bool = False
    ) -> tuple[Specs, Specs]:
        latent = self.latent(student)
        height, width = size
        cell, unit = latent.downsampling, self.unit(student)
        if height % unit or width % unit or min(size) < unit:
            raise EdgeflashError(
                f"size {height}x{width}: both sides must be multiples of {unit} px, {unit} at least"
            )
        most = student.config(self.denoiser).get("pos_embed_max_size")  # of SD 3's, in patches
        if most and max(size) > most * unit:
            raise EdgeflashError(
                f"size {height}x{width}: the {self.denoiser} knows places (pos_embed_max_size) of "
                f"at most {most * unit} px a side"
            )
        z = (BATCH, latent.channels, height // cell, width // cell)
        pixels = (BATCH, 3, height, width)
        if component in self.text_encoders:
            return self._text_encoder(student, component)
        if component == self.denoiser:
            inputs, outputs = self._denoiser(student, z)
            return tuple(s for s in inputs if not (folded and s.role == "timestep")), outputs
        if component == "vae_decoder":
            return (image("latent_sample", "latent", z),), (_pixels("sample", pixels),)
        tiny = student.class_of("vae")[1] == "AutoencoderTiny"
        name = "latent_sample" if tiny else "latent_parameters"
        moments = (BATCH, latent.channels * (1 if tiny else 2), *z[2:])
        return (_pixels("sample", pixels),), (image(name, "latent", moments),)

    @abstractmethod
    def _text_encoder(self, student: Student, name: str) -> tuple[Specs, Specs]:
        """Inputs and outputs of one that reads prompts."""

    @abstractmethod
    def _denoiser(self, student: Student, z: tuple[int | str, ...]) -> tuple[Specs, Specs]:
        """Inputs and outputs of the denoiser of latents ``z``, with its timestep."""

    def unit(self, student: Student) -> int:
        patch = student.config(self.denoiser).get("patch_size") or 1  # of a transformer, in cells
        return self.latent(student).downsampling * int(patch)

    def size(self, student: Student) -> tuple[int, int]:
        sides = student.config(self.denoiser).get("sample_size") or 64
        height, width = sides if isinstance(sides, list) else (sides, sides)
        if not all(isinstance(side, int) and side > 0 for side in (height, width)):
            raise TypeError(f"sample_size = {sides!r} of the {self.denoiser}")
        unit = self.latent(student).downsampling
        return height * unit, width * unit

    def latent(self, student: Student) -> Latent:
        config = student.config("vae")
        return Latent(
            channels=config["latent_channels"],
            downsampling=2 ** (len(_widths(config)) - 1),
            scale=config.get("scaling_factor", 0.18215 if "down_block_types" in config else 1.0),
            shift=config.get("shift_factor") or 0.0,
        )


def as_rows(vector: Tensor, width: int) -> Tensor:
    """[n, k] as rows that go behind a prompt's in c: [n, ceil(k / width), width], zeros at the end.

    That way methods mix, drop and repeat prompts without knowing what one consists of.
    """
    from torch.nn.functional import pad

    return pad(vector, (0, -vector.shape[-1] % width)).view(len(vector), -1, width)


def of_rows(c: Tensor, wide: int) -> tuple[Tensor, Tensor]:
    """c without the rows that `as_rows` made, [n, s, d], and what is in them, [n, wide]."""
    rows = -(-wide // c.shape[-1])
    return c[:, :-rows], c[:, -rows:].flatten(1)[:, :wide]


def token_ids(tokens: tuple[int | str, ...]) -> TensorSpec:
    """What a text encoder takes."""
    return TensorSpec(name="input_ids", role="tokens", shape=tokens, dtype="int64", layout="NS")


def floats(name: str, role: str, shape: tuple[int | str, ...], layout: str) -> TensorSpec:
    """A tensor of float32."""
    return TensorSpec(name=name, role=role, shape=shape, dtype="float32", layout=layout)


def image(name: str, role: str, shape: tuple[int | str, ...]) -> TensorSpec:
    """Something that lies on the latent's cells, or on pixels."""
    return floats(name, role, shape, "NCHW")


def _pixels(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    spec = image(name, "image", shape)
    return spec.model_copy(update={"low": -1.0, "high": 1.0})


def _widths(config: dict[str, Any]) -> list[int]:
    """Channels per resolution of an autoencoder."""
    widths: list[int] = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return widths
