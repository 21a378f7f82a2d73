"""Memory of one micro-batch with and without recomputation: exact bytes of CPU tensors at the peak.

Forward and backward of the preset's model with its MTP modules, on random tokens, after one such pass; what is counted
is what is allocated beyond weights and gradients, at the moment when it is most (`metrics/live_bytes.py`).

Usage:
    python -m tools.bench.bench_recompute --presets tiny laptop --precisions fp32 bf16
writes tools/bench/results/recompute.csv and prints a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from dsv3_megatron.config.memory import RECOMPUTE_MODULES  # noqa: E402
from dsv3_megatron.config.presets import PRESETS, preset  # noqa: E402
from tools.bench.records import Measurement, append_rows  # noqa: E402

NOTHING, LAYERS = "nothing", "full"
CASES = {NOTHING: (), **{name: (name,) for name in RECOMPUTE_MODULES}, "all three": RECOMPUTE_MODULES}


def peak_bytes(stage: Any, *, vocab_size: int, micro_batch_size: int, seq_length: int) -> int:
    """Of forward and backward of one micro-batch, beyond what was there before."""
    import torch

    from dsv3_megatron.metrics.live_bytes import count_live_bytes

    tokens = torch.randint(0, vocab_size, (micro_batch_size, seq_length + 1),
                           generator=torch.Generator().manual_seed(0))
    positions = torch.arange(seq_length).unsqueeze(0)
    with count_live_bytes() as live:
        losses = stage(input_ids=tokens[:, :-1], position_ids=positions, attention_mask=None, labels=tokens[:, 1:])
        loss = losses.main_BS.sum() + 0.3 * sum(mtp.sum() for mtp in losses.mtp_BS)
        del losses
        loss.backward()
    return live.peak


def measure(name: str, precision: str, groups: Any) -> dict[str, int]:
    """Peak bytes by what is recomputed."""
    from dsv3_megatron.model.build import build_stages
    from dsv3_megatron.model.recomputed_modules import set_recomputed

    run = preset(name).override(transformer_impl="local", recompute_granularity=None, recompute_modules=[])
    shape = {"vocab_size": run.model.vocab_size, "micro_batch_size": run.training.micro_batch_size,
             "seq_length": run.training.seq_length}
    found = {}
    for granularity in (None, LAYERS):
        stages, _ = build_stages(run.override(recompute_granularity=granularity), groups, precision=precision)
        stages[0].train()
        for parameter in stages[0].parameters():
            # As in training, gradients have their place before the pass.
            parameter.main_grad = parameter.new_zeros(parameter.shape, dtype=parameter.dtype)
        peak_bytes(stages[0], **shape)
        for case, names in (CASES if granularity is None else {LAYERS: ()}).items():
            set_recomputed(stages, names)
            found[case] = peak_bytes(stages[0], **shape)
    return found


def main() -> None:
    """Measure, write the results, print a table."""
    from dsv3_megatron.config.parallel import ParallelConfig
    from dsv3_megatron.platform import prepare

    device = prepare()
    from dsv3_megatron.parallel.groups import create_groups, destroy_groups, start_process_group

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=["tiny", "laptop"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    options = parser.parse_args()
    start_process_group(device)
    groups = create_groups(ParallelConfig(), 1)
    print("| Model | Recomputed | peak of one micro-batch | saved |\n| --- | --- | ---: | ---: |")
    for name in options.presets:
        for precision in options.precisions:
            training = preset(name).training
            config = f"{name} {precision} seq={training.seq_length} batch={training.micro_batch_size}"
            found = measure(name, precision, groups)
            for case, count in found.items():
                saved = found[NOTHING] - count
                print(f"| {config} | {case} | {count / 1e6:,.1f} MB | {saved / 1e6:,.1f} MB "
                      f"({saved / found[NOTHING]:.0%}) |", flush=True)
            append_rows("recompute.csv", [Measurement(case, config, "peak_memory", count / 1e6, "MB")
                                          for case, count in found.items()], "CPU tensors, exact")
    destroy_groups()


if __name__ == "__main__":
    main()
