"""What a process is told by whoever started it: signals, its place among other processes, the cores it may use.

No torch: all of it is needed before torch is imported. In reading order:

    ranks.py    torchrun's variables                          stop.py     signals that ask to end
    parent.py   processes that this one starts                cores.py    cores that may be used
    logs.py     what is logged                                unpickling.py  the one place that unpickles
    host_bytes.py  memory that may be used                    elastic.py   nodes that come and go
    loopback.py     a store that no other machine can reach
    bounds.py       work that may take so much time and memory
"""
