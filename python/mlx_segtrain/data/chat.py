"""Where the trained turns of a conversation lie, found by rendering its chat template."""

from typing import TYPE_CHECKING, Any

from mlx_segtrain.data.jsonl import Record
from mlx_segtrain.errors import InputError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Consecutive pieces of one text, each with its loss weight; 0 is context.
Pieces = list[tuple[str, float]]

# A private-use character: content that no real message starts with.
SENTINEL = "\ue000"


def split_turns(record: Record, tokenizer: "TokenizerWrapper", train_on: str) -> list[Pieces]:
    """Renders a messages row and cuts it where a trained turn starts and ends.

    Gives one list of pieces, or several for a template that renders a turn differently once
    others follow it: then every such turn is rendered as it is when it is generated. What follows
    the last trained turn cannot change the loss and is left out. Raises InputError.
    """
    messages = record.row["messages"]
    weights = _weights(messages, train_on)
    messages = [
        {key: value for key, value in message.items() if key not in ("train", "weight")}
        for message in messages
    ]
    turns = [i for i, weight in enumerate(weights) if weight > 0]
    if not turns:
        return [[]]
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{record.source}: the tokenizer has no chat template to render messages with; give "
            '"prompt" and "completion", or "text".'
        )
    render = _renderer(record, tokenizer)
    spans = {}
    for i in turns:
        full = render(messages[: i + 1])
        spans[i] = (_start(i, messages, full, render, record.source), full)

    samples = []
    while turns:
        whole = spans[turns[-1]][1]
        inside = [i for i in turns if whole.startswith(spans[i][1])]
        pieces, position = [], 0
        for i in inside:
            start, full = spans[i]
            start = max(start, position)
            pieces += [(whole[position:start], 0.0), (whole[start : len(full)], weights[i])]
            position = len(full)
        samples.append([piece for piece in pieces if piece[0]])
        turns = [i for i in turns if i not in inside]
    return samples[::-1]


def _weights(messages: list[dict[str, Any]], train_on: str) -> list[float]:
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = set(assistant[-1:] if train_on == "last" else assistant)
    return [
        float(message.get("weight", 1)) if i in trained and message.get("train", True) else 0.0
        for i, message in enumerate(messages)
    ]


def _renderer(record: Record, tokenizer: "TokenizerWrapper"):
    tools = {"tools": record.row["tools"]} if record.row.get("tools") else {}

    def render(messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **tools
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise InputError(
                f"{record.source}: the chat template cannot render the first {len(messages)} "
                f"messages ({error}); change the row to what the template takes."
            ) from error

    return render


def _start(i: int, messages: list[dict[str, Any]], full: str, render, source: str) -> int:
    """Where, in the rendering of messages[:i + 1], the text that the model generates starts."""
    if i > 0:
        prefix = render(messages[:i], True)
        if full.startswith(prefix):
            return len(prefix)
        if not full.startswith(render(messages[:i])):
            raise InputError(
                f"{source}: the chat template renders what comes before messages[{i}] differently "
                'once that turn follows, so it cannot be trained; set "train": false on it, '
                "merge it with the turn before it, or leave the row out."
            )
    # Only the generation prompt differs (some open a thinking block), or nothing comes before:
    # the turn then starts at its own content, which is where another content stands instead.
    other = render([*messages[:i], {**messages[i], "content": SENTINEL}])
    header, found, _ = other.partition(SENTINEL)
    if not found or not full.startswith(header):
        raise InputError(
            f"{source}: where the content of messages[{i}] starts in the chat template cannot be "
            'told, so that turn cannot be trained; set "train": false on it or leave the row out.'
        )
    return len(header)
