"""Pretraining of DeepSeek-V3-style models on Megatron-Core: from raw text to weights."""

__version__ = "0.1.0"
