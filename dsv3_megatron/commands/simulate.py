"""Which pipeline schedule, and what will it cost: step time, waiting and memory by rank, before anyone runs it.

    dsv3 simulate --schedule dualpipev --pipeline-model-parallel-size 8 --num-microbatches 32 \\
        --cost-f 1 --cost-b 2 --cost-w 1 --cost-fb 2.4 --png schedule.png

    dsv3 simulate --compare --pipeline-model-parallel-size 8 --num-microbatches 32 --cost-fb 2.4

Costs are of one chunk, the part of the model that one stage holds, in any unit of time. The model is cut into P stages
by 1f1b, zb1p and dualpipe, into 2P by zbv and dualpipev, into V*P by interleaved. --compare keeps the model: the costs
are of a chunk of --schedule (1f1b if not given), and of the others in proportion to their stages.

Exit status: 0, or 2 for a command that cannot be carried out.
"""

from __future__ import annotations

import argparse
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.output import json_text, require_output_file
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.schedule.compare import Outcome, compare, recommend
from dsv3_megatron.schedule.draw import plot_timeline, write_trace
from dsv3_megatron.schedule.formulas import published_bubble
from dsv3_megatron.schedule.plan import SCHEDULES, Plan, build_plan
from dsv3_megatron.schedule.simulate import Costs, Simulation, require_cost, require_pair, require_part, simulate
from dsv3_megatron.schedule.timeline import Time
from dsv3_megatron.schedule.validate import validate_plan

_MOST_DIGITS = 30  # of a cost: sums over a step stay within a float
_MOST_ACTIONS = 2_000_000  # minutes
_COMPARED_VIRTUAL_STAGES = 4  # most chunks per rank that --compare tries unless told


def _cost(text: str) -> Fraction:
    """A cost as typed, exactly: 0.1 is a tenth. Sizes are looked at first: a fraction writes 1e999999999 out."""
    try:
        numbers = [Decimal(part) for part in text.split("/")]
    except InvalidOperation:
        numbers = []
    if not numbers or not all(number.is_finite() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    if any(number and abs(number.adjusted()) > _MOST_DIGITS for number in numbers) or len(text) > 2 * _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large or too small: at most 1e{_MOST_DIGITS}, at least "
                                         f"1e-{_MOST_DIGITS}; give all costs in another unit")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number") from None


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="dsv3 simulate", description=__doc__.partition("\n\n")[0],
                                     epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--schedule", metavar="S", help=f"one of {', '.join(SCHEDULES)}")
    add("--pipeline-model-parallel-size", type=int, required=True, metavar="P", help="pipeline ranks")
    add("--num-microbatches", type=int, required=True, metavar="M", help="micro-batches of a step, per data replica")
    add("--virtual-stages", type=int, metavar="V",
        help="chunks per rank of interleaved, default 2; with --compare the most to try, "
             f"default {_COMPARED_VIRTUAL_STAGES}")
    add("--cost-f", type=_cost, default=Fraction(1), metavar="F", help="forward of one chunk, default 1")
    add("--cost-b", type=_cost, default=Fraction(2), metavar="B", help="its full backward, default 2")
    add("--cost-w", type=_cost, default=Fraction(1), metavar="W", help="the weight part of B, default 1")
    add("--cost-fb", type=_cost, metavar="F&B", help="overlapped forward + full backward, default F + B")
    add("--cost-p2p", type=_cost, default=Fraction(0), metavar="T", help="transfer between two ranks, default 0")
    add("--compare", action="store_true", help="all schedules side by side, and a recommendation")
    add("--json", action="store_true", help="print JSON")
    add("--actions", action="store_true", help="print what each rank runs in order")
    add("--png", metavar="FILE", help="write a Gantt chart")
    add("--trace", metavar="FILE", help="write a trace for chrome://tracing or ui.perfetto.dev")
    options = parser.parse_args(arguments)
    if options.cost_fb is None:
        options.cost_fb = options.cost_f + options.cost_b
    return options


def _check_costs(options: argparse.Namespace) -> None:
    """The rules of costs, with the names of the flags."""
    for name in ("cost_f", "cost_b", "cost_w"):
        require_cost(name, getattr(options, name))
    require_cost("cost_p2p", options.cost_p2p, is_zero_allowed=True)
    require_part("cost_w", options.cost_w, "cost_b", options.cost_b)
    require_pair("cost_fb", options.cost_fb, options.cost_f, options.cost_b)


def _costs(options: argparse.Namespace, num_stages: int) -> Costs:
    return Costs.uniform(num_stages, forward=options.cost_f, backward=options.cost_b, weight=options.cost_w,
                         overlapped=options.cost_fb, p2p=options.cost_p2p)


def _plan(options: argparse.Namespace) -> Plan:
    """The plan that was asked for; with --compare alone, that of the costs."""
    schedule = options.schedule
    if schedule is None:
        if not options.compare:
            raise ConfigError(f"schedule must be given: one of {', '.join(SCHEDULES)}; or --compare, for all of them")
        schedule = "1f1b"
    num_actions = (2 * options.pipeline_model_parallel_size * options.num_microbatches
                   * (options.virtual_stages or _COMPARED_VIRTUAL_STAGES))
    if num_actions > _MOST_ACTIONS:
        raise ConfigError(
            f"pipeline_model_parallel_size={options.pipeline_model_parallel_size} with num_microbatches="
            f"{options.num_microbatches} makes up to {num_actions} actions, more than the {_MOST_ACTIONS} that are "
            "simulated one by one; give fewer of either (a step of more micro-batches grows by the same for each)")
    is_limit = options.compare and schedule != "interleaved"  # then it is about the other rows
    plan = build_plan(schedule, num_ranks=options.pipeline_model_parallel_size,
                      num_microbatches=options.num_microbatches,
                      virtual_stages=None if is_limit else options.virtual_stages)
    validate_plan(plan)
    return plan


def _json_number(value: Time) -> int | float:
    return int(value) if value == int(value) else float(value)


def _as_json(result: Simulation, is_with_actions: bool) -> dict[str, Any]:
    plan = result.plan
    found: dict[str, Any] = {
        "schedule": plan.schedule, "num_ranks": plan.num_ranks, "num_stages": plan.num_stages,
        "num_microbatches": plan.num_microbatches,
        "step_time": _json_number(result.step_time), "ideal_time": _json_number(result.ideal_time),
        "bubble": [_json_number(value) for value in result.bubble],
        "peak_activations": [_json_number(value) for value in result.peak_activations],
        "parameters": [_json_number(value) for value in result.parameters],
    }
    if is_with_actions:
        found["actions"] = [[action.as_json() for action in actions] for actions in plan.actions]
    return found


def _print_result(options: argparse.Namespace, result: Simulation) -> None:
    plan = result.plan
    published = published_bubble(plan, forward=options.cost_f, backward=options.cost_b, weight=options.cost_w,
                                 overlapped=options.cost_fb)
    if published is None:
        note = "the published formula does not hold for these costs and sizes"
    else:
        note = f"published formula{' without transfers' if options.cost_p2p else ''}: {float(published):g}"
    longest = max(result.bubble)
    print(f"{plan.schedule}: {plan.num_ranks} ranks, {plan.num_stages} stages, {plan.num_microbatches} micro-batches")
    print(f"step time   {float(result.step_time):g}")
    print(f"ideal time  {float(result.ideal_time):g}   if no rank ever waited")
    print(f"bubble      {float(longest):g}   {float(100 * longest / result.step_time):.1f}% of the step, on the rank "
          f"that waits longest; {note}")
    print(f"\n{'rank':>4} {'bubble':>10} {'activations':>12} {'parameters':>11}   (in chunks, in stages)")
    for rank, row in enumerate(zip(result.bubble, result.peak_activations, result.parameters, strict=True)):
        bubble, activations, parameters = map(float, row)
        print(f"{rank:>4} {bubble:>10g} {activations:>12g} {parameters:>11g}")


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    candidate = outcome.candidate
    found: dict[str, Any] = {"schedule": candidate.schedule, "virtual_stages": candidate.virtual_stages,
                             "overlapped": candidate.is_overlapped}
    if outcome.problem is not None:
        return found | {"problem": outcome.problem}
    return found | {"num_stages": outcome.num_stages} | {
        name: _json_number(getattr(outcome, name)) for name in ("step_time", "bubble", "activations", "parameters")}


def _print_outcomes(outcomes: list[Outcome]) -> None:
    width = max(len(str(outcome.candidate)) for outcome in outcomes)
    print(f"{'':{width}} {'stages':>7} {'step time':>10} {'bubble':>9} {'':>7} {'activations':>12} {'parameters':>11}")
    for outcome in outcomes:
        name = f"{outcome.candidate!s:{width}}"
        if outcome.problem is not None:
            print(f"{name}  cannot: {outcome.problem}")
            continue
        share = f"{float(100 * outcome.bubble / outcome.step_time):.1f}%"
        print(f"{name} {outcome.num_stages:>7} {float(outcome.step_time):>10.6g} {float(outcome.bubble):>9.5g} "
              f"{share:>7} {float(outcome.activations):>12g} {float(outcome.parameters):>11g}")


def _run(options: argparse.Namespace) -> None:
    _check_costs(options)
    require_output_file("--png", options.png, ending=".png")
    require_output_file("--trace", options.trace)
    plan = _plan(options)
    result = simulate(plan, _costs(options, plan.num_stages))
    outcomes: list[Outcome] = []
    if options.compare:
        most = _COMPARED_VIRTUAL_STAGES if options.virtual_stages is None else options.virtual_stages
        outcomes = compare(_costs(options, 1), num_stages=plan.num_stages, num_ranks=plan.num_ranks,
                           num_microbatches=plan.num_microbatches, max_virtual_stages=most)
    for path, write in ((options.png, plot_timeline), (options.trace, write_trace)):
        if path:
            write(plan, result.timeline, path)
    if options.json:
        found = _as_json(result, options.actions)
        if outcomes:
            choice = recommend(outcomes)
            found["comparison"] = [_outcome_json(outcome) for outcome in outcomes]
            found["recommended"] = _outcome_json(choice.fastest) | {"reason": choice.reason}
        print(json_text(found))
        return
    if outcomes:
        _print_outcomes(outcomes)
        print(f"\nRecommended: {recommend(outcomes).reason}")
    else:
        _print_result(options, result)
    if options.actions:
        for rank, actions in enumerate(plan.actions):
            print(f"\nrank {rank}: " + "  ".join(str(action).replace(" ", "") for action in actions))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse_arguments(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    return 0
