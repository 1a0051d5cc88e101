"""The rehearsals of all configurations that `make test` leaves out."""

import pytest

from tests.support.rehearsals import cases, process  # noqa: F401  a fixture


@pytest.mark.parametrize(("check", "file"), cases(common=False))
def test_the_other_configurations_are_rehearsed_too(check, file, process, tmp_path):
    check(file, process, tmp_path)
