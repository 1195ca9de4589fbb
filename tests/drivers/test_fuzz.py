"""Malformed requests against the decoder that answers strangers' bytes; the full campaign is
tests/benchmarks/fuzz_messages.py."""

from __future__ import annotations

import pytest

from tests.benchmarks.fuzz_messages import STRATEGIES, campaign, message


@pytest.mark.parametrize(
    ("decoder", "samples"),
    [
        ("drivers.bulk:decode_request", ""),
        ("aecontrol.exposure.messages:decode_request", "tests.faults.requests:samples"),
    ],
)
def test_malformed_requests_are_refused_and_nothing_else_happens(decoder: str, samples: str) -> None:
    tally = campaign(20_000, 2, decoder, "aecontrol.errors:AecontrolError", samples)
    assert tally.crashes == []
    assert {strategy for strategy, outcome in tally.outcomes if outcome == "refused"} == {
        s.__name__ for s in STRATEGIES
    }
    assert sum(n for (_, outcome), n in tally.outcomes.items() if outcome == "accepted") > 10
    assert tally.grown_bytes < 16 << 20


def test_a_careless_decoder_is_found_out() -> None:
    tally = campaign(500, 1, "json:loads", "json:JSONDecodeError", "")
    assert {"UnicodeDecodeError", "RecursionError"} <= {crash.split(": ")[1] for crash in tally.crashes}
    number = int(tally.crashes[0].split()[1])
    samples = [b'{"a": 1}']
    assert message(number, samples) == message(number, samples)  # a crash can be seen again
