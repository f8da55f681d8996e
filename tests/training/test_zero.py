"""DeepSpeed over processes: every ZeRO stage trains as one process does, mixed modalities never hang."""

from __future__ import annotations

import pytest
from processes import STAGES, launch


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict:
    return launch(1, tmp_path_factory.mktemp("zero") / "one.json", STAGES[:1])["zero0"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict:
    return launch(2, tmp_path_factory.mktemp("zero") / "two.json", STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does_although_one_has_images_and_the_other_only_text(stage, one_process, two_processes):
    assert two_processes[stage]["targets"] == one_process["targets"]
    assert two_processes[stage]["losses"] == pytest.approx(one_process["losses"], rel=1e-5)
    assert one_process["losses"][-1] < one_process["losses"][0] - 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_whole_weights_are_gathered_and_equal(stage, one_process, two_processes):
    assert two_processes[stage]["whole"]
    assert two_processes[stage]["weights"] == pytest.approx(one_process["weights"], rel=1e-5)


def test_one_process_may_have_pictures_and_the_other_stored_states(tmp_path):
    """Under ZeRO-3 both gather the frozen encoder's weights, in every step and for its fingerprint."""
    one = launch(1, tmp_path / "one.json", ("zero0-stored",))["zero0-stored"]
    two = launch(2, tmp_path / "two.json", ("zero2-stored", "zero3-stored"))
    for found in two.values():
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5) and found["targets"] == one["targets"]
        assert found["weights"] == pytest.approx(one["weights"], rel=1e-5) and found["whole"] and one["whole"]
    assert one["losses"][-1] < one["losses"][0]
