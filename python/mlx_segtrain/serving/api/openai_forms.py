"""What /v1 takes and gives, and what the fields of a request mean.

What a field means to OpenAI's clients it means here, or the request is refused by name
(openai_fields.py).
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from ...errors import InputError
from ...fields import fault_of_variables
from ..generation.decoding import Options
from ..generation.mounting import Base, Selected
from .openai_fields import IN_CHAT, IN_COMPLETION, IN_MESSAGE, IN_PART, IN_STREAM_OPTIONS, Request

# Requests


def _variables(values: dict[str, Any]) -> dict[str, Any]:
    if fault := fault_of_variables(values):
        raise ValueError(f"chat_template_kwargs: {fault}")
    return values


class Part(Request):
    """A part of a message's content; parts are put together without anything between them."""

    type: str = Field(description="text; others are refused")
    text: str | None = None
    neutral = IN_PART


class Message(Request):
    """A turn. `developer` is `system` to the model; of an assistant the content may be null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    neutral = IN_MESSAGE

    @property
    def size(self) -> int:
        """Characters."""
        if isinstance(self.content, list):
            return sum(len(part.text or "") for part in self.content)
        return len(self.content or "")


class StreamOptions(Request):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    neutral = IN_STREAM_OPTIONS


#: Biases, and turns of a chat, at most.
BIASES, TURNS = 1024, 10_000


def _few(values: Any) -> Any:
    """Pydantic would check each before it counts them."""
    if isinstance(values, Mapping) and len(values) > BIASES:
        raise ValueError(f"{len(values)} are given, and {BIASES} is the most")
    return values


#: Fields that Options has by the same name, and as they are.
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
    """What chat and completions share."""

    model: str | None = Field(
        None, description="the served model (its id, path, name or 'default'), or a mounted adapter"
    )
    adapter: str | None = Field(
        None,
        description="a mounted adapter; several as 'a+b', whose updates add; 'none' or '' for the "
        "model alone; left out, the server's own default",
    )
    adapters: str | None = Field(
        None,
        description="the same in mlx_lm.server's spelling: an id as in adapter, or the path of a "
        "mounted adapter",
    )
    lora_path: str | None = Field(None, description="the same as adapters, in SGLang's spelling")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of the answer, at most; left out, 512 of a chat, 16 of a completion",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="max_tokens by another name; it goes first"
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=10,
        description="0 if left out: always the likeliest token, so that answers with and without "
        "an adapter can be compared. OpenAI's own default is 1",
    )
    top_p: float | None = Field(None, ge=0, le=1, description="1 if left out: all tokens")
    top_k: int | None = Field(None, ge=-1, description="0 if left out: all tokens; so does -1")
    min_p: float | None = Field(None, ge=0, le=1, description="0 if left out: all tokens")
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="for tokens of prompt and answer; 1 if left out: none"
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="for the answer's tokens")
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="for the answer's tokens, by how often they came"
    )
    logit_bias: Annotated[dict[Token, Bias], BeforeValidator(_few)] | None = Field(
        None,
        max_length=BIASES,
        description="what is added to the logits of tokens, by their number",
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**64, description="the same seed gives the same answer"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = Field(
        None, description="where the answer ends; it holds none of these"
    )
    stream: bool | None = Field(None, description="server-sent events, a piece of text each")
    stream_options: StreamOptions | None = None
    most: ClassVar[int]  #: tokens of the answer, where the request does not say it
    continues: ClassVar[bool] = False  #: the answer's text goes on from the prompt's

    @property
    @abstractmethod
    def size(self) -> int:
        """Characters that have to become tokens."""

    @abstractmethod
    def encode(self, chosen: Selected) -> list[int]:
        """Tokens of the prompt; InputError for what is none."""

    @abstractmethod
    def let_go(self) -> None:
        """Frees what was asked, whose tokens are known by now."""

    def options(self) -> Options:
        """How the answer's tokens are chosen, and where it ends."""
        given = self.model_dump(include=SAMPLING, exclude_none=True)
        given["top_k"] = max(given.get("top_k", 0), 0)
        return Options(
            max_tokens=self.max_completion_tokens or self.max_tokens or self.most,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            continues=self.continues,
            **given,
        )


class ChatRequest(Generate):
    """A chat, to which the model gives the next message."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=TURNS
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_variables)] | None = Field(
        None,
        description="variables of the chat template; by default those that the adapter was "
        "trained with",
    )
    neutral = IN_CHAT
    most = 512

    @property
    def size(self) -> int:
        variables = len(json.dumps(self.chat_template_kwargs)) if self.chat_template_kwargs else 0
        return variables + sum(message.size for message in self.messages)

    def encode(self, chosen: Selected) -> list[int]:
        return chosen.encode_chat(chat_turns(self.messages), self.chat_template_kwargs)

    def let_go(self) -> None:
        self.messages, self.chat_template_kwargs = [], None


class CompletionRequest(Generate):
    """A text to complete."""

    prompt: str | Tokens | Annotated[list[str], Field(fail_fast=True)] | Prompts = Field(
        description="a text, or its tokens; a list of more than one is refused"
    )
    neutral = IN_COMPLETION
    most = 16
    continues = True

    @property
    def size(self) -> int:
        first = self.prompt[0] if isinstance(self.prompt, list) and self.prompt else self.prompt
        return len(first) if isinstance(first, str) else 0

    def encode(self, chosen: Selected) -> list[int]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise InputError(f"prompt: {len(prompt)} prompts in one request: send one in each.")
            prompt = prompt[0]
        return chosen.base.encode(prompt) if isinstance(prompt, str) else prompt

    def let_go(self) -> None:
        self.prompt = ""


class MountRequest(BaseModel, strict=True, extra="forbid"):
    """An adapter folder, and the name under which requests may use it."""

    id: str
    path: str


# Answers


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str | None = None


class Error(BaseModel):
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="of the prompt, that needed no computing")


class Usage(BaseModel):
    """In tokens; the end of the sequence counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(
        description="null if the server has no token: clients that do not know each other"
    )


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    adapter: str | None = Field(description="what was in the model: 'a', 'a+b', or null")
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    adapter: str | None = Field(description="what was in the model: 'a', 'a+b', or null")
    choices: list[TextChoice]
    usage: Usage


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mlx_segtrain"] = "mlx_segtrain"
    parent: str | None = Field(default=None, description="of an adapter: its model")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class MountedAdapter(BaseModel):
    id: str
    path: str
    rank: int = Field(description="the largest")
    scale: float
    size_bytes: int
    mounted_layers: int = Field(description="linears with an update")


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


# Meaning


def chat_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """As chat templates take them; InputError for what is no text."""
    turns = []
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        message.refuse_extra(f"{where}.")
        content = message.content
        if content is None and message.role != "assistant":
            raise InputError(f"{where}.content is missing: give a text.")
        if isinstance(content, list):
            for j, part in enumerate(content):
                if part.type != "text" or part.text is None:
                    raise InputError(
                        f"{where}.content: the model reads text, not {part.type[:60]!r}: give "
                        'parts {"type": "text", "text": …}.'
                    )
                part.refuse_extra(f"{where}.content.{j}.")
            content = "".join(part.text or "" for part in content)
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": content or ""})
    return turns


def names_base(base: Base, model: str | None) -> bool:
    """Whether a request's model is the base."""
    if model is None or model == str(base.path):
        return True
    return model.lower() in (base.id.lower(), base.id.rsplit("/", 1)[-1].lower(), "default")
