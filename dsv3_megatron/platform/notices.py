"""Notices of other packages that tell a user of this library nothing, each with the reason it may go.

Only these texts are dropped, from the logger or the warning that is named; everything else is shown.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    # Apex and Transformer Engine are used where they are installed; `transformer_impl` says which was chosen.
    (r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning),
    (r"Transformer Engine and Apex are not installed", UserWarning),
    # Imported by Megatron-Core's optimizer for model classes that are not used here.
    (r"MimoModelConfig is experimental", UserWarning),
    # A default of Megatron-Core's own configuration class.
    (r"full scope is deprecated", UserWarning),
    # Megatron-Core calls torch's checkpoint reader by keywords, whose order no longer matters.
    (r"The argument order of load has been changed", UserWarning),
    # Megatron-Core's zero_grad looks at the distributed optimizer's shards, which are views.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
)

_LOG_RECORDS = {
    # This library is built on GPTModel on purpose; it adds its own features.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # The layout that DDP computes is the one the optimizer would.
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    # torch looks for CUDA on machines that have the toolkit and no GPU.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


class _Without(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def drop_known_notices() -> None:
    """Stop showing the notices listed in this module. Safe to call again."""
    for pattern, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=category)
    for name, text in _LOG_RECORDS.items():
        target = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in target.filters):
            target.addFilter(_Without(text))
