"""Responses: OpenAI's newer protocol, which codex speaks."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.calibration.chat_template import Message
from quantkit.errors import first_line
from quantkit.serving.engine import Prefill
from quantkit.serving.requests import ResponsesRequest
from quantkit.serving.turns import CALL, REASONING, Ended, Piece, RequestError, Service, Turn, Usage

Json = dict[str, Any]


@dataclass
class ResponseTurn:
    """A turn, with the fields of its request that a response repeats."""

    turn: Turn
    request: ResponsesRequest
    chat: list[Message]
    spaces: dict[str, tuple[str, str]]
    identity: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


async def response_turn(service: Service, request: ResponsesRequest) -> ResponseTurn:
    """Return the turn that a request asks for. Raises RequestError."""
    chat: list[Message] = []
    if request.previous_response_id is not None:
        earlier = service.store.get(request.previous_response_id)
        if earlier is None:
            raise RequestError(
                f"{request.previous_response_id[:80]!r} is not stored.",
                "previous_response_id",
                "previous_response_not_found",
            )
        chat = earlier
    chat += request.chat(service.store.item)
    functions, spaces = request.functions()
    wishes = request.wishes(functions)
    instructed = [{"role": "system", "content": request.instructions}, *chat]
    prompt = await service.prompt(instructed if request.instructions else chat, wishes)
    sampling = request.sampling(service, len(prompt.tokens), request.max_output_tokens)
    return ResponseTurn(Turn(prompt, sampling, wishes.functions), request, chat, spaces)


async def response_events(service: Service, turn: ResponseTurn) -> AsyncIterator[Json | str]:
    """Yield the events of a response, and comments while its prompt is read."""
    writer = _Writer(turn.spaces)
    count = 0

    def numbered(event: Json) -> Json:
        nonlocal count
        count += 1
        return {**event, "sequence_number": count - 1}

    begun = _response(service, turn, "in_progress", [], None)
    yield numbered({"type": "response.created", "response": begun})
    yield numbered({"type": "response.in_progress", "response": begun})
    try:
        async for item in service.answer(turn.turn):
            if isinstance(item, Prefill):
                yield f": read {item.read} of {item.total} tokens\n\n"
                continue
            if isinstance(item, Piece):
                for event in writer.add(item):
                    yield numbered(event)
                continue
            status = "incomplete" if item.reason == "length" else "completed"
            for event in writer.close(status):
                yield numbered(event)
            response = _response(service, turn, status, writer.output, item)
            if turn.request.store is not False:
                chat = turn.chat + _spoken(writer.output)
                service.store.put(turn.identity, chat, writer.output)
            yield numbered({"type": f"response.{status}", "response": response})
    except Exception as exc:  # noqa: BLE001  (a stream has to end legally)
        failed = _response(service, turn, "failed", writer.output, None)
        failed["error"] = {"code": "server_error", "message": first_line(exc)}
        yield numbered({"type": "response.failed", "response": failed})


async def response_stream(service: Service, turn: ResponseTurn) -> AsyncIterator[str]:
    """Yield a response as server-sent events."""
    async for event in response_events(service, turn):
        if isinstance(event, str):
            yield event
        else:
            yield f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"


async def whole_response(service: Service, turn: ResponseTurn) -> Json:
    """Return a whole response."""
    last: Json = {}
    async for event in response_events(service, turn):
        if isinstance(event, dict) and "response" in event:
            last = event["response"]
    return last


class _Writer:
    """Writes items of the output, and the events that tell of them."""

    def __init__(self, spaces: dict[str, tuple[str, str]]) -> None:
        self.output: list[Json] = []
        self._spaces = spaces
        self._number: int | None = None
        self._text = ""

    def add(self, piece: Piece) -> list[Json]:
        """Return the events of some new text."""
        events: list[Json] = []
        if piece.number != self._number:
            events += self.close("completed")
            self._number = piece.number
            events += self._open(piece)
        if piece.text:
            self._text += piece.text
            events.append({**self._place(), "type": self._kind() + ".delta", "delta": piece.text})
            if self._item["type"] == "message":
                events[-1]["logprobs"] = []
        return events

    @property
    def _item(self) -> Json:
        return self.output[-1]

    def _kind(self) -> str:
        kinds = {"message": "output_text", "reasoning": "reasoning_text"}
        return "response." + kinds.get(self._item["type"], "function_call_arguments")

    def _place(self) -> Json:
        place = {"item_id": self._item["id"], "output_index": len(self.output) - 1}
        return place if self._item["type"] == "function_call" else {**place, "content_index": 0}

    def _open(self, piece: Piece) -> list[Json]:
        self._text = ""
        self.output.append(self._begun(piece))
        item = json.loads(json.dumps(self._item))
        added = {"type": "response.output_item.added", "item": item}
        events: list[Json] = [{**added, "output_index": len(self.output) - 1}]
        if piece.kind != CALL:
            events.append(
                {**self._place(), "type": "response.content_part.added", "part": self._part("")}
            )
        return events

    def _begun(self, piece: Piece) -> Json:
        unique = uuid.uuid4().hex
        if piece.kind == CALL:
            name, space = self._spaces.get(piece.name, (piece.name, None))
            item: Json = {"id": f"fc_{unique}", "type": "function_call", "status": "in_progress"}
            item |= {"call_id": piece.identity, "name": name, "arguments": ""}
            return item | ({"namespace": space} if space else {})
        if piece.kind == REASONING:
            item = {"id": f"rs_{unique}", "type": "reasoning", "status": "in_progress"}
            return item | {"summary": [], "content": [], "encrypted_content": None}
        item = {"id": f"msg_{unique}", "type": "message", "status": "in_progress"}
        return item | {"role": "assistant", "content": []}

    def _part(self, text: str) -> Json:
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def close(self, status: str) -> list[Json]:
        """Return the events that end the item that is open."""
        if self._number is None:
            return []
        item, place, text = self._item, self._place(), self._text
        self._number = None
        item["status"] = status
        done: Json = {**place, "type": self._kind() + ".done"}
        if item["type"] == "function_call":
            item["arguments"] = text
            events = [{**done, "arguments": text, "name": item["name"]}]
        else:
            content = self._part(text)
            item["content"] = [content]
            logprobs: Json = {"logprobs": []} if item["type"] == "message" else {}
            events = [{**done, "text": text, **logprobs}]
            events.append({**place, "type": "response.content_part.done", "part": content})
        index = place["output_index"]
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
        return events


def _response(
    service: Service, turn: ResponseTurn, status: str, output: list[Json], ended: Ended | None
) -> Json:
    request, sampling = turn.request, turn.turn.sampling
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        "id": turn.identity,
        "object": "response",
        "created_at": turn.created,
        "status": status,
        "error": None,
        "incomplete_details": cut,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": service.name,
        "output": list(output),
        "parallel_tool_calls": False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": request.reasoning.effort if request.reasoning else None},
        "store": request.store is not False,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": [{"type": "function", "strict": False, **one} for one in turn.turn.functions],
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": _usage(ended.usage) if ended else None,
    }


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _spoken(output: list[Json]) -> list[Message]:
    """Return an output as messages of the conversation."""
    return ResponsesRequest.model_validate({"input": output}).chat()
