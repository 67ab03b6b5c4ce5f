"""The official Python SDK against Evergate, with the scripted upstream behind it.

Reads EVERGATE_URL (with /v1) and EVERGATE_KEY. Prints one line per case, then "N passed, M failed"; exit 1 on failure.
The models are scripts of the fake upstream; crates/testkit/src/fake/script.rs says what each does.
"""

import asyncio
import json
import os
import sys

import openai

from cases import case, equal, run

URL = os.environ["EVERGATE_URL"]
KEY = os.environ["EVERGATE_KEY"]
TEXT = "Hello from the fake upstream"
# What `one-byte` says: characters of one to four bytes.
MANY_BYTES_TEXT = "Hello é € 😀 👩‍💻 there"
MESSAGES = [{"role": "user", "content": "Say hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather at a place",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=20)


def chat(model, **more):
    return client.chat.completions.create(model=model, messages=MESSAGES, **more)


def raises(kind, call, status=None, code=None):
    """Calls and returns the exception, which must be of exactly that class."""
    try:
        result = call()
    except openai.OpenAIError as error:
        equal(type(error).__name__, kind.__name__)
        if status is not None:
            equal(error.status_code, status)
        if code is not None:
            equal(error.code, code)
        return error
    raise AssertionError(f"no {kind.__name__} but {result!r}")


@case
def chat_unary():
    completion = chat("ok")
    equal(completion.choices[0].message.content, TEXT)
    equal(completion.choices[0].finish_reason, "stop")
    equal(completion.usage.total_tokens, completion.usage.prompt_tokens + completion.usage.completion_tokens)


@case
def chat_stream():
    chunks = list(chat("ok", stream=True))
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks), TEXT)
    equal([chunk.choices[0].finish_reason for chunk in chunks][-1], "stop")
    assert all(chunk.usage is None for chunk in chunks)


@case
def chat_stream_with_usage():
    chunks = list(chat("stream-5", stream=True, stream_options={"include_usage": True}))
    equal(chunks[-1].choices, [])
    equal(chunks[-1].usage.completion_tokens, 5)
    assert all(chunk.usage is None for chunk in chunks[:-1])


@case
def chat_stream_however_it_is_cut():
    for model, text in [("one-byte", MANY_BYTES_TEXT), ("crlf", TEXT)]:
        equal("".join(chunk.choices[0].delta.content or "" for chunk in chat(model, stream=True)), text)


@case
def tool_call():
    choice = chat("tools", tools=TOOLS, tool_choice="auto").choices[0]
    equal(choice.finish_reason, "tool_calls")
    call = choice.message.tool_calls[0]
    equal((call.function.name, json.loads(call.function.arguments)), ("weather", {"city": "Oslo"}))


@case
def tool_call_stream():
    chunks = list(chat("tools", tools=TOOLS, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    equal(calls[0].function.name, "weather")
    equal(json.loads("".join(call.function.arguments or "" for call in calls)), {"city": "Oslo"})


@case
def unknown_fields_reach_the_upstream():
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]
    completion = client.chat.completions.create(
        model="echo-request",
        messages=[{"role": "user", "content": parts}],
        tools=TOOLS,
        logprobs=True,
        response_format={"type": "json_object"},
        extra_body={"vendor_field": {"deep": [1.0, None]}},
    )
    body = json.loads(completion.model_extra["received"]["body"])
    equal(body["tools"], TOOLS)
    equal(body["messages"][0]["content"], parts)
    equal(body["response_format"], {"type": "json_object"})
    equal(body["vendor_field"], {"deep": [1.0, None]})
    assert KEY not in completion.model_extra["received"]["head"], "the client's key went to the upstream"


@case
def embeddings_of_five_inputs():
    words = ["one", "two", "three", "four", "five"]
    vectors = [item.embedding for item in client.embeddings.create(model="ok", input=words).data]
    equal(len({tuple(vector) for vector in vectors}), 5)

    async def each_alone():
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=20) as many:
            answers = await asyncio.gather(*(many.embeddings.create(model="ok", input=[word]) for word in words))
        return [answer.data[0].embedding for answer in answers]

    equal(asyncio.run(each_alone()), vectors)


@case
def completions():
    equal(client.completions.create(model="ok", prompt="Say hello").choices[0].text, TEXT)
    chunks = list(client.completions.create(model="ok", prompt="Say hello", stream=True))
    equal("".join(chunk.choices[0].text for chunk in chunks), TEXT)


@case
def models():
    assert "ok" in [model.id for model in client.models.list()]
    equal(client.models.retrieve("ok").id, "ok")
    raises(openai.NotFoundError, lambda: client.models.retrieve("nothing"), 404, "model_not_found")


@case
def request_id():
    assert chat("ok")._request_id
    equal(chat("ok", extra_headers={"x-request-id": "sdk-check-1"})._request_id, "sdk-check-1")
    error = raises(openai.NotFoundError, lambda: chat("nothing", extra_headers={"x-request-id": "sdk-check-2"}))
    equal(error.request_id, "sdk-check-2")


@case
def error_400():
    error = raises(openai.BadRequestError, lambda: chat("ok", extra_body={"model": 5}), 400, "invalid_value")
    equal(error.param, "model")
    raises(openai.BadRequestError, lambda: chat("status-400"), 400)


@case
def error_401():
    stranger = client.with_options(api_key="sk-wrong")
    call = lambda: stranger.chat.completions.create(model="ok", messages=MESSAGES)
    raises(openai.AuthenticationError, call, 401, "invalid_api_key")


@case
def error_401_of_the_upstream_is_not_the_clients():
    for model in ["status-401", "status-403"]:
        raises(openai.InternalServerError, lambda: chat(model), 502, "upstream_auth_failed")


@case
def error_404():
    error = raises(openai.NotFoundError, lambda: chat("nothing"), 404, "model_not_found")
    assert "nothing" in error.message


@case
def error_429():
    raises(openai.RateLimitError, lambda: chat("status-429"), 429, "rate_limit_exceeded")
    raises(openai.RateLimitError, lambda: chat("status-429", stream=True), 429, "rate_limit_exceeded")


@case
def error_500():
    raises(openai.InternalServerError, lambda: chat("status-500"), 502, "upstream_failed")
    raises(openai.InternalServerError, lambda: chat("status-500", stream=True), 502, "upstream_failed")
    # A defect of the gateway itself, which its debug build has on demand.
    broken = {"x-evergate-fault": "panic-handler"}
    raises(openai.InternalServerError, lambda: chat("ok", extra_headers=broken), 500, "internal_error")


@case
def error_504():
    raises(openai.InternalServerError, lambda: chat("silent"), 504, "deadline_exceeded")
    raises(openai.InternalServerError, lambda: chat("never-headers", stream=True), 504, "first_token_timeout")


@case
def broken_streams_raise():
    for model in ["reset-mid", "eof-mid", "no-finish", "half-event", "error-event-mid"]:
        text = []

        def read():
            for chunk in chat(model, stream=True):
                text.append(chunk.choices[0].delta.content or "")

        try:
            error = raises(openai.APIError, read)
        except AssertionError as wrong:
            raise AssertionError(f"{model}: {wrong}") from None
        assert error.message and error.code, f"{model}: {error.message!r} {error.code!r}"
        assert TEXT.startswith("".join(text)) and "".join(text) not in ("", TEXT), f"{model}: {text}"


@case
def first_event_that_is_an_error_raises_with_a_status():
    raises(openai.InternalServerError, lambda: chat("error-event-first", stream=True), 502)


sys.exit(run("python"))
