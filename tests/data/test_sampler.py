import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.data.sampler import DistributedSampler, batch_rows, permutation
from clt.errors import UserError


@st.composite
def readings(draw: st.DrawFn) -> dict[str, int]:
    """n_rows, block_rows, batch and seed of a reading."""
    n = draw(st.integers(1, 300))
    return {"n_rows": n, "block_rows": draw(st.integers(1, 80)), "batch": draw(st.integers(1, n)),
            "seed": draw(st.integers(0, 2**40))}  # fmt: skip


@settings(deadline=None)
@given(readings(), st.integers(0, 1000), st.integers(1, 8))
def test_the_ranks_split_the_global_batch(reading: dict[str, int], step: int, world: int) -> None:
    parts = [batch_rows(**reading, step=step, rank=rank, world=world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), batch_rows(**reading, step=step))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.dtype == np.int64 for part in parts)


@settings(deadline=None)
@given(readings(), st.integers(0, 50))
def test_every_epoch_has_each_row_once(reading: dict[str, int], start_step: int) -> None:
    n, batch = reading["n_rows"], reading["batch"]
    epoch = -(-start_step * batch // n)  # the first that begins at or after this step
    last_step = -(-(epoch + 1) * n // batch)
    stream = np.concatenate([batch_rows(**reading, step=step) for step in range(start_step, last_step)])
    begin = epoch * n - start_step * batch
    np.testing.assert_array_equal(np.sort(stream[begin : begin + n]), np.arange(n))


@settings(deadline=None)
@given(readings())
def test_blocks_stay_whole(reading: dict[str, int]) -> None:
    order = batch_rows(**{**reading, "batch": reading["n_rows"]}, step=0)
    b = reading["block_rows"]
    starts = np.flatnonzero(order % b == 0)
    assert len(starts) == -(-reading["n_rows"] // b)
    for start in starts:
        run = order[start : start + b]
        run = run[run // b == run[0] // b]
        np.testing.assert_array_equal(run, np.arange(run[0], min(run[0] + b, reading["n_rows"])))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [batch_rows(1000, 10, 1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert batch_rows(1000, 10, 1000, 0, 1).tolist() == orders[1]
    largest = [permutation(100, 2**63 - i, number=0, stream=0).tolist() for i in (1, 2, 3)]
    assert len({tuple(order) for order in largest}) == 3


def test_the_order_never_changes() -> None:
    assert permutation(8, seed=1, number=2, stream=0).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert batch_rows(7, 2, 7, seed=0, step=0).tolist() == [0, 1, 4, 5, 2, 3, 6]


def test_a_batch_larger_than_the_store_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"batch_tokens=11 but the store has 10 rows: lower the batch, or extract more"):
        batch_rows(10, 2, 11, 0, 0)
    with pytest.raises(UserError, match="the store has 10 rows"):
        DistributedSampler(10, 2, 11, 0)


def test_a_batch_smaller_than_the_world_is_refused() -> None:
    with pytest.raises(UserError, match="batch_tokens=3 leaves some of 4 ranks without a row"):
        DistributedSampler(10, 2, 3, 0, rank=0, world=4)


def test_the_sampler_yields_one_batch_a_step_and_resumes() -> None:
    whole = list(DistributedSampler(50, 8, 12, 3, rank=1, world=2, stop_step=9))
    assert [len(rows) for rows in whole] == [6] * 9
    resumed = list(DistributedSampler(50, 8, 12, 3, rank=1, world=2, start_step=4, stop_step=9))
    np.testing.assert_array_equal(np.stack(whole[4:]), np.stack(resumed))
    endless = iter(DistributedSampler(50, 8, 12, 3))
    for step in range(30):
        np.testing.assert_array_equal(next(endless), batch_rows(50, 8, 12, 3, step))
