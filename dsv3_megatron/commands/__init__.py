"""What a user types: one module a command. Each reads arguments, calls the other rooms and prints what comes back.

Every module has `main(arguments)`, which returns the exit code. Nothing is imported here.

    dispatch.py     `dsv3 COMMAND`: the table of commands

    train.py        one process of a run                   evaluate.py     loss and perplexity of a checkpoint
    generate.py     text from a checkpoint                 convert.py      to Hugging Face's format and back
    verify.py       whether checkpoints are what was written   sft.py      a model fine-tuned on conversations
    grpo.py         a model that learns from its own answers   sweep.py   settings x seeds of such runs
    lm_eval.py      lm-evaluation-harness on a checkpoint

    preprocess.py   text to tokens on disk                 train_tokenizer.py   a tokenizer learned from text
    merge.py        datasets joined end to end             inspect.py      a dataset looked at, or verified

    plan.py         time, memory and cost of a run         rehearse.py     ranks of a GPU run without a GPU
    certify.py      a layout against one process        simulate.py     a schedule on paper
    draw_schedule.py  what ranks did when                  plot.py         a run's measurements as one page
    doctor.py       what is installed and missing          report.py       DeepSeek-V3's papers, figure by figure
    rendezvous.py   where the nodes of an elastic run meet   completion.py   scripts with which shells complete all this
"""
