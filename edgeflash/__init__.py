"""edgeflash: distil a text-to-image diffusion model, export it, run it on a device."""

__version__ = "0.1.0"
