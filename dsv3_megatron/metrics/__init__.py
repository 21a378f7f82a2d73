"""What a run measures about itself, and what can be counted of a model without building it.

Nothing is imported here: the parts that need no torch stay without it. What is drawn or told of it is in `reports/`.

    parameters.py   exact counts, by rank too              flops.py    FLOPs per token, tokens/s, MFU
    rank_state.py   bytes that a rank holds between steps  balance.py  measures of expert load
    run_records.py  StepReport and metrics.jsonl           writer.py   TensorBoard and metrics.jsonl
    progress.py     bar or log lines                       tags.py     the table of tags

What a logged step looks like from inside:

    instruments.py     collects, over all ranks  measurements.py    what they saw, as plain numbers
    gradients.py       norms by component        step_clock.py      where a step's time goes
    process_memory.py  of this process           shared_numbers.py  one collective for all of it
    scalars.py         TensorBoard's scalars     pictures.py        its histograms and heat maps
    heat_map.py        images                    event_files.py     a run's folder read back
    event_writer.py event files through a full disk           kept_file.py     the same for any file of records
    sinks.py        TensorBoard and trackers  trackers/         Weights & Biases, MLflow, Prometheus
    live_bytes.py  bytes that a block of code allocates on a CPU
"""
