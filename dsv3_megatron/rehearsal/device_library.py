"""The CUDA runtime that a rehearsal is preloaded with: `cuda_runtime.c`, compiled at its first use and kept.

The library is libcudart's stand-in and, by the name that it is linked under, the driver's, libcuda.so.1.

torch asks libcudart how many devices there are and of what kind, and makes streams and events. A rank's process is
started with this library before libcudart, so that torch.cuda answers on a machine without a driver.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dsv3_megatron.config.fields import ConfigError

SOURCE = Path(__file__).with_name("cuda_runtime.c")
COMPILERS = ("cc", "gcc", "clang")
# The struct that describes a device is that of CUDA 13.
CUDA_MAJOR = "13"


def require_cuda_build(version: str | None) -> None:
    """Refuse a torch whose CUDA branches are not there, or speak to another runtime.

    Args:
        version: CUDA that torch was built for, `torch.version.cuda`.

    Raises:
        ConfigError: torch is a build for CPUs, or for another CUDA; or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"a rehearsal replaces the CUDA runtime by preloading, which works on Linux; this is "
                          f"{sys.platform}: use a Linux machine or container")
    if version is None or version.partition(".")[0] != CUDA_MAJOR:
        found = "a build without CUDA" if version is None else f"for CUDA {version}"
        raise ConfigError(f"a rehearsal needs torch built for CUDA {CUDA_MAJOR}, and the one here is {found}: install "
                          "the build for CUDA (no GPU is needed), in an environment of its own if this one must stay")


def find_compiler() -> str:
    """Path of the C compiler: CC's, or the first of `COMPILERS` that is there.

    Raises:
        ConfigError: there is none.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else list(COMPILERS)
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise ConfigError(f"a rehearsal compiles a small C file at its first use, and no C compiler is here (looked "
                          f"for {', '.join(names)}): install one, such as the package gcc (apt-get install gcc, dnf "
                          "install gcc)")
    return found


def runtime_library(cache: Path | None = None) -> Path:
    """The compiled library; compiled now if this version of it has not been yet.

    Args:
        cache: Folder to keep it in; None: XDG_CACHE_HOME/dsv3_megatron, by default ~/.cache/dsv3_megatron.

    Raises:
        ConfigError: there is no C compiler, or it fails.
    """
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_megatron"
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"rehearsal-{digest}.so"
    if library.exists():
        return library
    compiler = find_compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may compile at once: each to a name of its own, which then takes the place.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "library.so"
            done = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(made),
                                   str(SOURCE)],
                                  capture_output=True, text=True)
            if done.returncode:
                raise ConfigError(f"{compiler} cannot compile {SOURCE.name} for the rehearsal: "
                                  f"{(done.stderr or done.stdout).strip()[-800:]}; install a C compiler with its C "
                                  "library's headers, such as the packages gcc and libc6-dev, or set CC to one")
            made.replace(library)
    except OSError as error:
        raise ConfigError(f"the rehearsal's library cannot be kept in {folder} ({error.strerror}); set XDG_CACHE_HOME "
                          "to a folder that can be written to") from error
    return library
