"""One router per part of the protocol."""
