"""fastdmd: distil a diffusion model into a one-step generator with DMD2."""

__version__ = "0.1.0"
