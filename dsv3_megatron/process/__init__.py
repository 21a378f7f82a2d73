"""What a process is told by whoever started it: signals, its place among other processes, the cores it may use.

`stop` has the signals that ask to end, `ranks` reads torchrun's variables, `cores` counts. No torch: all of it is
needed before torch is imported.
"""
