"""A certificate: what was certified of a layout, with which tolerances and versions, or the first difference.

As text and as JSON.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from dsv3_megatron.certification.comparison import Difference
from dsv3_megatron.certification.shrunk_run import ShrunkRun
from dsv3_megatron.certification.verdict import Verdict
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.version import __version__

# Of differences and ties, in the text.
_MOST_LINES = 8
NOT_PROVED = ("the run's own widths, sequence length and precision (fp32 here)", "NCCL and a GPU's kernels (gloo on "
              "CPUs here)", "the data files (random samples here)")


@dataclass(frozen=True)
class Certificate:
    """What was found of a run that a user asked about.

    Attributes:
        flags: Flags of the run.
        world_size: Processes that the run is for.
        shrunk: The small run that stood for it.
        verdict: What was found.
    """

    flags: tuple[str, ...]
    world_size: int
    shrunk: ShrunkRun
    verdict: Verdict

    @property
    def command(self) -> str:
        """The command that certifies the same layout again."""
        return f"dsv3 certify --world-size {self.world_size} {shlex.join(self.flags)}"


def versions() -> dict[str, str]:
    """Versions of what computed."""
    return {"dsv3_megatron": __version__, "torch": version("torch"), "megatron-core": version("megatron-core")}


def layout_words(parallel: ParallelConfig, world_size: int) -> str:
    """A layout in a few words, such as "8 processes: pp 4 (dualpipe, layout Et|t|t|tmL) x tp 1, ep 2, etp 1, dp 2"."""
    pipeline = f"pp {parallel.pipeline_model_parallel_size}"
    if parallel.pipeline_model_parallel_size > 1:
        inside = [parallel.schedule]
        if parallel.num_virtual_stages_per_pipeline_rank > 1:
            inside.append(f"{parallel.num_virtual_stages_per_pipeline_rank} virtual stages")
        if parallel.pipeline_model_parallel_layout:
            inside.append(f"layout {parallel.pipeline_model_parallel_layout}")
        pipeline += f" ({', '.join(inside)})"
    split = f"tp {parallel.tensor_model_parallel_size}"
    if parallel.context_parallel_size > 1:
        split += f" x cp {parallel.context_parallel_size} ({parallel.cp_comm_type})"
    return (f"{world_size} process{'es' * (world_size > 1)}: {pipeline} x {split}, ep "
            f"{parallel.expert_model_parallel_size}, etp {parallel.expert_tensor_parallel_size}, dp "
            f"{parallel.data_parallel_size(world_size)}")


def as_line(number: int, certificate: Certificate) -> str:
    """One layout of many on a line, with its command behind it where it failed."""
    verdict, run = certificate.verdict, certificate.shrunk.run
    extras = [f"{run.model.mtp_num_layers} MTP"]
    if run.training.recompute_granularity:
        extras.append(f"recompute {run.training.recompute_granularity}")
    if run.fp8.is_enabled:
        extras.append("fp8")
    if run.data.document_flags or run.data.sft:
        extras.append("conversations" if run.data.sft else "documents")
    result = "equal" if verdict.is_equal else "DIFFERS"
    ties = f", {len(verdict.ties)} ties" if verdict.ties else ""
    line = (f"{number:4} {result}  {layout_words(run.parallel, certificate.shrunk.world_size)}, {', '.join(extras)}"
            f"{ties}; gradients within {verdict.largest.get('gradient', float('nan')):.1g} ({verdict.seconds:.1f} s)")
    if verdict.is_equal:
        return line
    return "\n".join([line, *(f"       {text}" for text in _failure(verdict)),
                      f"       again: {certificate.command}"])


def as_text(certificate: Certificate) -> str:
    """The certificate of one layout for people."""
    verdict, shrunk = certificate.verdict, certificate.shrunk
    result = "EQUAL" if verdict.is_equal else "DIFFERS"
    lines = [f"{result}: {layout_words(shrunk.run.parallel, shrunk.world_size)}", ""]
    lines += ["compared:", *(f"  {check}" for check in verdict.checks or ["nothing"])]
    lines += ["", "largest relative errors (tolerance; ten times that for one process's second step against the "
                  "definition's):"]
    lines += [f"  {kind:25} {error:.2g} ({verdict.allowed[kind]:.2g})" for kind, error in verdict.largest.items()]
    if verdict.ties:
        lines += ["", f"choices of experts that rounding decides, {len(verdict.ties)}; no fault:"]
        lines += _first([str(tie) for tie in verdict.ties])
    if verdict.num_taken:
        lines += ["", f"roundings to FP8 that the order of a sum decides, taken from the other run: "
                      f"{verdict.num_taken}; no fault"]
    if shrunk.reductions:
        lines += ["", "reduced:", *(f"  {text}" for text in shrunk.reductions)]
    lines += ["", "not proved here:", *(f"  {text}" for text in NOT_PROVED)]
    lines += ["", ", ".join(f"{name} {number}" for name, number in versions().items())
              + f"; {verdict.seconds:.1f} s"]
    if not verdict.is_equal:
        lines += ["", "what differs, the first first:", *_failure(verdict), "", f"again: {certificate.command}"]
    return "\n".join(lines)


def _failure(verdict: Verdict) -> list[str]:
    if verdict.error:
        return [f"  {line}" for line in verdict.error.strip().splitlines()]
    return _first([str(difference) for difference in verdict.differences])


def _first(texts: Sequence[str]) -> list[str]:
    more = [f"  and {len(texts) - _MOST_LINES} more"] if len(texts) > _MOST_LINES else []
    return [*(f"  {text}" for text in texts[:_MOST_LINES]), *more]


def as_json(certificate: Certificate) -> dict[str, Any]:
    """The certificate as plain values."""
    verdict, shrunk = certificate.verdict, certificate.shrunk
    return {
        "is_equal": verdict.is_equal,
        "command": certificate.command,
        "world_size": certificate.world_size,
        "certified": {"world_size": shrunk.world_size, "run": shrunk.run.as_dict()},
        "reductions": list(shrunk.reductions),
        "not_proved": list(NOT_PROVED),
        "compared": verdict.checks,
        "largest_errors": verdict.largest,
        "tolerances": verdict.allowed,
        "differences": [_difference(difference) for difference in verdict.differences],
        "ties": [asdict(tie) for tie in verdict.ties],
        "roundings_taken": verdict.num_taken,
        "error": verdict.error,
        "seconds": round(verdict.seconds, 3),
        "versions": versions(),
    }


def _difference(difference: Difference) -> dict[str, Any]:
    return {"quantity": difference.quantity, "moment": difference.moment,
            "rank": asdict(difference.place) if difference.place else None, "relative_error": difference.error,
            "tolerance": difference.tolerance, "detail": difference.detail}
