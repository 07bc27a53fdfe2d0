"""How much faster eight clients are answered together than one by one, and how soon the first byte comes.

    python benchmarks/serve.py

A server of `mini` runs in this process, with one thread of PyTorch. Each client asks for texts of 64 tokens, one after
the other. Prints a table and writes all numbers as JSON, with the machine, the versions and the command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from pathlib import Path

import httpx
import torch

import metamorph
from data import machine
from metamorph.inference import Session
from metamorph.serving.app import create_app
from metamorph.serving.engine import Engine
from metamorph.serving.server import Server


TOKENS = 64
CLIENTS = (1, 2, 4, 8)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=16, help="answers for each number of clients")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serve.json")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    session = metamorph.load("mini", device="cpu", dtype=torch.float32)
    # Answers end at their limit only.
    session.model.generation_config.suppress_tokens = session.processor.end_of_turn_token_ids
    rows = asyncio.run(measure(start(session), flags.answers))
    report = {"machine": machine(), "tokens": TOKENS, "rows": rows}
    flags.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["machine"], indent=2))
    print("\n| Clients | tokens/s | × one client | first byte (median) |")
    print("|---:|---:|---:|---:|")
    for row in rows:
        speed = row["tokens_per_second"]
        ratio = speed / rows[0]["tokens_per_second"]
        print(f"| {row['clients']} | {speed:.0f} | {ratio:.2f} | {row['first_byte_seconds']:.3f} s |")


def start(session: Session) -> str:
    """The URL of a server in a thread, for as long as this process runs."""
    engine = Engine(session)
    server = Server(create_app(engine), engine, "127.0.0.1", 0, client_timeout=60)
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


async def measure(url: str, answers: int) -> list[dict[str, float]]:
    """Tokens per second of each number of clients, and the median time to the first byte."""
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        await ask(http)  # warm
        for clients in CLIENTS:
            begin = time.monotonic()
            first = await asyncio.gather(*(client(http, answers // clients) for _ in range(clients)))
            seconds = time.monotonic() - begin
            times = [each for own in first for each in own]
            rows.append(
                {
                    "clients": clients,
                    "tokens_per_second": TOKENS * len(times) / seconds,
                    "first_byte_seconds": statistics.median(times),
                }
            )
    return rows


async def client(http: httpx.AsyncClient, answers: int) -> list[float]:
    """Seconds to the first byte of each answer."""
    return [await ask(http) for _ in range(answers)]


async def ask(http: httpx.AsyncClient) -> float:
    """Seconds from a request to the first byte of its streamed answer, which is read to its end."""
    body = {"messages": [{"role": "user", "content": "how are you?"}], "max_tokens": TOKENS, "stream": True}
    begin = time.monotonic()
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        chunks = answer.aiter_raw()
        await anext(chunks)
        first = time.monotonic() - begin
        async for _ in chunks:
            pass
    return first


if __name__ == "__main__":
    main()
