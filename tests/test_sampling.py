"""Seeds and their streams of uniform numbers."""

from __future__ import annotations

from mint_engine.sampling import UniformStream


def test_a_seed_fixes_a_stream_and_samples_have_streams_of_their_own() -> None:
    def take(seed: int | None, index: int) -> list[float]:
        stream = UniformStream(seed, index)
        return [stream.next() for _ in range(4)]

    assert take(3, 0) == take(3, 0)
    assert take(3, 0) != take(3, 1)
    assert take(3, 0) != take(4, 0)
    assert take(-1, 0) == take(-1, 0)
    assert take(None, 0) != take(None, 0)
