"""Checkpoints in Hugging Face's layout: DeepSeek-V3's published form, and what `transformers` writes.

    directory = HuggingFaceDirectory(path)            # checked as a whole; directory.model is the ModelConfig
    weight = directory.tensor("lm_head.weight")       # one tensor, dequantized
    load_hugging_face(directory, chunks, groups)      # (module `load`) this rank's stages, under any layout
    hugging_face_tensors(model)                       # every tensor's name, shape and our parameter's name
    model_config_from_json / model_config_to_json     # config.json <-> ModelConfig
"""

from dsv3_megatron.checkpoint.hf.config import model_config_from_json, model_config_to_json
from dsv3_megatron.checkpoint.hf.directory import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, Storage, hugging_face_tensors, tensors_by_parameter

__all__ = ["HuggingFaceDirectory", "HuggingFaceTensor", "Storage", "hugging_face_tensors", "model_config_from_json",
           "model_config_to_json", "tensors_by_parameter"]
