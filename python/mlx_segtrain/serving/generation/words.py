"""The bytes of single tokens, for log-probabilities in OpenAI's format."""

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _bytes_of_letters() -> dict[str, int]:
    """Returns the byte that each character represents in byte-level vocabularies such as
    GPT-2's."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {**{chr(byte): byte for byte in plain}, **letters}


def _is_byte_level(tokenizer: Any) -> bool:
    """Returns whether the characters of tokens represent bytes (GPT-2) instead of text
    (SentencePiece)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return hasattr(tokenizer, "byte_decoder")
    return "ByteLevel(" in repr(backend.decoder)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Returns the UTF-8 bytes of a token's text."""
    name = tokenizer.convert_ids_to_tokens(int(token))
    if not isinstance(name, str):
        return b""
    if int(token) in tokenizer.added_tokens_decoder:  # these are text in every vocabulary
        return name.encode()
    if _is_byte_level(tokenizer):
        letters = _bytes_of_letters()
        return b"".join(bytes([letters[x]]) if x in letters else x.encode() for x in name)
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    return name.replace("▁", " ").encode()


def shown(own: bytes) -> str:
    """Returns a token's text. If the token is only a part of a character, returns its bytes as
    escape sequences, as OpenAI does."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in own)
