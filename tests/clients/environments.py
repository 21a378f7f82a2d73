"""Programs that run an export, each in a virtual environment of its own: what one needs another cannot stand.

    python -m tests.clients.environments              makes every environment that is not there (make clients)
    python -m tests.clients.environments mlx_lm       makes that one

They are folders in `.clients/`. CLIENTS is the one place that says what each installs; the page of a program tells its
user to install the same (test_pages.py). The environment of a client that `shares_torch` sees the packages of the
Python that makes it, behind its own, so that torch is on the disk once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.hf.readers import LLAMA_CPP, MLX_LM, TRANSFORMERS_4, TRANSFORMERS_5

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".clients"
# Written when everything is installed: what was.
STAMP = "installed.txt"


@dataclass(frozen=True)
class Client:
    """A program that runs an export.

    Attributes:
        name: Of its folder in `.clients/`; "" if it is in the environment of this library's tests.
        reader: Its column in `readers.py`.
        page: File in docs/export/ that tells a user how to run it.
        requires: What the page has its user install, as pip reads it.
        shares_torch: Sees the packages of this library's environment behind its own.
        sources: A source distribution of PyPI that is unpacked into `sources/` of its folder, "NAME==VERSION"; "" for
            none.
        checkout: A folder in `sources/` that stands for the repository which the page has its user clone, and has its
            name.
        rounds_fp8: FP8 weights become bf16 in it, as in this library; else they keep all bits of value times scale.
    """

    name: str
    reader: str
    page: str
    requires: tuple[str, ...]
    shares_torch: bool = False
    sources: str = ""
    checkout: str = ""
    rounds_fp8: bool = True

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
        return "\n".join([*self.requires, self.sources, f"shares_torch={self.shares_torch}"])

    def is_there(self) -> bool:
        """Whether its environment is whole, and made for these versions."""
        stamp = self.folder / STAMP
        return not self.name or (stamp.is_file() and stamp.read_text(encoding="utf-8") == self.installed)

    @property
    def mark(self) -> pytest.MarkDecorator:
        """Skips a test where the environment is not there, and says which command makes it."""
        reason = (f"needs {', '.join(self.requires)} in .clients/{self.name}: make clients, or python -m "
                  f"tests.clients.environments {self.name}")
        return pytest.mark.skipif(not self.is_there(), reason=reason)


CLIENTS = {client.name or "transformers_5": client for client in (
    Client("", TRANSFORMERS_5, "transformers.md", ("transformers==5.23.0", "torch")),
    Client("transformers_4", TRANSFORMERS_4, "transformers.md", ("transformers==4.57.6", "torch", "accelerate==1.15.0"),
           shares_torch=True),
    # The source of llama-cpp-python has llama.cpp whole.
    Client("llama_cpp", LLAMA_CPP, "llama_cpp.md", ("xllamacpp==2026.10.11549", "transformers==5.23.0", "torch"),
           shares_torch=True, sources="llama-cpp-python==0.3.36", checkout="vendor/llama.cpp",
           rounds_fp8=False),
    Client("mlx_lm", MLX_LM, "mlx_lm.md", ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")),
)}


def make(client: Client) -> None:
    """Make the environment of a client anew.

    Raises:
        subprocess.CalledProcessError: something could not be fetched or installed; there is no stamp then.
    """
    shutil.rmtree(client.folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(client.folder)], check=True)
    python = str(client.programs / "python")
    if client.shares_torch:
        own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                             capture_output=True, text=True).stdout.strip()
        # Read when that Python starts: a folder to look in after its own.
        (Path(own) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-input", "-q", *client.requires], check=True)
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
    """Make the environments that are named, or all; those that are there stay as they are."""
    for name in names or CLIENTS:
        client = CLIENTS[name]
        if client.is_there():
            print(f"{name}: is there", flush=True)
        else:
            print(f"{name}: installing {', '.join(filter(None, [*client.requires, client.sources]))}", flush=True)
            make(client)


if __name__ == "__main__":
    main(sys.argv[1:])
