"""`python -m dsv3_megatron COMMAND`, which torchrun can start too: the same as `dsv3 COMMAND`."""

from dsv3_megatron.commands.dispatch import run

if __name__ == "__main__":
    run()
