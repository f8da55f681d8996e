"""The report: a page that stands alone, escapes everything, and shows what it was given."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from metalm.errors import DataError
from metalm.evaluation.report import (
    LARGEST_SIDE,
    Figure,
    Gallery,
    GalleryItem,
    Table,
    Text,
    caption_gallery,
    loss_curve,
    vqa_gallery,
    write_report,
)

VOID = {"meta", "img", "br", "link"}
EVIL = "<script>alert('x')</script> & \"quotes\""
METRICS = [{"step": 10 * i, "loss": 5 / i, "tokens_per_second": 5000.0 + i, "lr": 1e-3} for i in range(1, 101)]


class Page(HTMLParser):
    """A page read back: its tags, attributes and text; raises on tags that do not close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def images(self) -> list[Image.Image]:
        uris = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        return [Image.open(BytesIO(base64.b64decode(uri.partition("base64,")[2]))) for uri in uris]


def picture(width=32, height=24, format="PNG", color="red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, format)
    return buffer.getvalue()


def written(tmp_path, *sections, title="Demo") -> tuple[str, Page]:
    path = write_report(tmp_path / "new" / "report.html", title, sections)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_page_stands_alone_and_is_well_formed(tmp_path):
    html, page = written(
        tmp_path,
        Text("One.\n\nTwo.", title="Summary"),
        Table("Results", ["metric", "value"], [["accuracy", 0.5]]),
        loss_curve(METRICS),
        Gallery("Pictures", [GalleryItem(picture(), [("prediction", "red")], "right", "right")]),
    )
    assert html.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert "@import" not in html
    assert "url(http" not in html
    assert "prefers-color-scheme: dark" in html
    assert ("meta", "name", "viewport") in page.attributes
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    ids = {f"#{value}" for tag, name, value in page.attributes if (tag, name) == ("section", "id")}
    assert len(links) == 4
    assert set(links) <= ids


def test_everything_is_escaped(tmp_path):
    row = {"id": EVIL, "question": EVIL, "prediction": EVIL, "references": [EVIL], "score": 0.0}
    figure = loss_curve(METRICS[:3], title=EVIL)
    html, page = written(
        tmp_path,
        Text(EVIL, title=EVIL),
        Table(EVIL, [EVIL], [[EVIL]]),
        Figure(EVIL, figure.figure, EVIL),
        Gallery(EVIL, [GalleryItem(None, [(EVIL, EVIL)], EVIL, "")], EVIL),
        vqa_gallery([row], lambda key: None, title=EVIL),
        caption_gallery([row], lambda key: None, title=EVIL),
        title=EVIL,
    )
    assert "script" not in page.tags
    assert "<script" not in html
    # title, h1; 6 headings and their links; paragraph, column, cell, figcaption, note, label, line, badge; galleries.
    assert page.texts.count(EVIL) == 2 + 12 + 8 + 3 + 2


def test_text_that_utf8_cannot_hold_is_written_all_the_same(tmp_path):
    _, page = written(tmp_path, Text("half a pair: \ud83d."))
    assert "half a pair: ?." in page.texts


def test_table_cells_are_written_for_people(tmp_path):
    rows = [["a", 0.123456, 1234567, True, None], ["b", 98765.4, 2, False, "x"]]
    html, page = written(tmp_path, Table("T", ["name", "score", "count", "ok", "note"], rows))
    for cell in ("0.1235", "98,765", "1,234,567", "yes", "no", "–", "x"):
        assert cell in page.texts
    assert html.count('<td class="number">') == 4  # two columns of numbers, two rows


def test_a_row_of_another_width_and_a_strange_section_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has not 2 cells"):
        write_report(tmp_path / "r.html", "R", [Table("T", ["a", "b"], [[1]])])
    with pytest.raises(TypeError, match="not str"):
        write_report(tmp_path / "r.html", "R", [Text("x"), "y"])


def test_loss_curve_from_a_file_that_a_killed_run_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [*METRICS, {"step": 1000, "loss": 0.25}, {"step": 1010, "loss": float("nan")}, {"step": 1020, "lr": 0.1}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 1030, "lo')
    section = loss_curve(path, title="Pretraining")
    loss_axis, speed_axis = section.figure.axes
    steps, losses = loss_axis.lines[0].get_data()
    assert list(steps) == [10 * i for i in range(1, 101)]
    assert losses[0] == 5
    assert losses[-1] == 0.25  # step 1000 came twice: the later row counts
    assert list(speed_axis.lines[0].get_data()[1]) == [5000.0 + i for i in range(1, 100)]
    assert section.caption == "Loss 5.000 at step 10, 0.250 at step 1,000."

    html, page = written(tmp_path, section)
    assert page.tags.count("svg") == 1
    assert {"loss", "tokens/s", "step", "Pretraining"} <= set(page.texts)
    assert "currentColor" in html
    assert "#000000" not in html


def test_loss_curve_smooths_long_runs_without_a_shift():
    from metalm.evaluation.report import _smooth

    assert _smooth([1.0] * 100) == [1.0] * 100
    ramp = [float(i) for i in range(100)]
    assert _smooth(ramp)[10:90] == pytest.approx(ramp[10:90])


def test_loss_curve_without_speed_and_without_loss(tmp_path):
    section = loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert len(section.figure.axes) == 1
    with pytest.raises(DataError, match="no row with a step and a finite loss"):
        loss_curve([{"step": 1}])
    with pytest.raises(DataError, match=r"missing\.jsonl.*cannot read the training metrics"):
        loss_curve(tmp_path / "missing.jsonl")


def test_the_same_report_is_the_same_page(tmp_path):
    pages = [written(tmp_path / name, loss_curve(METRICS), Text("x"))[0] for name in "ab"]
    assert pages[0] == pages[1]


def test_pictures_keep_their_bytes_but_large_ones_shrink(tmp_path):
    small, large = picture(32, 24), picture(2000, 1000, "JPEG")
    truncated = picture(300, 300, "JPEG")[:400]
    items = [GalleryItem(data, []) for data in (small, large, picture(8, 8, "BMP"), truncated, b"no picture", None)]
    html, page = written(tmp_path, Gallery("G", items))
    assert base64.b64encode(small).decode() in html
    sizes = [(image.format, image.size) for image in page.images()]
    assert sizes == [("PNG", (32, 24)), ("JPEG", (LARGEST_SIDE, LARGEST_SIDE // 2)), ("JPEG", (8, 8))]
    assert page.texts.count("no picture") == 3


def test_vqa_gallery_marks_right_partly_wrong_and_finds_pictures(tmp_path):
    pictures = {"img": picture(color="blue"), "q2": picture(color="green")}
    rows = [
        {
            "id": "q1",
            "question": "what color?",
            "prediction": "red",
            "references": ["red"],
            "score": 1.0,
            "image": "img",
        },
        {"id": "q2", "prediction": "pot", "references": {"vine": 0.667, "plant": 1, "pot": 0.333}, "score": 0.333},
        {"id": "q3", "prediction": "", "references": ["a", "b", "b"], "score": 0.0},
    ]
    gallery = vqa_gallery(rows, pictures.get)
    assert [item.mark for item in gallery.items] == ["right", "partly", "wrong"]
    assert [item.badge for item in gallery.items] == ["right", "partly, 0.33", "wrong"]
    assert [item.image for item in gallery.items] == [pictures["img"], pictures["q2"], None]
    assert gallery.items[0].lines == [("question", "what color?"), ("prediction", "red"), ("answers", "red")]
    assert gallery.items[1].lines[-1] == ("answers", "plant 1, vine 0.667, pot 0.333")
    assert gallery.items[2].lines == [("prediction", ""), ("answers", "b × 2, a")]
    _, page = written(tmp_path, gallery)
    assert {"✓ right", "◐ partly, 0.33", "✗ wrong", "empty"} <= set(page.texts)


def test_caption_gallery_shows_score_and_exact_match():
    rows = [
        {"id": 1, "prediction": "A red circle", "references": ["a red circle", "a circle"], "score": 812.34},
        {"id": 2, "prediction": "a dog", "references": ["a cat"], "score": 0.0},
    ]
    gallery = caption_gallery(rows, lambda key: None)
    assert [item.badge for item in gallery.items] == ["CIDEr 812.3, equals a reference", "CIDEr 0.0"]
    assert [item.mark for item in gallery.items] == ["right", ""]
    assert gallery.items[0].lines[1:] == [("references", "a red circle"), ("", "a circle")]


def test_a_long_gallery_is_sampled_evenly_and_says_so():
    rows = [{"id": i, "prediction": str(i), "references": ["x"], "score": 0.0} for i in range(1000)]
    gallery = vqa_gallery(rows, lambda key: None, count=4)
    assert [item.lines[0][1] for item in gallery.items] == ["0", "250", "500", "750"]
    assert gallery.note == "4 of 1,000, evenly spaced, not chosen by score."
    assert vqa_gallery(rows[:3], lambda key: None, count=4).note == ""
    assert vqa_gallery([], lambda key: None).items == []
