import pytest

from quantkit.errors import InputError
from quantkit.units import bits_per_weight, count, parse_bytes, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("48GiB", 48 * 2**30),
        ("1.5 MB", 1_500_000),
        ("7B", 7),
        ("0", 0),
        ("2kb", 2000),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5GBs", "1e9", "5 G B", "nan", "7", "4.5"])
def test_bad_sizes(text):
    with pytest.raises(InputError, match="size"):
        parse_bytes(text)


def test_in_words():
    assert size(12_076_119_168) == "12.08 GB"
    assert size(999) == "999 B"
    assert count(20_914_757_184) == "20.91B"
    assert bits_per_weight(12_076_119_168, 20_914_757_184) == pytest.approx(4.619, abs=5e-4)
