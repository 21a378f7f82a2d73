"""The time of a step: operations of a layer, seconds on a machine, and the pipeline's schedule around them.

Nothing is imported here. In reading order:

    operations.py       what a linear, a norm does            layer_operations.py what layers and stages do
    latent_passing.py   ranks that share a sequence
    dispatch_bytes.py   destinations of tokens                network.py          bytes on the wire
    work.py             operations as seconds on a machine    under_passes.py     messages that passes hide
    step_time.py        a step, through schedule/simulate
    rollout_time.py     answers of a run of GRPO, by bytes and operations
"""
