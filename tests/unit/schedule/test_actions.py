"""The words of a schedule: as text, and as JSON that other programs read."""

import json

from dsv3_megatron.schedule.actions import Action, Kind, Operation

FORWARD = Operation(Kind.FORWARD, 0, 3)
BACKWARD = Operation(Kind.BACKWARD, 1, 2)


def test_text():
    assert [str(Operation(kind, 1, 12)) for kind in Kind] == ["F1.12", "I1.12", "W1.12", "B1.12"]
    assert str(Action((FORWARD,))) == "F0.3"
    assert str(Action((FORWARD, BACKWARD))) == "F0.3 & B1.2"


def test_json():
    forward, backward = {"op": "F", "chunk": 0, "mb": 3}, {"op": "B", "chunk": 1, "mb": 2}
    assert json.loads(json.dumps(Action((FORWARD,)).as_json())) == forward
    assert json.loads(json.dumps(Action((FORWARD, BACKWARD)).as_json())) == {"op": "FB", "f": forward, "b": backward}


def test_two_operations_are_a_pair():
    assert not Action((FORWARD,)).is_overlapped and Action((FORWARD, BACKWARD)).is_overlapped
