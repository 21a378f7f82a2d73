"""What stands in for CUDA: only without it, only when asked, all of it, and nothing that is not needed."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.platform import cpu, meta_device, prepare
from dsv3_megatron.platform.cpu import STAND_INS, StandIn, install_stand_ins, remove_stand_ins

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without CUDA")


def _label(stand_in: StandIn) -> str:
    owner = stand_in.owner if isinstance(stand_in.owner, str) else getattr(stand_in.owner, "__name__", "")
    return f"{owner.removeprefix('megatron.core.')}.{stand_in.name}"


def _owner(stand_in: StandIn) -> Any:
    return importlib.import_module(stand_in.owner) if isinstance(stand_in.owner, str) else stand_in.owner


@pytest.fixture
def bare() -> Iterator[None]:
    """Without stand-ins before the test, as it was before it afterwards."""
    was_installed = cpu.installed()
    install_stand_ins()  # Megatron-Core, once imported without them, stays compiled
    remove_stand_ins()
    yield
    remove_stand_ins()
    if was_installed:
        install_stand_ins()


# -- the list ------------------------------------------------------------------------------------------


@cache
def _parsed(module: str) -> ast.Module:
    """A module of Megatron-Core, without importing it."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _find(reference: str) -> ast.AST:
    """The module, class or function that a `needed_by` names."""
    module, _, name = reference.partition(":")
    tree = _parsed(module)
    if not name:
        return tree
    return next(node for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name)


def _uses(node: ast.AST, stand_in: StandIn) -> bool:
    """Whether the code below `node` has what the stand-in replaces."""
    if stand_in.replacement is cpu._on_cpu:
        return any(isinstance(call, ast.Call) and ast.unparse(call.func) == f"torch.{stand_in.name}"
                   and any(key.arg == "device" and ast.unparse(key.value) == "'cuda'" for key in call.keywords)
                   for call in ast.walk(node))
    if stand_in.owner is torch.Tensor and stand_in.name == "type":
        return "torch.cuda.FloatTensor" in {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
    if isinstance(stand_in.owner, str):
        return any(stand_in.name in (getattr(leaf, "id", None), getattr(leaf, "asname", None))
                   for leaf in ast.walk(node))
    attributes = {ast.unparse(leaf) for leaf in ast.walk(node) if isinstance(leaf, ast.Attribute)}
    if stand_in.owner is torch.Tensor:
        return any(attribute.endswith(f".{stand_in.name}") for attribute in attributes)
    return f"{stand_in.owner.__name__}.{stand_in.name}" in attributes


@pytest.mark.parametrize("stand_in", STAND_INS, ids=_label)
def test_every_stand_in_names_calls_that_megatron_core_has(stand_in: StandIn) -> None:
    assert stand_in.needed_by and stand_in.reason
    for reference in stand_in.needed_by:
        assert _uses(_find(reference), stand_in), f"{reference} does not use {_label(stand_in)}"


def test_a_stand_in_that_nothing_needs_would_be_found() -> None:
    unused = StandIn(torch.cuda, "default_stream", lambda: None, ("pipeline_parallel.utils",), "planted")
    assert not _uses(_find("pipeline_parallel.utils"), unused)
    with pytest.raises(StopIteration):
        _find("pipeline_parallel.utils:no_such_function")


def test_no_attribute_is_replaced_twice() -> None:
    owners = [s.owner if isinstance(s.owner, str) else id(s.owner) for s in STAND_INS]
    assert len(set(zip(owners, [s.name for s in STAND_INS], strict=True))) == len(STAND_INS)


def test_modules_of_megatron_core_are_imported_after_torch_is_ready() -> None:
    by_name = [isinstance(stand_in.owner, str) for stand_in in STAND_INS]
    assert by_name == sorted(by_name)


# -- importing, installing, taking back ----------------------------------------------------------------

_IMPORT_PROBE = """
import inspect, json, sys
import torch
def attributes():
    spaces = {"torch": torch, "cuda": torch.cuda, "random": torch.cuda.random, "nvtx": torch.cuda.nvtx,
              "Tensor": torch.Tensor, "Module": torch.nn.Module}
    return {(space, name): id(inspect.getattr_static(owner, name)) for space, owner in spaces.items()
            for name in dir(owner) if hasattr(owner, name)}
attributes()
before = attributes()
import dsv3_megatron.platform, dsv3_megatron.platform.cpu, dsv3_megatron.platform.device, dsv3_megatron.platform.meta
after = attributes()
report = {"imported": sorted(str(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)),
          "megatron": "megatron.core" in sys.modules}
# A machine with a GPU, as far as this process can tell.
selected = []
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.set_device = selected.append
torch.cuda.get_device_name = lambda device=None: "some GPU"
before = attributes()
device = dsv3_megatron.platform.prepare(local_rank=1)
report["prepared"] = sorted(str(key) for key, value in attributes().items() if before.get(key) != value)
report["device"] = [str(device.torch_device), device.backend, device.name, [str(d) for d in selected]]
try:
    dsv3_megatron.platform.cpu.install_stand_ins()
except RuntimeError as error:
    report["refused"] = str(error)
report["installed"] = dsv3_megatron.platform.cpu.installed()
report["after_refusal"] = sorted(str(key) for key, value in attributes().items() if before.get(key) != value)
try:
    dsv3_megatron.platform.detect_device(2)
except ValueError as error:
    report["too_few"] = str(error)
report["megatron"] |= "megatron.core" in sys.modules
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    """What a fresh process saw change on import, and on prepare() where CUDA seems to be there."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", _IMPORT_PROBE], capture_output=True, text=True,
                         timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_changes_nothing(probe: dict[str, Any]) -> None:
    assert probe["imported"] == []


def test_with_cuda_nothing_is_replaced(probe: dict[str, Any]) -> None:
    assert probe["prepared"] == [] and probe["after_refusal"] == []
    assert probe["installed"] is False
    assert probe["megatron"] is False
    assert probe["device"] == ["cuda:1", "nccl", "some GPU", ["cuda:1"]]


def test_with_cuda_stand_ins_are_refused(probe: dict[str, Any]) -> None:
    assert probe["refused"] == "stand-ins for CUDA are for machines without it; this one has CUDA"


def test_more_processes_than_gpus(probe: dict[str, Any]) -> None:
    assert probe["too_few"] == ("local_rank=2 needs 3 GPUs, this machine has 2; "
                                "start at most 2 processes per node (GPUS_PER_NODE=2)")


@without_cuda
def test_prepare_installs_every_stand_in_and_they_can_be_taken_back(bare: None) -> None:
    assert not cpu.installed()
    originals = [getattr(_owner(stand_in), stand_in.name) for stand_in in STAND_INS]
    device = prepare()
    assert (str(device.torch_device), device.backend, device.is_cuda) == ("cpu", "gloo", False)
    assert cpu.installed()
    for stand_in, original in zip(STAND_INS, originals, strict=True):
        now = getattr(_owner(stand_in), stand_in.name)
        assert now is not original, _label(stand_in)
        if not stand_in.wraps:
            assert now is stand_in.replacement, _label(stand_in)
    once = [getattr(_owner(stand_in), stand_in.name) for stand_in in STAND_INS]
    assert prepare() == device
    assert all(getattr(_owner(s), s.name) is replaced for s, replaced in zip(STAND_INS, once, strict=True))
    remove_stand_ins()
    assert not cpu.installed()
    for stand_in, original in zip(STAND_INS, originals, strict=True):
        assert getattr(_owner(stand_in), stand_in.name) is original, _label(stand_in)


# -- what they do --------------------------------------------------------------------------------------


@without_cuda
def test_factories_read_cuda_as_cpu(bare: None) -> None:
    prepare()
    for tensor in (torch.tensor([1.0], device="cuda"), torch.zeros(2, device="cuda:0"),
                   torch.empty(2, device=torch.device("cuda")), torch.empty_like(torch.ones(2), device="cuda"),
                   torch.zeros(2, device=torch.cuda.current_device()), torch.ones(2).cuda()):
        assert tensor.device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type(torch.float64).dtype == torch.float64


@without_cuda
def test_streams_and_events_are_always_done(bare: None) -> None:
    prepare()
    stream, event = torch.cuda.Stream(device="cuda"), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record(stream)
        stream.wait_event(event)
    event.wait()
    event.synchronize()
    stream.synchronize()
    torch.cuda.synchronize()
    torch.ones(1).record_stream(stream)
    assert stream.query() and event.query() and isinstance(stream.record_event(), cpu.CpuEvent)
    assert torch.cuda.current_stream() == torch.cuda.current_stream()


@without_cuda
def test_random_states_are_those_of_the_cpu(bare: None) -> None:
    prepare()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("drawn apart", 7)
    untouched = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("drawn apart"):
        apart = torch.rand(3)
    assert torch.equal(torch.rand(3), untouched)
    assert torch.equal(apart, torch.rand(3, generator=torch.Generator().manual_seed(7)))


@without_cuda
def test_split_sizes_become_integers(bare: None) -> None:
    prepare()
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    assert maybe_move_tensor_to_cpu(torch.tensor([3, 4]), as_numpy=True).tolist() == [3, 4]
    assert torch.is_tensor(maybe_move_tensor_to_cpu(torch.tensor([3, 4])))
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None


@without_cuda
def test_functions_are_not_compiled(bare: None) -> None:
    prepare()

    def double(x: int) -> int:
        return 2 * x

    assert torch.compile(double) is double and torch.compile(dynamic=True)(double) is double


@without_cuda
@pytest.mark.parametrize("prepared", [False, True])
def test_meta_device_allocates_nothing_and_ends_with_its_block(bare: None, prepared: bool) -> None:
    if prepared:
        prepare()
    before = torch.cuda.current_device
    with pytest.raises(KeyError, match="inside"), meta_device() as device:
        assert device == torch.get_default_device() == torch.device("meta")
        assert torch.empty(1 << 50).device.type == "meta"
        assert torch.empty(1 << 50, device=torch.cuda.current_device()).device.type == "meta"
        raise KeyError("inside")
    assert torch.cuda.current_device is before
    assert torch.empty(1).device.type == "cpu"
