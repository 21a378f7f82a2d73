"""A stage in pieces, for schedules that hide transfers or let weight gradients wait.

Nothing is imported here. In reading order:

    runner.py           what an executor runs                 segments.py         a stage between its exchanges
    tape.py             backward from segment to segment      weight_gradients.py those that wait
    buckets.py          what is reduced and gathered under the passes
"""
