"""Rows of a text: the kept tokens of its windows, batch by batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from clt.config import Config
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.forward import Rows, check_finite, forward_text
from clt.lm.load import LanguageModel, load_language_model
from clt.lm.text import windows


@pytest.fixture
def lm(config: Callable[..., Config]) -> LanguageModel:
    return load_language_model(config().lm)


def equal(one: Rows, other: Rows) -> bool:
    columns = ((one.token, other.token), (one.position, other.position), (one.document, other.document))
    return torch.equal(one.activations, other.activations) and all(np.array_equal(a, b) for a, b in columns)


def test_rows_are_the_kept_tokens_of_the_windows(config: Callable[..., Config], lm: LanguageModel) -> None:
    made = config("data.dtype=bfloat16")
    stream = list(windows(made.text, "heldout", lm, 16))
    passes = list(forward_text(made, "heldout", lm))
    assert [len(batch) for batch, _ in passes[:-1]] == [4] * (len(passes) - 1)
    assert sum(len(batch) for batch, _ in passes) == len(stream)
    for number, (batch, rows) in enumerate(passes):
        assert rows.activations.dtype == torch.bfloat16
        assert (rows.token.dtype, rows.position.dtype, rows.document.dtype) == (np.int32, np.int32, np.int64)
        first = 0
        for window, same in zip(batch, stream[4 * number :]):
            places = np.flatnonzero(window.keep)
            part = rows[first : first + len(places)]
            np.testing.assert_array_equal(part.token, same.tokens[places])
            np.testing.assert_array_equal(part.position, places)
            np.testing.assert_array_equal(part.document, same.documents[places])
            alone = capture(lm, torch.from_numpy(window.tokens).long()[None])[0, places]
            torch.testing.assert_close(part.activations.float(), alone, rtol=1e-2, atol=1e-3)
            first += len(places)
        assert first == len(rows)


def test_skipped_windows_leave_the_rest_as_it_is(config: Callable[..., Config], lm: LanguageModel) -> None:
    made = config()
    whole = [rows for _, rows in forward_text(made, "heldout", lm)]
    rest = [rows for _, rows in forward_text(made, "heldout", lm, skip=8)]
    assert len(rest) == len(whole) - 2
    assert all(map(equal, rest, whole[2:]))


def test_rows_are_copied_into_views_of_their_own(config: Callable[..., Config], lm: LanguageModel) -> None:
    rows = next(forward_text(config(), "heldout", lm))[1]
    out = torch.zeros_like(rows.activations)
    bytes_of_rows = out.view(len(rows), -1).view(torch.uint8).numpy()
    rows[3:7].copy_into([bytes_of_rows[place].data for place in (9, 0, 4, 2)])
    assert torch.equal(out[[9, 0, 4, 2]], rows.activations[3:7])
    assert not out[1].any()


def test_a_value_that_the_dtype_does_not_hold_is_named(config: Callable[..., Config], lm: LanguageModel) -> None:
    made = config()
    batch, rows = next(forward_text(made, "train", lm))
    check_finite(lm, batch, rows)
    lm.model.get_submodule("transformer.h.1.mlp.c_proj").bias[5] = 1e5
    batch, rows = next(forward_text(made, "train", lm))
    with pytest.raises(
        UserError, match=r"target activation 1\d+ at layer 1 \(document 0\) overflows float16, .* 65504"
    ):
        check_finite(lm, batch, rows)
