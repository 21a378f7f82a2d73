"""What each pipeline rank computes when: plans as data, their proof, cost and picture, without torch; the executor.

In reading order. A plan:

    actions.py           its words                              plan.py        who holds which stage, and does what
    orders.py            the order of a rank, by schedule       transfers.py   sends and receives without deadlock
    timeline.py          when each action runs                  validate.py    proof that it is sound
    delivery.py          the same by the rules of a GPU's communicators

What it costs:

    simulate.py          time, waiting, activations             formulas.py    published bubbles and bounds
    compare.py           all schedules beside each other        draw.py        Gantt charts and traces

Running it:

    execute.py           a plan on real stages                  transport.py   tensors between ranks
    recorder.py          what was done when
    forward_backward.py  a training step behind Megatron-Core's interface
"""
