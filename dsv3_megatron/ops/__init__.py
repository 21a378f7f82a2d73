"""One operation a file: a reference that is obviously right, beside what runs, and the choice between backends.

Torch only. Every operation takes `backend="auto"`, which picks by device and dtype and logs its choice once;
a backend named explicitly is used or raises. Products of bf16 numbers share one decision, in `backend.py`.

In reading order:

    linear.py           y = x W^T and its gradients            backend.py        which way a product is computed
    rms_norm.py         RMSNorm                                swiglu.py         silu(gate) * up
    rope.py             rotary embedding                       rotary_frequencies.py   its angles
    attention.py        causal core attention                  attention_choices.py   what computes it; no torch
    block_attention.py  to keys that come in blocks        fused_blocks.py     by a kernel
    softmax.py          softmax in place                       steady_sums.py    bits that do not depend on neighbours
    router_scores.py    logits -> affinities                   experts.py        SwiGLU experts over sorted rows
    row_blocks.py       an expert's rows among all             row_sums.py       rows copied, and added up
    routes.py           which rows go where
    cross_entropy.py    the head and token losses              head_loss_choices.py   which way; no torch
    chunked_head_loss.py   with torch alone                    fused_head_loss.py     with kernels
    local_scores.py     a vocabulary split over ranks          recompute.py      tensors made again in backward
    row_bytes.py        bytes of rows that travel; no torch    host_memory.py      freed memory stays in the process

    fp8/                the same in FP8
"""
