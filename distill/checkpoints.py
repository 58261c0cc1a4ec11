"""Checkpoints of a stage: written whole or not at all, and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from edgeflash.disk import is_disk_full
from edgeflash.errors import EdgeflashError


def save(accelerator: Accelerator, folder: Path, told: dict[str, Any]) -> None:
    """Writes `checkpoint/` through a temporary folder, so that a kill leaves the older one.

    ``told``: its "step", and what else `restore` shall give back.

    Raises:
        EdgeflashError: a full disk; the older one stays.
    """
    draft, final, old = (folder / f"checkpoint{tail}" for tail in (".new", "", ".old"))
    main = accelerator.is_main_process
    if main:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(draft))
        accelerator.wait_for_everyone()
        if main:
            progress = told | {"sharded": accelerator.is_fsdp2}
            (draft / "progress.json").write_text(json.dumps(progress))
    except Exception as error:
        full = is_disk_full(error, folder)
        shutil.rmtree(draft, ignore_errors=True)
        if not full:
            raise
        raise EdgeflashError(
            f"{final}: disk full at step {told['step']}; free some space and run the same command "
            "again: it goes on from the checkpoint before"
        ) from None
    if main:
        if final.exists():  # else the older one is all there is
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        draft.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def restore(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Loads the last whole checkpoint; step 0 when there is none.

    Raises:
        EdgeflashError: one whose weights are cut up, where these are not, or the other way round.
    """
    for name in ("checkpoint", "checkpoint.old"):
        if (folder / name / "progress.json").is_file():
            told = dict(json.loads((folder / name / "progress.json").read_text()))
            if told.get("sharded", False) != accelerator.is_fsdp2:
                way = "without" if accelerator.is_fsdp2 else "with"
                raise EdgeflashError(
                    f"{folder / name}: was written {way} FSDP: launch it so again, or delete "
                    f"{folder} to train this stage afresh"
                )
            accelerator.load_state(str(folder / name))
            return told
    return {"step": 0, "seconds": 0.0, "terms": {}}
