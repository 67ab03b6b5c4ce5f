"""What Evergate makes itself, against the types of the official Python SDK, which are generated from OpenAI's specification.

Each answer is taken from the wire and validated strictly: no value is converted, and no field is there that the type does
not know. What the specification says beyond the types is asserted beside it. Same environment and output as check.py.
"""

import http.client as http_client
import json
import os
import sys
import time

import httpx2
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ValidationError

from cases import case, equal, run

KEY = os.environ["EVERGATE_KEY"]
client = httpx2.Client(base_url=os.environ["EVERGATE_URL"], headers={"authorization": f"Bearer {KEY}"}, timeout=20)
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "Say hello, é 😀"}]}
TEXT = {"model": "echo", "prompt": "Say hello, é 😀"}


def unknown(value, at=""):
    """The fields that no type knows."""
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            yield f"{at}.{name}"
        for name in type(value).model_fields:
            yield from unknown(getattr(value, name), f"{at}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown(item, f"{at}[{index}]")


def conforms(kind, value):
    found = kind.model_validate(value, strict=True)
    equal(list(unknown(found)), [])
    if "created" in value:
        assert abs(value["created"] - time.time()) < 24 * 3600, value["created"]
    return found


def ask(path, body, status=200):
    answer = client.post(path, json=body)
    equal((answer.status_code, answer.headers["content-type"]), (status, "application/json"))
    return answer.json()


def stream(path, body):
    answer = client.post(path, json=body | {"stream": True})
    equal((answer.status_code, answer.headers["content-type"]), (200, "text/event-stream"))
    *events, done, rest = answer.text.split("\n\n")
    equal((done, rest), ("data: [DONE]", ""))
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    equal(len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}), 1)
    return chunks


def sums_up(usage, has_output=True):
    wanted = usage["prompt_tokens"] + (usage["completion_tokens"] if has_output else 0)
    assert usage["prompt_tokens"] > 0 and usage["total_tokens"] == wanted, usage


def check_usage(chunks, wants_usage):
    """The last chunk has it and no choice, all others say that they have none; or nobody speaks of it."""
    if not wants_usage:
        assert all("usage" not in chunk for chunk in chunks)
        return chunks
    *before, last = chunks
    equal(last["choices"], [])
    sums_up(last["usage"])
    assert all(chunk["usage"] is None for chunk in before)
    return before


def check_ends(chunks):
    """One choice each, which has come to its end in the last chunk and in no other."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    equal((len(choices), {choice["index"] for choice in choices}), (len(chunks), {0}))
    equal([choice["finish_reason"] for choice in choices], [None] * (len(choices) - 1) + ["stop"])
    assert all(choice["logprobs"] is None for choice in choices)
    return choices


@case
def the_types_are_strict():
    """Else the cases below would prove nothing."""
    good = ask("/chat/completions", CHAT)
    for change in [{"created": "1"}, {"object": "chat"}, {"choices": None}, {"vendor": 1}, {"usage": {"total_tokens": 1}}]:
        try:
            conforms(ChatCompletion, good | change)
        except (ValidationError, AssertionError):
            continue
        raise AssertionError(f"{change} conforms")


@case
def chat():
    value = ask("/chat/completions", CHAT)
    conforms(ChatCompletion, value)
    [choice] = value["choices"]
    equal(choice, {
        "index": 0,
        "message": {"role": "assistant", "content": "Say hello, é 😀", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    })
    sums_up(value["usage"])


@case
def chat_stream():
    for wants_usage in [False, True]:
        more = {"stream_options": {"include_usage": True}} if wants_usage else {}
        chunks = stream("/chat/completions", CHAT | more)
        for chunk in chunks:
            conforms(ChatCompletionChunk, chunk)
        choices = check_ends(check_usage(chunks, wants_usage))
        equal(choices[0]["delta"]["role"], "assistant")
        assert all("role" not in choice["delta"] for choice in choices[1:])
        equal("".join(choice["delta"].get("content") or "" for choice in choices), "Say hello, é 😀")
        equal(choices[-1]["delta"], {})


@case
def completion():
    value = ask("/completions", TEXT)
    conforms(Completion, value)
    [choice] = value["choices"]
    equal(choice, {"text": "Say hello, é 😀", "index": 0, "logprobs": None, "finish_reason": "stop"})
    sums_up(value["usage"])


@case
def completion_stream():
    for wants_usage in [False, True]:
        more = {"stream_options": {"include_usage": True}} if wants_usage else {}
        chunks = stream("/completions", TEXT | more)
        choices = check_ends(check_usage(chunks, wants_usage))
        equal("".join(choice["text"] for choice in choices), "Say hello, é 😀")
        for choice in choices:
            # The type has no null here, which OpenAI sends all the same until the end.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        for chunk in chunks:
            conforms(Completion, chunk)


@case
def embeddings():
    for words in [["one", "two", "three", "four", "five"], "one", [[1, 2], [3]]]:
        value = ask("/embeddings", {"model": "echo", "input": words, "encoding_format": "float"})
        conforms(CreateEmbeddingResponse, value)
        count = len(words) if isinstance(words, list) else 1
        equal([item["index"] for item in value["data"]], list(range(count)))
        assert all(isinstance(number, float) for item in value["data"] for number in item["embedding"])
        sums_up(value["usage"], has_output=False)


@case
def models():
    listed = client.get("/models").json()
    equal((sorted(listed), listed["object"]), (["data", "object"], "list"))
    for item in listed["data"]:
        conforms(Model, item)
        equal(client.get(f"/models/{item['id']}").json(), item)
    assert "echo" in [item["id"] for item in listed["data"]]


@case
def errors():
    """Every way to be refused that a client has, and what an upstream's faults are told as."""
    fault = {"x-evergate-fault": "panic-handler"}
    of = lambda model, **more: {"json": CHAT | {"model": model} | more}
    for method, path, more, status, code in [
        ("POST", "/chat/completions", {"content": b""}, 400, "invalid_json"),
        ("POST", "/chat/completions", {"content": b"\xff"}, 400, "invalid_json"),
        ("POST", "/chat/completions", {"json": {}}, 400, "invalid_value"),
        ("POST", "/chat/completions", {"json": {"model": 5}}, 400, "invalid_value"),
        ("POST", "/embeddings", {"json": {"model": "echo"}}, 400, "invalid_value"),
        ("POST", "/chat/completions", of("echo") | {"headers": {"x-request-timeout": "soon"}}, 400, "invalid_value"),
        ("GET", "/models", {"headers": {"authorization": "Bearer sk-wrong"}}, 401, "invalid_api_key"),
        ("POST", "/chat/completions", of("nothing"), 404, "model_not_found"),
        ("GET", "/models/nothing", {}, 404, "model_not_found"),
        ("GET", "/nothing", {}, 404, "not_found"),
        ("DELETE", "/chat/completions", {}, 405, "method_not_allowed"),
        ("POST", "/chat/completions", of("echo") | {"headers": {"content-encoding": "gzip"}}, 415, "unsupported_media_type"),
        ("GET", "/models", {"headers": {"x": "y" * 70_000}}, 431, "headers_too_large"),
        ("POST", "/chat/completions", of("status-429"), 429, "rate_limit_exceeded"),
        ("POST", "/chat/completions", of("ok") | {"headers": fault}, 500, "internal_error"),
        ("POST", "/chat/completions", of("status-401"), 502, "upstream_auth_failed"),
        ("POST", "/chat/completions", of("status-500", stream=True), 502, "upstream_failed"),
        ("POST", "/chat/completions", of("silent"), 504, "deadline_exceeded"),
        ("POST", "/chat/completions", of("never-headers", stream=True), 504, "first_token_timeout"),
    ]:
        answer = client.request(method, path, **more)
        equal((answer.status_code, answer.headers["content-type"]), (status, "application/json"))
        check_error(answer.json(), code)


@case
def error_of_a_body_that_is_announced_too_large():
    # By hand: the library sends what it announces, and may meet the end of the connection while it does.
    wire = http_client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    wire.putrequest("POST", f"{client.base_url.path}chat/completions")
    for name, value in [("authorization", f"Bearer {KEY}"), ("content-length", str(1 << 40))]:
        wire.putheader(name, value)
    wire.endheaders()
    answer = wire.getresponse()
    equal((answer.status, answer.headers["content-type"]), (413, "application/json"))
    check_error(json.loads(answer.read()), "request_too_large")


@case
def errors_in_streams():
    for model in ["reset-mid", "eof-mid", "no-finish", "half-event", "error-event-mid"]:
        text = client.post("/chat/completions", json=CHAT | {"model": model, "stream": True}).text
        *_, last, rest = text.split("\n\n")
        equal(rest, "")
        assert "[DONE]" not in text, model
        check_error(json.loads(last.removeprefix("data: ")))


def check_error(value, code=None):
    equal(list(value), ["error"])
    equal(sorted(value["error"]), ["code", "message", "param", "type"])
    error = conforms(ErrorObject, value["error"])
    assert error.message and error.type and error.code
    if code is not None:
        equal(error.code, code)


sys.exit(run("schemas"))
