"""Triton kernels, installed as `dsv3_megatron.kernels`; the reference of each one lives in `dsv3_megatron.ops`."""
