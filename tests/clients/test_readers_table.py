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
from tests.clients.environments import CLIENTS
from tests.clients.exports import SHAPES, TEXT, TOLERANCE, export, our_log_probabilities, our_model, without_rounding
from tests.clients.pages import Reader, page_text, scoring_block

# Runs a block in each folder in a process of its own, which has what takes seconds to import already. A process that
# ends itself, as those of C++ do, ends no other, and one that waits for good is ended.
IN_TURN = """
import importlib.util, json, os, signal, sys, traceback
import transformers
if importlib.util.find_spec("torch"):
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM
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
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with `exported/` for each shape."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SHAPES}
    for name, folder in folders.items():
        export(folder, SHAPES[name])
    return folders


@pytest.fixture(scope="module")
def scored(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a client score all shapes, once; each folder then has `said.txt` and, if it took it, `logprobs.npy`."""
    @functools.cache
    def score(name: str) -> dict[str, Path]:
        client = CLIENTS[name]
        folders = {shape: tmp_path_factory.mktemp(f"{name}-{shape}") for shape in SHAPES}
        for shape, folder in folders.items():
            (folder / "exported").symlink_to(exports[shape] / "exported")
            with Reader(client, folder) as reader:
                environment = reader.environment
        block = scoring_block(page_text(client))
        subprocess.run([str(client.programs / "python"), "-c", IN_TURN,
                        json.dumps([block, list(map(str, folders.values()))])], env=environment, check=True,
                       stdin=subprocess.DEVNULL, timeout=3600)
        return folders

    return score


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=CLIENTS[name].mark) for name in CLIENTS])
def test_a_shape(exports: dict[str, Path], scored: Any, groups: Any, tmp_path: Path, name: str, shape: str) -> None:
    if name == "transformers_5" and SHAPES[shape].dtype == "fp8" and not importlib.util.find_spec("accelerate"):
        pytest.skip("Transformers reads FP8 with accelerate, which is not installed (pip install accelerate)")
    reader, exported = CLIENTS[name].reader, exports[shape] / "exported"
    folder = scored(name)[shape]
    effects = SHAPES[shape].effects(reader, HuggingFaceDirectory(exported).model)
    said = (folder / "said.txt").read_text(errors="replace")
    if not (folder / "logprobs.npy").exists():
        print(f"{reader}: {shape}: refused: {said.strip().splitlines()[-1][:300]}")
        assert REFUSES in effects, said[-3000:]
        return
    if SHAPES[shape].dtype == "fp8" and not CLIENTS[name].rounds_fp8:
        exported = without_rounding(exported, tmp_path / "fp32")
    ours_SV = our_log_probabilities(our_model(exported, groups), load_tokenizer(exported).encode(TEXT).ids)
    theirs_SV = torch.from_numpy(np.load(folder / "logprobs.npy"))
    difference = (theirs_SV - ours_SV).abs().max().item()
    print(f"{reader}: {shape}: largest difference {difference:.1e}")
    assert theirs_SV.shape == ours_SV.shape
    assert REFUSES not in effects
    assert (difference > TOLERANCE) == (DIFFERS in effects)
