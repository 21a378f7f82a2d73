"""A run in one process: where all rooms meet.

Nothing is imported here. In reading order:

    rank.py         the process, from its device to its exit code
    trainer.py      the training loop
    evaluator.py    rows of tokens scored with a model that only runs forward
"""
