"""Rank 0 says what was chosen; the others only warn."""

import logging

import pytest

from dsv3_megatron.process.logs import configure_logging


@pytest.mark.parametrize(("rank", "expected"), [(0, ["chosen", "wrong"]), (1, ["wrong"]), (7, ["wrong"])])
def test_what_a_rank_says(rank, expected, caplog):
    configure_logging(rank)
    logger = logging.getLogger("dsv3_megatron.somewhere")
    logger.info("chosen")
    logger.warning("wrong")
    logger.debug("detail")
    assert [record.getMessage() for record in caplog.records] == expected


def test_other_packages_only_warn(caplog):
    configure_logging(0)
    logging.getLogger("another.package").info("about itself")
    assert not caplog.records
