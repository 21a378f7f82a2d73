"""What a machine can do.

Nothing is imported here. In reading order:

    hardware.py         a machine as data                     hardware_tables.py  those known by name, with sources
    hopper_tables.py    H800, H100, H200                      blackwell_tables.py B200, GB200, GB300
    calibrate.py        a machine fitted to a run's logs      micro_benchmarks.py a CPU measured; needs torch
    operand_pools.py    what products are measured on         narrow_pass.py      what modules take beside them
"""
