"""What `checkpoint/hf/readers.py` says of a program is held against what it does, over architectures.

A program's Python is that of its page, up to the log-probabilities of the whole vocabulary.

Legend: S positions, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.readers import DIFFERS, REFUSES
from dsv3_megatron.data.tokenizer import load_tokenizer
from tests.clients.environments import RUNNERS
from tests.clients.exports import (
    TEXT,
    TOLERANCE,
    export,
    our_log_probabilities,
    our_model,
    shapes_of,
    without_rounding,
)
from tests.clients.pages import Reader, page_text, scoring_block

# Runs a block in each folder in a process of its own, which has what takes seconds to import already. A process that
# ends itself, as those of C++ do, ends no other, and one that waits for good is ended.
IN_TURN = """
import importlib.util, json, os, signal, sys, traceback
import transformers
if importlib.util.find_spec("torch"):
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM
if importlib.util.find_spec("vllm"):
    import vllm
block, folders = json.loads(sys.argv[1])
for folder in folders:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    signal.alarm(300)
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        exec(compile(block, "the page", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # here, before what the error holds is taken down: llama.cpp's server may never end
    finally:
        sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives a folder with `exported/` of a client's shape; clients that need the same have it made once."""
    folders: dict[tuple[str, str], Path] = {}

    def made(name: str, shape: str) -> Path:
        key = shape, str(RUNNERS[name].needs)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(shape)
            export(folders[key], shapes_of(RUNNERS[name])[shape])
        return folders[key]

    return made


@pytest.fixture(scope="module")
def scored(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a client score all its shapes, once; each folder then has `said.txt` and, if it took it, `logprobs.npy`."""
    @functools.cache
    def score(name: str) -> dict[str, Path]:
        client = RUNNERS[name]
        folders = {shape: tmp_path_factory.mktemp(f"{name}-{shape}") for shape in shapes_of(client)}
        for shape, folder in folders.items():
            (folder / "exported").symlink_to(exported(name, shape) / "exported")
            with Reader(client, folder) as reader:
                environment = reader.environment
        block = scoring_block(page_text(client))
        subprocess.run([str(client.programs / "python"), "-c", IN_TURN,
                        json.dumps([block, list(map(str, folders.values()))])], env=environment, check=True,
                       stdin=subprocess.DEVNULL, timeout=3600)
        return folders

    return score


CASES = [pytest.param(name, shape, marks=client.mark) for name, client in RUNNERS.items()
         for shape in shapes_of(client)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_shape(exported: Any, scored: Any, groups: Any, tmp_path: Path, name: str, shape: str) -> None:
    made = shapes_of(RUNNERS[name])[shape]
    if name == "transformers_5" and made.dtype == "fp8" and not importlib.util.find_spec("accelerate"):
        pytest.skip("Transformers reads FP8 with accelerate, which is not installed (pip install accelerate)")
    reader, export_ = RUNNERS[name].reader, exported(name, shape) / "exported"
    folder = scored(name)[shape]
    effects = made.effects(reader, HuggingFaceDirectory(export_).model)
    said = (folder / "said.txt").read_text(errors="replace")
    if not (folder / "logprobs.npy").exists():
        print(f"{reader}: {shape}: refused: {said.strip().splitlines()[-1][:300]}")
        assert REFUSES in effects, said[-3000:]
        return
    if made.dtype == "fp8" and not RUNNERS[name].rounds_fp8:
        export_ = without_rounding(export_, tmp_path / "fp32")
    ours_SV = our_log_probabilities(our_model(export_, groups), load_tokenizer(export_).encode(TEXT).ids)
    theirs_SV = torch.from_numpy(np.load(folder / "logprobs.npy"))
    difference = (theirs_SV - ours_SV).abs().max().item()
    print(f"{reader}: {shape}: largest difference {difference:.1e}")
    assert theirs_SV.shape == ours_SV.shape
    assert REFUSES not in effects
    if made.dtype == "fp8" and RUNNERS[name].fp8_in_16_bits:
        return
    assert (difference > TOLERANCE) == (DIFFERS in effects)
