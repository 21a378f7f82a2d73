"""Ranks of a GPU run on a machine without a GPU: memory, messages, host waits, and errors of a GPU's code alone.

    dsv3 rehearse --preset dsv3-671b --fp8 blockwise --world-size 2048 --ranks 0 300 2047

    dsv3 rehearse --preset dsv3-671b --fp8 blockwise --world-size 2048 --all-kinds

All flags of a run are taken and mean the same; data, folders and other ranks are made up. Each rank builds the run's
own Trainer and takes a step, on tensors with shapes and without values. docs/guides/rehearsal.md says what is seen so.

Exit status: 0 nothing found, 1 something found, 2 the run or the command cannot be.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser, parse_command
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.planning.memory.estimate import RankMemory, estimate_memory
from dsv3_megatron.process.cores import usable_cores

if TYPE_CHECKING:  # the room imports torch, which the flags do without
    from dsv3_megatron.rehearsal.findings import Rehearsal
    from dsv3_megatron.rehearsal.rank_results import RankResult

EXIT_FOUND = 1


def _parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    assert __doc__ is not None
    parser = Parser(prog="dsv3 rehearse", allow_abbrev=False, description=__doc__.partition("\n\n")[0],
                    epilog=__doc__.partition("\n\n")[2], usage="dsv3 rehearse --world-size N [flags of a run]",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--world-size", type=int, metavar="N", help="processes of the run, one a GPU")
    add("--ranks", type=int, nargs="+", metavar="R", help="global ranks to rehearse (default: 0)")
    add("--all-kinds", action="store_true", help="a rank of each kind, pipeline position x expert position, and "
        "compare their messages")
    add("--imbalance", type=float, default=1.0, metavar="X", help="routed rows of the first expert-parallel rank over "
        "the mean (default: 1, balance)")
    add("--num-microbatches", type=int, metavar="N", help="micro-batches of the step (default: as few as fill the "
        "pipeline)")
    add("--num-steps", type=int, choices=(1, 2), metavar="N", help="steps: 2 tell what the first one makes for all "
        "later ones (default: 2; 1 with --all-kinds)")
    add("--save-and-resume", action="store_true", help="save a checkpoint too, and resume from it")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (%(default)s)")
    add("--device-memory-gb", type=float, default=80 * 2**30 / 1e9, metavar="X",
        help="memory of a GPU, in GB of 10^9 bytes (default: 85.9, which is 80 GiB)")
    add("--processes", type=int, metavar="N", help="ranks rehearsed at a time (default: one a core)")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_known_args(arguments)


def _check(options: argparse.Namespace) -> None:
    """The rules of this command's own flags, without the run's."""
    if options.world_size is None:
        raise ConfigError("--world-size must be given: how many GPUs the run has; see --help")
    for flag, value in (("--world-size", options.world_size), ("--num-microbatches", options.num_microbatches),
                        ("--gpus-per-node", options.gpus_per_node), ("--processes", options.processes)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag}={value} must be at least 1")
    if not 0 < options.device_memory_gb < 1e6:
        raise ConfigError(f"--device-memory-gb={options.device_memory_gb:g} must be above 0 and below 1e6")
    if options.all_kinds and options.ranks is not None:
        raise ConfigError("--all-kinds chooses ranks itself; leave out --ranks, or it")


def rehearse(options: argparse.Namespace, flags: Sequence[str], command: Sequence[str] | None = None) -> Rehearsal:
    """Rehearse what the command's options ask for.

    Args:
        options: Options of this command.
        flags: Flags of the run.
        command: Arguments of Python that start the process that ranks are forked from; None: the rehearsal's own.

    Raises:
        ConfigError: the run cannot be, or the options.
        RuntimeError: the process that ranks are forked from died.
    """
    from dsv3_megatron.rehearsal.findings import Rehearsal
    from dsv3_megatron.rehearsal.rank_kinds import ranks_of_all_kinds, require_ranks
    from dsv3_megatron.rehearsal.rank_processes import RANKS_COMMAND, rehearse_ranks
    from dsv3_megatron.rehearsal.rank_results import RankTask
    from dsv3_megatron.rehearsal.rehearsed_run import rehearsed_run

    _check(options)
    asked = parse_command(flags).run
    run = rehearsed_run(asked, options.world_size, options.num_microbatches)
    _check_imbalance(options.imbalance, run)
    ranks = (ranks_of_all_kinds(run.parallel, options.world_size) if options.all_kinds
             else require_ranks(options.ranks or [0], options.world_size))
    device_bytes = round(options.device_memory_gb * 1e9)
    num_steps = options.num_steps or (1 if options.all_kinds else 2)
    tasks = [RankTask(tuple(flags), rank, options.world_size, options.gpus_per_node, options.num_microbatches,
                      num_steps, options.save_and_resume, options.imbalance, device_bytes) for rank in ranks]
    results = rehearse_ranks(tasks, num_processes=options.processes or min(usable_cores(), len(tasks)),
                             command=command or RANKS_COMMAND)
    return Rehearsal(
        run=run, world_size=options.world_size, device_bytes=device_bytes, ranks=tuple(results),
        asked_microbatches=asked.training.num_microbatches(asked.parallel.data_parallel_size(options.world_size)),
        planned={result.rank: _planned(run, options, result) for result in results})


def _planned(run: RunConfig, options: argparse.Namespace, result: RankResult) -> RankMemory:
    """The planner's estimate for a rank, with the rows that its experts get."""
    from dsv3_megatron.rehearsal.made_routing import imbalance_of

    imbalance = imbalance_of(result.expert_rank, options.imbalance, ep=run.parallel.expert_model_parallel_size)
    return estimate_memory(run, options.world_size, imbalance=imbalance)[result.pipeline_rank]


def _check_imbalance(imbalance: float, run: RunConfig) -> None:
    from dsv3_megatron.rehearsal.made_routing import require_imbalance

    require_imbalance(imbalance, experts=run.model.num_experts, top_k=run.model.moe_router_topk,
                      ep=run.parallel.expert_model_parallel_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        options, flags = _parse_arguments(arguments)
        rehearsal = rehearse(options, flags)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    from dsv3_megatron.rehearsal.findings import as_json, as_text

    print(json_text(as_json(rehearsal)) if options.json else as_text(rehearsal))
    return EXIT_FOUND if rehearsal.findings() else 0
