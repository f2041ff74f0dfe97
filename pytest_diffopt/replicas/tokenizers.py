"""Tokenizers of the public classes, from vocabularies made in memory: no file and no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from string import ascii_lowercase
from typing import Any

from pytest_diffopt.errors import ReplicaError

# The words of the prompt that QwenImagePipeline puts around a user's, and cuts off by counting: 34 tokens.
_QWEN_WORDS = (
    *("system", "user", "assistant", "Describe", "Ġthe", "Ġimage", "Ġby", "Ġdetailing", "Ġcolor", "Ġshape", "Ġsize"),
    *("Ġtexture", "Ġquantity", "Ġtext", "Ġspatial", "Ġrelationships", "Ġof", "Ġobjects", "Ġand", "Ġbackground"),
)

# Those around a prompt for HunyuanVideoPipeline, which cuts off 95 tokens: with the space before them, but for the first ones.
_LLAMA_WORDS = (
    *(
        "▁the",
        "▁video",
        "▁by",
        "▁detailing",
        "▁following",
        "▁aspects",
        "▁The",
        "▁main",
        "▁content",
        "▁and",
        "▁theme",
        "▁of",
    ),
    *(
        "▁color",
        "▁shape",
        "▁size",
        "▁texture",
        "▁quantity",
        "▁text",
        "▁spatial",
        "▁relationships",
        "▁objects",
        "▁events",
    ),
    *(
        "▁behaviors",
        "▁temporal",
        "▁physical",
        "▁movement",
        "▁changes",
        "▁background",
        "▁environment",
        "▁light",
        "▁style",
    ),
    *("▁atmosphere", "▁camera", "▁angles", "▁movements", "▁transitions", "▁used", "▁in", "▁Actions", "▁1"),
    *("system", "user", "Describe"),
)


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


def _qwen2_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers.pre_tokenizers import ByteLevel

    # A word of the template grows letter by letter, before pairs of letters could take it apart.
    grown = [(word[:length], word[length]) for word in _QWEN_WORDS for length in range(1, len(word))]
    pairs = [(a, b) for a in ascii_lowercase for b in ascii_lowercase]
    merges = list(dict.fromkeys([*grown, *pairs]))
    tokens = dict.fromkeys([*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)])
    return {token: index for index, token in enumerate(tokens)}, merges


def _llama_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    # Words with their space come first: they are whole before a shorter one could take letters out of them.
    merges = list(dict.fromkeys((word[:end], word[end]) for word in _LLAMA_WORDS for end in range(1, len(word))))
    merges += [pair for pair in ((a, b) for a in ascii_lowercase for b in ascii_lowercase) if pair not in set(merges)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    return {token: index for index, token in enumerate(dict.fromkeys([*tokens, *(a + b for a, b in merges)]))}, merges


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


def qwen2_tokenizer(max_length: int = 131072) -> Any:
    """A ``Qwen2Tokenizer`` of bytes, pairs of letters and the words that ``QwenImagePipeline`` puts around a prompt.

    Those words make as many tokens as in public; a prompt makes up to about three times as many.
    """
    vocabulary, merges = _qwen2_vocabulary()
    return import_module("transformers").Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=max_length,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def qwen2_vocabulary_size() -> int:
    """Number of tokens of :func:`qwen2_tokenizer`, special ones included: a text encoder's ``vocab_size``."""
    return len(qwen2_tokenizer())


def llama_tokenizer(max_length: int = 256) -> Any:
    """A ``LlamaTokenizerFast`` of bytes, pairs of letters and the words that ``HunyuanVideoPipeline`` puts around a prompt.

    Those words make as many tokens as in public; a prompt makes up to about three times as many.
    """
    vocabulary, merges = _llama_vocabulary()
    return import_module("transformers").LlamaTokenizerFast(
        vocab=vocabulary,
        merges=merges,
        model_max_length=max_length,
        pad_token="</s>",
        padding_side="right",
        extra_special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    )


def llama_vocabulary_size() -> int:
    """Number of tokens of :func:`llama_tokenizer`, special ones included: a text encoder's ``vocab_size``."""
    return len(llama_tokenizer())


_MAKERS: Mapping[str, Callable[..., Any]] = {
    "CLIPTokenizer": clip_tokenizer,
    "CLIPTokenizerFast": clip_tokenizer,
    "T5Tokenizer": t5_tokenizer,
    "T5TokenizerFast": t5_tokenizer,
    "LlamaTokenizer": llama_tokenizer,
    "LlamaTokenizerFast": llama_tokenizer,
    "Qwen2Tokenizer": qwen2_tokenizer,
    "Qwen2TokenizerFast": qwen2_tokenizer,
}


def in_memory(class_name: str, **config: Any) -> Any:
    """A tokenizer that stands for one of the class ``class_name``; ``config`` is ``max_length``, in tokens, or nothing.

    Its vocabulary is smaller than the public one, so every id it makes is one that a public text encoder knows.

    Raises:
        ReplicaError: none stands for that class.
    """
    if class_name not in _MAKERS:
        raise ReplicaError(
            f"No tokenizer made in memory stands for {class_name}; there are {', '.join(_MAKERS)}. "
            f"Add the tokenizer's own files to the directory."
        )
    return _MAKERS[class_name](**config)
