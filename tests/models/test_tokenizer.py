"""Tokenizers load from a directory alone; a missing or damaged one is a ModelError."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mint_engine.errors import ModelError
from mint_engine.models.tokenizer import load_tokenizer


@pytest.fixture
def directory(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return tmp_path


def test_a_directory_with_only_tokenizer_files_is_enough(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("two one three") == [1, 0, 2]
    assert tokenizer.decode([0, 1]) == "one two"


def test_an_absent_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer: expected one of tokenizer.json, tokenizer.model, vocab.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "unheard of"}}'])
def test_a_damaged_tokenizer_is_named(directory, text):
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=f"{directory}: the tokenizer cannot be read"):
        load_tokenizer(directory)
