"""Triton kernels, installed as `dsv3_megatron.kernels`; the reference of each one lives in `dsv3_megatron.ops`,
that of the optimizer's in `dsv3_megatron.optim`.

In reading order:

    launch.py           on a Hopper GPU, or under Triton's interpreter on a CPU
    bf16_rounding.py    fp32 -> the dtype of a result
    fp8_rounding.py     scales and rounding, which all FP8 kernels share
    fp8_quantize.py     activations, SwiGLU, weights -> narrow values and scales
    fp8_packed_rows.py  rows -> bytes for a transfer, and back
    fp8_gemm.py         products, single and grouped
    fp8_tuning.py       their tile sizes, as measured on this machine
    weight_update.py    the optimizer's update, all weights in one launch
    head_loss_tiles.py  tile sizes of the head and its loss, and the bytes they move; no torch
    head_loss.py        the output head and its loss, logits in registers
    tile_order.py       the order of a product's tiles
"""
