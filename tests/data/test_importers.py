"""Importers: each on small files in its data set's published layout; `jsonl` on real data as well."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import zipfile
from itertools import islice

import pytest
from PIL import Image

from metalm.data.importers import IMPORTERS, import_dataset
from metalm.data.importers.daquar import split_reference
from metalm.data.importers.media import MediaSource, sample_key
from metalm.data.sample import Question
from metalm.data.shards import read_samples, write_shards
from metalm.errors import DataError


def picture(color, kind="JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, kind)
    return out.getvalue()


def make_folder(folder, names) -> dict[str, bytes]:
    """Pictures of different colours under these names; returns their bytes."""
    pictures = {name: picture((10 * n, 0, 0), "PNG" if name.endswith("png") else "JPEG") for n, name in enumerate(names)}
    for name, data in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return pictures


def make_zip(path, pictures: dict[str, bytes], compression=zipfile.ZIP_STORED, prefix="") -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in pictures.items():
            archive.writestr(prefix + name, data)


def write_json(path, record) -> str:
    path.write_text(json.dumps(record))
    return str(path)


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def load(name: str, **options):
    return list(import_dataset(name, **options))


# --- images


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "wrapped/in/folders/"])
def test_images_come_as_they_lie(tmp_path, compression, prefix):
    pictures = make_folder(tmp_path / "folder" / prefix, ["a.jpg", "b.png"])
    make_zip(tmp_path / "all.zip", {**pictures, "__MACOSX/a.jpg": b"x"}, compression, prefix)
    for path in (tmp_path / "folder", tmp_path / "all.zip"):
        source = MediaSource(path)
        assert {name: source.read(name) for name in pictures} == pictures
        assert source.read("a.jpeg", "a.jpg") == pictures["a.jpg"]


def test_a_missing_image_is_an_error_or_counted(tmp_path):
    make_folder(tmp_path, ["a.jpg"])
    with pytest.raises(DataError, match=rf"image 'x\.jpg' is not in {tmp_path}"):
        MediaSource(tmp_path).read("x.jpg")
    source = MediaSource(tmp_path, skip_missing=True)
    assert [source.read(name) is None for name in ("x.jpg", "a.jpg", "y.jpg")] == [True, False, True]
    assert source.missing == ["x.jpg", "y.jpg"]


def test_two_images_of_one_name_need_their_path(tmp_path):
    pictures = make_folder(tmp_path, ["train/a.jpg", "val/a.jpg"])
    source = MediaSource(tmp_path)
    assert source.read("val/a.jpg") == pictures["val/a.jpg"]
    with pytest.raises(DataError, match="2 files of this name"):
        source.read("a.jpg")


def test_images_that_are_none(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        MediaSource(tmp_path / "gone")
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        MediaSource(tmp_path / "bad.zip")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match="empty"):
        MediaSource(tmp_path).read("empty.jpg")
    make_zip(tmp_path / "torn.zip", {"a.jpg": picture("red")})
    data = bytearray((tmp_path / "torn.zip").read_bytes())
    data[60:80] = bytes(20)
    (tmp_path / "torn.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"'a\.jpg' in .*torn\.zip: cannot be read"):
        MediaSource(tmp_path / "torn.zip").read("a.jpg")


def test_keys_are_unique_and_name_tar_members():
    taken: set[str] = set()
    names = ["x/a.jpg", "y/a.jpg", "a.jpg", "b.c d/é.1.png", ".jpg"]
    assert [sample_key(name, taken) for name in names] == ["a", "a-2", "a-3", "é_1", "_jpg"]


# --- the register


def test_the_register_names_what_is_wrong():
    assert set(IMPORTERS) == {
        "flickr8k",
        "coco-captions",
        "vqav2",
        "okvqa",
        "daquar",
        "conll",
        "labelled",
        "pairs",
        "questions",
        "sounds",
        "text",
        "jsonl",
    }
    with pytest.raises(DataError, match=r"no importer 'flickr8' .did you mean 'flickr8k'"):
        import_dataset("flickr8")
    with pytest.raises(DataError, match=r"no option 'image' .did you mean 'images'"):
        import_dataset("daquar", image="x")
    with pytest.raises(DataError, match="'annotations' is missing"):
        import_dataset("daquar", images="x")


def test_imports_are_lazy(tmp_path):
    """A picture is read when its sample is asked for, not before."""
    pictures = make_folder(tmp_path, ["a.jpg", "b.jpg"])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"image": name, "caption": name} for name in pictures])
    samples = import_dataset("jsonl", annotations=path)
    assert next(samples).key == "a"
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"b\.jpg"):
        next(samples)


# --- flickr8k


@pytest.fixture
def flickr8k_files(tmp_path):
    names = ["1000_a1.jpg", "1001_b2.jpg", "1002_c3.jpg"]
    pictures = make_folder(tmp_path / "Flicker8k_Dataset", names)
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    lines = [f"{name}#{n}\tA dog , number {n} ." for name in [*names, "2258277193_586949ec62.jpg.1"] for n in range(5)]
    (text / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (text / "Flickr_8k.trainImages.txt").write_text("1002_c3.jpg\n1000_a1.jpg\n")
    (text / "Flickr_8k.devImages.txt").write_text("1001_b2.jpg\n")
    return tmp_path, pictures


def test_flickr8k_official(flickr8k_files):
    folder, pictures = flickr8k_files
    options = {"images": folder / "Flicker8k_Dataset", "annotations": folder / "Flickr8k_text"}
    train = load("flickr8k", **options, split="train")
    assert [sample.key for sample in train] == ["1002_c3", "1000_a1"]
    assert train[1].image == pictures["1000_a1.jpg"]
    assert train[1].captions == [f"A dog , number {n} ." for n in range(5)]
    assert [sample.key for sample in load("flickr8k", **options, split="val")] == ["1001_b2"]
    assert len(load("flickr8k", **options)) == 3
    with pytest.raises(DataError, match=r"Flickr_8k\.testImages\.txt is missing"):
        load("flickr8k", **options, split="test")
    with pytest.raises(DataError, match="flickr8k has train, dev, val, test"):
        load("flickr8k", **options, split="training")


def test_flickr8k_kaggle(flickr8k_files, tmp_path):
    folder, pictures = flickr8k_files
    make_zip(tmp_path / "Images.zip", pictures, prefix="Images/")
    kaggle = folder / "kaggle"
    kaggle.mkdir()
    with open(kaggle / "captions.txt", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "caption"])
        writer.writerows([name, f'A "dog" , number {n} .'] for name in pictures for n in range(5))
    samples = load("flickr8k", images=tmp_path / "Images.zip", annotations=kaggle)
    assert [sample.image for sample in samples] == list(pictures.values())
    assert samples[0].captions[4] == 'A "dog" , number 4 .'
    with pytest.raises(DataError, match="or import without a split"):
        load("flickr8k", images=tmp_path / "Images.zip", annotations=kaggle / "captions.txt", split="train")


def test_flickr8k_bad_files(flickr8k_files, caplog):
    folder, _ = flickr8k_files
    token = folder / "Flickr8k_text/Flickr8k.token.txt"
    options = {"images": folder / "Flicker8k_Dataset", "annotations": folder / "Flickr8k_text"}
    (folder / "Flicker8k_Dataset/1001_b2.jpg").unlink()
    with pytest.raises(DataError, match=r"1001_b2\.jpg"):
        load("flickr8k", **options)
    with caplog.at_level(logging.WARNING):
        assert len(load("flickr8k", **options, skip_missing=True)) == 2
    assert "1 images not in" in caplog.text and "1001_b2.jpg" in caplog.text
    token.write_text(token.read_text() + "no tab here\n")
    with pytest.raises(DataError, match=r"Flickr8k\.token\.txt, line 21: expected image\.jpg#0<TAB>caption"):
        load("flickr8k", **options)
    with pytest.raises(DataError, match=r"neither Flickr8k\.token\.txt nor captions\.txt"):
        load("flickr8k", images=folder, annotations=folder)


# --- coco


def test_coco_official(tmp_path):
    pictures = make_folder(tmp_path / "val2017", ["000000000139.jpg", "000000000285.jpg"])
    record = {
        "info": {},
        "licenses": [],
        "images": [
            {"id": 285, "file_name": "000000000285.jpg", "height": 8, "width": 8},
            {"id": 139, "file_name": "000000000139.jpg", "height": 8, "width": 8},
        ],
        "annotations": [
            {"image_id": 139, "id": 1, "caption": "A woman stands in the dining area.\n"},
            {"image_id": 285, "id": 2, "caption": "A bear."},
            {"image_id": 139, "id": 3, "caption": "A room with chairs."},
        ],
    }
    path = write_json(tmp_path / "captions_val2017.json", record)
    first, second = load("coco-captions", images=tmp_path / "val2017", annotations=path)
    assert (first.key, first.image) == ("000000000139", pictures["000000000139.jpg"])
    assert first.captions == ["A woman stands in the dining area.", "A room with chairs."]
    assert second.captions == ["A bear."]
    with pytest.raises(DataError, match="one split by itself"):
        load("coco-captions", images=tmp_path / "val2017", annotations=path, split="val")
    instances = {**record, "annotations": [{"image_id": 139, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(DataError, match="are no captions"):
        load("coco-captions", images=tmp_path, annotations=write_json(tmp_path / "instances.json", instances))


def test_coco_karpathy(tmp_path):
    names = {"train2014/COCO_train2014_000000000009.jpg": "train", "val2014/COCO_val2014_000000000042.jpg": "test"}
    names["val2014/COCO_val2014_000000000073.jpg"] = "restval"
    pictures = make_folder(tmp_path, names)
    images = [
        {
            "filepath": name.split("/")[0],
            "filename": name.split("/")[1],
            "split": split,
            "sentences": [{"tokens": ["a", "dog"], "raw": "A dog. ", "imgid": 0, "sentid": 0}],
        }
        for name, split in names.items()
    ]
    path = write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    options = {"images": tmp_path, "annotations": path}
    (test,) = load("coco-captions", **options, split="test")
    assert (test.key, test.captions) == ("COCO_val2014_000000000042", ["A dog."])
    assert test.image == pictures["val2014/COCO_val2014_000000000042.jpg"]
    assert len(load("coco-captions", **options, split="train+restval")) == 2
    assert len(load("coco-captions", **options)) == 3
    with pytest.raises(DataError, match=r"split 'val': .* has train, test, restval"):
        load("coco-captions", **options, split="val")


# --- vqav2 and okvqa


def vqa_question(number, image_id, text):
    return {"question_id": number, "image_id": image_id, "question": text}


def vqa_annotation(number, image_id, answers, answer_type, question_type):
    return {
        "question_id": number,
        "image_id": image_id,
        "answer_type": answer_type,
        "question_type": question_type,
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "raw_answer": answer + "ing", "answer_confidence": "maybe", "answer_id": n}
            for n, answer in enumerate(answers, 1)
        ],
    }


def test_vqav2(tmp_path):
    pictures = make_folder(tmp_path / "val2014", ["COCO_val2014_000000262148.jpg", "COCO_val2014_000000000042.jpg"])
    make_zip(tmp_path / "val2014.zip", pictures, prefix="val2014/")
    ten = ["down"] * 5 + ["at table", "skateboard", "down", "table", "table"]
    questions = {
        "data_subtype": "val2014",
        "questions": [
            vqa_question(262148000, 262148, "Where is he looking?"),
            vqa_question(42000, 42, "Is it red?"),
            vqa_question(262148001, 262148, "How many?"),
        ],
    }
    annotations = {
        "data_subtype": "val2014",
        "annotations": [
            vqa_annotation(42000, 42, ["yes"] * 10, "yes/no", "is it"),
            vqa_annotation(262148000, 262148, ten, "other", "none of the above"),
            vqa_annotation(262148001, 262148, ["2"] * 10, "number", "how many"),
        ],
    }
    options = {
        "questions": write_json(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", questions),
        "annotations": write_json(tmp_path / "v2_mscoco_val2014_annotations.json", annotations),
    }
    first, second = load("vqav2", images=tmp_path / "val2014.zip", **options)
    assert (first.key, first.image) == ("COCO_val2014_000000262148", pictures["COCO_val2014_000000262148.jpg"])
    assert first.questions == [
        Question("262148000", "Where is he looking?", ten, type="other"),
        Question("262148001", "How many?", ["2"] * 10, type="number"),
    ]
    assert second.questions[0].type == "yes/no"
    unanswered = load("vqav2", images=tmp_path / "val2014", questions=options["questions"])
    assert unanswered[0].questions[0].answers == []
    with pytest.raises(DataError, match=r"no 'questions' in it .*right file"):
        load("vqav2", images=tmp_path, questions=options["annotations"], annotations=options["annotations"])
    del annotations["annotations"][0]
    write_json(tmp_path / "v2_mscoco_val2014_annotations.json", annotations)
    with pytest.raises(DataError, match=r"question 42000 of .* is not in .*do they match"):
        load("vqav2", images=tmp_path / "val2014", **options)


def test_okvqa(tmp_path):
    pictures = make_folder(tmp_path, ["COCO_val2014_000000297147.jpg"])
    annotations = {
        "data_subtype": "val2014",
        "question_types": {"four": "Sports and Recreation", "other": "Other"},
        "annotations": [vqa_annotation(2971475, 297147, ["race"] * 4 + ["motocross"] * 6, "other", "four")],
    }
    questions = {"data_subtype": "val2014", "questions": [vqa_question(2971475, 297147, "What sport is this?")]}
    options = {
        "images": tmp_path,
        "questions": write_json(tmp_path / "OpenEnded_mscoco_val2014_questions.json", questions),
        "annotations": write_json(tmp_path / "mscoco_val2014_annotations.json", annotations),
    }
    (sample,) = load("okvqa", **options)
    (question,) = sample.questions
    assert sample.image == pictures["COCO_val2014_000000297147.jpg"]
    assert question.answers == ["race"] * 4 + ["motocross"] * 6 and question.best_answer == "motocross"
    assert question.type == "Sports and Recreation"
    assert load("okvqa", **options, raw=True)[0].questions[0].answers[0] == "raceing"


# --- daquar


def test_daquar(tmp_path):
    pictures = make_folder(tmp_path / "nyu_depth_images", ["image3.png", "image4.png"])
    pictures |= make_folder(tmp_path / "nyu_depth_images", ["image7.jpg"])
    path = tmp_path / "qa.37.raw.train.txt"
    path.write_text(
        "what is on the desk in the image3 ?\nbook, scissor, papers\n"
        "how many chairs are there in the image7 ?\n2\n"
        "what is left of the door in this image3 ?\nnight_stand\n"
        "what is found in the image4 near the wall ?\nlamp\n"
    )
    samples = load("daquar", images=tmp_path / "nyu_depth_images", annotations=path)
    assert [sample.key for sample in samples] == ["image3", "image7", "image4"]
    assert [sample.image for sample in samples] == [pictures[f] for f in ("image3.png", "image7.jpg", "image4.png")]
    assert samples[0].questions == [
        Question("1", "what is on the desk ?", ["book, scissor, papers"]),
        Question("3", "what is left of the door ?", ["night_stand"]),
    ]
    assert samples[2].questions[0].question == "what is found near the wall ?"
    path.write_text("what is on the desk in the image3 ?\nbook\nwhat is this ?\nlamp\n")
    with pytest.raises(DataError, match=r"train\.txt, line 3: this question names no picture"):
        load("daquar", images=tmp_path, annotations=path)
    path.write_text("what is on the desk in the image3 ?\n")
    with pytest.raises(DataError, match=r"line 1: the last question has no answer line"):
        load("daquar", images=tmp_path, annotations=path)


@pytest.mark.parametrize(
    "asked, question",
    [
        ("what is in the image12 ?", "what is ?"),
        ("what colour is the table in image12 ?", "what colour is the table ?"),
        ("what is at the back of this image12 ?", "what is at the back ?"),
        ("what is on the shelf in the image 12?", "what is on the shelf?"),
    ],
)
def test_daquar_references_go(asked, question):
    assert split_reference(asked) == ("image12", question)


# --- text


def test_text_by_blank_lines(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("\ufeffOne line.\nAnd another.\n\n  \nTwo.\n\n\nThree — é.", encoding="utf-8")
    samples = load("text", path=path)
    assert [sample.text for sample in samples] == ["One line.\nAnd another.", "Two.", "Three — é."]
    assert samples[0].key == "plain-00000001" and samples[0].image is None
    assert [s.text for s in load("text", path=path, per="file")] == ["One line.\nAnd another.\n\n  \nTwo.\n\n\nThree — é."]
    assert [s.text for s in load("text", path=path, per="line")] == ["One line.", "And another.", "Two.", "Three — é."]
    with pytest.raises(DataError, match="one of document, line, file"):
        load("text", path=path, per="word")


def test_wikitext_runs_from_title_to_title(tmp_path):
    lines = [" ", " = Robert Boulter = ", " ", " Robert is an actor . ", " ", " = = Career = = ", " "]
    lines += [" In 2000 = = he began . ", " He left . ", " ", " = Homarus = ", " ", " A lobster . "]
    path = tmp_path / "wiki.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    first, second = (sample.text for sample in load("text", path=path))
    assert first.split("\n\n") == [
        " = Robert Boulter =",
        " Robert is an actor .",
        " = = Career = =",
        " In 2000 = = he began .\n He left .",
    ]
    assert second == " = Homarus =\n\n A lobster ."


def test_text_from_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("from text")
    (tmp_path / "ignored.csv").write_text("a,b")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "row one"}, {"text": "  "}, {"text": "row\n\ntwo"}])
    (tmp_path / "deep/a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    (tmp_path / "program.py").write_text("def f():\n\n    return 1\n")
    samples = load("text", path=tmp_path)
    assert [sample.text for sample in samples] == [
        "from text",
        "row one",
        "row\n\ntwo",
        "zipped",
        "def f():\n\n    return 1",
    ]
    assert len({sample.key for sample in samples}) == 5
    write_shards(samples, tmp_path / "out")
    assert list(read_samples(str(tmp_path / "out"))) == samples


def test_text_bad_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes("fine\nh\xe4sslich\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt.*not UTF-8"):
        load("text", path=tmp_path / "latin.txt")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: no text in column 'text'; columns: body"):
        load("text", path=path)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:-12])
    with pytest.raises(DataError, match=r"cut\.txt\.gz.*cannot be read"):
        load("text", path=tmp_path / "cut.txt.gz")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no text in it"):
        load("text", path=tmp_path / "blank.txt")
    with pytest.raises(DataError, match="no such file"):
        load("text", path=tmp_path / "gone.txt")


# --- jsonl


def test_jsonl_merges_rows_of_an_image(tmp_path):
    pictures = make_folder(tmp_path / "images", ["x/a.jpg", "y/a.jpg"])
    rows = [
        {"image": "x/a.jpg", "split": "train", "captions": ["one", "two"]},
        {"image": "y/a.jpg", "split": "val", "caption": "other"},
        {"text": "a page", "split": "train"},
        {
            "image": "x/a.jpg",
            "split": "train",
            "question_id": 7,
            "question": "what?",
            "answer": "dog",
            "type": "object",
        },
        {"image": "x/a.jpg", "split": "train", "question": "how many?", "answers": [2, "two"]},
        {"image": "x/a.jpg", "split": "train", "question": "why?", "soft_answers": {"so": 1, "for": 0.667}},
        {"image": "x/a.jpg", "split": "train", "question": "is it?", "answer": True},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    first, page = load("jsonl", annotations=path, images=tmp_path / "images", split="train")
    assert (first.key, first.image, first.captions) == ("a", pictures["x/a.jpg"], ["one", "two"])
    assert first.questions == [
        Question("7", "what?", ["dog"], type="object"),
        Question("5", "how many?", ["2", "two"]),
        Question("6", "why?", soft_answers={"so": 1.0, "for": 0.667}),
        Question("7", "is it?", ["yes"]),
    ]
    assert (page.key, page.text, page.image) == ("text-00000001", "a page", None)
    assert [s.key for s in load("jsonl", annotations=path, images=tmp_path / "images")] == ["a", "a-2", "text-00000001"]


def test_jsonl_columns_by_name(tmp_path):
    pictures = make_folder(tmp_path, ["a.jpg"])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"file": "a.jpg", "title": "one", "alt": ["two"], "part": 1}])
    options = {"annotations": path, "image_column": "file", "split_column": "part", "split": "1"}
    (sample,) = load("jsonl", **options, caption_column=["alt", "title"])
    assert (sample.image, sample.captions) == (pictures["a.jpg"], ["two"])
    assert load("jsonl", **options, caption_column="title")[0].captions == ["one"]
    with pytest.raises(DataError, match=r"no row of split '2' .found: 1."):
        load("jsonl", **{**options, "split": "2"}, caption_column="title")


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"image": "a.jpg", "caption": "b"', r"rows\.jsonl, line 3: not JSON"),
        ('["a.jpg", "b"]', r"rows\.jsonl, line 3: a JSON object was expected"),
        ('{"image": "a.jpg"}', r"line 3: neither a caption, nor a text, nor a question .*columns: image"),
        ('{"image": ["a.jpg"], "caption": "b"}', r"line 3: the image must be a string"),
        ('{"image": "a.jpg", "caption": {"en": "b"}}', r"line 3: the caption must be a string"),
        ('{"image": "a.jpg", "question": "b", "soft_answers": ["c"]}', r"line 3: soft answers must map"),
        ('{"image": "a.jpg", "question": "b", "soft_answers": {"c": 3}}', r"line 3: the score of an answer must be"),
        ('{"image": "gone.jpg", "caption": "b"}', r"image 'gone\.jpg' is not in"),
    ],
)
def test_jsonl_bad_rows(tmp_path, row, message):
    make_folder(tmp_path, ["a.jpg"])
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg", "caption": "fine"}\n\n' + row + "\n")
    with pytest.raises(DataError, match=message):
        load("jsonl", annotations=tmp_path / "rows.jsonl")


def test_jsonl_hints_at_the_right_column(tmp_path):
    make_folder(tmp_path, ["a.jpg"])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.jpg", "caption": "b", "heading": "c"}])
    with pytest.raises(DataError, match=r"no row has the text column 'headng' .*did you mean 'heading'"):
        load("jsonl", annotations=path, text_column="headng")
    with pytest.raises(DataError, match="no row in it"):
        load("jsonl", annotations=write_jsonl(tmp_path / "none.jsonl", []))


def test_an_open_source_tells_what_was_missing(tmp_path):
    make_folder(tmp_path, ["a.jpg"])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"image": name, "caption": "b"} for name in ("a.jpg", "b.jpg")])
    source = MediaSource(tmp_path, skip_missing=True)
    assert len(load("jsonl", annotations=path, images=source)) == 1
    assert source.missing == ["b.jpg"]


# --- real data, with hardly any option


def test_real_captions(shared, tmp_path):
    folder = shared / "data/flickr8k"
    samples = import_dataset("jsonl", annotations=folder / "captions.jsonl", images=folder / "images.zip", split="train")
    samples = list(islice(samples, 200))
    assert samples[0].key == "1000268201_693b08cb0e" and samples[0].captions[1] == "A girl going into a wooden building ."
    assert all(len(sample.captions) == 5 and sample.image[:2] == b"\xff\xd8" for sample in samples)
    write_shards(samples, tmp_path / "out", samples_per_shard=64)
    assert list(read_samples(str(tmp_path / "out"))) == samples


def test_real_soft_answers(shared):
    folder = shared / "data/coco_vqa"
    samples = load("jsonl", annotations=folder / "okvqa_val.jsonl", images=folder / "images.zip")
    assert sum(len(sample.questions) for sample in samples) == 525
    by_id = {question.id: question for sample in samples for question in sample.questions}
    assert by_id["3397615"].best_answer == "vine" and by_id["3397615"].soft_answers["ficus"] == 0.667


def test_real_questions(shared):
    folder = shared / "data/daquar"
    train = load("jsonl", annotations=folder / "qa.jsonl", images=folder / "images.zip", split="train")
    assert sum(len(sample.questions) for sample in train) == 5368
    assert train[0].questions[2].question == "what is on the desk ?"
    assert train[0].questions[2].answers == ["book, scissor, papers, tape_dispenser"]


def test_real_text(shared):
    folder = shared / "data/text"
    articles = load("text", path=folder / "wikitext2.valid.txt.gz")
    assert len(articles) == 60  # as many as the validation set has
    assert all(article.text.startswith(" = ") for article in articles)
    problems = load("text", path=folder / "gsm8k.test.jsonl.gz", text_column="question")
    assert len(problems) == 1319 and problems[0].text.startswith("Janet’s ducks lay 16 eggs per day.")


def test_real_layout_of_flickr8k(shared, tmp_path):
    """The authors' text files, written anew from the real captions, give the samples that the JSON Lines give."""
    folder = shared / "data/flickr8k"
    with open(folder / "captions.jsonl") as lines:
        rows = [json.loads(line) for line in islice(lines, 300)]
    tokens = [f"{row['image']}#{n}\t{caption}" for row in rows for n, caption in enumerate(row["captions"])]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(tokens))
    names = [row["image"] for row in rows if row["split"] == "train"]
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("\n".join(names) + "\n")
    official = load("flickr8k", images=folder / "images.zip", annotations=tmp_path, split="train")
    jsonl = import_dataset("jsonl", annotations=folder / "captions.jsonl", images=folder / "images.zip", split="train")
    assert official == list(islice(jsonl, len(names)))


# --- pairs

E2E = """mr,ref
"name[Alimentum], area[riverside]","By the river, there is ""Alimentum""."
"name[Zizzi], food[Thai]",Zizzi is Thai.

"name[Alimentum], area[riverside]",Alimentum is by the river.
"""


def test_pairs_of_the_same_source_make_one_sample(tmp_path):
    (tmp_path / "e2e.csv").write_text(E2E)
    with gzip.open(tmp_path / "e2e.tsv.gz", "wt") as file:
        file.write("mr\tref\nname[Zizzi], food[Thai]\tZizzi isn't \"Thai\n")
    rows = [{"source": "a", "target": "b"}, {"source": "c", "target": "d"}, {"source": "a", "target": "e"}]
    write_jsonl(tmp_path / "own.jsonl", rows)
    first, second = load("pairs", path=tmp_path / "e2e.csv", source="mr", target="ref")
    assert first.text == "name[Alimentum], area[riverside]" and second.captions == ["Zizzi is Thai."]
    assert first.captions == ['By the river, there is "Alimentum".', "Alimentum is by the river."]
    (quoted,) = load("pairs", path=tmp_path / "e2e.tsv.gz", source="mr", target="ref")
    assert quoted.captions == ["Zizzi isn't \"Thai"]
    assert [(s.key, s.text, s.captions) for s in load("pairs", path=tmp_path / "own.jsonl")] == [
        ("text-00000000", "a", ["b", "e"]),
        ("text-00000001", "c", ["d"]),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (E2E.replace("ref", "text"), r"line 2: no column 'ref' \(columns: mr, text\)"),
        (E2E.replace("Zizzi is Thai.", ""), "line 3: nothing in column 'ref'"),
        (E2E.replace("Zizzi is Thai.", "Zizzi, Thai"), "line 3: 3 cells under a header of 2: 'name.Zizzi., food.Thai.'"),
        ('mr,ref\na,"b\n', "line 2: not a table"),
        ("mr,ref\n", "no row in it"),
    ],
)
def test_bad_pairs(tmp_path, text, message):
    (tmp_path / "e2e.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load("pairs", path=tmp_path / "e2e.csv", source="mr", target="ref")


def test_real_pairs(shared):
    samples = load("pairs", path=shared / "data/text/e2e.dev.csv.gz", source="mr", target="ref")
    assert (len(samples), sum(len(sample.captions) for sample in samples)) == (547, 4672)
    assert samples[0].text == "name[Alimentum], area[city centre], familyFriendly[no]"
