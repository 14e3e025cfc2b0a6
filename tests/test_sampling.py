"""Seeds and their streams of uniform numbers."""

from __future__ import annotations

import numpy as np

from mint_engine.sampling import UniformStream


def test_a_seed_fixes_a_stream_and_samples_have_streams_of_their_own() -> None:
    def take(seed: int | None, index: int) -> list[float]:
        stream = UniformStream(seed, index)
        return [stream.take(1)[0] for _ in range(4)]

    assert take(3, 0) == take(3, 0)
    assert take(3, 0) != take(3, 1)
    assert take(3, 0) != take(4, 0)
    assert take(-1, 0) == take(-1, 0)
    assert take(None, 0) != take(None, 0)


def test_a_stream_is_philox_number_by_number_however_they_are_asked_for() -> None:
    generator = np.random.Generator(np.random.Philox(key=np.array([3, 1], dtype=np.uint64)))
    expected = [float(generator.random()) for _ in range(150)]
    stream, found = UniformStream(3, 1), []
    for ahead in (1, 3, 70, 2) * 40:
        assert stream.peek(ahead)[: 150 - len(found)] == expected[len(found) : len(found) + ahead]
        if len(found) < 150:
            found.append(stream.take(1)[0])
    assert found == expected
