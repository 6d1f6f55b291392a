"""Determines from a tokenizer's structure whether the tokens of a text's pieces decode to the same
text as the tokens of the whole text.

Two structures of tokenizer.json are recognized: byte-level BPE (Llama 3, Qwen, SmolLM), and BPE
that writes spaces as ▁ and unknown characters as bytes, and adds no space before a text (Gemma).
"""

import json
import unicodedata
from collections.abc import Callable
from typing import Any

from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

#: A function that returns whether the pieces of a text are normalized in the same way as the whole
#: text.
Holds = Callable[[str], bool]


def lossless(tokenizer: Any) -> Holds | None:
    """Returns a function that tests whether the tokens of a text's pieces decode to the same text
    as the tokens of the whole text. Returns None if the structure of this transformers tokenizer is
    not recognized."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    if not isinstance(model, BPE) or not hasattr(backend, "encode_batch_fast"):
        return None
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    added = tokenizer.added_tokens_decoder.values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None  # such tokens remove whitespace, or depend on the text around them
    cuts, steps = parts_of(backend.pre_tokenizer), parts_of(backend.normalizer)
    whole = all(_keeps(cut) for cut in cuts)
    if any(cut["type"] == "ByteLevel" for cut in cuts):
        # Without a token for unknown characters, BPE drops these characters both from the pieces
        # and from the whole text.
        known = ByteLevel.alphabet() if model.unk_token is not None else []
        plain = [own["type"] for own in parts_of(backend.decoder)] == ["ByteLevel"]
        normal = {"NFC"} >= {step["type"] for step in steps}
    else:
        known = [f"<0x{byte:02X}>" for byte in range(256)]
        decoding = [own["type"] for own in parts_of(backend.decoder)]
        plain = model.byte_fallback and decoding == ["Replace", "ByteFallback", "Fuse"]
        normal = steps == [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if not (whole and plain and normal and all(backend.token_to_id(x) is not None for x in known)):
        return None
    return _composed if any(step["type"] == "NFC" for step in steps) else lambda _: True


def _composed(text: str) -> bool:
    """Returns whether NFC normalization leaves the text, and therefore each of its pieces,
    unchanged."""
    return text.isascii() or unicodedata.is_normalized("NFC", text)


def parts_of(component: Any) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer, a pre-tokenizer or a decoder, in the form used in
    tokenizer.json."""
    if component is None:
        return []
    own = json.loads(component.__getstate__())
    if own["type"] != "Sequence":
        return [own]
    return next(value for value in own.values() if isinstance(value, list))


def _keeps(cut: dict[str, Any]) -> bool:
    """Returns whether a pre-tokenizer only splits a text, without adding or removing anything."""
    kind = cut["type"]
    if kind == "ByteLevel":
        return not cut["add_prefix_space"]
    return kind == "Digits" or (kind == "Split" and cut["behavior"] != "Removed")
