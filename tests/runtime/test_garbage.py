"""Collection is put off in a block, and afterwards it is as it was, also after an error."""

from __future__ import annotations

import gc

import pytest

from treepo_mega.runtime.garbage import collection_put_off


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
