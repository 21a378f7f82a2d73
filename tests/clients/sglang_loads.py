"""What SGLang's loader makes of exports on a CPU: a program of its own, in SGLang's environment.

    PYTHON tests/clients/sglang_loads.py REQUEST.json        PYTHON: one that has sglang, and nothing of this library

The request is {"models": {NAME: {"export": FOLDER, "out": FOLDER}}}. Into each `out` go `model.safetensors` and, where
the export has MTP modules, `draft.safetensors`: the parameters of SGLang's model and of its NextN draft as
`load_weights` left them, before anything is repacked for a kernel. `said.txt` has the warnings of loading, and
`refused-model.txt` and `refused-draft.txt` the error where one is not taken.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ.update(SGLANG_USE_CPU_ENGINE="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

# In every parameter before anything is loaded; no weight of a test's export has it.
UNLOADED = -448.0


def stand_in_for_missing() -> None:
    """Modules that are imported and never called while a model is loaded.

    PyPI has no CPU build of sgl_kernel, SGLang's compiled kernels. torchvision belongs to one version of torch.
    """
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "sgl_kernel"):
        module = MagicMock(name=name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        sys.modules[name] = module


def load(export: Path, out: Path, *, is_draft: bool) -> None:
    """Build one of SGLang's two models of an export, let its loader fill it, and keep its parameters."""
    import torch
    from safetensors.torch import save_file
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.rotary_embedding.factory import get_rope_wrapper
    from sglang.srt.model_loader import get_model_loader
    from sglang.srt.models import deepseek_v2

    # For a CPU it has rotary embeddings with YaRN only; they have no weights.
    deepseek_v2.get_rope_wrapper = lambda *given, **named: get_rope_wrapper(*given, **{**named, "device": "cuda"})
    arguments = server_args(export)
    config = ModelConfig.from_server_args(arguments, is_draft_model=is_draft)
    loader: Any = get_model_loader(LoadConfig(), config)
    model = loader.initialize_model_for_startup(model_config=config, device_config=DeviceConfig("cpu"))
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(UNLOADED)
    loader.load_weights_only(model, loader._get_all_weights(config, model), torch.device("cpu"))
    kept = {name: value.detach().clone().contiguous() for name, value in model.named_parameters()}
    save_file(kept, out / ("draft.safetensors" if is_draft else "model.safetensors"))


def server_args(export: Path) -> Any:
    """The settings of a server of one process, made known to SGLang's modules."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=str(export), device="cpu", skip_tokenizer_init=True,
                           attention_backend="torch_native")
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    return arguments


def start_groups(folder: Path) -> None:
    """The groups of one process."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo",
                                 distributed_init_method=f"file://{folder.resolve()}/store")
    initialize_model_parallel()


def main(request_file: str) -> None:
    """Load every export of a request; what is refused does not end the others."""
    import transformers  # noqa: F401 - it looks for torchvision, and must not find the stand-in

    stand_in_for_missing()
    request = json.loads(Path(request_file).read_text())
    is_ready = False
    for asked in request["models"].values():
        export, out = Path(asked["export"]), Path(asked["out"])
        if not is_ready:
            server_args(export)
            start_groups(out)
            is_ready = True
        handler = logging.FileHandler(out / "said.txt")
        logging.getLogger().addHandler(handler)
        has_mtp = json.loads((export / "config.json").read_text()).get("num_nextn_predict_layers")
        for is_draft in (False, True) if has_mtp else (False,):
            try:
                load(export, out, is_draft=is_draft)
            except Exception as error:  # noqa: BLE001 - a refusal of any kind is what is asked for; the others go on
                name = "refused-draft.txt" if is_draft else "refused-model.txt"
                (out / name).write_text("".join(traceback.format_exception(error)))
        logging.getLogger().removeHandler(handler)


if __name__ == "__main__":
    main(*sys.argv[1:])
