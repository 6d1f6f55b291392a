"""Generates random values and files that an attacker might send."""

import json
import random
import struct
from collections.abc import Iterable
from typing import Any

#: Unusual values, which break code that expects only ordinary ones.
ODD = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), -1e308, "", " ", "\0", "\x00", "a", "a" * 5000, "é" * 600, "é\ud800", "\ud800"),
    *(
        "../" * 20 + "etc/passwd",
        "../../etc/passwd",
        "~nobody/x",
        "/dev/zero",
        "\n" * 9,
        "\r\nx: y",
    ),
    *([], {}, [[]], [None], [0] * 9, {"": {}}, {"a": {}}, ["a"] * 300, [{}] * 100),
    *({"a": {"a": {"a": {}}}}, "{{ 1/0 }}", "(a*)*b", "(a+)+$", "(", ".?" * 31, "none", "a+b"),
    *("9" * 5000, "\u202e", "<script>", "%s%n", "lora_A", "__proto__", "F32", "U8"),
]


class Mutator:
    """Mutates JSON values and bytes. `extra` contains additional unusual values."""

    def __init__(self, seed: int, extra: Iterable[Any] = ()):
        self.chance = random.Random(seed)
        self.odd = [*ODD, *extra]

    def value(self, value: Any, depth: int = 0) -> Any:
        """Returns the value with unusual values inserted and keys removed or renamed."""
        chance = self.chance
        if isinstance(value, dict) and value and chance.random() < 0.85:
            key = chance.choice(list(value))
            kind = chance.randrange(7)
            if kind == 0:
                return {name: x for name, x in value.items() if name != key}
            if kind == 1:
                return {**value, str(chance.choice(self.odd))[:300]: chance.choice(self.odd)}
            if kind == 2:
                return {**value, chance.choice(["", "../x", "lora_A", key + "x"]): value[key]}
            changed = {**value, key: self.value(value[key], depth + 1)}
            return self.value(changed) if kind == 3 and depth < 3 else changed
        if isinstance(value, list) and value and chance.random() < 0.7:
            at = chance.randrange(len(value))
            return [*value[:at], self.value(value[at], depth + 1), *value[at + 1 :]]
        return chance.choice(self.odd)

    def bytes(self, content: bytes) -> bytes:
        """Returns the bytes with some of them changed, removed, duplicated or added."""
        chance, found = self.chance, bytearray(content)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(found) or 1)
            match chance.randrange(6):
                case 0:
                    del found[at:]
                case 1:
                    found[at:at] = chance.randbytes(chance.randrange(1, 20))
                case 2:
                    found[at:at] = found[at : at + chance.randrange(1, 200)]
                case 3:
                    found[at:at] = chance.choice([b"{", b"[", b'"', b"\\", b"\xff", b"\n"]) * 50
                case 4:
                    found += bytes(chance.randrange(1, 100))
                case _ if found:
                    found[at % len(found)] = chance.randrange(256)
        return bytes(found)

    def text(self, value: Any) -> bytes:
        """Returns JSON text: either the text of a mutated value, or the mutated text of the
        original value."""
        if self.chance.random() < 0.3:
            return self.bytes(json.dumps(value).encode())
        return json.dumps(self.value(value)).encode()

    def tensors(self, content: bytes) -> bytes:
        """Returns a safetensors file whose length, header or data has been changed."""
        chance, start = self.chance, 8 + struct.unpack("<Q", content[:8])[0]
        match chance.randrange(6):
            case 0:
                size = len(content)
                lengths = [0, 1, 2**63, 2**64 - 1, 2**31, size, chance.randrange(9999)]
                return struct.pack("<Q", chance.choice(lengths)) + content[8:]
            case 1:
                return self.bytes(content)
            case 2:
                return self.bytes(content[:start]) + content[start:]
            case _:
                header = self.text(json.loads(content[8:start]))
                return struct.pack("<Q", len(header)) + header + content[start:]
