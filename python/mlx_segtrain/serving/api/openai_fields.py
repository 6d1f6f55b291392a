"""Request fields of other OpenAI-compatible servers that this server does not implement.

A request that sets such a field is refused with an error that names the field, because ignoring it
would give a wrong result. Null and the values in these tables are accepted, because they mean the
same as omitting the field.
Sources: OpenAI's API reference, and the request classes of vLLM, SGLang and mlx_lm.server.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from pydantic import BaseModel

from ...config import nearest
from ...errors import InputError, word

#: For each field, the values besides null that mean the same as omitting the field. None means all
#: values.
Neutral = Mapping[str, Sequence[Any] | None]
ANYTHING = None

#: Fields whose neutral value is False (OFF) or an empty list (EMPTY).
OFF = (
    *("store", "use_beam_search", "separate_reasoning"),
    *("return_tokens_as_token_ids", "return_token_ids", "return_token_offsets"),
    *("return_prompt_text", "return_prompt_token_ids", "return_meta_info"),
    *("return_hidden_states", "return_routed_experts", "return_cached_tokens_details"),
    *("echo", "continue_final_message", "use_audio_in_video", "watermarking"),
    *("ignore_eos", "no_stop_trim", "include_stop_str_in_output"),
)
EMPTY = ("functions", "documents", "stop_token_ids", "bad_words", "logits_processors")

#: Fields of both chats and completions.
IN_BOTH: Neutral = {
    **dict.fromkeys(OFF, (False,)),
    **dict.fromkeys(EMPTY, ([],)),
    # Labels for the operator, and hints for caches
    **dict.fromkeys(("user", "metadata", "safety_identifier", "custom_labels"), ANYTHING),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), ANYTHING),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    # Function calling as it was before `tools` existed
    "function_call": ("none", "auto"),
    # The format of the completion
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "include_reasoning": (True,),
    "stream_reasoning": (True,),
    "stream_interval": (1,),
    # The number of completions, and the data returned about each
    "best_of": (1,),
    "length_penalty": (1,),
    "return_mm_kwargs": (True,),
    "routed_experts_start_len": (0,),
    "routed_experts_prompt_start": (0,),
    # The prompt
    "suffix": ("",),
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "role_mapping": ({},),
    # When the completion ends, and which tokens its text contains
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    # How tokens are sampled
    "xtc_probability": (0,),
    "xtc_threshold": ANYTHING,  # has no effect if xtc_probability is 0
    "draft_model": ("default_model",),
}
IN_CHAT: Neutral = {**IN_BOTH, "add_special_tokens": (False,)}  # the template adds these tokens
IN_COMPLETION: Neutral = {
    **IN_BOTH,
    "add_special_tokens": (True,),
    # For chats only
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "top_logprobs": (0, -1),
}
#: Fields of a chat's message.
IN_MESSAGE: Neutral = {
    "name": ANYTHING,
    "cache_control": ANYTHING,
    "annotations": ([],),
    "reasoning": ("",),
}
#: Fields of a content part of a message. They are only hints for caching.
IN_PART: Neutral = {"cache_control": ANYTHING, "prompt_cache_breakpoint": ANYTHING}
#: Fields of stream_options.
IN_STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}


class Request(BaseModel, extra="allow", strict=True, allow_inf_nan=False):
    """A request that keeps unknown fields, so that an error can name them."""

    neutral: ClassVar[Neutral] = {}

    def refuse_extra(self, where: str = "") -> None:
        """Raises InputError for an unknown field whose value may change a completion."""
        for name, value in (self.model_extra or {}).items():
            harmless = self.neutral.get(name, ())
            if value is None or harmless is None or any(_same(value, x) for x in harmless):
                continue
            ways = " or ".join(["leave it out", *(f"pass {json.dumps(x)}" for x in harmless)])
            hint = ""
            if name not in self.neutral:
                hint = nearest(name[:100], list(type(self).model_fields))
            raise InputError(
                f"{where}{word(name)}: this server does not support this field (its value is "
                f"{_shown(value)}): {ways}.{hint}"
            )


def _same(value: Any, other: Any) -> bool:
    """Compares JSON values: true differs from 1, but 1.0 equals 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shown(value: Any) -> str:
    shown = "".join(islice(json.JSONEncoder().iterencode(value), 61))  # the value may be long
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
