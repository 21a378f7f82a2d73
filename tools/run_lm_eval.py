#!/usr/bin/env python3
"""The script of the command `dsv3 lm-eval`, which `--help` explains."""

from dsv3_megatron.commands.dispatch import run_named

if __name__ == "__main__":
    run_named("lm-eval")
