"""mint-engine: LoRA post-training as software you own. ``import mint`` is the API of the MinT documents."""

from mint_engine.openmp import spin_briefly

__version__ = "0.1.0"

spin_briefly()  # before anything here imports torch
