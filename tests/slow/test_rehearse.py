"""The rehearsals of all configurations that `make test` leaves out."""

import pytest

from tests.support.rehearsals import (  # noqa: F401  a fixture
    assert_edits_are_rehearsed,
    assert_nothing_is_wrong,
    assert_pictures_are_missed,
    files,
    process,
)


@pytest.mark.parametrize("file", files(common=False, pictures=True))
def test_of_edits_the_pictures_that_are_not_here_are_named(file, process, tmp_path):
    assert_pictures_are_missed(file, process, tmp_path)


@pytest.mark.parametrize("file", files(common=False, pictures=True))
def test_edits_of_pictures_are_rehearsed_at_a_small_size(file, process, tmp_path):
    assert_edits_are_rehearsed(file, process, tmp_path)


@pytest.mark.parametrize("file", files(common=False, pictures=False))
def test_every_configuration_is_rehearsed_and_nothing_is_wrong_with_it(file, process, tmp_path):
    assert_nothing_is_wrong(file, process, tmp_path)
