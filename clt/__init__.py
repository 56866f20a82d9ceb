"""Training of cross-layer transcoders in plain PyTorch."""

__version__ = "0.1.0"
