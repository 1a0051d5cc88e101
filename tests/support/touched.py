"""A file that code in a checkpoint would write."""

import pytest


@pytest.fixture
def touched(tmp_path):
    return tmp_path / "touched"
