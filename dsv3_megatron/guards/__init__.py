"""What watches over a run: steps that must not be applied, spikes, ranks that have stopped.

spikes.py        is this loss or gradient norm out of line? A robust statistic over the last good steps; pure Python
decisions.py     what follows: counters, skips, rollbacks, the end of the run, all saved in checkpoints; pure Python
guarded_step.py  one optimizer step under guard: every rank finds what is wrong, all decide the same
events.py        what fired, as log lines, guards.jsonl and the report of a run that was ended
saves.py         is this state worth a checkpoint, and may older ones go? pure Python
keeper.py        writes, exports and goes back to the run's checkpoints
endings.py       how a run ended, for what started it
hang.py          a watchdog thread in each rank
step_losses.py   mean losses of a step, of which there may be none; pure Python
claims.py        whose a run's folders are, and what a start may do in them
lock.py          the file that says which process uses a folder
"""
