"""Bytes of rows on the wire, those of the report among them."""

from dsv3_megatron.ops.row_bytes import gated_bytes, record_bytes


def test_record_of_the_report():
    """7,168 values and 56 scales (DeepSeek-V3 report, section 3.3.3)."""
    assert record_bytes(7168) == 7168 + 56 * 4 == 7392
    assert record_bytes(32) == 36 and record_bytes(129) == 137


def test_gates_are_behind_rows_to_a_multiple_of_16():
    assert gated_bytes(14336) == 14352 and gated_bytes(7392) == 7408 and gated_bytes(12) == 16
    assert gated_bytes(7392, 48) == 7440
