"""The table of families: complete, of this checkout, and honest about failures."""

from __future__ import annotations

import pytest
import torch
from conftest import CHECKOUT

from benchmarks import parity
from benchmarks.families import FAMILIES, Decoder, Speech, TimmTower
from metalm.interop import decoders

BY_NAME = {family.name: family for family in FAMILIES}


def test_every_family_of_decoders_has_a_row():
    assert {one.family.lower() for one in FAMILIES if isinstance(one, Decoder)} == {
        name.partition("_")[0] for name in decoders.FAMILIES
    }
    assert len(BY_NAME) == len(FAMILIES)


def test_the_readmes_table_is_the_commands():
    """The same families in their order; run `make parity` where it is not so."""
    text = (CHECKOUT / "README.md").read_text().partition(parity.START)[2].partition(parity.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [(family.name, family.kind) for family in FAMILIES]
    for row, family in zip(rows, FAMILIES, strict=True):
        assert row[2:4] == ["yes", f"yes ({family.format})"] and float(row[4]) <= parity.TOLERANCE
        assert row[5] == ("yes" if isinstance(family, Decoder) else "")


@pytest.mark.parametrize("name", ["Qwen3", "ResNet", "EVA", "wav2vec 2.0"])
def test_a_family_is_measured_from_its_files(name):
    found = parity.measure(BY_NAME[name])
    assert found.holds and found.builds and found.loads, found
    assert found.same_text is (True if name == "Qwen3" else None)


class Perturbed(TimmTower):
    def load(self, folder):
        ours = super().load(folder)
        with torch.no_grad():
            ours.model.layer1[0].conv1.weight += 1e-3
        return ours


class Forgetful(Decoder):
    """Reads as it should, and then writes otherwise."""

    def same_text(self, theirs, ours):
        with torch.no_grad():
            ours.decoder.transformer.blocks[0].mlp.down.weight.mul_(-1)
        return super().same_text(theirs, ours)


class Torn(Speech):
    def save(self, theirs, folder):
        (folder / "model.pth").write_bytes(b"torn")


BROKEN = [
    Perturbed("ResNet", "resnet18", 64),
    Forgetful("Qwen3", "Qwen3", BY_NAME["Qwen3"].shape),
    Torn("wav2vec 2.0", "wav2vec2_model", BY_NAME["wav2vec 2.0"].shape),
    TimmTower("Swin", "swin_tiny_patch4_window7_224", 224),
]


def test_what_does_not_hold_is_a_failure(monkeypatch, capsys, tmp_path):
    """A wrong weight, another text, a torn file, a tower that METALM cannot read: each said in its own cell."""
    monkeypatch.setattr(parity, "FAMILIES", BROKEN)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{parity.START}\nold\n{parity.END}\nafter\n")
    assert parity.main(["--write", str(page)]) == 1
    out, err = capsys.readouterr()
    assert "parity fails: ResNet, Qwen3, wav2vec 2.0, Swin" in err
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in out.splitlines() if line[:2] == "| "}
    assert lines["ResNet"][4].endswith("(too large)") and float(lines["ResNet"][4].split()[0]) > parity.TOLERANCE
    assert float(lines["Qwen3"][4]) <= parity.TOLERANCE and lines["Qwen3"][5] == "no"
    assert lines["wav2vec 2.0"][2] == "yes" and lines["wav2vec 2.0"][3].startswith("no: ")
    assert lines["Swin"][2].startswith("no: ConfigError: timm model 'swin_tiny_patch4_window7_224' gives no patch states")
    text = page.read_text()
    assert text.startswith(f"before\n{parity.START}\n| family |") and text.endswith(f"|\n{parity.END}\nafter\n")
    assert "old" not in text


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="there must be a place for the table"):
        parity.put("nothing here", "a table")
