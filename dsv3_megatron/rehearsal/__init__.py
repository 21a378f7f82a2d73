"""Ranks of a GPU run on a machine without a GPU: the run's own Trainer on tensors with shapes and without values.

What a rank allocates, posts to other ranks and waits for is recorded; what only a GPU's branches can raise is raised
here. In reading order:

    rank_processes.py       several ranks, each in a process of its own
    forked_ranks.py         the process that they are forked from
    rehearsed_rank.py       one of them: from a task to a result
    rank_results.py         task and result as plain values
    rehearsed_run.py        the run that is rehearsed: one phase, few micro-batches, no folders
    rank_kinds.py           which ranks differ

    watch.py                every operation of a rank, seen and answered
    remembered_results.py   shapes of results, worked out once
    known_values.py         values of the few small tensors that the host reads
    live_memory.py          what is alive when
    kernel_workspaces.py    what kernels of torch take for themselves
    collective_calls.py     messages between ranks
    source_lines.py         the line that is at work

    stand_ins.py            all that is replaced in torch, Triton and the library
    checkpoint_stand_ins.py the same for saving and loading
    replacement.py          one thing that is replaced
    device_library.py       the CUDA runtime that a process is preloaded with (cuda_runtime.c)
    made_data.py            samples
    made_routing.py         experts of tokens

    message_comparison.py   whether ranks that share a group post the same
    totals.py               a step in few numbers
    findings.py             what was found, as text and JSON
"""
