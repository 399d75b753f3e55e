"""Clients that mean no good: python -m tests.experiments.hostile_clients PORT SECONDS. Each kind has an address of its own on the loopback.

Prints the counts of its tries, and of the statuses that it got, as JSON.
"""

import asyncio
import contextlib
import gzip
import json
import socket
import sys
import time
from collections import Counter

LOOP, BOMB = "loop", gzip.compress(b" " * 50_000_000)
tries, statuses = Counter(), Counter()


async def connect(port, address, buffer=None):
    """(reader, writer) of a connection from an address, with little room for what is not read yet."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.setblocking(False)
    sock.bind((address, 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=sock, limit=buffer or 1 << 16)


def request(port, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", "Content-Length": len(data), **headers}
    return f"POST {path} HTTP/1.1\r\n".encode() + "".join(f"{k}: {v}\r\n" for k, v in headers.items()).encode() + b"\r\n" + data


def completion(prompt="x", **more):
    return {"model": "tiny", "prompt": prompt, **more}


async def answered(port, address, data, name):
    """Sends a request and reads all of the answer."""
    reader, writer = await connect(port, address)
    try:
        writer.write(data)
        line = await asyncio.wait_for(reader.readline(), 120)
        statuses[f"{name} {line.split()[1].decode() if line else 'none'}"] += 1
        with contextlib.suppress(asyncio.TimeoutError):
            while await asyncio.wait_for(reader.read(1 << 16), 0.5):
                pass
    finally:
        writer.close()


async def never_reads(port, address):
    """Asks for much, and leaves it unread."""
    reader, writer = await connect(port, address, 4096)
    writer.write(request(port, "/v1/completions", completion(n=32, logprobs=20, max_tokens=400, stream=True)))
    await asyncio.sleep(8)
    writer.close()


async def drips(port, address):
    """Sends the head of a request a byte at a time, and never ends it."""
    _, writer = await connect(port, address)
    try:
        for byte in b"POST /v1/completions HTTP/1.1\r\nX-Slow: " + b"x" * 200:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.3)
    finally:
        writer.close()


async def huge_prompt(port, address):
    await answered(port, address, request(port, "/v1/completions", completion("many words " * 80_000)), "huge")
    await asyncio.sleep(0.3)


async def disconnects(port, address):
    """Goes away in the middle of a stream."""
    reader, writer = await connect(port, address)
    writer.write(request(port, "/v1/completions", completion(max_tokens=400, stream=True)))
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(reader.readuntil(b"data: "), 2)
    writer.close()
    await asyncio.sleep(0.1)


async def many_texts(port, address):
    await answered(port, address, request(port, "/v1/completions", completion(n=64, max_tokens=200)), "many")
    await asyncio.sleep(0.1)


async def template_loops(port, address):
    body = {"model": "tiny", "messages": [{"role": "user", "content": LOOP}], "max_tokens": 1}
    await answered(port, address, request(port, "/v1/chat/completions", body), "loop")
    await asyncio.sleep(0.5)


async def bombs(port, address):
    await answered(port, address, request(port, "/v1/completions", BOMB, **{"Content-Encoding": "gzip"}), "bomb")
    await asyncio.sleep(0.5)


KINDS = [never_reads] * 2 + [drips] * 40 + [huge_prompt] * 2 + [disconnects] * 2 + [many_texts] * 2 + [template_loops] * 2 + [bombs]


async def again(kind, port, address, end):
    while time.monotonic() < end:
        tries[kind.__name__] += 1
        try:
            await asyncio.wait_for(kind(port, address), max(1, end - time.monotonic()))
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.2)


async def main(port, seconds):
    end, names = time.monotonic() + seconds, list(dict.fromkeys(kind.__name__ for kind in KINDS))
    addresses = {name: f"127.0.1.{number + 1}" for number, name in enumerate(names)}
    await asyncio.gather(*(again(kind, port, addresses[kind.__name__], end) for kind in KINDS))
    print(json.dumps({"tries": tries, "statuses": statuses}))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
