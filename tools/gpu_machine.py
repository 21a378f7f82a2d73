"""What a GPU session finds: Python, packages beside what the library needs, the GPU.

Run by tools/gpu_session.py. Exit code 1 where a package is missing or too old; the rest of the session goes on.
"""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from pathlib import Path

from dsv3_megatron.config.streams import run_command

ROOT = Path(__file__).resolve().parents[1]
# Used where they are installed, and named in the report.
OPTIONAL = ("transformer-engine", "deep_gemm", "liger-kernel", "flash-attn", "transformers", "pytest", "hypothesis")


def unmet_requirements() -> list[str]:
    """What of pyproject.toml's dependencies is not installed here, or in another version."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unmet = []
    for text in project["dependencies"]:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(f"{wanted.name}{wanted.specifier}: not installed")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            unmet.append(f"{wanted.name}{wanted.specifier}: {found} is installed")
    return unmet


def main() -> int:
    """Print what is here."""
    unmet = unmet_requirements()
    print(f"Python {platform.python_version()}")
    for text in unmet:
        print(f"missing: {text}")
    for name in ("torch", "triton", "megatron-core", *OPTIONAL):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed")
    from dsv3_megatron.platform import prepare

    device = prepare()
    print(f"device {device.name}, {device.backend}")
    if device.is_cuda:
        import torch

        properties = torch.cuda.get_device_properties(device.torch_device)
        print(f"compute capability {properties.major}.{properties.minor}, {properties.multi_processor_count} SMs, "
              f"{properties.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}, cuDNN "
              f"{torch.backends.cudnn.version()}")
    if unmet:
        print(f"{len(unmet)} packages are missing or too old: carry their wheels (docs/contributing/gpu.md)")
    return int(bool(unmet))


if __name__ == "__main__":
    run_command(main)
