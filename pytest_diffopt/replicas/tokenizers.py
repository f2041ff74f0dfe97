"""CLIP and T5 tokenizers of the public classes, from vocabularies made in memory: no file and no download."""

from __future__ import annotations

from importlib import import_module
from string import ascii_lowercase
from typing import Any


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers.pre_tokenizers import ByteLevel

    # The byte alphabet encodes any prompt; pairs of letters let one of about 140 letters fit in CLIP's 77 tokens.
    alphabet = sorted(ByteLevel.alphabet())
    merges = [(a, b + end) for end in ("</w>", "") for a in ascii_lowercase for b in ascii_lowercase]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges)]
    # The end token has the highest id, as in the public vocabulary: some text encoders find it by argmax.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _t5_vocabulary() -> list[tuple[str, float]]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return pieces + [(chr(code), -1.0) for code in range(33, 127)]


def clip_tokenizer(max_length: int = 77) -> Any:
    """A ``CLIPTokenizer`` of bytes and pairs of letters: encodes any text, of which ``max_length`` tokens count."""
    vocabulary, merges = _clip_vocabulary()
    return import_module("transformers").CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def clip_vocabulary_size() -> int:
    """Number of tokens of :func:`clip_tokenizer`: a text encoder's ``vocab_size``. The end token is the last id."""
    return len(_clip_vocabulary()[0])


def t5_tokenizer(max_length: int = 512) -> Any:
    """A ``T5TokenizerFast`` whose pieces are the printable ASCII characters; any other character is ``<unk>``."""
    return import_module("transformers").T5TokenizerFast(
        vocab=_t5_vocabulary(), extra_ids=0, model_max_length=max_length
    )


def t5_vocabulary_size() -> int:
    """Number of pieces of :func:`t5_tokenizer`: a text encoder's ``vocab_size``."""
    return len(_t5_vocabulary())
