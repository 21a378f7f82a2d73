"""The weights' moving average: against the formula, out of the way of the weights, saved, evaluated and exported."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_megatron.checkpoint.folder import CheckpointError, RunProgress
from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.checkpoint.store import load_weights, save_checkpoint
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import differences, merge, small_run, start

pytestmark = pytest.mark.distributed

DECAY, STEPS = 0.8, 5


def kind(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of one kind, by parameter."""
    return {key.split(":")[1]: tensor for key, tensor in state.items() if key.startswith(f"{name}:")}


def train_and_save(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Some steps, the state after each; what a model with the average swapped in has; what a fresh one loads."""
    training = start(small_run(ema_decay=DECAY, **changes))
    average = training.average
    assert average is not None
    with pytest.raises(ValueError, match="no average before the first step"), average.swapped_in():
        pass
    states = []
    for number in range(STEPS):
        training.step(number)
        states.append(training.whole_state())
    with average.swapped_in():
        inside = training.whole_state()
    after = training.whole_state()
    save_checkpoint(folder, RunProgress(STEPS, 4 * STEPS, 64 * STEPS), training.run, training.chunks,
                    training.optimizer, training.groups, keep_last=0, average=average)
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    load_weights(folder, training.run, training.chunks, training.groups, is_average=True)
    result = {"states": states, "inside": inside, "after": after, "loaded": training.whole_state(),
              "threads": [thread.name for thread in threading.enumerate()]}
    save_checkpoint(folder / "none", RunProgress(1, 4, 64), small_run(**changes), training.chunks, training.optimizer,
                    training.groups, keep_last=0)
    try:
        load_weights(folder / "none", training.run, training.chunks, training.groups, is_average=True)
    except CheckpointError as error:
        result["message"] = str(error)
    return result


@pytest.mark.parametrize(("ranks", "changes"), [(2, {"expert_model_parallel_size": 2}), (1, {"precision": "bf16"}),
                                              (2, {"expert_model_parallel_size": 2, "context_parallel_size": 2})],
                         ids=["EP2xDP2-fp32", "one-process-bf16", "EP2xCP2-fp32"])
def test_the_average_is_the_weighted_mean_of_the_weights_after_each_step(tmp_path, ranks, changes):
    results = run_ranks(ranks, train_and_save, tmp_path, changes)
    states = [merge([result["states"][number] for result in results]) for number in range(STEPS)]
    shares = [DECAY ** (STEPS - 1 - number) for number in range(STEPS)]
    weights = [kind(state, "param") for state in states]
    expected = {name: sum(share * step[name].double() for share, step in zip(shares, weights, strict=True))
                / sum(shares) for name in weights[0]}
    averages = kind(states[-1], "average")
    for name, tensor in expected.items():
        # STEPS fp32 roundings of values around 0.1 (norms: 1).
        torch.testing.assert_close(averages[name].double(), tensor, rtol=1e-6, atol=1e-8, msg=name)
    # After the first step it is that step's weights.
    assert not differences(kind(states[0], "average"), kind(states[0], "param"))

    inside, after, loaded = (merge([result[moment] for result in results]) for moment in ("inside", "after", "loaded"))
    dtype = next(iter(kind(loaded, "weight").values())).dtype
    rounded = {name: tensor.to(dtype) for name, tensor in averages.items()}
    assert not differences(kind(inside, "weight"), rounded)
    assert not differences(after, states[-1])
    assert not differences(kind(loaded, "weight"), rounded)
    assert "has no average of the weights: its run had ema_decay=0.0" in results[0]["message"]
    # A thread beside the step's would have OpenMP threads of its own, and on a CPU all would wait for one another.
    assert not [name for result in results for name in result["threads"] if name.startswith("weight-average")]

    convert_to_hugging_face(tmp_path, tmp_path / "hf", dtype="fp32", is_average=True, is_verified=True)
    exported = HuggingFaceDirectory(tmp_path / "hf")
    for theirs, ours in (
            ("model.norm.weight", "decoder.final_layernorm.weight"),
            ("model.layers.2.mlp.experts.5.down_proj.weight", "decoder.layers.2.mlp.experts.5.linear_fc2.weight"),
            ("model.layers.1.self_attn.o_proj.weight", "decoder.layers.1.self_attention.linear_proj.weight")):
        assert torch.equal(exported.tensor(theirs, torch.float32), averages[ours]), theirs
    biases = [tensor for key, tensor in states[-1].items() if key == "bias:2"]
    assert torch.equal(exported.tensor("model.layers.2.mlp.gate.e_score_correction_bias", torch.float32), biases[0])
