"""Loading a model's tokenizer from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mint_engine.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of these holds the vocabulary, whichever kind of tokenizer it is.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer transformers' AutoTokenizer reads from ``directory``; no network, no code from the model.

    Raises ModelError if there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise ModelError(f"{directory}: no tokenizer: expected one of {', '.join(VOCABULARIES)}")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise ModelError(f"{directory}: the tokenizer cannot be read: {error}") from error
