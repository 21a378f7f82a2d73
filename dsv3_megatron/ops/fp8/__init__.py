"""FP8: how products of narrow numbers work here.

A linear layer y = x W^T has three products. Each takes two matrices of 8-bit floats (E4M3) and sums in fp32:

    forward            y [T, O]  =  x [T, I]    W^T [I, O]       sums over I
    input gradient    dx [T, I]  = dy [T, O]    W   [O, I]       sums over O
    weight gradient   dW [O, I]  = dy^T [O, T]  x   [T, I]       sums over T

Eight bits reach only from 2^-9 to 448, so values are divided by a scale first, and the product is multiplied by it
again. An activation or a gradient has one scale for each 1 x 128 values along the dimension that the product sums over.
A weight has one for each 128 x 128. So one outlier spoils 128 values and not a whole matrix. x and dy go into two
products that sum over different dimensions, and are therefore quantized twice, once along each. W serves both its
products with one copy, because its tiles are square.

Quantized here: activations and gradients just before their products, weights once a step (they change only between
steps). Kept in BF16 or fp32: embedding, head, norms, router, attention itself. Source: DeepSeek-V3 report, section 3.3.

Nothing is imported here. In reading order:

    scale_groups.py       values that share a scale         quantize.py        values -> narrow ones and scales
    gemm.py               products of narrow matrices       products.py        a linear's three, by the precision map
    linear.py             a differentiable linear           experts.py         experts
    kept_swiglu.py        SwiGLU from its narrow input
    held_weights.py       weights, quantized once a step    packed_rows.py     rows as bytes, for a transfer
    reference_backend.py  the interface, and the reference  triton_backend.py  kernels behind it
    engine.py             Transformer Engine's recipe       choice.py          which of these a run gets
    published.py          weights as published checkpoints store them
"""
