"""Writes past the end of a tensor. `make sanitize` runs this first, to see that the sanitizer is there and looks."""

import torch

from mint_engine.kernels.op import native

sink, flop = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
native.peak(0, sink.data_ptr() + sink.nbytes, 1, flop.data_ptr())
