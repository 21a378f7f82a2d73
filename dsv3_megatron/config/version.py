"""The library's version, which checkpoints and exports carry. No module imports the package itself for it."""

__version__ = "0.1.0"
