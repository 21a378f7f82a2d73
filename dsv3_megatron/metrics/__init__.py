"""What a run measures about itself, and what can be said about a model without building it.

Nothing is imported here: the parts that answer `--print-model` need no torch.

    parameters.py   exact counts, by rank too                 flops.py      FLOPs per token, tokens/s, MFU
    rank_state.py   bytes that a rank holds between steps     balance.py    measures of expert load
    model_table.py  all of it as a table or JSON
    records.py      StepReport and metrics.jsonl              writer.py     TensorBoard and metrics.jsonl
    progress.py     bar or log lines                          plot.py       loss.png
    summary.py      a run against unigram and bigram models

    What a logged step looks like from inside: README.md has every tag.

    instruments.py  collects, over all ranks                  measurements.py  what they saw, as plain numbers
    gradients.py    norms by component                        phase_clock.py   where a step's time goes
    memory.py       of this process                           shared_numbers.py  one collective for all of it
    scalars.py      TensorBoard's scalars                     pictures.py      its histograms and heat maps
    heat_map.py     images                                    tags.py          the table of tags
    event_files.py  a run's folder read back                  report_page.py   tools/plot_run.py's page
    event_writer.py event files through a full disk           kept_file.py     the same for any file of records
    live_bytes.py   bytes that a block of code allocates on a CPU

    A run's recipe (--print-schedule): schedule_table.py as a table, schedule_plot.py as a picture.
"""
