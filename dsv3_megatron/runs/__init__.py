"""A run in one process: where all rooms meet.

Nothing is imported here. In reading order:

    rank.py         the process, from its device to its exit code
    built_model.py  a model, from the processes to its weights
    step_sums.py    what ranks add up of a step, in one collective
    learner.py      a model that learns: one optimizer step
    trainer.py      the training loop of a run
    validation_report.py  what a run says of a validation
    run_queue.py    runs as processes, some at a time
    evaluator.py    rows of tokens scored with a model that only runs forward
    shared_model.py a model on any layout that answers what the first process asks: scores, new tokens
    answering_run.py  whether a checkpoint can answer so, before anything is allocated
    harness_model.py  a model as lm-evaluation-harness asks it
    alone.py        settings and results of a model without a run
    notebook.py     all of it for a notebook: dsv3_megatron.Model
"""
