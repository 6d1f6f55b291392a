"""Uses a server through LangChain and LiteLLM: a response, a stream, structured output, and a tool
call.

    pip install langchain-openai litellm
    python examples/other_clients.py --url http://localhost:8090

No test runs this file, because the two packages need 0.4 GB of disk space. It was last run with
langchain-openai 1.7.4 and litellm 1.110.2.
"""

import argparse

import litellm
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


class Weather(BaseModel):
    """Returns the weather at a place."""

    model_config = ConfigDict(extra="forbid")
    place: str = Field(max_length=20)


def try_langchain(url: str) -> None:
    how = {"model": "default", "base_url": f"{url}/v1", "api_key": "unused"}
    llm = ChatOpenAI(**how, max_tokens=300)
    print("answer:", llm.invoke("Hello", extra_body={"adapter": "none"}).content)
    print("stream:", "".join(str(chunk.content) for chunk in llm.stream("Hello")))
    print("schema:", llm.with_structured_output(Person).invoke("Make a person up."))
    asked = HumanMessage("How is the weather in Rome?")
    only = {"tool_choice": "any", "parallel_tool_calls": False}
    calling = llm.bind_tools([Weather], **only).invoke([asked])
    print("call:", calling.tool_calls)
    told = [ToolMessage("sunny", tool_call_id=call["id"]) for call in calling.tool_calls]
    print("and then:", llm.invoke([asked, calling, *told]).content)


def try_litellm(url: str) -> None:
    how = {"model": "openai/default", "api_base": f"{url}/v1", "api_key": "unused"}
    how |= {"messages": [{"role": "user", "content": "Make a person up."}], "max_tokens": 300}
    print("answer:", litellm.completion(**how).choices[0].message.content)
    chunks = litellm.completion(**how, stream=True)
    print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    answer = litellm.completion(**how, response_format=Person)
    print("schema:", Person.model_validate_json(answer.choices[0].message.content))
    function = {"name": "weather", "parameters": Weather.model_json_schema()}
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    answer = litellm.completion(**how, **tools, parallel_tool_calls=False)
    print("call:", answer.choices[0].message.tool_calls)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8090")
    url = parser.parse_args().url
    try_langchain(url)
    try_litellm(url)
