import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_server.training.records import DataError, load_image, read_records, set_names

ROW = {"id": "a", "split": "train", "images": ["images/a.png"], "width": 4, "height": 3}


def _write(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")


def test_a_record_has_what_its_line_says_and_empty_values_for_the_rest(tmp_path: Path) -> None:
    row = ROW | {
        "scene": "river",
        "captions": ["a river ."],
        "presence": {"water": True},
        "qa": [{"question": "Is there a river?", "answer": "yes", "type": "presence"}],
        "objects": [{"label": "ship", "bbox": [1, 2, 3, 3]}],
        "mask": "masks/a.png",
        "mask_classes": {"1": "water"},
    }
    _write(tmp_path / "toy", json.dumps(row), json.dumps(ROW | {"id": "b", "split": "val"}))
    (record,) = read_records(tmp_path, ["toy"], "train")
    assert record.set == "toy"
    assert record.images == (tmp_path / "toy" / "images" / "a.png",)
    assert record.qa[0].answer == "yes"
    assert record.objects[0].bbox == (1, 2, 3, 3)
    assert record.mask_classes == {1: "water"}
    (plain,) = read_records(tmp_path, ["toy"], "val")
    assert (plain.scene, plain.captions, plain.presence, plain.qa, plain.mask) == (None, (), {}, (), None)
    assert len(read_records(tmp_path, ["toy"], None)) == 2
    assert read_records(tmp_path, ["toy"], "test") == []


def test_a_missing_set_names_those_that_are_there(tmp_path: Path) -> None:
    _write(tmp_path / "toy", json.dumps(ROW))
    assert set_names(tmp_path) == ["toy"]
    with pytest.raises(DataError, match=r"'ucm'.*toy"):
        read_records(tmp_path, ["toy", "ucm"], "train")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1]", "JSON object"),
        (json.dumps({"id": "a", "split": "train", "images": ["a.png"], "width": 4}), "height"),
        (json.dumps(ROW | {"images": "a.png"}), "images"),
        (json.dumps(ROW | {"objects": [{"label": "ship", "bbox": [1, 2, 3]}]}), "wrong form"),
    ],
)
def test_a_bad_line_is_named_by_file_number_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    _write(tmp_path / "toy", json.dumps(ROW), line)
    with pytest.raises(DataError, match=rf"records.jsonl, line 2.*{reason}"):
        read_records(tmp_path, ["toy"], "train")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
def test_images_of_any_8_bit_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    path = tmp_path / "a.png"
    grey.convert(mode).save(path)
    image = load_image(path)
    assert image.shape == (3, 4, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[..., 0], np.asarray(grey))
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_an_image_that_cannot_be_trained_on_is_named_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 4), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (("deep.png", "8-bit"), ("text.png", "not an image"), ("gone.png", "no such")):
        with pytest.raises(DataError, match=rf"{name}.*{reason}"):
            load_image(tmp_path / name)
