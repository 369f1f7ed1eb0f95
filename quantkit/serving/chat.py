"""Chat Completions: OpenAI's older protocol."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from quantkit.serving.engine import Prefill
from quantkit.serving.requests import ChatRequest
from quantkit.serving.turns import CALL, REASONING, TEXT, Ended, Piece, Service, Turn, Usage


async def chat_turn(service: Service, request: ChatRequest) -> Turn:
    """Return the turn that a request asks for. Raises RequestError."""
    wishes = request.wishes()
    prompt = await service.prompt(request.chat(), wishes)
    most = request.max_completion_tokens or request.max_tokens
    sampling = request.sampling(service, len(prompt.tokens), most)
    return Turn(prompt, sampling, wishes.functions, request.stops())


async def chat_completion(service: Service, turn: Turn) -> dict[str, Any]:
    """Return a whole completion."""
    texts = {TEXT: "", REASONING: ""}
    calls: dict[int, dict[str, Any]] = {}
    ended = Ended("stop", Usage())
    async for item in service.answer(turn):
        if isinstance(item, Ended):
            ended = item
        elif isinstance(item, Piece) and item.kind == CALL:
            call = calls.setdefault(item.number, _call(item))
            call["function"]["arguments"] += item.text
        elif isinstance(item, Piece):
            texts[item.kind] += item.text
    content = (texts[TEXT] or None) if calls else texts[TEXT]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if texts[REASONING]:
        message |= dict.fromkeys(("reasoning", "reasoning_content"), texts[REASONING])
    if calls:
        message["tool_calls"] = list(calls.values())
    choice = {"index": 0, "message": message, "finish_reason": ended.reason, "logprobs": None}
    head = _head(service, "chat.completion")
    return {**head, "choices": [choice], "usage": _usage(ended.usage)}


async def chat_stream(service: Service, turn: Turn, *, usage: bool) -> AsyncIterator[str]:
    """Yield a completion as server-sent events; `usage` asks for a last one with the counts."""
    head = _head(service, "chat.completion.chunk")
    numbers: dict[int, int] = {}

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**head, "choices": [choice]} | ({"usage": None} if usage else {}))

    yield event({"role": "assistant", "content": ""})
    async for item in service.answer(turn):
        if isinstance(item, Prefill):
            yield f": read {item.read} of {item.total} tokens\n\n"
        elif isinstance(item, Ended):
            yield event({}, item.reason)
            if usage:
                yield _event({**head, "choices": [], "usage": _usage(item.usage)})
        elif item.kind == CALL:
            if item.number not in numbers:
                numbers[item.number] = len(numbers)
                yield event({"tool_calls": [{"index": numbers[item.number], **_call(item)}]})
            if item.text:
                arguments = {"index": numbers[item.number], "function": {"arguments": item.text}}
                yield event({"tool_calls": [arguments]})
        elif item.kind == REASONING:
            yield event(dict.fromkeys(("reasoning", "reasoning_content"), item.text))
        else:
            yield event({"content": item.text})
    yield "data: [DONE]\n\n"


def _head(service: Service, kind: str) -> dict[str, Any]:
    identity = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": service.name}


def _call(piece: Piece) -> dict[str, Any]:
    """Return the beginning of a call, without its arguments."""
    function = {"name": piece.name, "arguments": ""}
    return {"id": piece.identity, "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
