"""Defines chat templates, creates tokenizers (byte-level and SentencePiece-like), and returns the
spans in the loss."""

import json

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlx_segtrain.data import Options, load_split

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|eot|>", "<|pad|>"]


CORPUS = [
    "Hello there, how are you today? I am fine. The sky is blue and the grass is green.",
    "def add(a, b):\n\n    return a + b\n\n\nprint(add(1, 2))",
    "user assistant system tool\n[INST] a question [/INST] an answer",
] * 20


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


LLAMA3 = (
    "<s>{% for m in messages %}<|header|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}"
)


INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


# Only the last turn has an empty thinking block, as in Qwen3's template.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML


def wrap(tokenizer, template, eos="</s>", pad=None, stops=()):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=pad
    )
    fast.chat_template = template
    stops = (*((eos,) if eos else ()), "<|im_end|>", "<|eot|>", *stops)
    ends = [fast.convert_tokens_to_ids(token) for token in stops]
    return TokenizerWrapper(fast, eos_token_ids=ends)


def add_bos(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )


def byte_level(template=CHATML, bos=True, eos="</s>", pad=None, stops=()):
    """Returns a byte-level BPE tokenizer, in which preceding text affects a token only through
    merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=[*SPECIAL, *stops],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if bos:
        add_bos(tokenizer)
    return wrap(tokenizer, template, eos, pad, stops)


def metaspace(template=INST, scheme="first"):
    """Returns a BPE tokenizer that writes spaces as ▁. Like SentencePiece, it prepends a space to
    every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False
        ),
    )
    add_bos(tokenizer)
    return wrap(tokenizer, template)


def load(tmp_path, tokenizer, *rows, max_seq_length=4096, **options):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"max_seq_length": max_seq_length, "prompt_format": "raw", **options}
    return load_split(path, tokenizer, Options(**how))


def chat(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def trained(row, tokenizer):
    """Returns the text of each span of tokens that is in the loss."""
    spans, previous = [], False
    for token, weight in zip(row.ids.tolist(), row.weights.tolist(), strict=True):
        if weight > 0:
            if not previous:
                spans.append([])
            spans[-1].append(token)
        previous = weight > 0
    return [tokenizer.decode(span) for span in spans]


def text(row, tokenizer):
    return tokenizer.decode(row.ids.tolist())


def ids(tokenizer, *pieces):
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
