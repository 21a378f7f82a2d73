"""A model on one or several processes that answers what the first process asks: scores of continuations, new tokens.

The first process calls; the others wait in `follow` until it has something for them, do their part of it, and wait
again. Processes that have a model among them are a team; where there are several, each answers its share of the
batches.

    model = SharedModel.build(run, load)
    if not model.is_asking: return model.follow()
    try: model.score(...)
    finally: model.end()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.generation.continuations import ContinuationRequest, ContinuationScore, plan_batches, score_batches
from dsv3_megatron.generation.forward import CachedModel
from dsv3_megatron.generation.generator import Generator, Options
from dsv3_megatron.generation.split_model import SplitModel
from dsv3_megatron.generation.stop_texts import StopTexts
from dsv3_megatron.generation.text import TextCodec
from dsv3_megatron.parallel.groups import start_process_group
from dsv3_megatron.platform import prepare
from dsv3_megatron.runs.built_model import BuiltModel, LoadInto, build_model

# The others wait as long while the first process reads its tasks or sums up what it found.
_LONGEST_WAIT_S = 6 * 3600.0


@dataclass(frozen=True)
class _Scoring:
    """Continuations to score: the arguments of `SharedModel.score`."""

    requests: tuple[ContinuationRequest, ...]
    batch_size: int | None


@dataclass(frozen=True)
class _Continuing:
    """Prompts to continue: the arguments of `SharedModel.generate`."""

    prompts: tuple[tuple[int, ...], ...]
    options: Options
    stops: tuple[str, ...]


class SharedModel:
    """One process's share of a model that answers.

    Args:
        built: The stages, with their weights.
        codec: The tokenizer, which tells where a text says that it ends.
        max_length: Most tokens that the model reads; None: its context.

    Attributes:
        model: What this process runs.
        max_length: Most tokens that the model reads.
        is_asking: Whether this is the process that asks, the first one.
    """

    def __init__(self, built: BuiltModel, codec: TextCodec, max_length: int | None = None) -> None:
        parallel, stages = built.run.parallel, [stage.eval() for stage in built.stages]
        self.built, self.codec = built, codec
        self.max_length = max_length or built.run.model.max_position_embeddings
        is_whole = len(stages) == 1 and all(group.size() == 1 for group in _shared_by(built.groups))
        self.model = CachedModel(stages[0]) if is_whole else SplitModel(stages, parallel, built.groups, built.config)
        self.rank, self.num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.is_asking = self.rank == 0
        self.team, self.num_teams = teams(built.groups)
        # Whether the others listen: not in the middle of a piece of work, which may have failed for all.
        self._is_heard = True

    @classmethod
    def build(cls, run: RunConfig, load: LoadInto | None, codec: TextCodec, max_length: int | None = None
              ) -> SharedModel:
        """Join the processes, build the model and load its weights; called by every process.

        Args:
            run: A run validated against the number of processes.
            load: Puts the checkpoint into the stages; None: the run's own kind, from `run.checkpoint.load`.
            codec: The tokenizer.
            max_length: Most tokens that the model reads; None: its context.
        """
        start_process_group(prepare(), timeout_s=_LONGEST_WAIT_S)
        built = build_model(run)
        built.load(load)
        return cls(built, codec, max_length)

    # ---- what the first process asks ----------------------------------------------------------------

    def score(self, requests: Sequence[ContinuationRequest], *, batch_size: int | None = 1,
              report: Callable[[int], None] = lambda count: None) -> list[ContinuationScore]:
        """The scores of continuations, in their order.

        Args:
            requests: Continuations to score.
            batch_size: Sequences of a pass; None: as many as fill the model's context.
            report: Hears how many more requests have been answered.

        Raises:
            ConfigError: a continuation cannot be scored; nothing was computed.
        """
        plan_batches(requests, max_length=self.max_length, batch_size=batch_size)
        return self._ask(_Scoring(tuple(requests), batch_size), report)

    def generate(self, prompts: Sequence[Sequence[int]], options: Options, stops: Sequence[str] = (),
                 report: Callable[[int], None] = lambda count: None) -> list[list[int]]:
        """New ids of each prompt, without the end token.

        Args:
            prompts: Ids of each.
            options: Settings of the generation.
            stops: Texts behind which a sequence need not go on; what comes out ends with one, or behind it.
            report: Hears how many more prompts have ended.

        Raises:
            ConfigError: a setting is wrong, or a prompt cannot be continued; nothing was computed.
        """
        options.validate(self.model.num_mtp_layers)
        for number, prompt in enumerate(prompts, start=1):
            options.check_prompt(prompt, self.model.vocab_size, f"prompt {number}")
        return self._ask(_Continuing(tuple(map(tuple, prompts)), options, tuple(stops)), report)

    def end(self) -> None:
        """Let the others go; the first process calls it once, whatever has happened."""
        if self._is_heard:
            self._tell(None)

    # ---- what every process does --------------------------------------------------------------------

    def follow(self) -> None:
        """Do this process's part of whatever the first one asks, until it ends."""
        while (work := self._tell(None)) is not None:
            self._do(work, lambda count: None)

    def _tell(self, work: Any) -> Any:
        message = [work]
        if self.num_ranks > 1:
            torch.distributed.broadcast_object_list(message, src=0)
        return message[0]

    def _ask(self, work: _Scoring | _Continuing, report: Callable[[int], None]) -> list[Any]:
        assert self.is_asking, "the first process asks"
        return self._do(self._tell(work), report)

    def _do(self, work: _Scoring | _Continuing, report: Callable[[int], None]) -> list[Any]:
        """This team's share of a piece of work, and the shares of all."""
        self._is_heard = False
        if isinstance(work, _Scoring):
            batches = plan_batches(work.requests, max_length=self.max_length, batch_size=work.batch_size)
            mine: dict[int, Any] = dict(score_batches(
                self.model, work.requests, batches[self.team::self.num_teams], report))
            count = len(work.requests)
        else:
            mine, count = self._continue(work, report), len(work.prompts)
        everyone: list[dict[int, Any]] = [mine]
        if self.num_ranks > 1:
            everyone = [{}] * self.num_ranks
            torch.distributed.all_gather_object(everyone, mine)
        self._is_heard = True
        found = {number: value for each in everyone for number, value in each.items()}
        return [found[number] for number in range(count)]

    def _continue(self, work: _Continuing, report: Callable[[int], None]) -> dict[int, list[int]]:
        """Batches of prompts, the longest first, each with its number among all: what draws follow from."""
        order = sorted(range(len(work.prompts)), key=lambda number: (-len(work.prompts[number]), work.prompts[number]))
        size = work.options.batch_size
        batches = [order[first: first + size] for first in range(0, len(order), size)]
        mine = [number for batch in batches[self.team::self.num_teams] for number in batch]
        found: dict[int, list[int]] = {number: [] for number in mine}
        options = dataclasses.replace(work.options, has_ended=StopTexts(self.codec, work.stops)) if work.stops \
            else work.options
        for event in Generator(self.model, options).generate([work.prompts[number] for number in mine], mine):
            found[mine[event.prompt]] += event.ids
            if event.ended is not None:
                report(1)
        return found


def teams(groups: ProcessGroupCollection) -> tuple[int, int]:
    """Which team this process is in, and how many there are: processes with parts of one model are a team.

    Called by every process. Processes are together that share a stage's layers, its experts or a pipeline, and those
    that are together with these.
    """
    world_size = torch.distributed.get_world_size()
    own = [torch.distributed.get_process_group_ranks(group) for group in _shared_by(groups)]
    everyone: list[list[list[int]]] = [own]
    if world_size > 1:
        everyone = [[]] * world_size
        torch.distributed.all_gather_object(everyone, own)
    team_of = list(range(world_size))
    for ranks in (ranks for sets in everyone for ranks in sets):
        joined = {team_of[rank] for rank in ranks}
        team_of = [min(joined) if team in joined else team for team in team_of]
    numbers = sorted(set(team_of))
    return numbers.index(team_of[torch.distributed.get_rank()]), len(numbers)


def _shared_by(groups: ProcessGroupCollection) -> tuple[torch.distributed.ProcessGroup, ...]:
    """The groups over which the weights of one model are divided."""
    return groups.pp, groups.tp, groups.ep, groups.expt_tp
