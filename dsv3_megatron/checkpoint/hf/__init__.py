"""Checkpoints in Hugging Face's layout: DeepSeek-V3's published form, and what `transformers` writes.

    directory = HuggingFaceDirectory(path)            # checked as a whole; directory.model is the ModelConfig
    weight = directory.tensor("lm_head.weight")       # one tensor, dequantized
    load_hugging_face(directory, chunks, groups)      # (module `load`) this rank's stages, under any layout
    hugging_face_tensors(model)                       # every tensor's name, shape and our parameter's name
    model_config_to_json(model, dtype="bfloat16")     # config.json of a model; config/family_json.py reads one

In reading order. What a folder holds:

    names.py             every tensor and our parameter  config_json.py      config.json of an export
    safetensors_file.py  one file                        directory.py        the folder as a whole
    spellings.py         other names of tensors          row_strips.py       a tensor a few rows at a time

From it and to it:

    pretrained.py    into a run's modules                 to_megatron.py      into a checkpoint of ours
    stored.py        a checkpoint of ours by their names  to_hugging_face.py  out of one
    weight_files.py  which tensor in which file           side_files.py       files besides weights
    source.py        what is kept to make it again        export.py           the export at a run's end
    workplace.py     a conversion that may be stopped     audit.py            is it the same, tensor by tensor?
    model_card.py    README.md                            readers.py          programs that read an export
"""

from dsv3_megatron.checkpoint.hf.config_json import model_config_to_json
from dsv3_megatron.checkpoint.hf.directory import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, Storage, hugging_face_tensors, tensors_by_parameter

__all__ = ["HuggingFaceDirectory", "HuggingFaceTensor", "Storage", "hugging_face_tensors", "model_config_to_json",
           "tensors_by_parameter"]
