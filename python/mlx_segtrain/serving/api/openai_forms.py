"""Requests and responses of /v1.

Each field has the same meaning as in OpenAI's API. A field that is not declared here is refused
with an error that names it (openai_fields.py).
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from ...errors import InputError
from ...fields import fault_of_variables
from ...generation.decoding import Options
from ..generation.grammars import Grammar, Grammars
from ..generation.mounting import Selected
from . import openai_tools as tools_of
from .openai_fields import (
    IN_CHAT,
    IN_COMPLETION,
    IN_MESSAGE,
    IN_PART,
    IN_STREAM_OPTIONS,
    Request,
)
from .openai_tools import Calls, Tools

# Requests


def _variables(values: dict[str, Any]) -> dict[str, Any]:
    if fault := fault_of_variables(values):
        raise ValueError(f"chat_template_kwargs: {fault}")
    return values


class Part(Request):
    """A part of a message's content. Parts are joined without a separator."""

    type: str = Field(description="the type of the part, which must be 'text'")
    text: str | None = None
    neutral = IN_PART


class Message(Request):
    """A turn of a chat. The role `developer` means the same as `system`. A `tool` turn contains the
    result of a tool call. The content of an assistant turn may be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = Field(None, description="the reasoning of an assistant turn")
    tool_calls: Calls | None = Field(None, description="the tool calls of an assistant turn")
    tool_call_id: str | None = Field(
        None, description="in a tool turn: the id of the tool call that this turn responds to"
    )
    neutral = IN_MESSAGE

    @property
    def size(self) -> int:
        """The number of characters in the turn."""
        n = len(self.reasoning_content or "")
        n += sum(len(call.function.arguments) for call in self.tool_calls or ())
        if isinstance(self.content, list):
            return n + sum(len(part.text or "") for part in self.content)
        return n + len(self.content or "")


class JsonSchema(Request):
    """A schema that the completion must match."""

    name: str | None = Field(None, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="ignored: completions always match the schema")


class Format(Request):
    """The format of the completion."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Structure(Request):
    """The format of the completion, specified with vLLM's fields. Only one of these fields may be
    set."""

    json_: str | dict[str, Any] | None = Field(
        None, alias="json", description="a JSON schema that the completion must match"
    )
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    grammar: str | None = Field(
        None,
        description="a grammar in the format of Lark or llama.cpp; llama.cpp's format is assumed "
        "if the grammar contains ::=",
    )
    json_object: bool | None = None

    @property
    def is_set(self) -> bool:
        """Whether any of the fields is set."""
        given = (self.json_, self.regex, self.choice, self.grammar)
        return bool(self.json_object) or any(own is not None for own in given)


class StreamOptions(Request):
    """Options for a streamed response."""

    include_usage: bool | None = Field(
        None, description="whether the last chunk reports the token usage"
    )
    neutral = IN_STREAM_OPTIONS


#: Maximum numbers of logit biases, turns in a chat, completions per prompt, and completions per
#: request.
BIASES, TURNS, ANSWERS, PROMPTS = 1024, 10_000, 16, 64
#: Maximum number of alternatives per token for which log-probabilities are returned.
TOP = 20


def _few(values: Any) -> Any:
    """Limits the number of entries before pydantic checks every entry."""
    if isinstance(values, Mapping) and len(values) > BIASES:
        raise ValueError(f"{len(values)} entries exceed the maximum of {BIASES}")
    return values


#: Fields that have the same name and meaning in Options.
SAMPLING = {
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
}

Bias = Annotated[float, Field(ge=-100, le=100)]
Token = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Tokens = Annotated[list[int], Field(fail_fast=True)]
Prompts = Annotated[list[Tokens], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Generate(Request):
    """The fields that requests for chats and for completions share."""

    model: str | None = Field(
        None,
        description="the served model (its id, its path, the last part of its id, or 'default'), "
        "or the id of a mounted adapter",
    )
    adapter: str | None = Field(
        None,
        description="the id of a mounted adapter, or several ids joined by '+', to apply the sum "
        "of the adapters' updates; 'none' or '' selects the model without an adapter; default: the "
        "server's default adapter",
    )
    adapters: str | None = Field(
        None,
        description="the same as `adapter`, under the name that mlx_lm.server uses; it also "
        "accepts the path of a mounted adapter",
    )
    lora_path: str | None = Field(
        None, description="the same as `adapters`, under the name that SGLang uses"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="maximum number of tokens in the completion; default: 512 in chats, 16 in text "
        "completions",
    )
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        description="an alias for max_tokens; takes precedence if both are set",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=10,
        description="sampling temperature. The default is 0 (greedy decoding), so that completions "
        "with and without an adapter can be compared; OpenAI's default is 1",
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="sample only from the most likely tokens whose probabilities add up to this "
        "value; default: 1 (all tokens)",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        description="sample only from this many of the most likely tokens; 0 (the default) and -1 "
        "mean all tokens",
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="exclude tokens whose probability is less than this value times that of the "
        "most likely token; default: 0 (all tokens)",
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=10,
        description="penalty on tokens that are already in the prompt or the completion; default: "
        "1 (no penalty)",
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="number to subtract from the logit of each token that is already in the "
        "completion; default: 0",
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="number to subtract from a token's logit for each occurrence of the token in "
        "the completion; default: 0",
    )
    logit_bias: Annotated[dict[Token, Bias], BeforeValidator(_few)] | None = Field(
        None,
        max_length=BIASES,
        description="values to add to the logits of tokens, keyed by token id",
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**64,
        description="seed for sampling: the same seed gives the same completion",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = Field(
        None,
        description="up to 4 strings that end the completion and are not included in it",
    )
    n: int | None = Field(
        None,
        ge=1,
        le=ANSWERS,
        description="number of completions to generate for each prompt; default: 1",
    )
    response_format: Format | None = Field(
        None, description="the format of the completion; default: text"
    )
    structured_outputs: Structure | None = Field(
        None,
        description="the format of the completion, as in vLLM; this field has more options than "
        "`response_format`",
    )
    deterministic: bool | None = Field(
        None,
        description="whether the completion must be bit-identical each time, regardless of other "
        "requests. This is slower, because the request is decoded alone and without cached prompts",
    )
    stream: bool | None = Field(
        None, description="whether to stream the completion as server-sent events"
    )
    stream_options: StreamOptions | None = None
    most: ClassVar[int]  #: the default of max_tokens
    continues: ClassVar[bool] = False  #: whether the completion continues the prompt's text

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of characters to tokenize."""

    @abstractmethod
    def encode(self, chosen: Selected) -> list[list[int]]:
        """Returns the token ids of each prompt. Raises InputError if a prompt cannot be
        tokenized."""

    @property
    @abstractmethod
    def top(self) -> int | None:
        """The number of alternatives whose log-probabilities are requested; None if no
        log-probabilities are requested."""

    def check(self) -> None:
        """Raises InputError for a field that is not supported or would have no effect."""
        self.refuse_extra()
        for name in ("stream_options", "response_format", "structured_outputs"):
            own: Request | None = getattr(self, name)
            if own is not None:
                own.refuse_extra(f"{name}.")

    @property
    def is_formed(self) -> bool:
        """Whether the request sets a format for the completion."""
        form, more = self.response_format, self.structured_outputs
        return (form is not None and form.type != "text") or (more is not None and more.is_set)

    @property
    def is_guided(self) -> bool:
        """Whether the completion may need a grammar, which is slow to compile."""
        return self.is_formed

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """Compiles the grammar that the completion must match, or returns None if there is none.
        Compiling may be slow."""
        found: list[tuple[str, Callable[[], Grammar]]] = []
        form, more = self.response_format, self.structured_outputs
        if form is not None and form.type != "text":
            schema: Any = {"type": "object"}
            if form.type == "json_schema":
                own = form.json_schema
                if own is None or own.schema_ is None:
                    raise InputError("response_format.json_schema.schema is missing: add one.")
                own.refuse_extra("response_format.json_schema.")
                schema = own.schema_
            found.append(("response_format", lambda: grammars.schema("response_format", schema)))
        if more is not None:
            where = "structured_outputs"
            if (own := more.json_) is not None:
                parsed = _parsed(own, f"{where}.json")
                found.append((f"{where}.json", lambda: grammars.schema(f"{where}.json", parsed)))
            if (pattern := more.regex) is not None:
                found.append(
                    (f"{where}.regex", lambda: grammars.pattern(f"{where}.regex", pattern))
                )
            if (texts := more.choice) is not None:
                found.append((f"{where}.choice", lambda: grammars.choice(f"{where}.choice", texts)))
            if (text := more.grammar) is not None:
                found.append(
                    (f"{where}.grammar", lambda: grammars.grammar(f"{where}.grammar", text))
                )
            if more.json_object:
                found.append(
                    (f"{where}.json_object", lambda: grammars.schema(where, {"type": "object"}))
                )
        if len(found) > 1:
            both = f"{found[0][0]} and {found[1][0]}"
            raise InputError(f"{both} both set the answer's format: set only one of them.")
        return found[0][1]() if found else None

    def let_go(self) -> None:
        """Frees the prompt after it has been tokenized."""
        self.response_format = self.structured_outputs = None

    def options(self, grammar: Grammar | None = None) -> Options:
        """Returns the options for decoding."""
        given = self.model_dump(include=SAMPLING, exclude_none=True)
        given["top_k"] = max(given.get("top_k", 0), 0)
        return Options(
            max_tokens=self.max_completion_tokens or self.max_tokens or self.most,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            continues=self.continues,
            logprobs=self.top,
            deterministic=bool(self.deterministic),
            constraint=grammar,
            **given,
        )


class ChatRequest(Generate):
    """A chat. The model generates the next message."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=TURNS
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_variables)] | None = Field(
        None,
        description="variables to pass to the chat template; default: the values that were used to "
        "train the adapter",
    )
    tools: Tools | None = Field(None, description="functions that the model may call")
    tool_choice: tools_of.Choice | None = Field(
        None,
        description="`auto` (the default) lets the model call tools, `none` prevents it, and "
        "`required` forces it; naming a tool forces a call to that tool",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="whether a completion may contain several tool calls; default: true"
    )
    logprobs: bool | None = Field(
        None, description="whether to return the log-probability of each token in the completion"
    )
    top_logprobs: int | None = Field(
        None,
        ge=-1,
        le=TOP,
        description="with `logprobs`: also return the log-probabilities of this many alternatives "
        "for each token; 0 and -1 mean none",
    )
    neutral = IN_CHAT
    most = 512

    @property
    def size(self) -> int:
        more = [x for x in (self.chat_template_kwargs, self.for_template()) if x]
        return sum(len(json.dumps(x)) for x in more) + sum(x.size for x in self.messages)

    def encode(self, chosen: Selected) -> list[list[int]]:
        turns = chat_turns(self.messages)
        return [chosen.encode_chat(turns, self.chat_template_kwargs, self.for_template())]

    def for_template(self) -> list[dict[str, Any]]:
        """Returns the tools in the form that the chat template expects."""
        return [] if self.tool_choice == "none" else tools_of.for_template(self.tools or [])

    @property
    def calls(self) -> Literal["none", "auto", "forced"]:
        """Whether the model cannot, may or must call tools."""
        if not self.tools or self.tool_choice == "none":
            return "none"
        return "auto" if self.tool_choice in (None, "auto") else "forced"

    @property
    def top(self) -> int | None:
        return max(self.top_logprobs or 0, 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and self.top_logprobs > 0 and not self.logprobs:
            raise InputError("top_logprobs requires logprobs: true.")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise InputError(
                "tool_choice: this value requires tools, but there are none: add some."
            )
        if self._is_strict and self.is_formed:
            raise InputError(
                "tools: strict cannot be combined with an answer format: leave one of them out."
            )

    @property
    def _is_strict(self) -> bool:
        """Whether tool calls are optional, but must match a schema if the model makes any."""
        return self.calls == "auto" and any(tool.function.strict for tool in self.tools or ())

    @property
    def is_guided(self) -> bool:
        return self.calls == "forced" or self.is_formed or self._is_strict

    def grammar(self, grammars: Grammars) -> Grammar | None:
        if self._is_strict:
            schema = tools_of.by_choice(self.tools or [])
            return grammars.calls("tools.function.strict", schema)
        if self.calls != "forced":
            return super().grammar(grammars)
        if self.is_formed:
            raise InputError(
                "tool_choice: this value forces a tool call, so no answer format can be set as "
                "well: leave one of them out."
            )
        chosen = None if isinstance(self.tool_choice, str) else self.tool_choice
        parallel = self.parallel_tool_calls is not False
        return grammars.schema("tools", tools_of.forced(self.tools or [], chosen, parallel))

    def let_go(self) -> None:
        super().let_go()
        self.messages, self.chat_template_kwargs, self.tools = [], None, None


class CompletionRequest(Generate):
    """A text that the model continues."""

    prompt: str | Tokens | Annotated[list[str], Field(fail_fast=True)] | Prompts = Field(
        description="a prompt (a string or a list of token ids), or a list of prompts"
    )
    logprobs: Annotated[int | None, BeforeValidator(lambda x: None if x is False else x)] = Field(
        None,
        ge=0,
        le=TOP,
        description="if set, return the log-probability of each token in the completion, and those "
        "of this many alternatives per token",
    )
    neutral = IN_COMPLETION
    most = 16
    continues = True

    @property
    def size(self) -> int:
        return sum(len(prompt) for prompt in self.prompts if isinstance(prompt, str))

    @property
    def prompts(self) -> list[Any]:
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return prompt if several else [prompt]

    @property
    def top(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if len(self.prompts) * (self.n or 1) > PROMPTS:
            raise InputError(
                f"prompt: a request can ask for at most {PROMPTS} answers: send fewer prompts, or "
                "lower n."
            )

    def encode(self, chosen: Selected) -> list[list[int]]:
        return [chosen.base.encode(x) if isinstance(x, str) else x for x in self.prompts]

    def let_go(self) -> None:
        super().let_go()
        self.prompt = ""


class MountRequest(BaseModel, strict=True, extra="forbid"):
    """An adapter's folder, and the id by which requests refer to the adapter. If the id is omitted,
    the server chooses it from the name of the folder."""

    id: str | None = None
    path: str


# Responses


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str | None = None


class Error(BaseModel):
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(
        description="number of prompt tokens that were read from the prompt cache"
    )


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = Field(
        description="number of reasoning tokens, including the tags around them"
    )


class Usage(BaseModel):
    """Token counts, including end-of-sequence tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(
        description="null if the server has no access token: anyone could then send requests, and "
        "could infer other clients' prompts from the numbers of cached tokens"
    )
    completion_tokens_details: CompletionTokensDetails


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(
        description="the text of the message; null if the message contains only tool calls"
    )
    reasoning_content: str | None = None
    tool_calls: list[tools_of.Call] | None = None
    refusal: None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of all tokens of the completion, including reasoning and tool calls.
    They are computed before the sampling options and any grammar are applied."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    adapter: str | None = Field(
        description="the ids of the applied adapters ('a' or 'a+b'); null if no adapter was applied"
    )
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    adapter: str | None = Field(
        description="the ids of the applied adapters ('a' or 'a+b'); null if no adapter was applied"
    )
    choices: list[TextChoice]
    usage: Usage


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mlx_segtrain"] = "mlx_segtrain"
    parent: str | None = Field(default=None, description="for an adapter: the id of its base model")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class MountedAdapter(BaseModel):
    id: str
    path: str
    rank: int = Field(description="the largest LoRA rank of any layer")
    scale: float
    size_bytes: int
    mounted_layers: int = Field(description="number of linear layers that the adapter updates")


class MountedAdapters(BaseModel):
    adapters: list[MountedAdapter]


class AvailableAdapter(BaseModel):
    id: str
    path: str
    rank: int
    scale: float | None
    base_model: str | None
    mounted: bool


class AvailableAdapters(BaseModel):
    adapters: list[AvailableAdapter]


class MountAnswer(BaseModel):
    id: str
    mounted_layers: int
    rank: int
    scale: float


class UnmountAnswer(BaseModel):
    id: str
    removed_layers: int


# How requests are interpreted


def _parsed(schema: str | dict[str, Any], where: str) -> Any:
    if isinstance(schema, dict):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not valid JSON: it must be a JSON schema.") from None


def chat_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns the turns in the form that a chat template expects. Raises InputError for content
    that is not text."""
    turns = []
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        message.refuse_extra(f"{where}.")
        content = message.content
        if content is None and message.role != "assistant":
            raise InputError(f"{where}.content is missing: add text.")
        if isinstance(content, list):
            for j, part in enumerate(content):
                if part.type != "text" or part.text is None:
                    raise InputError(
                        f"{where}.content: the model accepts only text, not {part.type[:60]!r}: "
                        'send parts of the form {"type": "text", "text": …}.'
                    )
                part.refuse_extra(f"{where}.content.{j}.")
            content = "".join(part.text or "" for part in content)
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": content or ""}
        for name in ("tool_calls", "reasoning_content"):
            if getattr(message, name) and role != "assistant":
                raise InputError(f"{where}.{name} is only allowed in assistant messages.")
        if message.tool_calls:
            turn["tool_calls"] = tools_of.turn_calls(message.tool_calls, f"{where}.tool_calls")
        if message.reasoning_content:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_call_id is not None:
            if role != "tool":
                raise InputError(f"{where}.tool_call_id is only allowed in tool messages.")
            turn["tool_call_id"] = message.tool_call_id
        turns.append(turn)
    return turns
