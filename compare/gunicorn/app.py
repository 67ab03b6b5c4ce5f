"""A small pass-through: what comes in goes to the upstream, what comes back goes out, piece by piece.

It reads its key at its import, as a gateway reads its secrets at its start, and tells the client when an answer breaks
in its middle or is cancelled: with that, Gunicorn's side ends as truthfully as the server lets an application end.
"""

import asyncio
import os

import aiohttp

UPSTREAM = os.environ["COMPARE_UPSTREAM"]
with open(os.environ["COMPARE_KEY_FILE"], encoding="ascii") as file:
    KEY = file.read().strip()

session = None


async def app(scope, receive, send):
    """The ASGI application."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "http":
        await pass_through(scope, await whole_body(receive), send)


async def lifespan(receive, send):
    global session
    await receive()
    session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None, sock_connect=5))
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await session.close()
    await send({"type": "lifespan.shutdown.complete"})


async def whole_body(receive):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def pass_through(scope, body, send):
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    is_begun = False
    try:
        async with session.post(UPSTREAM + scope["path"], data=body, headers=headers) as answer:
            await begin(send, answer.status, answer.headers)
            is_begun = True
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    except (aiohttp.ClientError, asyncio.CancelledError) as error:
        message = b'{"error":{"message":"the answer broke off","type":"server_error"}}'
        if not is_begun:
            await begin(send, 502, {"content-type": "application/json", "content-length": str(len(message))})
        else:
            message = b"data: " + message + b"\n\n"
        await send({"type": "http.response.body", "body": message})
        if isinstance(error, asyncio.CancelledError):
            raise


async def begin(send, status, headers):
    kept = [(name, headers[name]) for name in ("content-type", "content-length") if name in headers]
    fields = [(name.encode(), value.encode()) for name, value in kept]
    await send({"type": "http.response.start", "status": status, "headers": fields})
