"""Whether a layout computes what one process computes: a certificate, or the first parameter that differs.

    dsv3 certify --preset dsv3-671b --world-size 2048 --pipeline-model-parallel-size 16 --expert-model-parallel-size 64

    dsv3 certify --random 200 --seed 1

All flags of a run are taken. Its widths are shrunk and its layout is kept, on as many processes as this machine can
start; the report says what was reduced. The small run takes two steps and resumes, with real numbers over gloo, and
every gradient, parameter, count and loss is compared with one process's, and one process's with a definition in
float64. docs/guides/certify.md says what this proves.

Exit status: 0 equal, 1 something differs, 2 the run or the command cannot be.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import Parser, parse_command
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.process.cores import usable_cores

if TYPE_CHECKING:
    from dsv3_megatron.certification.certificate import Certificate
    from dsv3_megatron.certification.shrunk_run import ShrunkRun

EXIT_DIFFERS = 1
# As many processes as this take their turns well on a laptop's cores.
_USUAL_PROCESSES = 8
_BYTES_PER_PROCESS = 700 * 10**6


def _parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    assert __doc__ is not None
    parser = Parser(prog="dsv3 certify", allow_abbrev=False, description=__doc__.partition("\n\n")[0],
                    epilog=__doc__.partition("\n\n")[2], usage="dsv3 certify [--world-size N] [flags of a run]",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--world-size", type=int, metavar="N", help="processes of the run (default: the fewest that its layout has)")
    add("--random", type=int, metavar="N", help="certify N layouts at random instead of a run's")
    add("--with", choices=("context",), dest="kind", help="of the layouts at random, draw those alone that split "
        "sequences over context-parallel ranks; some have YaRN")
    add("--seed", type=int, default=1, metavar="S", help="seed of the layouts at random (%(default)s)")
    add("--first", type=int, default=1, metavar="N", help="begin with the Nth of the layouts at random, counted from "
        "1: those before it are left out, as after a run that was stopped (%(default)s)")
    add("--processes", type=int, metavar="N", help="most processes at a time (default: 8, or one a core where there "
        "are more, as far as memory goes)")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_known_args(arguments)


def usual_processes(memory: Path = Path("/proc/meminfo")) -> int:
    """Processes to start at a time where nothing is said: for the cores and the memory that there are."""
    wanted = max(_USUAL_PROCESSES, usable_cores())
    try:
        lines = memory.read_text(encoding="ascii").splitlines()
    except OSError:
        return wanted  # no Linux: what its memory is cannot be read here
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(1, min(wanted, free // _BYTES_PER_PROCESS))


def _check(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """The rules of this command's own flags, without the run's."""
    for flag, value in (("--world-size", options.world_size), ("--random", options.random),
                        ("--first", options.first), ("--processes", options.processes)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag}={value} must be at least 1")
    if options.random is not None and (flags or options.world_size is not None):
        given = flags[0] if flags else "--world-size"
        raise ConfigError(f"--random draws the layouts itself; leave out {given}, or --random")
    if options.first > (options.random or 1):
        raise ConfigError(f"--first={options.first} begins behind the last of the layouts at random"
                          + (f", --random {options.random}" if options.random is not None else "; give --random N"))
    if options.kind is not None and options.random is None:
        raise ConfigError(f"--with {options.kind} chooses among layouts at random; give --random N, or leave it out")


def certify(options: argparse.Namespace, flags: Sequence[str]) -> list[Certificate]:
    """Certify what the command's options ask for; layouts at random are told line by line as they are done.

    Args:
        options: Options of this command.
        flags: Flags of the run.

    Raises:
        ConfigError: the run cannot be, or the options, or its layout needs more processes than may be started.
    """
    from dsv3_megatron.certification.shrunk_run import shrink

    _check(options, flags)
    processes = options.processes or usual_processes()
    if options.random is None:
        run = parse_command(flags).run
        size = options.world_size or run.parallel.minimum_world_size
        asked = [(size, list(flags), shrink(run, size, processes))]
    else:
        from dsv3_megatron.certification.random_layouts import random_layouts

        layouts = random_layouts(options.random, options.seed, processes, splits_sequences=options.kind == "context")
        asked = [(size, drawn, shrink(parse_command(drawn).run, size, processes))
                 for size, drawn in itertools.islice(layouts, options.first - 1, None)]
    return _certify(options, asked, processes)


def _certify(options: argparse.Namespace, asked: list[tuple[int, list[str], ShrunkRun]], processes: int
             ) -> list[Certificate]:
    from dsv3_megatron.platform import prepare

    prepare()  # before anything imports Megatron-Core
    from dsv3_megatron.certification.certificate import Certificate, as_line
    from dsv3_megatron.certification.certified_layout import RunToCertify
    from dsv3_megatron.certification.certify import Certifier, get_ready_to_fork
    from dsv3_megatron.certification.verdict import Verdict

    get_ready_to_fork()
    numbers = {f"layout-{number}": number for number in range(options.first, options.first + len(asked))}
    jobs = [RunToCertify(name, shrunk.run, shrunk.world_size)
            for name, (_, _, shrunk) in zip(numbers, asked, strict=True)]
    found: dict[int, Certificate] = {}

    def tell(verdict: Verdict) -> None:
        number = numbers[verdict.job.name]
        size, flags, shrunk = asked[number - options.first]
        found[number] = Certificate(tuple(flags), size, shrunk, verdict)
        if options.random is not None and not options.json:
            print(as_line(number, found[number]), flush=True)

    Certifier(processes).certify(jobs, tell)
    return [found[number] for number in sorted(found)]


def _print(options: argparse.Namespace, certificates: list[Certificate]) -> None:
    from dsv3_megatron.certification.certificate import as_json, as_text, versions

    if options.json:
        found = [as_json(certificate) for certificate in certificates]
        print(json_text(found[0] if options.random is None else {"seed": options.seed, "layouts": found}))
    elif options.random is None:
        print(as_text(certificates[0]))
    else:
        equal = sum(certificate.verdict.is_equal for certificate in certificates)
        ties = sum(len(certificate.verdict.ties) for certificate in certificates)
        print(f"{equal} of {len(certificates)} layouts equal, {len(certificates) - equal} differ, {ties} choices of "
              f"experts decided by rounding; seed {options.seed}, "
              + ", ".join(f"{name} {number}" for name, number in versions().items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        options, flags = _parse_arguments(arguments)
        certificates = certify(options, flags)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    _print(options, certificates)
    return 0 if all(certificate.verdict.is_equal for certificate in certificates) else EXIT_DIFFERS
