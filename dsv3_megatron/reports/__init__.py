"""What is drawn or told of a run: tables, pictures and pages, made of what `metrics/` counts and collects.

Nothing is imported here: the parts that answer `--print-model` need no torch.

    model_table.py     a model's counts and the bytes of its ranks (--print-model)
    schedule_table.py  a run's recipe as a table (--print-schedule)      schedule_plot.py  as a picture
    plot.py            loss.png                                          report_page.py    the page of `dsv3 plot`
    run_groups.py      runs that differ by their seed alone         groups_plot.py    several of them as one picture
    sweep_table.py     mean and spread over seeds
    summary.py         a run against unigram and bigram models      installation.py   what `dsv3 doctor` finds
"""
