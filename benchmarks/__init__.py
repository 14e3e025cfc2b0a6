"""Measurements. torch comes first: its threads then wait as they do for others' code (`mint_engine/openmp.py`)."""

import torch  # noqa: F401
