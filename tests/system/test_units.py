"""Bytes and seconds as people read them."""

import pytest

from qlora.system.units import duration, latency, size


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0382, "38.2 ms"), (0.00012, "0.12 ms"), (0.9994, "999 ms"), (0.9996, "1.00 s"), (1.254, "1.25 s")],
)
def test_the_time_of_a_token(seconds, said):
    assert latency(seconds) == said


@pytest.mark.parametrize(("seconds", "said"), [(59.4, "59s"), (59.6, "1m00s"), (65, "1m05s"), (7380, "2h03m")])
def test_the_time_of_a_training(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(1023, "1023 B"), (1024, "1 KiB"), (2**30, "1.00 GiB")])
def test_bytes(count, said):
    assert size(count) == said
