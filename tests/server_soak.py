"""A server under clients that misbehave, and OpenAI's client.

python tests/server_soak.py [--out DIR] [--python PYTHON]: starts `onelaunch serve` on stories15m's
shape with random weights, and checks

- pace: four clients that stream one text after the other, alone, and next to clients that read a
  byte a second, are killed in mid-stream, leave requests half sent, or hold 1,000 connections;
- leaks: threads, descriptors, memory and slots before and after 1,000 requests, of which each
  third client leaves in mid-stream;
- OpenAI's client, where PYTHON has the package openai: chats, texts, streams, log-probabilities,
  a stream that is left, 100 at once.

Leaves a record under --out, benchmarks/records by default; exits 1 where a bound is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from onelaunch.bench.core.record import Row, cpu_name, device_name, write_record  # noqa: E402
from onelaunch.bench.engines.serving.model import write_model  # noqa: E402

GOOD, TOKENS, ROUNDS = 4, 128, 9
SLOW, KILLED, HALF, IDLE = 32, 8, 200, 1000
REQUESTS = 1000
PACE = 0.9
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\n\r\n"


def body(tokens: int, seed: int = 0) -> bytes:
    ids = [1, *(300 + (seed * 7919 + i * 104729) % 31000 for i in range(15))]
    data = {"prompt": ids, "max_tokens": tokens, "stream": True, "ignore_eos": True, "seed": seed}
    raw = json.dumps(data).encode()
    return HEAD.format(len(raw)).encode() + raw


class Served:
    """A running server: its port, and what its process holds."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid

    async def stream(self, tokens: int, seed: int = 0, leave_after: int | None = None) -> int:
        """Stream a text; how many chunks came. `leave_after`: leave after so many bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(body(tokens, seed))
        data = bytearray()
        while b"[DONE]" not in data:
            new = await asyncio.wait_for(reader.read(1 << 16), 600)
            if not new:
                raise RuntimeError(f"the stream ended: {bytes(data[-200:])!r}")
            data += new
            if leave_after is not None and len(data) >= leave_after:
                break
        writer.close()
        return data.count(b"data: ")

    async def get(self, path: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        )
        data = await reader.read()
        writer.close()
        return data.partition(b"\r\n\r\n")[2].decode()

    async def busy(self) -> int:
        """Sequences that grow or wait."""
        lines = (await self.get("/metrics")).splitlines()
        values = dict(line.split() for line in lines if not line.startswith("#"))
        names = ("onelaunch_requests_processing", "onelaunch_requests_deferred")
        return sum(int(float(values[name])) for name in names)

    async def rest(self) -> None:
        """Until no sequence is left."""
        for _ in range(6000):
            if not await self.busy():
                return
            await asyncio.sleep(0.02)
        raise RuntimeError("sequences are left")

    def holds(self) -> dict[str, int]:
        """Threads, descriptors and resident megabytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return {
            "threads": int(lines["Threads"]),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "megabytes": int(lines["VmRSS"].split()[0]) // 1024,
        }


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Served]:
    model = folder / "stories15m.gguf"
    write_model("stories15m", model)
    command = [sys.executable, "-m", "onelaunch", "serve", str(model), "--port", "0"]
    log = folder / "log"
    with log.open("w") as errors:  # a pipe that no one reads would stop the server
        process = subprocess.Popen(
            [*command, "--dtype", "bfloat16"],
            stderr=errors,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
    try:
        while "http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield Served(int(log.read_text().rpartition(":")[2]), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert log.read_text().count("\n") == 1, log.read_text()


async def pace(served: Served) -> float:
    """Tokens a second of `GOOD` clients."""
    start = time.perf_counter()
    await asyncio.gather(*(served.stream(TOKENS, seed) for seed in range(GOOD)))
    return GOOD * TOKENS / (time.perf_counter() - start)


@contextlib.asynccontextmanager
async def slow_readers(served: Served) -> AsyncIterator[None]:
    """Clients that read a byte a second; their texts are written by the time they are counted."""
    ended = False

    async def read_slowly(reader: asyncio.StreamReader) -> None:
        while not ended:
            await reader.read(1)
            await asyncio.sleep(1)

    connections = []
    for seed in range(SLOW):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=2)
        writer.write(body(200, seed))
        connections.append((asyncio.ensure_future(read_slowly(reader)), writer))
    await served.rest()
    try:
        yield
    finally:
        ended = True
        for task, writer in connections:
            task.cancel()
            writer.close()


KILLABLE = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(bytes.fromhex(sys.argv[2]))
connection.recv(400)
print("reading", flush=True)
while connection.recv(64):
    pass
"""


@contextlib.asynccontextmanager
async def killed_clients(served: Served) -> AsyncIterator[None]:
    """Processes that are killed in mid-stream, just before what follows."""
    command = [sys.executable, "-c", KILLABLE, str(served.port), body(200).hex()]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(KILLED)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
    await served.rest()
    yield


@contextlib.asynccontextmanager
async def half_sent(served: Served) -> AsyncIterator[None]:
    """Requests of which the rest never comes."""
    with contextlib.ExitStack() as stack:
        for i in range(HALF):
            each = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            whole = body(TOKENS)
            each.sendall(whole[: 40 if i % 2 else len(whole) - 10])
        yield


@contextlib.asynccontextmanager
async def idle_connections(served: Served) -> AsyncIterator[None]:
    """Connections on which nothing is sent."""
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
        yield


async def paces(served: Served) -> list[Row]:
    rows = []
    await pace(served)
    for name, crowd in {
        f"next to {SLOW} that read a byte a second": slow_readers,
        f"after {KILLED} were killed in mid-stream": killed_clients,
        f"next to {HALF} requests half sent": half_sent,
        f"next to {IDLE} idle connections": idle_connections,
    }.items():
        alone, among = [], []
        for _ in range(ROUNDS):
            alone.append(await pace(served))
            async with crowd(served):
                among.append(await pace(served))
        shares = [b / a for a, b in zip(alone, among, strict=True)]
        notes = {"kind": "pace", "share": round(statistics.median(shares), 4)} | served.holds()
        peers = {"alone": statistics.median(alone)}
        rows.append(Row.of(f"pace {name}, tokens/s", among, peers=peers, notes=notes))
        print(rows[-1].line("tokens/s"), notes, flush=True)
    return rows


async def leaks(served: Served) -> Row:
    async def some(n: int) -> None:
        limit = asyncio.Semaphore(32)

        async def one(i: int) -> None:
            async with limit:
                await served.stream(24, i, leave_after=2000 if i % 3 == 0 else None)

        await asyncio.gather(*map(one, range(n)))
        await served.rest()

    await some(200)
    before = served.holds()
    await some(REQUESTS)
    await asyncio.sleep(6)  # uvicorn keeps connections for five seconds
    after = served.holds()
    notes = {"kind": "leak", "before": before, "after": after, "unit": "MB"}
    print(f"{REQUESTS} requests: {before} to {after}", flush=True)
    more = after["megabytes"] - before["megabytes"]
    return Row(f"memory added by {REQUESTS} requests, MB", more, n=REQUESTS, notes=notes)


OPENAI = """
import sys
from concurrent.futures import ThreadPoolExecutor
from openai import BadRequestError, OpenAI
client = OpenAI(api_key="none", base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", max_retries=0)
messages = [{"role": "user", "content": "abc def"}]
def chat(**more):
    return client.chat.completions.create(model="any", messages=messages, max_tokens=16, **more)
first = chat(seed=1, temperature=1.0)
assert first.choices[0].finish_reason in ("stop", "length")
assert first.usage.completion_tokens <= 16
assert chat(seed=1, temperature=1.0).choices[0].message.content == first.choices[0].message.content
text = client.completions.create(model="any", prompt="abc", max_tokens=8, seed=1)
assert text.choices[0].text
chunks = list(chat(stream=True, seed=1, stream_options={"include_usage": True}))
joined = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert joined == first.choices[0].message.content
assert chunks[-1].usage.completion_tokens == first.usage.completion_tokens
with_logprobs = chat(logprobs=True, top_logprobs=5, temperature=0).choices[0]
assert all(len(t.top_logprobs) == 5 for t in with_logprobs.logprobs.content)
assert all(t.top_logprobs[0].token == t.token for t in with_logprobs.logprobs.content)
assert len(chat(n=3).choices) == 3
with chat(stream=True) as stream:
    next(iter(stream))
try:
    chat(temperature=-1)
except BadRequestError as error:
    assert error.param == "temperature", error
else:
    raise AssertionError("not refused")
with ThreadPoolExecutor(100) as pool:
    answers = list(pool.map(lambda i: chat(seed=i, temperature=1.0), range(100)))
assert answers[1].choices[0].message.content == first.choices[0].message.content
assert client.models.list().data[0].id
print("openai", __import__("openai").__version__)
"""


def openai_client(served: Served, python: str) -> str | None:
    """The version of the client that found everything right; None without the package."""
    command = [python, "-c", OPENAI, str(served.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "No module named 'openai'" in done.stderr:
        print("no openai client here: left out")
        return None
    if done.returncode:
        raise SystemExit(f"OpenAI's client: {done.stderr}")
    print(done.stdout.strip(), flush=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "records")
    parser.add_argument("--python", default=sys.executable, help="one that may have openai")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as served:
        version = openai_client(served, args.python)
        rows = asyncio.run(paces(served))
        rows.append(asyncio.run(leaks(served)))
    if version is not None:
        rows[-1].notes["client"] = version
    print(write_record("serve-soak", "tokens/s", rows, args.out, device_name("cpu")))
    leak = rows[-1].notes
    kept = [
        all(row.notes["share"] >= PACE for row in rows[:-1]),
        leak["after"]["threads"] <= leak["before"]["threads"],
        leak["after"]["descriptors"] <= leak["before"]["descriptors"],
        rows[-1].ours <= 16,
    ]
    print(f"{cpu_name()}: bounds kept: {kept}")
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
