"""What the command refuses before a model is loaded, and what it says of itself."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from adaptive_fusion.cli import app
from adaptive_fusion.commands.serve import name_of
from adaptive_fusion.commands.serve_replicas import _must_fit
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.loading import model_options

OPTIONS = (
    "--model --policy --latency-ms --ttft-ms --vram-gb --dtype --attn --cache --quantization --device-map --host "
    "--port --api-key --allowed-media-domains --mode"
)


def test_every_option_is_explained() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"]).output
    assert all(option in shown for option in OPTIONS.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "there is no key"),
        (["--latency-ms", "-5"], "latency_ms is -5.0"),
        (["--model", "no/such/place/at/all"], "which is no folder"),
        (["--policy", "none such"], "unknown policy"),
        (["--served-name", ""], "model name is ''"),
        (["--replicas", "0"], "--replicas"),
        (["--replicas", "1000000"], "--replicas"),
        (["--replicas", "2", "--max-replicas", "1"], "max_replicas is 1"),
        (["--replicas", "2", "--ui"], "expected no --replicas"),
        (["--replicas", "2", "--model", "no/such/place/at/all"], "which is no folder"),
        (["--replicas", "2", "--policy", "none such"], "unknown policy"),
        (["--upstream", "http://127.0.0.1:9", "--vram-gb", "8", "--queue", "2"], "--vram-gb, --queue are of a model"),
        (["--upstream", "http://127.0.0.1:9", "--replicas", "2"], "--replicas is of a model that runs here"),
        (["--processor", "qwen2-vl"], "--processor is of an engine elsewhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], says: str) -> None:
    result = CliRunner(env={"ADAPTIVE_FUSION_API_KEY": ""}).invoke(app, ["serve", *arguments])
    assert result.exit_code == 2 and says in result.output and "Traceback" not in result.output


def test_no_more_replicas_than_memory_has_room_for() -> None:
    _must_fit(1)
    with pytest.raises(ConfigError, match=r"1000000 replicas do not fit .* expected at most \d+, or a cluster"):
        _must_fit(10**6)


def test_a_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    assert name_of(str(tmp_path)) == tmp_path.name and name_of("owner/name") == "owner/name"


def test_words_of_the_command_line_are_options_of_the_loader() -> None:
    assert model_options() == {}
    assert model_options("bf16", "sdpa", None, "auto") == {
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
        "device_map": "auto",
    }
    assert model_options(quantization="4bit")["quantization_config"].load_in_4bit
    for wrong in ({"dtype": "int3"}, {"quantization": "2bit"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
            model_options(**wrong)
