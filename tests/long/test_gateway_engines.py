"""The gateway before `transformers serve` with the reference model: what clients and their tests see is what they see
without it; and what must hold however hostile the requests are."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateway import client_of, gateway, inside, url_of
from mutants import mutate, seeds
from openai import OpenAI
from server import asking, image, text
from test_serve_compliance import program
from test_serve_media import body as conversation
from upstream import Engine, engine
from waits import MOST_S, until

from adaptive_fusion.reference import model_path
from benchmarks.load import server_process

GROWTH_MIB = 50
WARM = 300
"""Bodies before memory is looked at: decoders and their buffers come with the first ones."""
START_S = 600
"""When to give up waiting for the engine."""


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the reference model alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tmp_path_factory.mktemp("serve") / "said.txt"
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(model_path()), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with said.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environ)
        try:
            end = time.monotonic() + START_S
            while time.monotonic() < end:
                assert process.poll() is None, said.read_text()[-2000:]
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(MOST_S)


def asked(client: OpenAI, stream: bool, **options: Any) -> str:
    said = asking(image(640, 480), text("What is shown?"))
    found = client.chat.completions.create(
        model=str(model_path()), messages=said, stream=stream, max_tokens=12, temperature=0, **options
    )
    if not stream:
        return found.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_client_gets_the_same_words(transformers_serve: str, stream: bool) -> None:
    direct = OpenAI(base_url=f"{transformers_serve}/v1", api_key="none", timeout=START_S, max_retries=0)
    with gateway(transformers_serve, "native", engine="transformers", processor="reference") as server:
        assert asked(client_of(server), stream) == asked(direct, stream)


def test_a_smaller_image_is_answered_faster_for_fewer_tokens(transformers_serve: str) -> None:
    with gateway(transformers_serve, engine="transformers", processor="reference") as server:
        assert asked(client_of(server), True)
        until(lambda: asyncio.run(inside(server).records.last(1)), "the request's record")
        (row,) = asyncio.run(inside(server).records.last(1))
        assert row["tokens"]["visual_native"] > 0


def test_llm_comply_finds_through_the_gateway_what_it_finds_without(transformers_serve: str) -> None:
    def verdicts(base: str) -> dict[str, str]:
        options = ("--format", "openai-chat", "-u", base, "-m", str(model_path()), "-k", "none", "--json")
        said = program("llm_comply", "from llm_comply.cli import main; sys.exit(main())", *options)
        report = json.loads(said[said.index("{") :])
        rows = report["results"] if "results" in report else report["tests"]
        return {row["name"]: row["status"] for row in rows}

    direct = verdicts(f"{transformers_serve}/v1")
    with gateway(transformers_serve, engine="transformers", processor="reference") as server:
        assert verdicts(url_of(server, "/v1")) == direct
    assert len(direct) > 6


def test_hostile_bodies_meet_the_engines_own_answer_or_a_refusal(
    share_of: Callable[[int], int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(11)
    statuses: Counter[int] = Counter()

    def send(client: httpx.Client, behind: Engine, url: str, number: int) -> None:
        messages = conversation(mutate(seeds()[number % len(seeds())], rng), rng)
        fields: dict[str, Any] = {"model": "m", "messages": messages, "max_tokens": 1}
        if rng.random() < 0.2:
            fields[str(rng.choice(["stream", "adaptive_fusion", "logprobs", "n", "tools"]))] = messages
        data = json.dumps(fields, default=str).encode()
        data = data if rng.random() < 0.7 else mutate(data, rng)
        behind.got.clear()
        answer = client.post(url, content=data, headers={"content-type": "application/json"})
        statuses[answer.status_code] += 1
        if behind.got:
            assert answer.headers["x-engine"] == "yes" and answer.status_code in (200, 400)
        else:
            assert 400 <= answer.status_code < 500, answer.text

    # In a process of its own, so that what it takes is not hidden by what this one has given back.
    with (
        engine() as behind,
        server_process(tmp_path, "--upstream", behind.url, "--processor", "reference") as server,
        httpx.Client(timeout=MOST_S) as client,
    ):
        for number in range(WARM):
            send(client, behind, server.url, number)
        before = server.resident_mib()
        for number in range(share_of(10_000)):
            send(client, behind, server.url, WARM + number)
        grown = server.resident_mib() - before
        assert httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=MOST_S).status_code == 200
    print(statuses, f"{grown:.1f} MiB on {before:.0f}")
    assert grown < GROWTH_MIB
