"""Tells two figures of the embedded models' cards that `edgeflash score` does not.

    python tests/benchmarks/embedded_models.py

The PSNR of the teacher's autoencoder on 500 held-out renders, and what share of 4,000 the judge
reads right: what the last lines of their recipes tell, of the weights that ship. A minute.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from edgeflash import shapes
from edgeflash.distill.by_attributes import held_out_accuracy
from edgeflash.distill.by_autoencoder import reconstruction
from edgeflash.distill.judge import load_judge
from edgeflash.embedded import embedded


def main() -> None:
    vae = AutoencoderKL.from_pretrained(embedded("shapes-teacher") / "vae").float().eval()
    renders, _, _ = shapes.batch(shapes.HELD_OUT_SEED, range(500))
    pictures = torch.from_numpy(renders).permute(0, 3, 1, 2).float() / 127.5 - 1
    print(f"autoencoder: {reconstruction(vae, pictures)['psnr_db']:.1f} dB")
    for name, share in held_out_accuracy({"judge": load_judge()}).items():
        print(f"judge, {name.removeprefix('accuracy_')}: {share:.2%}")


if __name__ == "__main__":
    main()
