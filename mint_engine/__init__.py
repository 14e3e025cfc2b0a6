"""mint-engine: LoRA post-training as software you own. ``import mint`` is the API of the MinT documents."""

__version__ = "0.1.0"
