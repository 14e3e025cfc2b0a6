"""The training step in static buffers, for a GPU that replays it as a CUDA graph (docs/gpu.md).

A pass is cut to a shape of a coarse grid (`buckets`): rows and rows in the loss of each call, sequences. Per shape
there is one `program`: device buffers and the launches from tokens to gradients, in which sequence bounds, targets,
weights and row lists are data. `run` packs batches into programs, ahead of the device, and queues what becomes of
their gradients; `stepper` does the same with the optimiser. What comes back is read when it is there (`pending.py`).
"""
