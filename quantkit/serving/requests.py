"""Requests of OpenAI's two protocols, validated. Unknown fields are ignored."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from quantkit.calibration.chat_template import Message
from quantkit.generation.prompts import Wishes
from quantkit.serving.engine import Sampling
from quantkit.serving.turns import RequestError, Service, function_of

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high"}
_SAMPLED = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.\-:/]+$")]
_Float = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Sampled(_Body):
    """The sampling parameters that both protocols share; null takes the server's."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    temperature: Annotated[_Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    min_p: Annotated[_Float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[_Float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[_Float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[_Float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[_Float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    parallel_tool_calls: bool | None = None

    def sampling(self, service: Service, prompt: int, most: int | None) -> Sampling:
        """Return the parameters of an answer to a prompt of so many tokens."""
        room = service.engine.context - prompt
        asked = min(most or service.defaults.max_tokens, room)
        given = {name: value for name in _SAMPLED if (value := getattr(self, name)) is not None}
        bias = self._biases(service.engine.vocabulary)
        if given.get("top_k", 0) >= service.engine.vocabulary:
            given["top_k"] = 0  # all of them
        return replace(service.defaults, max_tokens=asked, logit_bias=bias, **given)

    def _biases(self, vocabulary: int) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        biases: dict[int, float] = {}
        for token, bias in self.logit_bias.items():
            if not token.isdecimal() or len(token) > 9 or int(token) >= vocabulary:
                raise RequestError(f"{token[:20]!r} is not a token id.", "logit_bias")
            biases[int(token)] = bias
        return biases


class _Part(_Body):
    type: str = "text"
    text: str | None = None
    refusal: str | None = None


Content = str | list[_Part] | None


class _FunctionCall(_Body):
    name: str
    arguments: str | dict[str, Any] = "{}"


class _ToolCall(_Body):
    id: str = ""
    function: _FunctionCall | None = None


class _ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None


class _Function(_Body):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Body):
    type: str = "function"
    function: _Function | None = None


class _Format(_Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: str | None = None


class _StreamOptions(_Body):
    include_usage: bool = False


class ChatRequest(_Sampled):
    """A request for a chat completion."""

    messages: Annotated[list[_ChatMessage], Field(min_length=1)]
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    reasoning_effort: Effort | None = None
    response_format: _Format | None = None
    stream_options: _StreamOptions | None = None

    def chat(self) -> list[Message]:
        """Return the conversation."""
        return [_chat_message(message) for message in self.messages]

    def wishes(self) -> Wishes:
        """Return the wishes of the conversation."""
        tools = [function_of(t.function.model_dump()) for t in self.tools or () if t.function]
        schema = _schema(self.response_format)
        return _wishes(tools, self.tool_choice, self.reasoning_effort, schema)

    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def _wishes(
    functions: list[dict[str, Any]],
    choice: str | dict[str, Any] | None,
    effort: str | None,
    schema: Mapping[str, Any] | None,
) -> Wishes:
    call: str | None = None
    if choice == "none":
        functions = []
    elif choice == "required":
        call = ""
    elif isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if name not in [one["name"] for one in functions]:
            raise RequestError(f"there is no tool {name!r:.60}.", "tool_choice")
        call = str(name)
    elif choice not in (None, "auto") and not isinstance(choice, dict):
        raise RequestError("expected none, auto, required or a function.", "tool_choice")
    if call is not None and not functions:
        raise RequestError("a call is required, but there are no tools.", "tool_choice")
    effort = _EFFORTS.get(effort, effort) if effort else None
    return Wishes(functions, effort, call, schema)


def _schema(form: _Format | None) -> Mapping[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    wrapped = form.json_schema or {}
    schema = form.schema_ or wrapped.get("schema")
    if not isinstance(schema, dict):
        raise RequestError("json_schema has no schema.", "response_format")
    return {"title": form.name or wrapped.get("name") or "answer", **schema}


def _text(content: Content, param: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for piece in content:
        if piece.type == "refusal":
            texts.append(piece.refusal or "")
        elif piece.type in ("text", "input_text", "output_text", "reasoning_text", "summary_text"):
            texts.append(piece.text or "")
        else:
            raise RequestError(f"{piece.type[:40]!r} is not served: only text is.", param)
    return "".join(texts)


def _chat_message(message: _ChatMessage) -> Message:
    role = "tool" if message.role == "function" else message.role
    chat: Message = {"role": role, "content": _text(message.content, "messages")}
    reasoning = message.reasoning or message.reasoning_content or message.thinking
    if role == "assistant" and reasoning:
        chat["thinking"] = reasoning
    if role == "assistant" and message.tool_calls:
        chat["tool_calls"] = [
            _call(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls
            if call.function
        ]
    if role == "tool":
        chat |= {"tool_call_id": message.tool_call_id or "", "name": message.name}
    return chat


def _call(identity: str, name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": text}
    return {"id": identity, "type": "function", "function": function}


class _Item(_Body):
    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = None
    summary: list[_Part] | None = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: Any = None


class _SpaceTool(_Body):
    type: str = "function"
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _ResponseTool(_SpaceTool):
    type: str
    tools: list[_SpaceTool] | None = None


class _Reasoning(_Body):
    effort: Effort | None = None


class _TextOptions(_Body):
    format: _Format | None = None


class ResponsesRequest(_Sampled):
    """A request for a response."""

    input: str | list[_Item]
    instructions: str | None = None
    tools: list[_ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: Literal[False] | None = None
    reasoning: _Reasoning | None = None
    text: _TextOptions | None = None
    metadata: dict[str, Any] | None = None
    top_logprobs: Literal[0] | None = None
    include: list[str] | None = None

    def chat(
        self, stored: Callable[[str], dict[str, Any] | None] = lambda _: None
    ) -> list[Message]:
        """Return the conversation that the input adds; `stored` knows earlier items by id."""
        if any("logprobs" in one for one in self.include or ()):
            raise RequestError("log-probabilities are not served.", "include")
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        chat: list[Message] = []
        thinking = ""
        for given in self.input:
            item = given
            if given.type == "item_reference":
                if (earlier := stored(given.id or "")) is None:
                    raise RequestError(f"the item {given.id!r:.80} is not stored.", "input")
                item = _Item.model_validate(earlier)
            thinking = _add(chat, item, thinking)
        return chat

    def functions(self) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
        """Return the functions, and the name and namespace of those in a namespace.

        Tools of other kinds are skipped: agents bring their own.
        """
        functions: list[dict[str, Any]] = []
        spaces: dict[str, tuple[str, str]] = {}
        for tool in self.tools or ():
            if tool.type == "function" and tool.name:
                functions.append(function_of(tool.model_dump()))
            elif tool.type == "namespace" and tool.name:
                for one in tool.tools or ():
                    if one.type == "function" and one.name:
                        joined = f"{tool.name}__{one.name}"
                        functions.append({**function_of(one.model_dump()), "name": joined})
                        spaces[joined] = (one.name, tool.name)
        return functions, spaces

    def wishes(self, functions: list[dict[str, Any]]) -> Wishes:
        """Return the wishes of the conversation."""
        effort = self.reasoning.effort if self.reasoning else None
        schema = _schema(self.text.format if self.text else None)
        return _wishes(functions, self.tool_choice, effort, schema)


def _add(chat: list[Message], item: _Item, thinking: str) -> str:
    """Add an item to a conversation; reasoning belongs to the assistant's item that follows."""
    if item.type == "reasoning":
        return thinking + _text(item.content or item.summary, "input")
    if item.type == "function_call":
        name = item.name or "unknown"
        name = f"{item.namespace}__{name}" if item.namespace else name
        call = _call(item.call_id or "", name, item.arguments or "{}")
        last = chat[-1] if chat else {}
        if last.get("role") == "assistant" and not (thinking and last.get("tool_calls")):
            last.setdefault("tool_calls", []).append(call)
            if thinking:
                last["thinking"] = last.get("thinking", "") + thinking
        else:
            chat.append(_assistant("", thinking, [call]))
    elif item.type == "function_call_output":
        output = item.output
        if isinstance(output, list):
            parts = [one for one in output if isinstance(one, Mapping)]
            output = "".join(str(one.get("text") or "") for one in parts)
        text = output if isinstance(output, str) else json.dumps(output)
        chat.append({"role": "tool", "content": text, "tool_call_id": item.call_id or ""})
    elif item.role == "assistant":
        chat.append(_assistant(_text(item.content, "input"), thinking, []))
    elif item.role is not None:
        chat.append({"role": item.role, "content": _text(item.content, "input")})
    else:
        return thinking  # an item of a hosted tool
    return ""


def _assistant(content: str, thinking: str, calls: Sequence[dict[str, Any]]) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = list(calls)
    return message
