"""Evaluations inside ranks, and what they are compared with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.certification.routing_notes import Notes, RoutingWatch
from dsv3_megatron.commands.evaluate import EvaluationRequest, check_request
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.runs.built_model import build_model
from dsv3_megatron.runs.evaluator import Evaluation, Evaluator

# fp32 on both sides: sums in another order.
TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-interleaved": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "pp2-dualpipe": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe"},
    "pp2-dualpipev": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev"},
    "pp2-mtp-alone": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Etttt|mL"},
    "pp2-loss-apart": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ettttm|L"},
    "pp2-zbv-loss-apart": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv",
                           "pipeline_model_parallel_layout": "Ett|tt|m|L"},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "tp2-ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
}


def evaluate(requests: list[EvaluationRequest]) -> list[Evaluation]:
    """This rank's share of one evaluation after another."""
    return [found for found, _ in evaluate_noted(requests)]


def evaluate_noted(requests: list[EvaluationRequest], given: Notes | None = None) -> list[tuple[Evaluation, Notes]]:
    """Likewise, and the routing of each; with the choices of experts in `given`."""
    from megatron.core import parallel_state

    found = []
    for request in requests:
        checked = check_request(request, torch.distributed.get_world_size())
        built = build_model(checked.run)
        built.load(checked.load)
        evaluator = Evaluator(built, eod_id=checked.eod_id)
        routing = RoutingWatch(given)
        routing.begin("evaluation 1")
        with routing.watched():
            found.append((evaluator.evaluate(checked.rows, logprobs=checked.logprobs), routing.notes))
        parallel_state.destroy_model_parallel()
    return found


def request_for(name: str, folder: Path, load: str, **changes: Any) -> EvaluationRequest:
    """Of the array `ids.npy` in `folder`, in fp32, under the layout called `name`; log-probabilities to NAME.npy."""
    return dataclasses.replace(
        EvaluationRequest(load=str(folder / load), tokens=str(folder / "ids.npy"),
                          logprobs=str(folder / f"{load}-{name}.npy"),
                          precision="fp32", parallel=LAYOUTS.get(name, {})), **changes)


def arguments_of(run: RunConfig) -> list[str]:
    """The command line of a run that differs from `tiny` in these fields only."""
    model = {name: value for name, value in dataclasses.asdict(run.model).items() if value is not None}
    flags = {"layernorm_epsilon": "norm_epsilon"}
    return [part for name, value in model.items()
            for part in (f"--{flags.get(name, name).replace('_', '-')}", str(value))]


def validation(folder: Path) -> dict[str, Any]:
    """The only validation of a run that wrote its metrics to `logs`."""
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if record["kind"] == "validation"]
    return record
