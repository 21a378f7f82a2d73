"""What a run will take before it starts: step time, memory, days, cost, and which layout is best. Needs no GPU.

    dsv3 plan --preset dsv3-671b --hardware h800 --num-gpus 2048 --pipeline-schedule dualpipe \\
        --fp8 blockwise --recompute-granularity selective --tokens 14.8e12 --price-per-gpu-hour 2

    dsv3 plan --preset dsv3-671b --hardware h800 --num-gpus 2048 --fp8 blockwise --search

    dsv3 plan --calibrate logs --save-hardware my-machine.json

All flags of a run (bash examples/pretrain_dsv3.sh --help) are taken and mean the same. docs/planning/README.md says
where each number comes from, and how far the predictions are from what was published and measured.

Exit status: 0 for an answer, "does not fit" among them ("fits" in --json); 2 for a command that cannot be carried out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.commands import grpo, sft
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser, TrainingRequest, parse_command
from dsv3_megatron.config.output import json_text, require_output_file
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.metrics.rank_state import checkpoint_bytes
from dsv3_megatron.planning.goodput.run_goodput import FailureFlags, RunGoodput, plan_goodput
from dsv3_megatron.planning.machine.hardware import Hardware, save_hardware
from dsv3_megatron.planning.machine.hardware_tables import HARDWARE, find_hardware
from dsv3_megatron.planning.memory.estimate import estimate_memory
from dsv3_megatron.planning.memory.headroom import lacking_memory
from dsv3_megatron.planning.memory.remedies import advise, describe
from dsv3_megatron.planning.plan_report import PlanReport, as_json, as_text, plot
from dsv3_megatron.planning.policy_cost import PolicyStep, policy_cost, policy_step
from dsv3_megatron.planning.run_cost import RunCost, main_phase, only_phase, require_possible, run_cost, sensitivities
from dsv3_megatron.planning.search import SearchResult, search
from dsv3_megatron.planning.time.rollout_time import AnswerLengths
from dsv3_megatron.planning.time.step_time import step_time
from dsv3_megatron.planning.time.work import Setting

_MOST = 1e18  # of a number of tokens, a price and the like: beyond it they are slips
_MOST_DEVICES = 1 << 20
_MOST_IMBALANCE = 1e4


def _parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, RunConfig]:
    assert __doc__ is not None
    parser = Parser(prog="dsv3 plan", allow_abbrev=False, description=__doc__.partition("\n\n")[0],
                    epilog=__doc__.partition("\n\n")[2],
                    usage="dsv3 plan --hardware NAME --num-gpus N [flags of a run]",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hardware", metavar="NAME", help=f"{', '.join(HARDWARE)}, cpu (measures this machine), or a .json "
        "file that --save-hardware wrote")
    add("--num-gpus", type=int, metavar="N", help="devices; on a CPU processes")
    add("--search", action="store_true", help="rank all layouts and schedules, and say why the others were rejected")
    add("--top", type=int, default=10, metavar="N", help="places of the ranking (%(default)s)")
    add("--tokens", type=float, metavar="N", help="where the run ends, such as 14.8e12 (default: all of the recipe)")
    add("--price-per-gpu-hour", type=float, metavar="X", help="in any currency")
    add("--mtbf-hours-per-gpu", type=float, metavar="X", help="mean hours of one GPU between two failures that stop "
        "the job: says what failures make of the run (Llama 3's 16,384 GPUs: 45,600)")
    add("--checkpoint-seconds", type=float, metavar="X", help="seconds that training waits for a save")
    add("--checkpoint-write-seconds", type=float, metavar="X", help="seconds from there until it is on disk, where it "
        "is written behind training (default: 0)")
    add("--restart-seconds", type=float, metavar="X", help="seconds from a failure until training goes on")
    add("--storage-gb-per-second", type=float, metavar="X", help="bandwidth of the storage for the whole run, from "
        "which seconds of saves and restarts follow where they are not given")
    add("--host-copy-gb-per-second", type=float, metavar="X", help="bandwidth from a GPU to its host: saves are "
        "written behind training")
    add("--spares", type=int, metavar="N", help="nodes that wait to replace others, paid for too (default: a lost node "
        "is always replaced within a restart)")
    add("--repair-hours", type=float, default=24.0, metavar="X", help="mean hours until a lost node is a spare again "
        "(%(default)s)")
    add("--prompt-tokens", type=float, default=256.0, metavar="X", help="of a run of GRPO: mean tokens of a prompt "
        "(%(default)g)")
    add("--answer-tokens", type=float, metavar="X", help="of a run of GRPO: mean tokens of an answer (default: the "
        "longest)")
    add("--rollout-gpus", type=int, metavar="N", help="of a run of GRPO: devices that one copy of the model generates "
        "on (default: the fewest that leave half of their memory)")
    add("--imbalance", type=float, metavar="X", help="routed rows of the busiest expert-parallel rank over the mean "
        "(default: from the machine's deviation)")
    add("--memory-headroom-gb", type=float, metavar="X", help="memory of each device that the run's tensors cannot "
        "have: CUDA context, NCCL buffers, fragmentation (default: by the machine's figures, stated in the output)")
    add("--calibrate", metavar="LOGDIR", help="compare with a run's --tensorboard-dir, and fit this machine's rates to "
        "it")
    add("--save-hardware", metavar="FILE.json", help="write the machine, measured or fitted")
    add("--json", action="store_true", help="print one JSON object")
    add("--png", metavar="FILE.png", help="draw it on one page")
    options, rest = parser.parse_known_args(arguments)
    return options, _request(rest).run


def _request(words: Sequence[str]) -> TrainingRequest:
    """The run of flags: of dsv3 grpo where they have prompts, of dsv3 sft with --sft, else of dsv3 train."""
    given = {word.partition("=")[0] for word in words}
    if "--prompts" in given:
        return grpo.parse(words)
    return sft.parse(words) if "--sft" in given else parse_command(words)


def _check(options: argparse.Namespace) -> None:
    """The rules of this command's own flags."""
    if options.calibrate is None:
        for flag, value in (("--hardware", options.hardware), ("--num-gpus", options.num_gpus)):
            if value is None:
                raise ConfigError(f"{flag} must be given; see --help")
    if options.num_gpus is not None and not 1 <= options.num_gpus <= _MOST_DEVICES:
        raise ConfigError(f"--num-gpus={options.num_gpus} must be at least 1 and at most {_MOST_DEVICES}")
    if options.top < 1:
        raise ConfigError(f"--top={options.top} must be at least 1")
    for flag, number, least, most in (
            ("--imbalance", options.imbalance, 1, _MOST_IMBALANCE),
            ("--memory-headroom-gb", options.memory_headroom_gb, 0, _MOST),
            ("--tokens", options.tokens, 1, _MOST), ("--prompt-tokens", options.prompt_tokens, 1, _MOST),
            ("--answer-tokens", options.answer_tokens, 1, _MOST), ("--rollout-gpus", options.rollout_gpus, 1, _MOST),
            ("--price-per-gpu-hour", options.price_per_gpu_hour, 0, _MOST)):
        if number is not None and not least <= number <= most:
            meaning = ", which is balance," if flag == "--imbalance" else ""
            raise ConfigError(f"{flag}={number:g} must be at least {least}{meaning} and at most {most:g}")
    for flag, value, ending in (("--png", options.png, ".png"), ("--save-hardware", options.save_hardware, ".json")):
        require_output_file(flag, value, ending=ending)


def _goodput(options: argparse.Namespace, run: RunConfig, setting: Setting, cost: RunCost) -> RunGoodput | None:
    """The run with failures, if something was said of them."""
    if options.mtbf_hours_per_gpu is None:
        for name in ("checkpoint_seconds", "checkpoint_write_seconds", "restart_seconds", "storage_gb_per_second",
                     "host_copy_gb_per_second", "spares"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} says what a failure costs, and --mtbf-hours-per-gpu is "
                                  "not given; give it, or leave this out")
        return None
    flags = FailureFlags(
        options.mtbf_hours_per_gpu, options.checkpoint_seconds, options.checkpoint_write_seconds,
        options.restart_seconds, options.spares, options.repair_hours, options.storage_gb_per_second,
        options.host_copy_gb_per_second)
    known = [phase for phase in cost.phases if phase.seconds]
    num_steps = sum(phase.num_steps for phase in known)
    if not num_steps:
        raise ConfigError("--mtbf-hours-per-gpu: no phase of the run can be done on these devices, so that there is no "
                          "time to plan failures in; --search finds a layout")
    return plan_goodput(
        flags, num_gpus=setting.num_devices, gpus_per_node=setting.hardware.ranks_per_node(setting.num_devices),
        checkpoint_bytes=checkpoint_bytes(run), step_seconds=cost.days * 86400 / num_steps, training_days=cost.days,
        save_interval=run.checkpoint.save_interval)


def _hardware(name: str, run: RunConfig, num_processes: int) -> Hardware:
    if name != "cpu":
        return find_hardware(name)
    from dsv3_megatron.planning.machine.calibrate import measure_cpu

    return measure_cpu(run, num_processes)


def _find_layout(run: RunConfig, setting: Setting) -> tuple[RunConfig | None, str]:
    result = search(run, setting, num_best=1)
    if not result.ranked:
        return None, result.why_none()
    return result.ranked[0].layout.apply(run), result.ranked[0].layout.describe()


def plan(run: RunConfig, setting: Setting, options: argparse.Namespace) -> PlanReport:
    """All that the command says about a run.

    Raises:
        ConfigError: the run cannot be on so many devices.
    """
    phase = main_phase(run)
    policy = _policy_step(run, setting, options)
    main = policy.training.run if policy else only_phase(run, phase)
    found: SearchResult | None = search(main, setting, num_best=options.top) if options.search else None
    if found is not None and found.ranked:
        try:
            require_possible(main, setting.num_devices)
        except ConfigError:  # the layout given cannot be had: speak of the best
            run = found.ranked[0].layout.apply(run)
            main = only_phase(run, phase)
    require_possible(main, setting.num_devices)
    terms = setting.memory_terms(main)
    memory = estimate_memory(main, setting.num_devices, **terms)
    remedies: tuple[str, ...] = ()
    if lacking_memory(memory, setting):
        remedies = tuple(describe(advise(main, setting.num_devices, **terms)))
    price = options.price_per_gpu_hour
    cost = policy_cost(run, setting, policy, price_per_gpu_hour=price) if policy else run_cost(
        run, setting, tokens=options.tokens, price_per_gpu_hour=price, find_layout=_find_layout)
    return PlanReport(
        run=main, phase=phase.name, step=step_time(main, setting), memory=memory, remedies=remedies, cost=cost,
        sensitivity=sensitivities(main, setting), search=found, goodput=_goodput(options, run, setting, cost),
        policy=policy)


def _policy_step(run: RunConfig, setting: Setting, options: argparse.Namespace) -> PolicyStep | None:
    """A step of a run of GRPO; None of another run."""
    if not run.policy.is_on:
        return None
    for flag, value in (("--tokens", options.tokens), ("--search", options.search or None)):
        if value is not None:
            raise ConfigError(f"{flag} cannot go with --prompts: a run of GRPO is counted in steps and answers, and is "
                              "planned in the layout given; leave it out")
    answer = run.policy.max_new_tokens if options.answer_tokens is None else options.answer_tokens
    return policy_step(run, setting, AnswerLengths(options.prompt_tokens, answer), options.rollout_gpus)


def _run(options: argparse.Namespace, run: RunConfig) -> int:
    _check(options)
    if options.calibrate is not None:
        from dsv3_megatron.planning.machine.calibrate import calibrate

        with slow_work("calibrate"):
            result = calibrate(Path(options.calibrate), options.hardware)
        if options.save_hardware:
            save_hardware(result.fitted, options.save_hardware)
        print(json_text(result.as_json()) if options.json else result.as_text())
        return 0
    with slow_work("measure this machine"):
        hardware = _hardware(options.hardware, run, options.num_gpus)
    if options.save_hardware:
        save_hardware(hardware, options.save_hardware)
    headroom = options.memory_headroom_gb
    setting = Setting(hardware, options.num_gpus, imbalance=options.imbalance,
                      headroom_bytes=None if headroom is None else headroom * 1e9)
    with slow_work("search layouts" if options.search else "plan"):
        report = plan(run, setting, options)
    if options.png:
        plot(report, options.png)
    print(json_text(as_json(report)) if options.json else as_text(report))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        options, run = _parse_arguments(arguments)
        return _run(options, run)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
