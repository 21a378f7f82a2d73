"""A run small enough to train on one thread, under any layout, and its whole state by global name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import Batch
from dsv3_megatron.model.build import build_stages, wrap_stages
from dsv3_megatron.model.global_names import WholeParameter, whole_parameters
from dsv3_megatron.optim.ema import WeightAverage
from dsv3_megatron.optim.optimizer import build_optimizer, set_learning_rate
from dsv3_megatron.optim.router_bias import collect_expert_loads, routers, update_router_biases
from dsv3_megatron.parallel.groups import create_groups, groups_of_gradients, replicas
from dsv3_megatron.schedule.forward_backward import ForwardBackward, ForwardStep, build_forward_backward

SEQ_LENGTH, GLOBAL_BATCH = 16, 4


def small_run(**changes: Any) -> RunConfig:
    """Four layers of which one is dense, and one MTP module: 88 thousand parameters."""
    model = ModelConfig(
        num_layers=4, num_dense_layers=1, hidden_size=32, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, ffn_hidden_size=48, num_experts=8,
        moe_ffn_hidden_size=16, moe_router_topk=2, moe_router_num_groups=2, moe_router_group_topk=1,
        num_shared_experts=1, mtp_num_layers=1, vocab_size=128, max_position_embeddings=SEQ_LENGTH,
        init_method_std=0.05)
    run = RunConfig("small", model, *(getattr(preset("tiny"), section) for section in (
        "parallel", "training", "data", "checkpoint", "logging")))
    return run.override(**{
        "seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "precision": "fp32",
        "transformer_impl": "local", **changes})


def architecture_arguments(run: RunConfig) -> list[str]:
    """The command line of a run that differs from its preset in the architecture only."""
    model = {name: value for name, value in dataclasses.asdict(run.model).items() if value is not None}
    flags = {"layernorm_epsilon": "norm_epsilon"}
    return [part for name, value in model.items()
            for part in (f"--{flags.get(name, name).replace('_', '-')}", str(value))]


@dataclass
class Training:
    """One rank's part of a run that is ready to train."""

    run: RunConfig
    groups: ProcessGroupCollection
    config: Any
    chunks: list[Any]
    optimizer: MegatronOptimizer
    forward_backward: ForwardBackward
    average: WeightAverage | None = None

    def step(self, number: int) -> float:
        """Train on the batch of step `number`; the mean main loss over all tokens, the same on every rank."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        copies = replicas(self.run.parallel, self.groups)
        tokens = torch.randint(0, self.run.model.vocab_size, (GLOBAL_BATCH, SEQ_LENGTH + 1),
                               generator=torch.Generator().manual_seed(number))
        numbered = list(enumerate(tokens, start=number * GLOBAL_BATCH))
        batches = [starmap(_batch, numbered[rank * GLOBAL_BATCH // size:(rank + 1) * GLOBAL_BATCH // size])
                   for rank, size in copies]
        several = len(self.chunks) > 1
        outputs = self.forward_backward(
            forward_step_func=ForwardStep(next, self.run.data, _loss), data_iterator=batches if several else batches[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=self.run.training.num_microbatches(self.groups.dp.size()),
            seq_length=SEQ_LENGTH, micro_batch_size=1, forward_only=False)
        set_learning_rate(self.optimizer, 3e-3)
        if self.average:
            self.average.wait()
        self.optimizer.step()
        if self.average:
            self.average.update()
        model = self.run.model
        loads, _ = all_expert_loads(
            self.chunks, num_layers=model.num_layers, num_mtp_layers=model.mtp_num_layers,
            num_experts=model.num_experts, device=torch.device("cpu"))
        update_router_biases(self.chunks, loads, num_layers=model.num_layers, update_rate=0.01 * (number + 1))
        total = torch.tensor(sum(output["sum"] for output in outputs) if outputs else 0.0, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        # Every tensor-parallel rank of the last stage has the same loss.
        return total.item() / self.groups.tp.size() / (GLOBAL_BATCH * SEQ_LENGTH)

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Weights, moments, fp32 weights, averages and biases by global name; NaN where another rank has the value."""
        shards = {parameter: (part, ranges["param"]) for part in parts(self.optimizer)
                  for buffer in part.gbuf_ranges for buckets in buffer.values() for bucket in buckets
                  for parameter, ranges in bucket["param_map"].items()}
        averages: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        if self.average:
            self.average.wait()
            averages = {shard.parameter: {"average": values}
                        for shard, values in zip(self.average.shards, self.average.averages, strict=True)}
        state: dict[str, torch.Tensor] = {}
        for chunk in self.chunks:
            for whole in whole_parameters(chunk, self.groups):
                _put(state, f"weight:{whole.name}", whole, whole.local)
                if whole.parameter not in shards:
                    continue
                part, held = shards[whole.parameter]
                held_values = part._get_main_param_and_optimizer_states(whole.parameter)
                for kind, values in (held_values | averages.get(whole.parameter, {})).items():
                    if values.dim() == 0:
                        continue
                    local = torch.full(whole.parameter.shape, torch.nan, dtype=values.dtype)
                    local.view(-1)[held.start:held.end] = values.detach().view(-1)
                    _put(state, f"{kind}:{whole.name}", whole, local if whole.expert is None else local[whole.expert])
        for row, router in routers(self.chunks, self.run.model.num_layers):
            state[f"bias:{row}"] = router.expert_bias.clone()
        return state


def all_expert_loads(chunks: list[Any], **sizes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads of experts and balance losses by layer, over all ranks."""
    sums = collect_expert_loads(chunks, **sizes)
    for part in sums:
        torch.distributed.all_reduce(part)
    return sums


def start(run: RunConfig) -> Training:
    """Groups, stages with their initial weights, and the optimizer, for the process group that is there."""
    run.validate(torch.distributed.get_world_size())
    precision = run.training.precision
    groups = create_groups(run.parallel, run.training.seed)
    stages, config = build_stages(run, groups, precision=precision)
    chunks = wrap_stages(stages, config, groups)
    optimizer = build_optimizer(run.training, chunks, groups, precision=precision)
    config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=groups_of_gradients(run.model, run.parallel, groups))
    config.grad_scale_func = None
    decay = run.training.ema_decay
    return Training(run, groups, config, chunks, optimizer, build_forward_backward(run.parallel, groups, config),
                    WeightAverage(optimizer, chunks, groups, decay=decay) if decay else None)


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers of a chain."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def merge(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The whole state from every rank's; replicas must agree exactly, and nothing may be missing."""
    merged: dict[str, torch.Tensor] = {}
    for state in states:
        for name, tensor in state.items():
            if name not in merged:
                merged[name] = tensor.clone()
                continue
            known, new = ~merged[name].isnan(), ~tensor.isnan()
            assert torch.equal(merged[name][known & new], tensor[known & new]), f"replicas of {name} differ"
            merged[name][new] = tensor[new]
    holes = [name for name, tensor in merged.items() if tensor.isnan().any()]
    assert not holes, f"no rank has all of {holes}"
    return merged


def differences(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> list[str]:
    """Names that are in one state only or whose dtypes or values are not equal, bit for bit."""
    return sorted(expected.keys() ^ actual.keys()) + [
        name for name in expected.keys() & actual.keys()
        if expected[name].dtype != actual[name].dtype or not torch.equal(expected[name], actual[name])]


def _batch(sample: int, tokens: torch.Tensor) -> Batch:
    return Batch(tokens[None, :-1], tokens[None, 1:], torch.ones(1, SEQ_LENGTH), torch.arange(SEQ_LENGTH)[None],
                 torch.tensor([sample]))


def _loss(_batch: Batch, losses: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    main_BS, mtp_BS = losses
    main = main_BS.sum()
    # int32 as the trainer's: the pipeline adds it up over ranks, and those without the loss have an int32 zero.
    count = torch.tensor(main_BS.numel(), dtype=torch.int32)
    return main + 0.3 * sum(loss.sum() for loss in mtp_BS), count, {"sum": main.item()}


def _put(state: dict[str, torch.Tensor], name: str, whole: WholeParameter, local: torch.Tensor) -> None:
    full = torch.full(whole.shape, torch.nan, dtype=local.dtype)
    whole.put(full, local)
    if name in state:
        # A stage's copy of the embedding.
        assert torch.equal(state[name], full), f"copies of {name} differ"
    state[name] = full
