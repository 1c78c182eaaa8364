"""User errors are one line and point at the nearest valid word."""

import pytest

from fedmoe_ds.errors import UserError, nearest


def test_message_is_one_line() -> None:
    assert str(UserError("data.source: x.jsonl:\n  line 3\tis no JSON;  fix it\n")) == (
        "data.source: x.jsonl: line 3 is no JSON; fix it"
    )


@pytest.mark.parametrize(
    ("word", "choices", "expected"),
    [
        ("roundz", ["rounds", "tiers"], "; did you mean 'rounds'?"),
        ("batchsize", ["batch_size", "betas"], "; did you mean 'batch_size'?"),
        ("zzz", ["tiers", "rounds"], "; choose one of rounds, tiers"),
        ("zzz", [], ""),
        ("zzz", (name for name in ("b", "a")), "; choose one of a, b"),
    ],
)
def test_nearest(word: str, choices: list[str], expected: str) -> None:
    assert nearest(word, choices) == expected
