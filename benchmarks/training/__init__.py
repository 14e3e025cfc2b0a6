"""The whole training step against PEFT + transformers: ``python -m benchmarks.training``."""
