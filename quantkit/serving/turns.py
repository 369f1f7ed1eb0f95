"""One turn of the model: from a conversation to reasoning, text and calls, as they arrive."""

import asyncio
import json
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.calibration.chat_template import Message
from quantkit.checkpoint.stock import repo_folder
from quantkit.errors import InputError, first_line
from quantkit.generation.answers import parse_calls
from quantkit.generation.harmony import COMMENTARY, FINAL, Channels, Delta, HarmonyReader
from quantkit.generation.memory import prompt_cache_bytes
from quantkit.generation.prompts import (
    Functions,
    HarmonyPrompts,
    Prompt,
    TemplatePrompts,
    Wishes,
    open_prompts,
)
from quantkit.serving.engine import Engine, Prefill, Sampling, Step

_log = logging.getLogger("quantkit.serve")
REASONING, TEXT, CALL = "reasoning", "text", "call"
_REMEMBERED = 1 << 20  # tokens of earlier turns
_STORED = 256 << 20  # characters of earlier conversations


class RequestError(InputError):
    """A request that cannot be served; `param` is its field, `code` OpenAI's name of the error."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Piece:
    """Some new text of the item `number` of an answer: reasoning, text, or a call's arguments.

    A call has the `name` of its function and an `identity`.
    """

    kind: str
    number: int
    text: str
    name: str = ""
    identity: str = ""


@dataclass(frozen=True)
class Usage:
    """Counts of tokens."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(frozen=True)
class Ended:
    """The end of an answer, for the reason stop, length or tool_calls."""

    reason: str
    usage: Usage


@dataclass(frozen=True)
class Turn:
    """A turn that is ready to be generated."""

    prompt: Prompt
    sampling: Sampling
    functions: Functions = ()
    stops: Sequence[str] = ()


class Memory:
    """The tokens of turns that ended in a call, by its id; the oldest are forgotten first."""

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._turns: OrderedDict[str, tuple[list[int], str, str]] = OrderedDict()
        self._most, self._size = most, 0

    def tokens(self, call: str, name: str, arguments: str) -> list[int] | None:
        """Return the tokens of the turn that ended in this call, unless it was edited since."""
        tokens, *written = self._turns.get(call) or (None, "", "")
        return tokens if written == [name, arguments] else None

    def remember(self, call: "MadeCall", tokens: list[int]) -> None:
        """Keep the tokens of a turn."""
        self._turns[call.identity] = (tokens, call.name, call.arguments)
        self._size += len(tokens)
        while self._size > self._most and len(self._turns) > 1:
            self._size -= len(self._turns.popitem(last=False)[1][0])


class Store:
    """Conversations by the id of the response that they led to; the oldest are dropped first.

    Clients may refer to their items by id, too.
    """

    def __init__(self, most: int = _STORED) -> None:
        self._chats: OrderedDict[str, tuple[list[Message], int, list[str]]] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}
        self._most, self._size = most, 0

    def get(self, identity: str) -> list[Message] | None:
        """Return a conversation; None if it is not stored."""
        entry = self._chats.get(identity)
        return None if entry is None else list(entry[0])

    def item(self, identity: str) -> dict[str, Any] | None:
        """Return an item of a stored response."""
        return self._items.get(identity)

    def put(self, identity: str, chat: list[Message], output: list[dict[str, Any]]) -> None:
        """Store a conversation, and the items that it ends with."""
        size = len(json.dumps([chat, output]))
        self._items |= {item["id"]: item for item in output}
        self._chats[identity] = (chat, size, [item["id"] for item in output])
        self._size += size
        while self._size > self._most and self._chats:
            _, (_, size, items) = self._chats.popitem(last=False)
            self._size -= size
            for item in items:
                self._items.pop(item, None)


@dataclass
class MadeCall:
    """A call that a model makes, with the `arguments` so far."""

    identity: str
    name: str
    arguments: str = ""


@dataclass
class Service:
    """A served model, with all that its requests share."""

    engine: Engine
    name: str
    channels: Channels
    prompts: HarmonyPrompts | TemplatePrompts
    defaults: Sampling
    memory: Memory = field(default_factory=Memory)
    store: Store = field(default_factory=Store)
    since: int = field(default_factory=lambda: int(time.time()))

    async def prompt(self, messages: Sequence[Message], wishes: Wishes) -> Prompt:
        """Return the prompt of a conversation. Raises RequestError if it cannot be read."""
        try:
            prompt = await asyncio.to_thread(self.prompts.prompt, messages, wishes, self.memory)
        except (InputError, ValueError, RecursionError) as exc:
            raise RequestError(first_line(exc), "messages") from exc
        if len(prompt.tokens) >= self.engine.context:
            raise RequestError(
                f"the prompt has {len(prompt.tokens):,} tokens, and the model's context "
                f"{self.engine.context:,}.",
                "messages",
                "context_length_exceeded",
            )
        return prompt

    async def answer(self, turn: Turn) -> AsyncIterator[Prefill | Piece | Ended]:
        """Yield an answer as it is generated: the progress of its prompt, pieces, its end."""
        reader = AnswerReader(self, turn)
        spoken = turn.prompt.tokens[len(turn.prompt.tokens) - turn.prompt.begun :]
        for piece in reader.begin(spoken):
            yield piece
        cached, count, finish, began = 0, 0, "stop", time.monotonic()
        by_state = not self.channels.has_channels
        steps = self.engine.steps(turn.prompt, turn.sampling, by_state=by_state)
        try:
            async for step in steps:
                if isinstance(step, Prefill):
                    cached = step.cached
                    _log.info("prompt: %d of %d tokens, %d cached", step.read, step.total, cached)
                    yield step
                    continue
                count += 1
                spoken.append(step.token)
                for piece in reader.push(step):
                    yield piece
                finish = step.finish or finish
                if reader.stopped or step.finish:
                    break
        finally:
            await steps.aclose()  # type: ignore[attr-defined]
        for piece in reader.finish():
            yield piece
        if reader.calls and finish == "stop":
            finish = "tool_calls"
            self.memory.remember(reader.calls[-1], spoken)
        usage = Usage(len(turn.prompt.tokens), cached, count, reader.reasoning)
        _log.info("answer: %d tokens in %.1f s, %s", count, time.monotonic() - began, finish)
        yield Ended(finish, usage)


def open_service(
    repo: str,
    defaults: Mapping[str, float | None] | None = None,
    *,
    cache_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> Service:
    """Load a repo (a folder or a Hub id) to serve it.

    `defaults` are sampling parameters that a request may leave out; without `max_tokens` an answer
    may fill the context. Raises OutputError if mlx-lm does not load the repo.
    """
    most = cache_bytes or prompt_cache_bytes(repo_folder(repo))
    engine = Engine(repo, cache_bytes=most, trust_remote_code=trust_remote_code)
    given = {name: value for name, value in (defaults or {}).items() if value is not None}
    sampling = replace(Sampling(max_tokens=engine.context), **given)  # type: ignore[arg-type]
    try:
        prompts = open_prompts(engine.tokenizer, repo_folder(repo))
    except BaseException:
        engine.close()
        raise
    name = Path(repo).resolve().name if Path(repo).is_dir() else repo
    return Service(engine, name, Channels(engine.tokenizer), prompts, sampling)


class AnswerReader:
    """Reads the pieces of one answer from its tokens."""

    def __init__(self, service: Service, turn: Turn) -> None:
        self._tokenizer = service.engine.tokenizer
        self._functions = turn.functions
        self._harmony = HarmonyReader(service.channels) if service.channels.has_channels else None
        self._stops = [stop for stop in turn.stops if stop]
        self._kind: tuple[Any, ...] = ()
        self._number = -1
        self._identity = self._name = ""
        self._tail = self._tool = ""
        self.stopped = False
        """Whether a stop string was reached."""
        self.calls: list[MadeCall] = []
        self.reasoning = 0

    def begin(self, tokens: Sequence[int]) -> list[Piece]:
        """Read the tokens that the answer was made to begin with."""
        return [piece for token in tokens for piece in self.push(Step(token, (), None))]

    def push(self, step: Step) -> list[Piece]:
        """Return the pieces that a token brings."""
        if self._harmony is not None:
            deltas = self._harmony.push(step.token)
            pieces = [piece for delta in deltas for piece in self._of_delta(delta)]
        else:
            pieces = [
                piece for state, text in step.segments for piece in self._of_text(state, text)
            ]
        self.reasoning += bool(pieces) and pieces[-1].kind == REASONING
        return pieces

    def finish(self) -> list[Piece]:
        """Return the pieces that were still waiting when the answer ended."""
        if self.stopped:
            return []
        if self._harmony is not None:
            deltas = self._harmony.finish()
            pieces = [piece for delta in deltas for piece in self._of_delta(delta)]
        else:
            pieces = self._of_text("", "")
        return pieces + self._flushed(())

    def _of_delta(self, delta: Delta) -> list[Piece]:
        recipient = delta.recipient
        called = recipient and recipient not in ("assistant", "all", "user")
        if called and self._functions:
            key: tuple[Any, ...] = (CALL, delta.message, recipient)
            name = str(recipient).removeprefix("functions.")
            return [*self._flushed(key), self._piece(CALL, key, delta.text, name)]
        if delta.channel in (FINAL, COMMENTARY) and not called:
            return self._text(delta.text, (TEXT, delta.message))
        if not delta.text:
            return []
        # A call where there is nothing to call is a thought.
        key = (REASONING, delta.message)
        return [*self._flushed(key), self._piece(REASONING, key, delta.text)]

    def _flushed(self, key: tuple[Any, ...]) -> list[Piece]:
        """Return the text that waited for a stop string, if another item follows it."""
        if not self._tail or key == self._kind:
            return []
        tail, self._tail = self._tail, ""
        return [self._piece(TEXT, self._kind, tail)]

    def _of_text(self, state: str, text: str) -> list[Piece]:
        """Return the pieces of some text of a model without channels."""
        if state == "tool":
            self._tool += text
            return []
        pieces: list[Piece] = []
        if self._tool:
            tool, self._tool = self._tool, ""
            calls = parse_calls(self._tokenizer, tool, self._functions)
            for number, (name, arguments) in enumerate(calls):
                written = json.dumps(arguments, ensure_ascii=False)
                key = (CALL, self._number, number, tool)
                pieces.append(self._piece(CALL, key, written, name))
            if not calls:
                pieces += self._text(tool, (TEXT,))
        if text and state == "reasoning":
            pieces.append(self._piece(REASONING, (REASONING,), text))
        elif text:
            pieces += self._text(text, (TEXT,))
        return pieces

    def _piece(self, kind: str, key: tuple[Any, ...], text: str, name: str = "") -> Piece:
        if key != self._kind:
            self._kind, self._number, self._name = key, self._number + 1, name
            self._identity = f"call_{uuid.uuid4().hex}" if kind == CALL else ""
            if kind == CALL:
                self.calls.append(MadeCall(self._identity, name))
        if kind == CALL:
            self.calls[-1].arguments += text
        return Piece(kind, self._number, text, self._name, self._identity)

    def _text(self, text: str, key: tuple[Any, ...]) -> list[Piece]:
        """Return text up to a stop string; an end that may become one waits."""
        if not self._stops:
            return [self._piece(TEXT, key, text)]
        if self.stopped or not text:
            return []
        if key != self._kind and self._tail:
            return [*self._flushed(key), *self._text(text, key)]
        text, self._tail = self._tail + text, ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            text = text[: min(places)]
        else:
            longest = max(len(stop) for stop in self._stops) - 1
            for length in range(min(longest, len(text)), 0, -1):
                if any(stop.startswith(text[-length:]) for stop in self._stops):
                    text, self._tail = text[:-length], text[-length:]
                    break
        return [self._piece(TEXT, key, text)] if text or self._kind != key else []


def function_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name, description and parameters of a function tool."""
    return {
        "name": tool["name"],
        "description": tool.get("description") or "",
        "parameters": tool.get("parameters") or {"type": "object", "properties": {}},
    }
