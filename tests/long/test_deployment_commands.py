"""Each command by which containers, clusters and systemd start the server or the gateway, run here without them: with
the reference model, on a free port, until it is ready, and to its end by a signal."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from waits import MOST_S, until

DEPLOY = Path(__file__).parents[2] / "deploy"
KEY = "a-key"
ENVIRONMENT = {
    "ADAPTIVE_FUSION_API_KEY": KEY,
    "ADAPTIVE_FUSION_UPSTREAM_KEY": "another",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
HERE = {"--model": "reference", "--served-name": "reference", "--host": "127.0.0.1"}
"""What is not there without the cluster."""


def of_docker() -> list[str]:
    """What the image runs when nothing else is said."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    entry, command = (yaml.safe_load(re.search(rf"^{name} (\[.*\])$", text, re.M)[1]) for name in ("ENTRYPOINT", "CMD"))
    return [*entry, *command]


def of_compose() -> dict[str, list[str]]:
    services = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    own = {name: service for name, service in services.items() if service["image"].startswith("adaptive-fusion")}
    return {f"compose {name}": ["adaptive-fusion", *service["command"]] for name, service in own.items()}


def of_kubernetes() -> dict[str, list[str]]:
    found = {}
    for name in ("gateway", "kserve"):
        for each in yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text(encoding="utf-8")):
            spec: dict[str, Any] = each.get("spec", {})
            pod = spec.get("predictor") or spec.get("template", {}).get("spec")
            if pod is not None:
                found[name] = ["adaptive-fusion", *pod["containers"][0]["args"]]
    return found


def of_systemd() -> list[str]:
    unit = (DEPLOY / "systemd" / "adaptive-fusion.service").read_text(encoding="utf-8")
    return shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.M)[1])


COMMANDS = {"docker": of_docker(), **of_compose(), **of_kubernetes(), "systemd": of_systemd()}


def as_here(command: list[str], folder: Path) -> list[str]:
    """The command with a free port and this machine's files; every option stays."""
    assert Path(command[0]).name == "adaptive-fusion"
    words = [word for text in command[1:] for word in (text.split("=", 1) if text.startswith("--") else [text])]
    for index, word in enumerate(words[:-1]):
        if word == "--port":
            words[index + 1] = "0"
        elif word in ("--log", "--state"):
            words[index + 1] = str(folder / Path(words[index + 1]).name)
        elif word in HERE:
            words[index + 1] = HERE[word]
        elif word == "--processor":
            words[index + 1] = "qwen3-vl"
        elif word == "--upstream":
            words[index + 1] = "http://127.0.0.1:9"  # nobody answers there, which the gateway must outlive
    return [sys.executable, "-m", "adaptive_fusion.cli", *words]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_start_command_serves_until_it_is_told_to_end(name: str, tmp_path: Path) -> None:
    command = COMMANDS[name]
    if command[1] == "gateway":
        pytest.importorskip("adaptive_fusion.commands.gateway")
    assert command[1] in ("serve", "gateway")
    said = tmp_path / "said.txt"
    with said.open("wb") as file:
        process = subprocess.Popen(as_here(command, tmp_path), stdout=file, stderr=file, env=os.environ | ENVIRONMENT)
    try:
        until(lambda: re.search(r"http://127\.0\.0\.1:\d+", said.read_text()) or process.poll() is not None, "a line")
        assert process.poll() is None, said.read_text()
        found = re.search(r"ready: .*?(http://127\.0\.0\.1:\d+)", said.read_text())
        assert found is not None, said.read_text()
        with httpx.Client(base_url=found[1], timeout=MOST_S) as client:
            assert client.get("/health").status_code == 200
            if command[1] == "serve":
                until(lambda: client.get("/ready").status_code == 200, "the server to be ready")
                assert client.get("/v1/models").status_code == 401
                models = client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).raise_for_status().json()
                assert models["data"][0]["id"] == "reference"
                assert client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(MOST_S) == 0, said.read_text()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)


def test_health_checks_ask_for_a_path_that_is_there() -> None:
    """The container's own check, run against a server, is what the image calls healthy."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    check = yaml.safe_load(re.search(r"HEALTHCHECK[^\n]*\\\n\s*CMD (\[.*\])", text)[1])
    from server import serving

    from adaptive_fusion import AdaptiveRunner

    with serving(AdaptiveRunner.from_pretrained("reference")) as server:
        command = [sys.executable, *check[1:]]
        done = subprocess.run(command, env=os.environ | {"PORT": str(server.port)}, timeout=MOST_S)
        assert done.returncode == 0
        gone = subprocess.run(command, env=os.environ | {"PORT": "9"}, timeout=MOST_S, stderr=subprocess.DEVNULL)
        assert gone.returncode != 0
