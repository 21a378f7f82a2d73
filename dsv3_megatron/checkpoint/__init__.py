"""The state of a run on disk: written all at once, read under any layout, converted from and to Hugging Face's.

In reading order:

    folder.py           files, manifest, and whether a checkpoint fits a run; no torch
    manifest_file.py    the manifest's own checksum, and its files; no torch
    store.py            save and load a run
    run_state.py        the state of a run as a dictionary of tensors
    pending.py          a save under way
    writing.py          a rank's part of a save             proved_files.py  what is read is proved, and not run
    background.py       its file, to be written while training goes on: memory and a process
    host_image.py       the memory in which it is put together
    tensor_frames.py    what is around a tensor's bytes in it
    file_copier.py      the process that writes it; no torch
    optimizer_state.py  AdamW's part of it                   average.py    the moving average's part
    text_files.py       tokenizer and form of the texts      agreement.py  what ranks must agree on meanwhile
    resume.py           how a run goes on from it; no torch  finite.py     loaded weights are numbers
    base_weights.py     the weights that a run begins with

Checkpoints without a model in memory:

    open.py          what a folder says of its model  tensor_index.py  its index, which runs nothing, and its errors
    tensor_files.py  a tensor at a time               byte_ranges.py   bytes from file to file, proved
    hf/              Hugging Face's layout
"""
