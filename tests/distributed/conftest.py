"""Several ranks need a GPU each, or none."""

import pytest


@pytest.fixture(autouse=True)
def ranks_have_a_gpu_each_or_none(no_gpu_for_several_ranks: None) -> None:
    """For every test of this folder."""
