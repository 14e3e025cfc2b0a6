"""One command for the GPU: right, tuned, measured against floors and peers. See docs/gpu.md and ``__main__``."""
