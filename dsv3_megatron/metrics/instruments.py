"""The trainer's instruments: they look at a step that is logged and say, over all ranks, what they saw.

On other steps they cost a few readings of a clock. On a logged step the routers and heads note what they do
(`model/observation.py`), the gradients are measured where they are final, and two collectives, one sum and one maximum
over all ranks, carry everything together. A layer that several ranks hold counts each token once, as for the loads:
each rank routes its own tokens.

Usage (every process makes one; all of them log the same steps):
    instruments = Instruments(run, chunks, optimizer, groups, device)
    instruments.begin_step(iteration)
    with instruments.clock.part("gradient-reduction"): ...
    instruments.measure_gradients()
    with instruments.clock.part("optimizer"): ...
    measurements = instruments.end_step()          # None unless the step is logged

Shapes: L layers with MTP modules, E experts, G groups of experts, b score bins, c components.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.gradients import COMPONENTS, GradientNorms
from dsv3_megatron.metrics.measurements import Measurements, RouterMeasurements, check_node_limit
from dsv3_megatron.metrics.process_memory import memory_bytes
from dsv3_megatron.metrics.run_records import is_logged
from dsv3_megatron.metrics.shared_numbers import SharedNumbers
from dsv3_megatron.metrics.step_clock import StepClock
from dsv3_megatron.model.language_model import DeepSeekV3Model
from dsv3_megatron.model.observation import NUM_SCORE_BINS, HeadAgreement, RouterObserver
from dsv3_megatron.optim.router_bias import routers
from dsv3_megatron.platform import Device

STEP_PARTS = ("data", "forward-backward", "gradient-reduction", "optimizer", "router-bias", "logging")


class Instruments:
    """One process's share of the instruments. Without a folder to log to, nothing is measured.

    Args:
        run: The run; `logging` says whether and when.
        chunks: This rank's stages, wrapped.
        optimizer: Distributed optimizer over the same stages.
        groups: The run's process groups.
        device: Device of this process.

    Attributes:
        clock: Clock of STEP_PARTS; the trainer marks them.
    """

    def __init__(self, run: RunConfig, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer,
                 groups: ProcessGroupCollection, device: Device) -> None:
        self._run = run
        self._device = device
        self._is_enabled = run.logging.tensorboard_dir is not None
        self.clock = StepClock(STEP_PARTS, torch.cuda.synchronize if self._is_enabled and device.is_cuda else None)
        self._is_observing = False
        self._num_steps = 0
        self._squares_c = torch.zeros(len(COMPONENTS), dtype=torch.float64)
        if not self._is_enabled:
            return
        model = run.model
        self._gradients = GradientNorms(chunks, optimizer, groups)
        self._routers = [
            (layer, router, RouterObserver(model.num_experts, model.moe_router_num_groups, device.torch_device))
            for layer, router in routers(chunks, model.num_layers)]
        self._heads = [module for chunk in chunks for module in chunk.modules()
                       if isinstance(module, DeepSeekV3Model) and module.post_process and model.mtp_num_layers]
        self._agreement = HeadAgreement(model.mtp_num_layers, groups.tp, device.torch_device,
                                        cp_group=groups.cp)
        # Tensor-parallel ranks compare the same heads.
        self._counts_agreement = groups.tp.rank() == groups.cp.rank() == 0

    def measure_gradients(self) -> None:
        """Measure the gradients of a logged step; called when they have been added up over ranks."""
        if self._is_observing:
            with self.clock.part("logging"):
                self._squares_c = self._gradients.squares()

    def begin_step(self, iteration: int) -> None:
        """Look at this step if it is a logged one; counted from 1."""
        self._num_steps += 1
        if self._is_enabled and is_logged(iteration, self._run.logging.log_interval):
            self._observe(True)

    def end_step(self) -> Measurements | None:
        """What was seen, the same on every rank; None if the step is not logged. Every rank calls.

        Raises:
            NodeLimitError: a token went to more groups of experts than it may.
        """
        if not self._is_observing:
            return None
        self._observe(False)
        measurements = self._collect()
        model = self._run.model
        if model.moe_router_num_groups > 1 and model.moe_router_group_mask == "exclude":
            # The other mask, Transformers' former one, breaks the limit where biased affinities are negative.
            check_node_limit(measurements.routers, model.moe_router_group_topk)
        return measurements

    def _observe(self, is_on: bool) -> None:
        self._is_observing = is_on
        for _, router, observer in self._routers:
            router.observer = observer if is_on else None
        for head in self._heads:
            head.agreement = self._agreement if is_on else None

    def _collect(self) -> Measurements:
        """Everything that was noted, over all ranks; the notes are cleared."""
        seconds = torch.tensor(list(self.clock.take().values()), dtype=torch.float64) / self._num_steps
        self._num_steps = 0
        memory = memory_bytes(self._device)
        sums = self._notes()
        largest = SharedNumbers({"seconds": (len(STEP_PARTS),), "memory": (len(memory),)}, self._device.torch_device)
        sums["seconds"].copy_(seconds / torch.distributed.get_world_size())
        largest["seconds"].copy_(seconds)
        largest["memory"].copy_(torch.tensor(list(memory.values())))
        sums.reduce(torch.distributed.ReduceOp.SUM)
        largest.reduce(torch.distributed.ReduceOp.MAX)
        return Measurements(
            routers=_router_measurements(sums),
            grad_norms=dict(zip(COMPONENTS, sums["squares"].sqrt().tolist(), strict=True)),
            head_agreement=tuple(agreeing / sampled if sampled else None
                                 for agreeing, sampled in sums["agreement"].tolist()),
            part_seconds=dict(zip(STEP_PARTS, sums["seconds"].tolist(), strict=True)),
            slowest_part_seconds=dict(zip(STEP_PARTS, largest["seconds"].tolist(), strict=True)),
            memory_bytes={kind: int(size) for kind, size in zip(memory, largest["memory"].tolist(), strict=True)},
        )

    def _notes(self) -> SharedNumbers:
        """This rank's notes, each in its place among all layers'."""
        model = self._run.model
        layers, groups = model.num_layers + model.mtp_num_layers, model.moe_router_num_groups
        notes = SharedNumbers({
            "scores": (layers, NUM_SCORE_BINS), "tokens_per_group": (layers, groups),
            "tokens_by_num_groups": (layers, groups + 1), "bias": (layers, model.num_experts), "holders": (layers,),
            "squares": (len(COMPONENTS),), "agreement": (model.mtp_num_layers, 2), "seconds": (len(STEP_PARTS),),
        }, self._device.torch_device)
        for layer, router, observer in self._routers:
            notes["scores"][layer] = observer.score_counts_b
            notes["tokens_per_group"][layer] = observer.tokens_per_group_G
            notes["tokens_by_num_groups"][layer] = observer.tokens_by_num_groups
            notes["bias"][layer] = router.expert_bias
            notes["holders"][layer] = 1
            observer.clear()
        notes["squares"].copy_(self._squares_c)
        if self._heads and self._counts_agreement:
            notes["agreement"].copy_(self._agreement.counts)
        self._agreement.clear()
        return notes


def _router_measurements(sums: SharedNumbers) -> dict[int, RouterMeasurements]:
    """Measurements by layer, from sums over ranks; layers without a router are left out."""
    # Every rank that holds a layer has the same bias: in fp64 the sum of equal fp32 numbers is exact.
    biases_LE = sums["bias"] / sums["holders"].clamp(min=1).unsqueeze(1)

    def counts(name: str, layer: int) -> list[int]:
        return sums[name][layer].long().tolist()

    return {layer: RouterMeasurements(counts("scores", layer), counts("tokens_per_group", layer),
                                      counts("tokens_by_num_groups", layer), biases_LE[layer].tolist())
            for layer, holders in enumerate(sums["holders"].tolist()) if holders}
