"""What is installed and what the machine has, as a list of findings: `dsv3 doctor`.

Usage:
    findings = examine(Path("."))
    is_ready = all(finding.state is not State.WRONG for finding in findings)
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.config.version import __version__
from dsv3_megatron.metrics.trackers.kinds import TRACKER_KINDS
from dsv3_megatron.ops.fp8.choice import resolve_fp8_backend
from dsv3_megatron.platform.device import detect_device, has_fast_bf16
from dsv3_megatron.process.cores import usable_cores
from dsv3_megatron.process.ranks import DEFAULT_PORT, require_free_port

DISTRIBUTION = "dsv3_megatron"
PACKAGES, ONE_FEATURE, MACHINE, GPUS, NETWORK, STORAGE = TOPICS = (
    "packages", "what one feature uses", "machine", "GPUs", "network", "storage")
_NEEDED_PYTHON = (3, 12)
# What the smallest run of several processes keeps in shared memory, and opens.
_SHARED_MEMORY_BYTES, _OPEN_FILES = 64 << 20, 1024
# A checkpoint of the quickstart's model with its dataset is below this.
_DISK_BYTES = 2 * 10**9
_INFINIBAND = Path("/sys/class/infiniband")


class State(Enum):
    """How a finding stands.

    Attributes:
        GOOD: There as it must be.
        ABSENT: Not there, and only the named feature needs it.
        WRONG: Not as a run on this machine needs it.
    """

    GOOD = "good"
    ABSENT = "absent"
    WRONG = "wrong"


@dataclass(frozen=True)
class SetupFinding:
    """One thing that was looked at.

    Attributes:
        topic: Heading it stands under.
        name: What was looked at.
        found: Description of what is there.
        state: State of it.
        use: Feature that uses it.
        remedy: Command or setting that mends it; "" where nothing is to be mended.
    """

    topic: str
    name: str
    found: str
    state: State = State.GOOD
    use: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class OptionalPackage:
    """A package that one feature uses.

    Attributes:
        module: Name that it is imported by.
        use: Feature that uses it.
        otherwise: Replacement that is used without it.
        remedy: Command that installs it.
    """

    module: str
    use: str
    otherwise: str
    remedy: str


OPTIONAL_PACKAGES = (
    OptionalPackage("transformer_engine", "--transformer-impl transformer_engine, its FP8 recipes and attention",
                    "this library's own modules", "pip install transformer-engine[pytorch], on a machine with a GPU"),
    OptionalPackage("apex", "Megatron-Core's fused multi-tensor operations", "torch's",
                    "build apex from its repository, with its CUDA extensions"),
    OptionalPackage("deep_ep", "--moe-token-dispatcher-type flex", "the dispatchers node and alltoall",
                    "build DeepEP from its repository"),
    OptionalPackage("deep_gemm", "FP8 products by DeepGEMM, where it was measured as the fastest",
                    "this library's Triton kernels", "build DeepGEMM from its repository"),
    OptionalPackage("flash_attn_interface", "--attention-backend flash on Hopper, without padding",
                    "cuDNN's attention through torch", "build FlashAttention-3 from its repository"),
    OptionalPackage("transformers", "tests against Transformers, and the benchmarks beside it",
                    "nothing; training and export do without", "pip install -e '.[test]'"),
    OptionalPackage("datatrove", "examples/data and TokenizeDocuments: preprocessing on an engine",
                    "dsv3 preprocess, whose --shard divides work too", "pip install -e '.[datatrove]'"),
    OptionalPackage("lm_eval", "dsv3 lm-eval", "nothing; dsv3 evaluate and generate do without",
                    "pip install 'lm-eval>=0.4.13'"),
    *(OptionalPackage(kind.module, kind.flag, "TensorBoard, which every run has", kind.remedy)
      for kind in TRACKER_KINDS),
)


def examine(folder: Path) -> list[SetupFinding]:
    """Look at this process's packages and machine; nothing is changed, and nothing is sent.

    Args:
        folder: Folder that a run would write into.
    """
    return [*_packages(), *_optional_packages(), *_host(), *_gpus(torch.version.cuda), *_network(_INFINIBAND),
            *_storage(folder)]


# -- packages --------------------------------------------------------------------------------------------


def _packages() -> Iterable[SetupFinding]:
    version = ".".join(map(str, sys.version_info[:3]))
    is_new = sys.version_info >= _NEEDED_PYTHON
    yield SetupFinding(PACKAGES, "Python", version, State.GOOD if is_new else State.WRONG,
                  remedy="" if is_new else "install Python 3.12 or later")
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield SetupFinding(PACKAGES, DISTRIBUTION, f"{__version__}, imported from a folder and not installed",
                           State.ABSENT, "the command dsv3, and what this page knows of its packages",
                           "make setup, or pip install -e .")
        return
    yield SetupFinding(PACKAGES, DISTRIBUTION, __version__)
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_requirement(requirement, _installed_version)


def check_requirement(requirement: Requirement, installed: Callable[[str], str | None]) -> SetupFinding:
    """Compare what a package asks for with what is there.

    Args:
        requirement: Name and versions of a package that this one needs.
        installed: Gives the version of a package by its name; None: it is not installed.
    """
    wanted, version = str(requirement.specifier) or "any version", installed(requirement.name)
    if version is not None and requirement.specifier.contains(version, prereleases=True):
        return SetupFinding(PACKAGES, requirement.name, version)
    return SetupFinding(PACKAGES, requirement.name, f"{version or 'not installed'}, and {wanted} is needed",
                        State.WRONG, remedy="make setup, or pip install -c constraints.txt -e .")


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional_packages() -> Iterable[SetupFinding]:
    for package in OPTIONAL_PACKAGES:
        if is_installed(package.module):
            yield SetupFinding(ONE_FEATURE, package.module, _installed_version(package.module) or "there",
                               use=package.use)
        else:
            yield SetupFinding(ONE_FEATURE, package.module, f"not here: {package.otherwise}", State.ABSENT, package.use,
                          package.remedy)


# -- the machine -----------------------------------------------------------------------------------------


def _host() -> Iterable[SetupFinding]:
    device = detect_device()
    memory = psutil.virtual_memory()
    if not device.is_cuda:
        yield SetupFinding(MACHINE, "processor", f"{device.name}, {usable_cores()} of them usable")
        yield SetupFinding(MACHINE, "precision", "bf16" if has_fast_bf16(device) else "fp32, for bf16 is slower here",
                      use="--precision auto")
    else:
        yield SetupFinding(MACHINE, "processor", f"{usable_cores()} cores usable")
    yield SetupFinding(MACHINE, "memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    threads = os.environ.get("OMP_NUM_THREADS")
    yield SetupFinding(MACHINE, "OMP_NUM_THREADS", threads or "not set; torchrun then sets 1",
                  use="threads of a process; the launcher divides the cores by the processes")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    is_enough = limit == resource.RLIM_INFINITY or limit >= _OPEN_FILES
    yield SetupFinding(MACHINE, "open files", "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}",
                  State.GOOD if is_enough else State.WRONG,
                  remedy="" if is_enough else f"ulimit -n {_OPEN_FILES} or more")


def _gpus(cuda_version: str | None) -> Iterable[SetupFinding]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if cuda_version is None else (
            "nvidia-smi is here, and torch finds no GPU: the driver may be too old for CUDA " + cuda_version
            if shutil.which("nvidia-smi") else "no driver was found")
        is_broken = cuda_version is not None and shutil.which("nvidia-smi") is not None
        yield SetupFinding(GPUS, "GPUs", f"none: {why}", State.WRONG if is_broken else State.ABSENT,
                      "training at full size; everything runs on a CPU too",
                      "compare nvidia-smi's CUDA version with torch's" if is_broken else "")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield SetupFinding(GPUS, f"GPU {number}", f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, compute "
                      f"capability {properties.major}.{properties.minor}, {properties.multi_processor_count} SMs")
    yield SetupFinding(GPUS, "CUDA of torch", str(cuda_version))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield SetupFinding(GPUS, "NCCL", nccl, use="messages between GPUs")
    cudnn = torch.backends.cudnn.version()
    yield SetupFinding(GPUS, "cuDNN", str(cudnn), use="attention with heads of 192 and 128 from 91900 on")
    try:
        backend = resolve_fp8_backend("auto", transformer_impl="local")
        yield SetupFinding(GPUS, "FP8", f"by {backend}", use="--fp8 blockwise")
    except ConfigError as error:
        yield SetupFinding(GPUS, "FP8", str(error), State.ABSENT, "--fp8 blockwise")


# -- network and storage ---------------------------------------------------------------------------------


def _network(infiniband: Path) -> Iterable[SetupFinding]:
    adapters = sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else []
    yield SetupFinding(NETWORK, "InfiniBand or RoCE adapters", ", ".join(adapters) or "none",
                  State.GOOD if adapters else State.ABSENT, "runs over several machines with GPUs")
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("NCCL_", "GLOO_"))}
    if given:
        yield SetupFinding(NETWORK, "settings", ", ".join(f"{name}={value}" for name, value in given.items()))
    try:
        require_free_port(DEFAULT_PORT, "localhost")
        yield SetupFinding(NETWORK, f"port {DEFAULT_PORT}", "free", use="where the processes of a run meet")
    except ConfigError as error:
        yield SetupFinding(NETWORK, f"port {DEFAULT_PORT}", str(error), State.ABSENT,
                      "where the processes of a run meet", "set MASTER_PORT to a free port")


def _storage(folder: Path) -> Iterable[SetupFinding]:
    yield _room(f"disk of {folder.resolve()}", folder, _DISK_BYTES, "datasets, checkpoints and logs",
                "free some of it, or run in another folder")
    if (shared := Path("/dev/shm")).is_dir():
        yield _room("shared memory", shared, _SHARED_MEMORY_BYTES, "messages between processes of one machine",
                    "give the container more: docker run --shm-size 8g")


def _room(name: str, folder: Path, needed: int, use: str, remedy: str) -> SetupFinding:
    free = shutil.disk_usage(folder).free
    is_enough = free >= needed
    if not os.access(folder, os.W_OK):
        return SetupFinding(STORAGE, name, "this user may not write here", State.WRONG, use, "run in another folder")
    return SetupFinding(STORAGE, name, f"{free / 1e9:.1f} GB free", State.GOOD if is_enough else State.WRONG, use,
                   "" if is_enough else remedy)
