"""What can be asked of an export besides target and place: one type for all that pass it on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from edgeflash.schedule import Guidance


class ExportOptions(BaseModel):
    """Options of an export, the target's own apart; see `edgeflash.export.line.export_student`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[int, ...] | None = Field(
        None, description="step counts to ship schedules for; none: those the student was made for"
    )
    timesteps: str | None = Field(
        None,
        description="'align-your-steps', or numbers, the noisiest first, of as many steps; none: "
        "as the student's sampler spaces them",
    )
    guidance: Guidance | None = Field(
        None, description="how the prompt steers; none: as the student says"
    )
    prompts: tuple[str, ...] = Field(
        (),
        description="recorded for calibration and parity, the first ones ship as goldens and are "
        "not calibrated on; none: the student's own, or some of all kinds",
    )
    record_all: bool = Field(
        False,
        description="record every prompt even where nothing is calibrated, for exports to other "
        "precisions to go on from what this one recorded",
    )
    size: tuple[int, int] | None = Field(
        None, description="(height, width) of images in px; none: what the denoiser was made for"
    )
    image_to_image: bool = Field(False, description="also export the encoder")
    fold_timestep: bool = Field(
        True,
        description="where all schedules have one and the same timestep, make it a constant; "
        "stock pipelines of optimum and OpenVINO GenAI want it as an input",
    )
    merge_tokens: float = Field(
        0.0,
        description="share of the denoiser's tokens to merge, up to 0.75; the ladder then holds "
        "the bundle against the student with this merging in torch",
    )
    deep_cache: int | None = Field(
        None,
        ge=2,
        description="run all of the denoiser every so many steps, in between a second graph of it "
        "(DeepCache); the ladder then holds the bundle against the student cached so in torch",
    )
    cache_branch: int = Field(
        0, ge=0, description="of deep_cache: the skip connection, from the outermost, kept there"
    )
    gate: int | None = Field(
        None,
        ge=1,
        description="hear the prompt in so many first steps alone, then a second graph runs "
        "(T-GATE); the ladder does the same",
    )
    floors: dict[str, float] = Field(
        {}, description="of the ladder, instead of the defaults; see edgeflash.floors"
    )


AS_USUAL = ExportOptions()
