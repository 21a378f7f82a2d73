"""One operation a file: a reference that is obviously right, beside what runs, and the choice between backends.

Torch only. Every operation takes `backend="auto"`, which picks by device and dtype and logs its choice once;
a backend named explicitly is used or raises. Products of bf16 numbers share one decision, in `backend.py`.
"""
