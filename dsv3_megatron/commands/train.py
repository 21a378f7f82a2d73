"""One process of a training run: `torchrun -m dsv3_megatron train FLAGS`, or alone `dsv3 train FLAGS`.

What can be answered without torch (--help, --print-model, --print-schedule, a wrong setting) is answered before it is
imported. A wrong setting is printed once, not once per process.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.launches import EXIT_NEXT_LAYOUT
from dsv3_megatron.config.load import TrainingRequest, parse_command
from dsv3_megatron.config.output import json_text, require_output_file
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.config.world_size import largest_world_size
from dsv3_megatron.guards.endings import launcher_listens, tell_launcher
from dsv3_megatron.process.elastic import EXIT_AGAIN, elastic_launch, stopped_code
from dsv3_megatron.process.logs import configure_logging
from dsv3_megatron.process.ranks import Processes, require_free_port
from dsv3_megatron.process.stop import StopListener, default_stops
from dsv3_megatron.runs.rank import EXIT_CONFIG, end_of, prepare_rank, run_rank, say_error

if TYPE_CHECKING:
    from dsv3_megatron.config.run import RunConfig
    from dsv3_megatron.guards.claims import Start
    from dsv3_megatron.planning.precheck import Told
    from dsv3_megatron.runs.trainer import Trainer

# Set by the launcher for its check before the start, of which there is one a node: how many there are, and which.
NODES, NODE_RANK = "DSV3_NODES", "DSV3_NODE_RANK"
# Set by the launcher for the processes of a run that it has checked: notes and warnings have been printed.
ALREADY_CHECKED = "DSV3_MEGATRON_CHECKED"


def main(arguments: Sequence[str] | None = None,
         parse: Callable[[Sequence[str]], TrainingRequest] = parse_command) -> int:
    """Run one process of a training run.

    Args:
        arguments: Words of the command line; None: those of the process.
        parse: Reader of them, which raises ValueError for what is wrong with them.

    Returns:
        Exit code: 0 done, 2 a setting or an input is wrong, 3 a guard ended the run, 4 a rank hung, 5 the run goes on
        under another layout when it is started again, 75 it makes way for the next start with other nodes, 128 and the
        number of a signal that came before there was anything to save; any other error raises.
    """
    with StopListener("nothing was saved"):
        return end_of(lambda: _main(sys.argv[1:] if arguments is None else arguments, parse))


def _main(arguments: Sequence[str], parse: Callable[[Sequence[str]], TrainingRequest]) -> int:
    processes: Processes | None = None
    try:
        processes = Processes.from_environment()
        command = parse(arguments)
        if command.print_model or command.print_schedule or command.plot_schedule:
            _describe(command, processes.rank)
            return 0
        world_size = command.world_size or processes.world_size
        if not command.check_only:
            processes.require_rank()
        if elastic_launch():
            world_size = largest_world_size(command.run, world_size)
            if processes.rank >= world_size and not command.check_only:
                return _stand_by(processes)
            processes = _narrowed(processes, world_size)
        command.run.validate(world_size)
        told = _check_inputs(command, world_size, processes.rank)
    except ValueError as error:
        return _refuse(str(error), processes)
    if processes.rank == 0:
        _tell(command, told)
    if command.check_only:
        return _meet_nodes(processes, None)
    return _train(command, processes)


def _narrowed(processes: Processes, world_size: int) -> Processes:
    """The places among the first `world_size` processes, which are all that the run uses."""
    if world_size == processes.world_size or processes.address is None:
        return processes
    if processes.rank == 0:
        print(f"{world_size} of {processes.world_size} processes are used: no more divide the layout and its batches; "
              "the others stand by", file=sys.stderr, flush=True)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(processes.local_size, world_size))
    return Processes.from_environment()


def _stand_by(processes: Processes) -> int:
    """Wait as a process without work: torchrun starts it again with the others when nodes come or go."""
    from dsv3_megatron.parallel.roll_call import PeerError, stand_by

    with default_stops():  # it has nothing to save
        try:
            return stand_by(processes)
        except PeerError as error:
            print(f"rank {processes.rank}, which stood by: {error}", file=sys.stderr, flush=True)
            return EXIT_AGAIN


def _refuse(text: str, processes: Processes | None) -> int:
    """Say what is wrong, to the user and to the processes that would wait for this one."""
    if processes is None or NODES in os.environ:
        where = f" (node {os.environ.get(NODE_RANK)}, on {socket.gethostname()})" if _num_nodes() > 1 else ""
        print_error(text, where)
        if processes is not None:
            _meet_nodes(processes, text)
    else:
        say_error(text, processes)
    return tell_launcher(EXIT_CONFIG)


def _num_nodes() -> int:
    return int(os.environ.get(NODES, "1"))


def _meet_nodes(processes: Processes, error: str | None) -> int:
    """The launcher's check of this node meets those of the others, so that all start, or none.

    Returns:
        Exit code: 2 if any node's check found something.
    """
    if NODES not in os.environ:
        return 0
    try:
        if _num_nodes() == 1:
            if error is None and "MASTER_PORT" in os.environ:
                require_free_port(processes.port, processes.address or "")
            return 0
        from dsv3_megatron.parallel.roll_call import PeerError, meet_nodes

        try:
            meet_nodes(processes, int(os.environ[NODE_RANK]), _num_nodes(), error)
        except PeerError as peer:
            if error is None:  # else it is said, and nobody was there to be told
                print_error(peer)
                return EXIT_CONFIG
    except ConfigError as wrong:
        if error is None:
            print_error(wrong)
        return EXIT_CONFIG
    return 0


def _tell(command: TrainingRequest, told: Sequence[Told]) -> None:
    """Say what was checked, if that was asked for; what may go wrong, and what became of Megatron-LM's flags, once."""
    if not os.environ.get(ALREADY_CHECKED):
        for note in command.notes:
            print(f"note: {note}", file=sys.stderr)
        for line in told:
            if line.is_warning:
                print(f"warning: {line.text}", file=sys.stderr)
    for line in told if command.check_only else ():
        if not line.is_warning:
            print(line.text)


def _describe(command: TrainingRequest, rank: int) -> None:
    """Print or draw what was asked for about the run, once."""
    run = command.run
    run.validate(command.world_size)
    require_output_file("--plot-schedule", command.plot_schedule, ending=".png")
    parts: dict[str, Any] = {}
    if command.print_model:
        from dsv3_megatron.reports.model_table import describe_model

        parts["model"] = describe_model(run, command.world_size, as_json=command.as_json)
    if command.print_schedule:
        from dsv3_megatron.reports.schedule_table import schedule_summary, schedule_table

        parts["schedule"] = schedule_summary(run) if command.as_json else schedule_table(run)
    if rank != 0:
        return
    if parts and command.as_json:
        # Of one thing its own object, of two one that holds both.
        print(json_text(parts if len(parts) > 1 else next(iter(parts.values())), indent=2))
    elif parts:
        print("\n\n".join(parts.values()))
    if command.plot_schedule:
        from dsv3_megatron.reports.schedule_plot import plot_schedule

        plot_schedule(run.recipe(), command.plot_schedule, title=run.name)


def _check_inputs(command: TrainingRequest, world_size: int, rank: int) -> list[Told]:
    """Data, tokenizer, layout, memory and folders fit the run; nothing is allocated for the answer.

    What the first rank alone writes or would find, it alone looks at.
    """
    from dsv3_megatron.checkpoint.base_weights import check_base
    from dsv3_megatron.checkpoint.folder import check_save_directory
    from dsv3_megatron.checkpoint.resume import plan_resumption
    from dsv3_megatron.data.blend import blends_of_run, check_data
    from dsv3_megatron.data.chat.masked import mask_prefix
    from dsv3_megatron.data.contents import read_contents
    from dsv3_megatron.data.datasets import parse_split
    from dsv3_megatron.data.document_ends import resolve_eod_id
    from dsv3_megatron.data.tokenizer import fingerprint
    from dsv3_megatron.guards.claims import RunClaim
    from dsv3_megatron.metrics.trackers.kinds import require_tracker_packages
    from dsv3_megatron.planning import precheck
    from dsv3_megatron.planning.dispatch_check import check_dispatch

    run = command.run
    start = RunClaim(run.checkpoint, run.logging.tensorboard_dir).look()
    launched = _launched(run, start)
    told = (precheck.check_layout(launched, world_size)
            + check_dispatch(launched, _ranks_per_node(command, world_size)))
    # Each phase to run may have data of its own.
    data = [phase.data for phase in run.recipe().phases_to_run]
    if run.policy.is_on:
        told += _check_prompts(run, is_new=start.load is None)
    elif not run.data.data_path:
        raise ConfigError("data_path is not set: give the training data's PREFIX (of PREFIX.bin and PREFIX.idx, made "
                          "by dsv3 preprocess), as in --data-path PREFIX")
    prefixes = list(dict.fromkeys(
        prefix for section in data for blend in blends_of_run(section) for prefix in blend.prefixes))
    if prefixes and not all(section.valid_data_path for section in data):
        parse_split(run.data.split)
    tokenizer = fingerprint(run.data.tokenizer_model) if run.data.tokenizer_model else None
    check_data(prefixes, vocab_size=run.model.vocab_size, tokenizer_fingerprint=tokenizer,
               cache_dir=run.data.data_cache_path)
    if run.data.document_flags:
        resolve_eod_id(prefixes, tokenizer_model=run.data.tokenizer_model, flags=run.data.document_flags)
    if run.checkpoint.pretrained_checkpoint and start.load is None:
        check_base(run.checkpoint.pretrained_checkpoint, run)
    plan_resumption(run, start.load, start.iteration)
    if run.checkpoint.save:
        check_save_directory(run.checkpoint.save)
    told += precheck.check_run_data(run) if prefixes else []
    masks = [mask_prefix(prefix) for prefix in prefixes] if run.data.sft else []
    for prefix in masks:
        read_contents(prefix, cache_dir=run.data.data_cache_path)
    if rank == 0:
        if run.checkpoint.verify_files == "all":
            precheck.prove_tokens([*prefixes, *masks])
        precheck.check_attention(run, is_planned=command.world_size is not None)
        told += precheck.check_vocabulary(run, prefixes)
        told += precheck.check_export(run)
        require_tracker_packages(run.logging)
        told += precheck.check_folders(run)
        told += precheck.check_memory(
            run, world_size, is_planned=command.world_size is not None, hardware=command.hardware,
            allows_overflow=command.allow_memory_overflow)
    return told


def _check_prompts(run: RunConfig, *, is_new: bool) -> list[Told]:
    """Prompts, rewards and kept rollouts fit a run that learns from answers of its own."""
    from dsv3_megatron.planning.precheck import Told
    from dsv3_megatron.post_training.checks import check_policy

    return [Told(text, is_warning=True) for text in check_policy(run, is_new=is_new)]


def _launched(run: RunConfig, start: Start) -> RunConfig:
    """The run in the layout, and with the batch, of the phase that this start begins with."""
    from dsv3_megatron.checkpoint.resume import plan_schedule

    phases = run.recipe().phases_to_run
    if all(phase.parallel == phases[0].parallel for phase in phases):
        return run
    planned, _ = plan_schedule(run, start.load, start.iteration)
    return planned.part.run.in_phase(planned.part.first_phase)


def _ranks_per_node(command: TrainingRequest, world_size: int) -> int | None:
    """Processes of this node, as far as whoever started this one has said it."""
    if NODES in os.environ:
        return world_size // _num_nodes()
    return None if command.world_size is not None else Processes.from_environment().local_size


def _trainer_of(run: RunConfig) -> Trainer:
    """The trainer of what a run learns from: texts and conversations, or answers of its own."""
    if run.policy.is_on:
        from dsv3_megatron.post_training.policy_trainer import PolicyTrainer

        return PolicyTrainer(run)
    from dsv3_megatron.runs.trainer import Trainer

    return Trainer(run)


def _train(command: TrainingRequest, processes: Processes) -> int:
    prepare_rank()
    configure_logging(processes.rank)  # before the bar, which takes the lines to itself while it is there
    from dsv3_megatron.parallel.roll_call import let_go

    def work() -> int:
        with slow_work("start", shown=processes.rank == 0):
            trainer = _trainer_of(command.run)
        code = trainer.train()
        if code == 0 and not trainer.is_complete:
            code = stopped_code()
        if elastic_launch() and processes.rank == 0:
            let_go(processes, code)
        elif code == EXIT_NEXT_LAYOUT and launcher_listens() and not elastic_launch():
            tell_launcher(code)
            return 0  # torchrun would call it a failure
        return code

    return run_rank(processes.rank, work)
