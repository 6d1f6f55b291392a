"""Byte-level BPE with a cache of words.

The tokenizers library splits a text into words with a pattern, and then applies merges within each
word. The split takes most of the time. For ASCII text, an equivalent Python pattern splits several
times faster, and the library is called only for words that are not yet cached. The library also
handles all other texts, and tokenizers with other patterns.
"""

import re
from functools import lru_cache
from itertools import chain
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from .lossless import parts_of

#: GPT_2, LLAMA_3 and QWEN_2 are patterns that occur in tokenizer.json. ASCII maps them to
#: equivalent patterns for ASCII text, because Python's re does not support \p{L} and \p{N}.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
ASCII = {
    GPT_2: r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    **{
        own: (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]" + digits + ""
            r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        for own, digits in ((LLAMA_3, "{1,3}"), (QWEN_2, ""))
    },
}
#: For ASCII text, this pattern is equivalent to splitting off every digit and then applying GPT_2
#: to each piece between the digits.
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
#: The maximum number of cached words, and the maximum number of characters in a cached word.
MOST, LONGEST = 1 << 18, 64


class Words(dict[str, list[int]]):
    """A cache of token ids, keyed by word. `of` returns the cache for a transformers tokenizer
    whose pattern is known."""

    def __init__(self, tokenizer: Any, pattern: str):
        backend = tokenizer.backend_tokenizer
        self._words, self._model = re.compile(pattern, re.ASCII).findall, backend.model
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        self._added = {text: [i] for text, i in added.items() if text}
        # If several added tokens start at the same position, the longest one is used, as in the
        # library.
        texts = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(texts)})" if texts else "((?!))").split
        cut = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
        self._bytes = {code: cut(chr(code))[0][0] for code in range(128)}

    @classmethod
    def of(cls, tokenizer: Any) -> "Words | None":
        """Returns the cache for a lossless tokenizer (lossless.py), or None if the tokenizer's
        pattern is unknown. All callers share the cache."""
        return _words_of(tokenizer, len(tokenizer))

    def __missing__(self, word: str) -> list[int]:
        found = [token.id for token in self._model.tokenize(word.translate(self._bytes))]
        if len(word) <= LONGEST and len(self) < MOST:
            self[word] = found
        return found

    def ids(self, text: str) -> list[int]:
        """Returns the token ids of an ASCII text."""
        cut = self._cut(text)
        parts: list[Any] = []
        for i in range(0, len(cut), 2):
            parts += map(self.__getitem__, self._words(cut[i]))
            if i + 1 < len(cut):
                parts.append(self._added[cut[i + 1]])
        return list(chain.from_iterable(parts))


@lru_cache(2)
def _words_of(tokenizer: Any, size: int) -> Words | None:
    """Implements Words.of. `size` is part of the cache key, because adding tokens changes a
    tokenizer's size."""
    backend = tokenizer.backend_tokenizer
    steps = parts_of(backend.pre_tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    if any(token.normalized for token in added) or backend.encode_special_tokens:
        return None
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if steps[0]["use_regex"]:
            return Words(tokenizer, ASCII[GPT_2])
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return Words(tokenizer, DIGITS)
        case ["Split", "ByteLevel"] if not steps[1]["use_regex"]:
            split = steps[0]
            pattern = ASCII.get(split["pattern"].get("Regex"))
            plain = split["behavior"] == "Isolated" and not split["invert"]
            return Words(tokenizer, pattern) if plain and pattern else None
    return None
