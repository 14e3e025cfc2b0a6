"""Tokens to text: nothing is said too early, nothing is taken back, and no stop string is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_fakes import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mint_engine.server.openai.choice import Choice, Piece, Token
from mint_engine.server.openai.detokenize import REPLACEMENT, ByteStream
from mint_engine.server.openai.respond import join
from mint_engine.server.openai.stop_strings import StopStrings
from mint_engine.server.openai.vocabulary import Vocabulary

EOS = 0
NO_CHARACTER = b"\xff"


@pytest.fixture(scope="module")
def byte_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def sentencepiece_like() -> PreTrainedTokenizerBase:
    """The decoder of Llama 2: spaces as "▁", bytes as <0xNN>, a space lost at the beginning of a text."""
    words = ["<unk>", "</s>", "▁Hello", "▁wor", "ld", "▁", "!"]
    vocab = {name: i for i, name in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def wordpiece_like() -> PreTrainedTokenizerBase:
    """A decoder that joins words by what follows: we do not know its bytes."""
    vocab = {name: i for i, name in enumerate(["[UNK]", "Hello", "wor", "##ld", "!", "é", "[END]"])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]")


def said(vocabulary: Vocabulary, tokens: list[int], context: list[int] | None = None) -> list[str]:
    stream = vocabulary.stream(context or [])
    return [stream.push(token) for token in tokens]


def test_a_character_that_spans_tokens_is_emitted_once_whole(byte_vocabulary: Vocabulary):
    pieces = said(byte_vocabulary, byte_vocabulary.encode("a€b"))
    assert pieces == ["a", "", "", "€", "b"]


@given(st.text(max_size=40))
def test_the_pieces_are_the_text_whatever_it_is(byte_vocabulary: Vocabulary, text: str):
    tokens = byte_vocabulary.encode(text)
    assert "".join(said(byte_vocabulary, tokens)) == text == byte_vocabulary.tokenizer.decode(tokens)


@given(st.binary(max_size=24))
def test_broken_bytes_are_replaced_as_the_tokenizer_replaces_them(raw: bytes):
    # Only a character that is not finished when the sample ends is left out instead: up to three bytes, and as many
    # replacements where they could not have become one (half a surrogate).
    stream = ByteStream(lambda byte: bytes([byte]))
    emitted = "".join(stream.push(byte) for byte in raw)
    full = raw.decode(errors="replace")
    assert full in [emitted + REPLACEMENT * n for n in range(4)]


def test_special_tokens_have_no_text_but_a_name(byte_vocabulary: Vocabulary):
    end = byte_vocabulary.tokenizer.eos_token_id
    assert said(byte_vocabulary, [end]) == [""]
    assert byte_vocabulary.token_string(end) == "<|end|>"


def test_ids_beyond_the_tokenizer_have_no_text(byte_vocabulary: Vocabulary):
    # Models pad their vocabulary, and a random one samples from the padding.
    assert said(byte_vocabulary, [9999]) == [""]
    assert byte_vocabulary.token_bytes(9999) == b""


def test_only_the_tokenizer_s_own_tokens_are_remembered(byte_vocabulary: Vocabulary):
    vocabulary = Vocabulary(byte_vocabulary.tokenizer)
    for token in (5, EOS, 300, 2**31 - 1):
        vocabulary.token_bytes(token)
    assert set(vocabulary._cache) == {5, EOS}


def test_part_of_a_character_is_shown_as_its_bytes(byte_vocabulary: Vocabulary):
    first = byte_vocabulary.encode("€")[0]
    assert byte_vocabulary.token_string(first) == r"\xe2"
    assert byte_vocabulary.token_string(first, prefix="bytes:") == r"bytes:\xe2"
    assert byte_vocabulary.token_bytes(first) == b"\xe2"


def test_a_sentencepiece_sample_keeps_the_space_it_begins_with():
    # The tokenizer's own decode drops it, but the sample goes on where a prompt ended.
    tokenizer = sentencepiece_like()
    tokens = tokenizer.convert_tokens_to_ids(["▁Hello", "▁wor", "ld", "<0xE2>", "<0x82>", "<0xAC>", "!"])
    pieces = said(Vocabulary(tokenizer), tokens)
    assert pieces == [" Hello", " wor", "ld", "", "", "€", "!"]
    assert "".join(pieces).removeprefix(" ") == tokenizer.decode(tokens)


def test_an_unknown_decoder_is_asked_for_the_difference():
    tokenizer = wordpiece_like()
    vocabulary = Vocabulary(tokenizer)
    context, tokens = [1], tokenizer.convert_tokens_to_ids(["wor", "##ld", "!", "é"])
    pieces = said(vocabulary, tokens, context)
    assert tokenizer.decode(context) + "".join(pieces) == tokenizer.decode([*context, *tokens])
    assert pieces[:2] == [" wor", "ld"]
    assert vocabulary.token_bytes(tokens[0]) is None


def test_a_text_without_a_stop_comes_through_at_once():
    assert StopStrings().push("abc") == ("abc", False)


def test_what_may_begin_a_stop_waits_until_it_is_decided():
    stops = StopStrings(["END"])
    assert stops.push("the E") == ("the ", False)
    assert stops.push("N") == ("", False)
    assert stops.push("glish") == ("ENglish", False)
    assert stops.push("E") == ("", False)
    assert stops.flush() == "E"


def test_the_first_of_several_stops_cuts():
    assert StopStrings(["world", "lo"]).push("hello world") == ("hel", True)
    assert StopStrings(["abcd", "bc"]).push("abc") == ("a", True)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_no_stop_is_shown_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    cutter, out, stopped = StopStrings(stops), "", False
    for part in parts:
        piece, stopped = cutter.push(part)
        out += piece
        assert not any(stop in out for stop in stops)
        if stopped:
            break
    else:
        out += cutter.flush()
    assert text.startswith(out)
    assert stopped == any(stop in text for stop in stops)
    if not stopped:
        assert out == text


def choice(stops: tuple[str, ...] = (), max_tokens: int | None = None) -> Choice:
    """Tokens are bytes here; 0 ends."""
    return Choice(ByteStream(lambda b: bytes([b])), stops=stops, eos=frozenset([EOS]), max_tokens=max_tokens)


def fed(sample: Choice, raw: bytes) -> list[Piece]:
    return [sample.push(Token(byte, -1.0)) for byte in raw]


def listed(piece: Piece) -> list[tuple[str, int]]:
    return [(chr(placed.token.id), placed.offset) for placed in piece.tokens]


def test_the_end_of_the_sequence_is_not_part_of_the_answer():
    sample = choice()
    whole = join(*fed(sample, b"hi\0more"))
    assert (whole.text, whole.finish_reason) == ("hi", None)
    assert [c for c, _ in listed(whole)] == ["h", "i"]
    assert sample.count == 3  # the token that ended it was sampled, too
    assert sample.finished


def test_a_stop_string_takes_its_tokens_with_it():
    pieces = fed(choice(stops=("END",)), b"ab END")
    assert [piece.text for piece in pieces] == ["a", "b", " ", "", "", ""]
    assert pieces[-1].finish_reason == "stop"
    assert listed(join(*pieces)) == [("a", 0), ("b", 1), (" ", 2)]


def test_tokens_are_reported_with_their_text_and_not_before():
    # "€" comes of three tokens; a stop string that begins with it must not leave its first bytes behind.
    pieces = fed(choice(stops=("€!",)), "a€!".encode())
    assert [listed(piece) for piece in pieces] == [[("a", 0)], [], [], [], []]
    pieces = fed(choice(stops=("€!",)), "a€?".encode())
    assert [len(piece.tokens) for piece in pieces] == [1, 0, 0, 0, 4]
    assert [placed.offset for placed in pieces[-1].tokens] == [1, 1, 1, 2]


def test_length_is_reached_with_the_last_token():
    pieces = fed(choice(stops=("xyz",), max_tokens=3), b"abx")
    assert (pieces[-1].text, pieces[-1].finish_reason) == ("x", "length")


def test_a_stop_string_in_the_last_token_counts_as_a_stop():
    pieces = fed(choice(stops=("x",), max_tokens=3), b"abx")
    assert (pieces[-1].text, pieces[-1].finish_reason) == ("", "stop")


def test_an_unfinished_character_at_the_end_is_left_out_but_its_tokens_are_not():
    pieces = fed(choice(max_tokens=3), "a€".encode()[:3])
    whole = join(*pieces)
    assert whole.text == "a"
    assert len(whole.tokens) == 3


@given(st.text("ab€\0", max_size=20), st.sampled_from([(), ("ab",), ("€a", "b€")]), st.integers(1, 30))
def test_text_and_tokens_agree(text: str, stops: tuple[str, ...], max_tokens: int):
    sample = choice(stops, max_tokens)
    pieces = [*fed(sample, text.encode()), sample.finish("length")]
    whole = join(*pieces)
    raw = bytes(placed.token.id for placed in whole.tokens)
    if whole.finish_reason == "length" or not stops:
        assert raw.decode(errors="ignore") == whole.text
    assert raw.decode(errors="ignore").startswith(whole.text)
    assert REPLACEMENT not in whole.text
    assert sum(piece.finish_reason is not None for piece in pieces) == 1
    for placed in whole.tokens:
        assert 0 <= placed.offset <= len(whole.text)
