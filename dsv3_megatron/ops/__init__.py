"""One operation a file: a reference that is obviously right, beside what runs, and the choice between backends.

Torch only. Every operation takes `backend="auto"`, which picks by device and dtype and logs its choice once;
a backend named explicitly is used or raises. Products of bf16 numbers share one decision, in `backend.py`.

In reading order:

    linear.py           y = x W^T and its gradients            backend.py        which way a product is computed
    rms_norm.py         RMSNorm                                swiglu.py         silu(gate) * up
    rope.py             rotary embedding                       rotary_frequencies.py   its angles
    attention.py        causal core attention                  softmax.py        softmax in place
    router_scores.py    logits -> affinities                   experts.py        SwiGLU experts over sorted rows
    cross_entropy.py    token losses                           recompute.py      tensors made again in backward
    host_memory.py      freed memory stays in the process

FP8:

    fp8_groups.py       values that share a scale              fp8_quantize.py   values -> narrow ones and scales
    fp8_gemm.py         products of narrow matrices            fp8_products.py   a linear's three, by the precision map
    fp8_linear.py       a differentiable linear                fp8_experts.py    experts
    fp8_weights.py      weights, quantized once a step         fp8_records.py    rows as bytes, for a transfer
    fp8_backend.py      the interface, and the reference       fp8_triton.py     this library's kernels behind it
    fp8_engine.py       Transformer Engine's recipe            fp8_choice.py     which of these a run gets
    block_fp8.py        weights as published checkpoints store them
"""
