"""Multiprocessors that persistent kernels use."""

import pytest


def test_communication_is_left_its_processors(monkeypatch):
    from dsv3_megatron.kernels import launch

    monkeypatch.setattr(launch, "num_processors", lambda: 132)
    assert launch.free_processors() == 132
    try:
        for left, free in ((20, 112), (131, 1), (500, 1)):
            launch.leave_processors(left)
            assert launch.free_processors() == free
        with pytest.raises(ValueError, match="leave_processors: count=-1 must be at least 0"):
            launch.leave_processors(-1)
    finally:
        launch.leave_processors(0)
