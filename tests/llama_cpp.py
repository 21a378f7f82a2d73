"""llama.cpp's converter and runtime as programs of their own: either may end its process.

    python -m tests.llama_cpp convert LLAMA_CPP FOLDER OUT.gguf     LLAMA_CPP: a checkout with convert_hf_to_gguf.py
    python -m tests.llama_cpp score MODEL.gguf IDS.json OUT.json    log-probabilities after each prefix of the ids

The converter refuses tokenizers that it has not seen before; it is told that this one is GPT-2's, which changes no id:
prompts are given as ids.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path


def convert(llama_cpp: str, folder: str, output: str) -> None:
    """The converter's own main on a folder, in FP32."""
    sys.path.insert(0, llama_cpp)
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", output, "--outtype", "f32"]
    runpy.run_path(str(Path(llama_cpp) / "convert_hf_to_gguf.py"), run_name="__main__")


def score(model: str, ids_file: str, output: str) -> None:
    """The whole vocabulary's log-probabilities after each prefix, [prefixes, vocabulary]."""
    import xllamacpp

    request = json.loads(Path(ids_file).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_predict, params.n_parallel, params.warmup = 512, 1, 1, False
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    rows = []
    for end in range(1, len(request["ids"]) + 1):
        answer = server.handle_completions({
            "prompt": request["ids"][:end], "n_predict": 1, "n_probs": request["vocab_size"], "temperature": -1.0,
            "cache_prompt": False, "samplers": [], "post_sampling_probs": False,
            # No answer for an end or a part of a character: a letter is drawn, the probabilities are those before.
            "logit_bias": [[request["letter_id"], 1e4]]})
        if isinstance(answer, str | bytes):
            answer = json.loads(answer)
        if "code" in answer:
            raise RuntimeError(str(answer))
        content = answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"]
        row = [-math.inf] * request["vocab_size"]
        for entry in content[0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    Path(output).write_text(json.dumps(rows))


if __name__ == "__main__":
    {"convert": convert, "score": score}[sys.argv[1]](*sys.argv[2:])
