"""What is installed, what is missing for which feature, what the machine has, and what to do.

    dsv3 doctor

Nothing is changed. A line begins with "ok", with "--" where only the named feature needs what is missing, or with "!!"
where a run on this machine would fail; below it stands what to do.

Exit status: 0 a run can start, 1 something must be mended first, 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.slow_work import slow_work

if TYPE_CHECKING:
    from dsv3_megatron.reports.installation import SetupFinding

EXIT_WRONG = 1
_MARKS = {"good": "ok", "absent": "--", "wrong": "!!"}


def _rehearsal() -> list[SetupFinding]:
    """What `dsv3 rehearse` needs besides the packages."""
    from torch.version import cuda

    from dsv3_megatron.config.fields import ConfigError
    from dsv3_megatron.rehearsal.device_library import find_compiler, require_cuda_build
    from dsv3_megatron.reports.installation import ONE_FEATURE, SetupFinding, State

    def cuda_build() -> str:
        require_cuda_build(cuda)
        return f"CUDA {cuda}"

    findings = []
    for name, look in (("C compiler", find_compiler), ("CUDA build of torch", cuda_build)):
        try:
            findings.append(SetupFinding(ONE_FEATURE, name, look(), use="dsv3 rehearse"))
        except ConfigError as error:
            findings.append(SetupFinding(ONE_FEATURE, name, str(error), State.ABSENT, "dsv3 rehearse"))
    return findings


def as_text(findings: Sequence[SetupFinding]) -> str:
    """The findings for a terminal, topic by topic."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            lines += ["", topic] if lines else [topic]
        use = f"  ({finding.use})" if finding.use else ""
        lines.append(f"  {_MARKS[finding.state.value]} {finding.name:<{width}}  {finding.found}{use}")
        if finding.remedy:
            lines.append(f"     {'':<{width}}  do: {finding.remedy}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="dsv3 doctor", description=__doc__.partition("\n\n")[0],
                                     epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    from dsv3_megatron.platform.notices import drop_known_notices

    drop_known_notices()
    from dsv3_megatron.reports.installation import TOPICS, State, examine

    with slow_work("look"):
        findings = sorted([*examine(Path()), *_rehearsal()], key=lambda finding: TOPICS.index(finding.topic))
    wrong = [finding for finding in findings if finding.state is State.WRONG]
    if options.json:
        print(json_text({"is_ready": not wrong, "findings": [
            {**asdict(finding), "state": finding.state.value} for finding in findings]}))
    else:
        print(as_text(findings))
        print("\n" + (f"{len(wrong)} to mend before a run: {', '.join(finding.name for finding in wrong)}" if wrong
                      else "a run can start here"))
    return EXIT_WRONG if wrong else 0
