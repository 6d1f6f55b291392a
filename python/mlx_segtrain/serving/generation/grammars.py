"""Formats of completions: JSON, a schema, a pattern, one of several texts, or a grammar.

After each token, llguidance computes which tokens may follow. Grammars are untrusted, so their size
and the work per token are limited. An error ends only the request that caused it.
"""

import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.numpy
import mlx.core as mx
import numpy as np

from ...errors import InputError

#: Maximum number of characters in a grammar, and maximum number of places where a rule, a group or
#: a subschema may start. llguidance may recurse at each of these places, and a stack overflow kills
#: the process. A stack of 8 MB suffices for about 2000 nested places.
MOST_TEXT, MOST_RULES = 1 << 16, 1000
#: The limits of a grammar: the work per token, and the number of states, each of which takes up to
#: 2 KB.
LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=100_000, max_lexer_states=20_000, verbose_errors=False
)
_LARK = ":(["
#: mlx-lm's parser for tool calls that are JSON between tags.
JSON_CALLS = "mlx_lm.tool_parsers.json_tools"
#: The allowed whitespace between JSON tokens: a space, or a line break with indentation.
SPACE: Any = {"whitespace_pattern": r"( |\n[ \t]{0,16})?"}


class Grammar:
    """A grammar, and its state after the tokens that have been generated. It implements
    decoding.Constraint."""

    def __init__(self, matcher: Any, tokens: int, ends: Sequence[int]):
        self._matcher, self._tokens, self._ends = matcher, tokens, ends

    def fresh(self) -> "Grammar":
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Grammar(matcher, self._tokens, self._ends)

    def take(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def allowed(self, n: int) -> mx.array:
        """Returns bool [n], which is true for the tokens that may follow. Once the text is
        complete, only end-of-sequence tokens may follow."""
        if self._matcher.is_stopped():
            return mx.zeros(n, mx.bool_).at[mx.array(list(self._ends))].add(True)
        mask = llguidance.numpy.allocate_token_bitmask(1, self._tokens)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask, 0)
        self._check()
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=self._tokens)
        found: Any = np.pad(bits, (0, max(0, n - self._tokens)))[:n].astype(np.bool_)
        return mx.array(found)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:300]
            raise InputError(f"the answer cannot be continued within its grammar: {reason}")


class Grammars:
    """Compiles grammars for a tokenizer. Each call may be slow."""

    def __init__(self, tokenizer: Any, tokens: int):
        self._wrapper, self._tokens = tokenizer, tokens
        self._tokenizer = tokenizer._tokenizer
        self._ends = sorted(tokenizer.eos_token_ids)
        self._lock = threading.Lock()
        self._known: Any = None

    def _tokens_known(self) -> Any:
        with self._lock:
            if self._known is None:
                from llguidance.hf import from_tokenizer
                from transformers import PreTrainedTokenizerFast

                if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                    raise InputError(
                        "answers cannot be constrained, because the model has no fast tokenizer."
                    )
                self._known = from_tokenizer(
                    self._tokenizer, n_vocab=self._tokens, eos_token=self._ends
                )
            return self._known

    def schema(self, field: str, schema: Any) -> Grammar:
        """Returns a grammar for JSON that matches a schema. The grammar limits whitespace, because
        some models would generate whitespace forever."""

        def read(text: str) -> str:
            return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=SPACE)

        try:
            text = json.dumps(schema)
        except RecursionError:
            raise InputError(f"{field} is nested too deeply: use a flatter schema.") from None
        return self._made(field, read, text, "{")

    def calls(self, field: str, schema: Any) -> Grammar:
        """Returns a grammar for text in which every tool call matches a schema. Raises InputError
        for a model that does not write tool calls as JSON between tags."""
        parser = getattr(self._wrapper, "tool_parser", None)
        if parser is None or parser.__module__ != JSON_CALLS:
            raise InputError(
                f"{field} works only if tool_choice is required or names a tool, because this "
                "model does not write tool calls as JSON between tags: leave strict "
                "out."
            )
        begin, end = self._wrapper.tool_call_start, self._wrapper.tool_call_end

        def read(text: str) -> str:
            return (
                "%llguidance {}\nstart: call* TEXT\n"
                f'call: begin "\\n" %json {text} {json.dumps(chr(10) + end)}\n'
                f"begin[lazy]: TEXT {json.dumps(begin)}\nTEXT: /(.|\\n)*/"
            )

        return self._made(field, read, json.dumps({"x-guidance": SPACE, **schema}), "{")

    def pattern(self, field: str, pattern: str) -> Grammar:
        return self._made(field, llguidance.LLMatcher.grammar_from_regex, pattern)

    def choice(self, field: str, texts: Sequence[str]) -> Grammar:
        """Returns a grammar that matches one of several texts."""
        rules = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._made(field, llguidance.LLMatcher.grammar_from_lark, f"start: {rules}")

    def grammar(self, field: str, grammar: str) -> Grammar:
        """Compiles a grammar in the format of Lark or llama.cpp. Only llama.cpp's grammars
        contain `::=`."""
        if "::=" in grammar:
            from llguidance.gbnf_to_lark import any_to_lark

            return self._made(field, lambda x: any_to_lark(x), grammar, _LARK)
        return self._made(field, llguidance.LLMatcher.grammar_from_lark, grammar, _LARK)

    def _made(self, field: str, read: Any, text: str, begins: str = "") -> Grammar:
        """Compiles a grammar. `begins` contains the characters that start rules, groups and
        subschemas."""
        if len(text) > MOST_TEXT:
            raise InputError(f"{field} has more than {MOST_TEXT} characters: shorten it.")
        if sum(map(text.count, begins)) > MOST_RULES:
            raise InputError(
                f"{field} contains more than {MOST_RULES} of the characters {begins} in total: "
                "shorten it."
            )
        try:
            known = self._tokens_known()
            matcher = llguidance.LLMatcher(known, read(text), log_level=0, limits=LIMITS)
            reason = matcher.get_error() if matcher.is_error() else ""
        except (InputError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            reason = str(error) or type(error).__name__
        else:
            if not reason:
                return Grammar(matcher, self._tokens, self._ends)
        raise InputError(f"{field} cannot be used: {' '.join(reason.split())[:300]}")
