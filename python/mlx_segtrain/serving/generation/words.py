"""The bytes of single tokens, as OpenAI's log probabilities show them."""

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _bytes_of_letters() -> dict[str, int]:
    """What byte each letter stands for in byte-level vocabularies (GPT-2's)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {**{chr(byte): byte for byte in plain}, **letters}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Of a token, as it stands in a text."""
    name = tokenizer.convert_ids_to_tokens(int(token))
    if not isinstance(name, str):
        return b""
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    letters = _bytes_of_letters()
    if "▁" not in name and all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return name.replace("▁", " ").encode()
