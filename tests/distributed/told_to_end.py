"""A command for the tests of `launch.py`: says how it was started, and ends as its argument tells it to."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time


def later() -> None:
    """Say something when the main thread is through."""
    time.sleep(0.2)
    print("a thread")


def main(ending: str) -> None:
    """Say what there is to say, and end."""
    print(sys.argv[1:], "rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"))
    atexit.register(print, "the end")
    threading.Thread(target=later).start()
    if ending == "raise":
        raise RuntimeError("as told")
    sys.exit({"none": None, "three": 3, "text": "why"}[ending])


if __name__ == "__main__":
    main(sys.argv[1])
