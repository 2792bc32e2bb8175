"""Collection is put off in a block, and afterwards it is as it was, also after an error."""

from __future__ import annotations

import gc

import pytest

from treepo_mega.runtime.garbage import collection_put_off, collection_rarer


@pytest.mark.parametrize("on", [True, False])
def test_it_is_afterwards_as_before(on):
    def fail() -> None:
        with collection_put_off():
            assert not gc.isenabled()
            raise RuntimeError("in between")

    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(RuntimeError, match="in between"):
            fail()
        assert gc.isenabled() == on
    finally:
        gc.enable()


def test_the_search_is_rarer_in_the_block_and_as_before_after_it():
    before = gc.get_threshold()

    def fail() -> None:
        with collection_rarer(60_000):
            assert gc.get_threshold() == (60_000, *before[1:])
            with collection_rarer(10):
                assert gc.get_threshold()[0] == 60_000, "never more often"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.get_threshold() == before
