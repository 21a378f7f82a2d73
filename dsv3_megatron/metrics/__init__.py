"""What a run measures about itself, and what can be said about a model without building it.

Nothing is imported here: the parts that answer `--print-model` need no torch.

    parameters.py   exact counts, bytes per rank              flops.py      FLOPs per token, tokens/s, MFU
    model_table.py  both as a table or JSON                   balance.py    expert load: max-violation
    records.py      StepReport and metrics.jsonl              writer.py     TensorBoard and metrics.jsonl
    progress.py     bar or log lines                          plot.py       loss.png
    summary.py      a run against unigram and bigram models
"""
