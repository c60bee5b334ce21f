"""Folders of images with truth: what is read of them, and that one bad line costs no other."""

import json

import pytest
from PIL import Image

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.truth import Thing, read_sources


def folder(place, *lines):
    place.mkdir(parents=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (place / "truth.jsonl").write_text("\n".join(text) + "\n", "utf-8")
    return place


def test_sources_are_pictured_by_their_truth(tmp_path):
    box = {"name": "cat", "box": [1, 2, 31, 12]}
    photos = folder(tmp_path / "photos", {"file": "a.png", "boxes": [box], "captions": ["a cat"]}, {"file": "b.png"})
    signs = folder(tmp_path / "signs", {"file": "a.png", "boxes": [{"text": "STOP", "box": [0, 0, 9, 9]}]})
    posters = folder(tmp_path / "posters", {"file": "a.png", "captions": ["a poster"], "text": ["SALE"]})
    illegible = folder(tmp_path / "far", {"file": "a.png", "captions": ["a street"], "text": ["###"]})
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("RGB", (40, 40)).save(bare / "x.png")
    found, failed = read_sources([photos, signs, posters, illegible, bare])
    assert not failed
    assert {source.name: source.pictured for source in found} == {
        "photos": True, "signs": False, "posters": False, "far": True, "bare": False,
    }  # fmt: skip
    things = {item.path.name: item.things for item in found[0].items}
    assert things == {"a.png": (Thing("cat", 30.0, 10.0),), "b.png": ()}


BAD = {
    "{not json": "not valid JSON",
    "[1]": "expected a JSON object",
    '{"file": 3}': "file is 3",
    '{"file": "../../secret.png"}': "expected the name of an image in the folder",
    '{"file": "c.png", "qa": [["what?"]]}': r"expected \[question, answer\]",
    '{"file": "c.png", "boxes": [{"name": "cat", "box": [5, 0, 1, 9]}]}': "x1 >= x0",
    '{"file": "c.png", "boxes": [{"name": "cat", "box": [0, 0, NaN, 9]}]}': "box is nan",
    '{"file": "c.png", "captions": "one"}': "captions is str",
    '{"file": "a.png"}': "named twice",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_by_its_number_and_the_others_are_read(tmp_path, line):
    source = folder(tmp_path / "mixed", {"file": "a.png"}, line, {"file": "b.png", "qa": [["who?", "me"]]})
    (found,), ((where, why),) = read_sources([source])
    assert sorted(item.path.name for item in found.items) == ["a.png", "b.png"]
    assert where == "mixed/truth.jsonl, line 2"
    with pytest.raises(ConfigError, match=BAD[line]):
        raise ConfigError(why)
    assert str(tmp_path) not in why


def test_folders_that_are_called_alike_get_names_of_their_own_and_broken_ones_are_named(tmp_path):
    first, second = folder(tmp_path / "a/charts", {"file": "x.png"}), folder(tmp_path / "b/charts", {"file": "x.png"})
    empty = folder(tmp_path / "empty")
    found, failed = read_sources([first, second, tmp_path / "nowhere", empty])
    assert [source.name for source in found] == ["a/charts", "b/charts"]
    assert [name for name, _ in failed] == ["nowhere", "empty"]
    with pytest.raises(ConfigError, match="named twice"):
        read_sources([first, first])
