"""What failures make of a run: the best interval of checkpoints, the share of time that counts, days and money.

Nothing is imported here. In reading order:

    failures.py         how often a job stops and what that costs -> the share of time that counts, in closed form
    failure_events.py   the same job event by event, drawn at random: knows nothing of the formula
    run_goodput.py      a planned run with failures: seconds from bytes, both answers, the spread
    goodput_report.py   that as text and as JSON
"""
