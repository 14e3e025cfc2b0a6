"""How training operations and decode steps share the device while both have work: each gets its part of the time."""

from __future__ import annotations

from mint_engine.errors import UserError

DEFAULT_SAMPLING_SHARE = 0.5


class FairShare:
    """Whose turn it is, by what each has had. One thread uses it.

    ``sampling``: the part of the device's time that decode steps get while training operations wait, and the other way
    round. Neither side can be cut short: who has had more than its part waits until the other has caught up, hence at
    most for as long as its own last turn earned. Time in which the other side had nothing to do is not counted.
    """

    def __init__(self, sampling: float = DEFAULT_SAMPLING_SHARE) -> None:
        """Raises UserError unless 0 < ``sampling`` < 1: neither side may starve."""
        if not 0 < sampling < 1:
            raise UserError(f"sampling_share: expected a number between 0 and 1, both excluded, got {sampling!r}")
        self._sampling = sampling
        self._owed = 0.0  # seconds, to sampling if positive

    @property
    def samplers_turn(self) -> bool:
        return self._owed > 0

    def trained(self, seconds: float) -> None:
        """Operations have had the device for so long."""
        self._owed += seconds * self._sampling

    def sampled(self, seconds: float, *, others_waited: bool) -> None:
        """Decode steps have; ``others_waited``: there were operations that could have had it."""
        self._owed = self._owed - seconds * (1 - self._sampling) if others_waited else 0.0

    def forget(self) -> None:
        """There was nothing to sample: what sampling did not want is not owed to it later."""
        self._owed = 0.0
