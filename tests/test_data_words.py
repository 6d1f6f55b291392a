"""Fast word tokenization returns the same tokens as the tokenizers library."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as cuts
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lib import chat_templates
from lib.chats import CORPUS, byte_level, chat, metaspace
from mlx_segtrain.data.lossless import lossless
from mlx_segtrain.data.template import ChatTemplate, TemplateError, direct
from mlx_segtrain.data.words import LLAMA_3, QWEN_2, Words

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x"]
TEXT = " It's 1234 o'clock,\n\n  he'LL say:\tdef f(x):\r\n    return x  \n"
#: Texts with all classes of characters that the patterns distinguish.
ascii_text = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL, "'s", "'ll", "'LL", "  ", "\n", "\r\n", " a", "12", "<|"]),
        st.text(st.characters(max_codepoint=127), max_size=5),
    ),
    max_size=12,
).map("".join)
any_text = st.one_of(ascii_text, st.text(max_size=12), st.sampled_from(["e\u0301", "가", "\u1161"]))


def wrapped(cut, normalizer=None, decoder=None, added=(), **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = cut
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder or decoders.ByteLevel()
    words = BpeTrainer(
        vocab_size=500,
        special_tokens=[*SPECIAL],
        initial_alphabet=cuts.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, TEXT] * 3, words)
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def split(pattern):
    own = cuts.Split(Regex(pattern), "isolated")
    return cuts.Sequence([own, cuts.ByteLevel(add_prefix_space=False, use_regex=False)])


PLAIN = cuts.ByteLevel(add_prefix_space=False)
BY_WORDS = {
    "gpt-2": wrapped(PLAIN),
    "smollm": wrapped(cuts.Sequence([cuts.Digits(individual_digits=True), PLAIN])),
    "llama-3": wrapped(split(LLAMA_3)),
    "qwen-2": wrapped(split(QWEN_2), normalizers.NFC()),
}


@pytest.mark.parametrize("name", BY_WORDS)
@given(text=ascii_text)
@example(text=TEXT)
@example(text="<|im_end|>xy <|im_end|>")
def test_words_give_the_library_s_tokens(name, text):
    tokenizer = BY_WORDS[name]
    words = Words.of(tokenizer)
    assert words is not None
    assert words.ids(text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", BY_WORDS)
@given(pieces=st.lists(any_text, min_size=2, max_size=3))
@example(pieces=["e", "\u0301"])
@example(pieces=["가", "\u11a8"])
def test_pieces_of_a_lossless_tokenizer_decode_as_the_whole(name, pieces):
    tokenizer = BY_WORDS[name]
    holds = lossless(tokenizer)
    assert holds is not None
    text = "".join(pieces)
    if not holds(text):
        assert name == "qwen-2" and not text.isascii()
        return
    ids = [i for own in pieces for i in tokenizer.encode(own, add_special_tokens=False)]
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == tokenizer.decode(whole)


@pytest.mark.parametrize(
    "tokenizer",
    [
        metaspace()._tokenizer,
        wrapped(cuts.ByteLevel(add_prefix_space=True)),
        wrapped(PLAIN, normalizers.Lowercase()),
        wrapped(cuts.Sequence([cuts.WhitespaceSplit(), PLAIN])),
        wrapped(cuts.Sequence([cuts.Split(" ", "removed"), PLAIN])),
        wrapped(PLAIN, added=[AddedToken("<x>", rstrip=True)]),
        wrapped(PLAIN, added=[AddedToken("word", single_word=True)]),
        wrapped(PLAIN, dropout=0.1),
        wrapped(PLAIN, decoder=decoders.Metaspace()),
    ],
    ids=range(9),
)
def test_others_are_compared_row_by_row(tokenizer):
    assert lossless(tokenizer) is None


def test_a_pattern_that_is_not_known_is_the_library_s():
    tokenizer = wrapped(split(r"\w+|\s+|[^\w\s]+"))
    assert lossless(tokenizer) and Words.of(tokenizer) is None
    tokenizer = wrapped(PLAIN, added=[AddedToken("of a normalized text", normalized=True)])
    assert lossless(tokenizer) and Words.of(tokenizer) is None


TEMPLATES = {
    name: own for name, own in vars(chat_templates).items() if name.isupper() and "{%" in own
}
CONVERSATIONS = [
    chat("a", "one"),
    chat("a", "one", "b", "two <|im_end|>"),
    [{"role": "system", "content": "Be"}, *chat("a", "")],
    [{"role": "developer", "content": "Be"}, *chat("a", "<think>x</think>b")],
    [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}],
    [*chat("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}],
    [*chat("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
    [*chat("a"), {"role": "assistant", "content": None}],
    [*chat("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
    chat("a", "b", first="assistant"),
    [],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"bos_token": "<|eot|>"}])
def test_a_template_that_is_called_directly_renders_the_same(name, kwargs):
    tokenizer = byte_level(TEMPLATES[name])
    fast = direct(tokenizer, kwargs)
    assert fast is not None
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            said = []
            for own in (fast, None):
                try:
                    said.append(ChatTemplate(tokenizer, kwargs, own)(messages, prompt))
                except TemplateError as error:
                    said.append(f"error: {error}")
            assert said[0] == said[1], messages


def test_what_is_no_template_of_jinja_is_not_called_directly():
    tokenizer = byte_level()
    tokenizer._chat_template = lambda messages, **_: json.dumps(messages)
    assert direct(tokenizer, {}) is None
