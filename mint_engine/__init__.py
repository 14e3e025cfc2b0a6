"""mint-engine: LoRA post-training as software you own. See README.md; ``import mint`` is the API of the MinT documents."""

__version__ = "0.1.0"
