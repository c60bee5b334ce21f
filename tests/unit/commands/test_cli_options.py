"""Values that concern a whole call are refused before anything is loaded; commands describe themselves."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner, Result

from adaptive_fusion.cli import app
from adaptive_fusion.commands.output import complain, printable
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import DOWNSAMPLES, FUSIONS, LAYERS, MAX_PIXELS, MIN_PIXELS, RANKS, OperatingPoint

FILES = ["a.png", "b.png"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", text))


@pytest.mark.parametrize(
    ("arguments", "error_type", "said"),
    [
        (["--latency-ms", "0"], "BudgetError", "latency_ms is 0.0; expected a number above 0"),
        (["--latency-ms", "nan"], "BudgetError", "latency_ms is nan; expected a number above 0"),
        (["--latency-ms", "inf"], "BudgetError", "latency_ms is inf; expected a number above 0"),
        (["--latency-ms", "-1"], "BudgetError", "latency_ms is -1.0; expected a number above 0"),
        (["--ttft-ms", "-inf"], "BudgetError", "ttft_ms is -inf; expected"),
        (["--vram-gb", "1e9"], "BudgetError", "vram_gb is 1000000000.0; expected a number above 0, at most 4096"),
        (["--attainment", "1"], "BudgetError", "attainment is 1.0; expected a number above 0, below 1"),
        (["--policy", "nosuch"], "PolicyError", "'nosuch'; expected one of balanced, latency, native"),
        (["--policy", "/nowhere/p.toml"], "PolicyError", "'p.toml'; expected one of balanced"),
        (["--point", "blended@0.5"], "ConfigError", "'blended'; expected one of gated, "),
        (["--point", "gated5"], "ConfigError", "layers is 5; expected one of 3, 6, 9, 12"),
        (["--point", "native@0.3"], "ConfigError", "downsample is 0.3; expected one of 1.0, 0.5, 0.25"),
        (["--point", "native@@"], "ConfigError", "'native@@'; expected a name such as native"),
        (["--model", "./nowhere"], "ConfigError", "'./nowhere', which is no folder; expected reference"),
        (["--model", "a/b/c"], "ConfigError", "'a/b/c', which is no folder; expected reference"),
        (["--model", ""], "ConfigError", "'', which is no folder; expected reference"),
    ],
)
def test_a_bad_value_refuses_every_input_with_the_value_and_the_choices(
    arguments: list[str], error_type: str, said: str
) -> None:
    result = call("run", *FILES, "--prompt", "?", "--json", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{error_type}: ") and said in result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["input"] for row in rows] == FILES
    assert all(row["error_type"] == error_type and said in row["error"] for row in rows)
    assert call("run", *FILES, "--prompt", "?", *arguments).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--prompt", "?"], "Missing argument 'FILE...'"),
        (["run", "a.png"], "Missing option '--prompt'"),
        (["run", "a.png", "--prompt", "?", "--latency-ms", "soon"], "Invalid value for '--latency-ms'"),
        (["run", "a.png", "--prompt", "?", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["paint"], "No such command 'paint'"),
        (["explain", "a.png", "--save-plot", "a.pdf"], "'a.pdf'; expected a file name ending in .png"),
        (["explain", "a.png", "--save-plot", "nowhere/a.png"], "'nowhere', which does not exist"),
        (["demo", "--latency-ms", "0"], "latency_ms is 0.0; expected a number above 0"),
        (["demo", "--policy", "nosuch"], "expected one of balanced"),
        (["bench", "budget", "--trace", "nowhere.csv"], "trace 'nowhere.csv' cannot be read: FileNotFoundError"),
    ],
)
def test_bad_usage_is_exit_code_2_with_the_reason(arguments: list[str], said: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert said in one_line(result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", sorted(get_command(app).commands))
def test_every_command_describes_itself(command: str) -> None:
    listed = call("--help")
    assert listed.exit_code == 0 and re.search(rf"\b{command}\b +\w", one_line(listed.stdout))
    own = call(command, "--help")
    assert own.exit_code == 0 and "Usage:" in own.stdout and "--help" in own.stdout


def test_policies_lists_the_shipped_ones() -> None:
    result = call("policies", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["name"] for row in rows} >= {"native", "reference-balanced", "reference-latency", "reference-quality"}
    assert all(set(row["lanes"]) == {"weighted", "gated", "video"} and row["description"] for row in rows)
    shown = call("policies")
    assert shown.exit_code == 0 and all(row["name"] in shown.stdout for row in rows)


points = st.builds(
    OperatingPoint,
    fusion=st.sampled_from(FUSIONS),
    layers=st.sampled_from(LAYERS),
    downsample=st.sampled_from(DOWNSAMPLES),
    max_pixels=st.none() | st.integers(MIN_PIXELS, MAX_PIXELS),
    adapter_rank=st.sampled_from(RANKS),
    max_fps=st.none() | st.sampled_from((0.5, 1.0, 2.0, 30.0)),
)


@given(points)
@settings(max_examples=100, deadline=None)
def test_a_point_is_read_back_from_its_name(point: OperatingPoint) -> None:
    found = OperatingPoint.parse(point.name)
    assert found.name == point.name
    if point.fusion not in ("native", "top"):  # those say nothing of layers and rank
        assert found == point


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_other_text_is_a_point_or_a_config_error(text: str) -> None:
    found: Any = None
    try:
        found = OperatingPoint.parse(text)
    except ConfigError as error:
        assert "expected" in str(error)
    assert found is None or isinstance(found, OperatingPoint)


@pytest.mark.parametrize(
    "name",
    [
        "Screenshot at 3.04\u202fPM.png",  # as macOS names them
        "\u753b\u9762\u3000\u4e00.png",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467.png",
        "\u0646\u0645\u06cc\u200c\u062f\u0627\u0646\u0645.png",
        "a\u00a0b\u00ad.png",
    ],
)
def test_spaces_and_joiners_of_all_scripts_are_printed_as_they_are(name: str) -> None:
    assert printable(name) == name


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    complain("new\nline.png: MediaError: no")
    assert capsys.readouterr().err == "new\ufffdline.png: MediaError: no\n"


def test_printed_text_cannot_drive_a_terminal() -> None:
    assert printable("\x9b2J\u2028\u2029\u2067\x85\x7f") == "\ufffd2J" + "\ufffd" * 5
    assert printable("a\x1b[2J\rb\u202ec\ud800\n\td") == "a\ufffd[2J\ufffdb\ufffdc\ufffd\n\td"
