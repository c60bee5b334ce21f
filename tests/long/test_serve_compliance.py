"""What other people's programs say of the server: its API, its own OpenAPI document, and thousands of broken bodies."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mutants import mutate, seeds
from test_serve_media import body as conversation
from waits import MOST_S

from benchmarks.load import ServerProcess, server_process

WITHOUT_TOOLS = ("Tool Calling",)
"""Tests that a model without tools cannot pass; the server refuses tools by name."""
GROWTH_MIB = 50
PROGRAM_S = 3600
"""When to give up waiting for another program's end."""
WARM = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("compliance")
    with server_process(folder, "--log", str(folder / "log.jsonl"), "--max-tokens", "16") as found:
        yield found


def program(module: str, call: str, *arguments: str) -> str:
    """What a program says that is run as ``module``'s ``call``; skipped where it is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; needs pip install adaptive-fusion[compat]")
    command = [sys.executable, "-c", f"import sys; {call}", *arguments]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PROGRAM_S
    ).stdout


def test_the_api_is_openais(tmp_path: Path) -> None:
    with server_process(tmp_path) as whole:  # its answers come to their own ends
        base = whole.url.removesuffix("/chat/completions")
        options = ("--format", "openai-chat", "-u", base, "-m", "reference", "-k", "none", "--json")
        said = program("llm_comply", "from llm_comply.cli import main; sys.exit(main())", *options)
    report = json.loads(said[said.index("{") :])
    rows = report["results"] if "results" in report else report["tests"]
    verdicts = {row["name"]: row["status"] for row in rows}
    assert len(verdicts) > 6
    failed = {name for name, verdict in verdicts.items() if verdict not in ("passed", "pass", "skipped", "skip")}
    assert failed == set(WITHOUT_TOOLS), said


def test_requests_made_of_its_own_document_meet_no_server_error(
    server: ServerProcess, share_of: Callable[[int], int]
) -> None:
    said = program(
        "schemathesis",
        "from schemathesis.cli import schemathesis; schemathesis()",
        *("run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "not_a_server_error"),
        *("--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
        *("--max-examples", str(share_of(100))),
    )
    generated, passed = map(int, re.findall(r"(\d+) generated, (\d+) passed", said)[0])
    assert generated == passed > 100, said[-5000:]


def test_broken_media_and_bodies_meet_no_server_error_and_tell_nothing(
    server: ServerProcess, share_of: Callable[[int], int]
) -> None:
    rng = np.random.default_rng(7)
    statuses: Counter[int] = Counter()

    def send(client: httpx.Client, data: bytes) -> None:
        response = client.post(server.url, content=data, headers={"content-type": "application/json"})
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["code"] and len(error["message"]) <= 1000
            assert not re.search(r" at 0x|site-packages|/home/|\.py\b|Traceback", error["message"])
            if error["code"] == "invalid_media":
                assert not re.search(r"/etc|169\.254", error["message"])

    def made(number: int) -> bytes:
        messages = conversation(mutate(seeds()[number % len(seeds())], rng), rng)
        fields: dict[str, Any] = {"model": "reference", "messages": messages, "max_tokens": 1}
        if rng.random() < 0.1:
            fields[str(rng.choice(["stop", "seed", "adaptive_fusion", "stream", "n"]))] = messages
        data = json.dumps(fields, default=str).encode()
        return data if rng.random() < 0.9 else mutate(data, rng)

    def many(count: int) -> None:
        with httpx.Client(timeout=MOST_S) as client, ThreadPoolExecutor(4) as pool:
            for number in range(0, count, 100):
                bodies = [made(number + i) for i in range(min(100, count - number))]
                list(pool.map(lambda data: send(client, data), bodies))

    many(WARM)
    before = server.resident_mib()
    many(share_of(10_000))
    grown = server.resident_mib() - before
    print(statuses, f"{grown:.1f} MiB")
    assert statuses[200] and statuses[400] and set(statuses) <= {200, 400, 404, 429}
    assert grown < GROWTH_MIB
    assert "internal" not in server.said.read_text()
