"""What a run will need before it starts: plain arithmetic on its configuration, no torch.

Nothing is imported here.

    machine/        what a machine can do: tables with sources, measurements, a fit to a run's logs
    time/           operations and bytes on the wire -> seconds of a step
    memory/         bytes of each pipeline rank, by component
    goodput/        failures, saves and restarts -> the share of time that counts

    search.py       all layouts, ranked or rejected           plan_report.py  text, JSON, picture
    run_cost.py     phases, days, device-hours, money         flags.py      settings as flags to paste
    policy_cost.py  rollouts and steps of GRPO
    precheck.py     will a run find what it needs?        dispatch_check.py  and its tokens their experts?

What a rank holds between steps is metrics/rank_state.py, which --print-model reads too.
"""
