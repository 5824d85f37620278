"""The pages of worst errors, on pictures whose errors are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dense_toy import HEIGHT, WIDTH, ScriptedDense, write_pairs, write_records
from dense_toy import paint as paint_scene
from PIL import Image
from toy import write_toy

from model_server.evaluation.gallery import PAGES, Error, gallery_section, run, worst, worst_corner
from model_server.evaluation.gallery_page import MOST_BYTES, SIDE, Page, Panel, draw, wrapped
from model_server.protocol import TileCaption, TileClasses, TileVqa
from model_server.query import Query


def panel() -> Panel:
    return Panel((np.zeros((SIDE, SIDE, 3), np.uint8),), ("one",))


def test_the_worst_window_is_where_most_is_wrong() -> None:
    wrong = np.zeros((50, 90))
    wrong[5, 5] = wrong[30:34, 60:64] = 1
    (x, y), count = worst_corner(wrong, 20)
    assert count == 16
    assert 44 <= x <= 60
    assert 14 <= y <= 30


def test_the_worst_are_taken_of_all_sets_before_one_set_fills_the_page() -> None:
    errors = [Error(9 - i, "many", panel) for i in range(6)] + [Error(1, "few", panel), Error(0, "none", panel)]
    chosen = worst(errors, 4)
    assert [(e.set, e.badness) for e in chosen] == [("many", 9), ("many", 8), ("many", 7), ("few", 1)]


def test_a_page_keeps_its_colours_and_its_size_limit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    noise[100:110, 100:110] = (255, 45, 45)
    page = Page("worst", (Panel((noise,), ("a line " * 20,)),) * 12, ("whose",), (("missed", "#ff2d2d"),))
    draw(page, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size <= MOST_BYTES
    with Image.open(tmp_path / "page.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20) or []}
    assert (255, 45, 45) in colours


def test_lines_are_wrapped_at_words() -> None:
    from PIL import ImageFont

    lines = wrapped("many words that do not fit", 60, ImageFont.load_default(12))
    assert " ".join(lines) == "many words that do not fit"
    assert len(lines) > 1


def test_every_kind_of_error_gets_a_page_and_sets_of_unclear_terms_none(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "docs"
    write_toy(data, "val", 2, "ucm")  # the blind spot: sea is said to be absent, scenes are right, captions differ
    write_toy(data, "val", 2, "rsicd_aid")
    write_pairs(data, "val", [((0, 0, 40, 30), (0, 0, 40, 40))])
    paint_scene(data / "neon_trees" / "images" / "a.png", [(10, 10, 30, 25)])
    trees = [{"label": "tree", "bbox": [40, 30, 60, 50]}]
    write_records(data, "neon_trees", [{"id": "t", "split": "val", "images": ["images/a.png"], "objects": trees}])
    paint_scene(data / "amazon_forest" / "images" / "a.png", water=(0, 0, WIDTH, HEIGHT // 2))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:20] = 1
    (data / "amazon_forest" / "m.png").parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(data / "amazon_forest" / "m.png")
    write_records(data, "amazon_forest", [{"id": "f", "split": "val", "images": ["images/a.png"], "mask": "m.png",
                                           "mask_classes": {"0": "background", "1": "forest"}}])  # fmt: skip

    class Wrong(ScriptedDense):
        def _one(self, query: Query) -> TileCaption | TileVqa | TileClasses:
            answer = super()._one(query)
            return answer.model_copy(update={"answer": "perhaps"}) if query.task == "vqa" else answer

    written = run(Wrong(), data, "val", out)
    assert [path.name for path in written] == [f"failures_{name}.png" for name in PAGES]
    text = "\n".join(gallery_section(out))
    assert all(f"failures_{name}.png" in text for name in PAGES)
    assert gallery_section(tmp_path) == []
