"""A cluster that was published."""

import pytest

from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.time.work import Setting


@pytest.fixture(scope="module")
def h800():
    return Setting(find_hardware("h800"), 2048)
