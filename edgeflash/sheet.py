"""A contact sheet: one PNG with a row of pictures for each system, for places that show no page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edgeflash.disk import drafted

SIDE, GAP, MARGIN, HEADER = 128, 6, 190, 58  # px
INK, PAPER = (34, 34, 34), (255, 255, 255)


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], out: Path
) -> None:
    """Writes the sheet.

    Args:
        rows: name -> pictures, one for each prompt.
        prompts: heads of the columns.
        out: PNG to write.
    """
    pitch = SIDE + GAP
    sheet = Image.new("RGB", (MARGIN + pitch * len(prompts), HEADER + pitch * len(rows)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, prompt in enumerate(prompts):
        words = "\n".join(textwrap.wrap(prompt, 22)[:4])
        draw.multiline_text((MARGIN + column * pitch, 2), words, INK, ImageFont.load_default(11))
    for row, (name, pictures) in enumerate(rows.items()):
        top = HEADER + row * pitch
        label = "\n".join(textwrap.wrap(name, 24))
        draw.multiline_text((4, top + SIDE // 2), label, INK, font, anchor="lm")
        for column, picture in enumerate(pictures):
            small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (MARGIN + column * pitch, top))
    with drafted(out) as draft:
        sheet.save(draft, optimize=True)
