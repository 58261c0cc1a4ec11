"""A step of latent consistency distillation, against the same step as diffusers' example does it.

    python tests/benchmarks/lcm_step.py                               # the embedded teacher
    python tests/benchmarks/export_full_size.py --write sd15 sd15 && \\
    python tests/benchmarks/lcm_step.py --teacher sd15 --size 512 --batch 1 --steps 3

Both train a student of the teacher's size on the same pictures, in turns, step by step, so that
both see the same machine. The example (`train_lcm_distill_sd_wds.py`) encodes pictures and captions
at every step, asks the teacher twice, under autocast, and moves its target network by a loop over
parameters. Ours has latents and conditioning cached; what that took once is told beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from distill_full_size import write_pictures
from torch import Tensor
from transformers import CLIPTokenizer

from edgeflash.distill.by_lcm import LCM
from edgeflash.distill.consistency import TIMESTEP_SCALING
from edgeflash.distill.data import open_store
from edgeflash.distill.loop import _step, _Turn
from edgeflash.distill.stage import Workshop
from edgeflash.embedded import located
from edgeflash.recipe import Data

W, GRID, HUBER_C, DECAY = 1.0, 50, 1e-3, 0.95
SAMPLES = 32


class Example:
    """The example's step, on the same networks."""

    def __init__(self, shop: Workshop, pictures: Tensor) -> None:
        assert shop.teacher
        self.vae, self.text, self.teacher = (
            shop.load(shop.teacher, name) for name in ("vae", "text_encoder", "unet")
        )
        self.student, self.target = deepcopy(self.teacher).train(), deepcopy(self.teacher)
        for frozen in (self.vae, self.text, self.teacher, self.target):
            frozen.requires_grad_(False)
        self.process = shop.process()
        self.tokenizer = CLIPTokenizer.from_pretrained(str(shop.teacher / "tokenizer"))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        self.pictures, self.captions = pictures, shop.store.captions
        self.nothing = self.encoded([""])

    def encoded(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            states: Tensor = self.text(ids).last_hidden_state
        return states

    def __call__(self, rows: np.ndarray) -> None:
        it, count = self.process, len(rows)
        c = self.encoded([self.captions[row] for row in rows])
        with torch.no_grad():
            found = self.vae.encode(self.pictures[rows]).latent_dist.sample()
        x_0 = found * self.vae.config.scaling_factor
        skip = it.timesteps // GRID
        t = (torch.randint(GRID, (count,)) + 1) * skip - 1
        s = (t - skip).clamp(min=0)
        x_t = it.noised(x_0, torch.randn_like(x_0), t)
        told = self.bounded(self.student, x_t, t, c)
        with torch.no_grad(), torch.autocast("cpu"):
            with_c = self.teacher(x_t, t, c).sample
            without = self.teacher(x_t, t, self.nothing.expand_as(c)).sample
            output = with_c + W * (with_c - without)
            x_s = it.ddim(it.x_0(output, x_t, t), it.eps(output, x_t, t), s)
        with torch.no_grad():
            wanted = self.bounded(self.target, x_s.float(), s, c)
        loss = ((told - wanted).square() + HUBER_C**2).sqrt().mean() - HUBER_C
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average, weight in zip(
            self.target.parameters(), self.student.parameters(), strict=True
        ):
            average.mul_(DECAY).add_(weight.detach(), alpha=1 - DECAY)

    def bounded(self, unet: Any, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """f(x, t) of arXiv 2310.04378, eq. 9."""
        scaled = (TIMESTEP_SCALING * t)[:, None, None, None]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * x + out * self.process.x_0(unet(x, t, c).sample, x, t)


def ours(shop: Workshop, batch: int) -> Callable[[np.ndarray], Any]:
    """A step of `by_lcm` in the loop; the first call of this encodes the data."""
    method = LCM(
        batch_size=batch, w_min=W, w_max=W, ddim_steps=GRID, target_ema=DECAY, huber_c=HUBER_C
    )
    stage, accelerator = method.begin(shop), Accelerator(cpu=True)
    turns = {name: _Turn(player, method, accelerator) for name, player in stage.players.items()}
    return lambda rows: _step(stage, turns, method, accelerator, rows, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="shapes-teacher", help="folder, or an embedded model")
    parser.add_argument("--size", type=int, default=64, help="of the pictures, px")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15, help="of each; two before are not counted")
    given = parser.parse_args()
    torch.manual_seed(0)
    teacher = located(given.teacher)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        write_pictures(folder, given.size, SAMPLES)
        data = Data(kind="folder", path=str(folder), size_px=given.size)
        store = open_store(data, 0, Path(scratch))
        shop = Workshop(teacher, teacher, store, Path(scratch), torch.device("cpu"))
        start = time.perf_counter()
        step = ours(shop, given.batch)
        once = time.perf_counter() - start
        example = Example(shop, store.pictures(np.arange(len(store))))
        seconds: dict[str, list[float]] = {"example": [], "edgeflash": []}
        rng = np.random.default_rng(0)
        for _ in range(2 + given.steps):
            rows = rng.integers(len(store), size=given.batch)
            for name, call in (("example", example), ("edgeflash", step)):
                start = time.perf_counter()
                call(rows)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:10} {median * 1000:9.0f} ms a step, {given.batch / median:7.2f} samples/s")
    ratio = medians["example"] / medians["edgeflash"]
    print(
        f"{ratio:.2f} x as fast; caching {len(store)} samples and loading took {once:.1f} s, once"
    )


if __name__ == "__main__":
    main()
