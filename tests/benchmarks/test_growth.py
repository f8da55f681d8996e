"""Where growth ceases to be linear, and what communication costs at worst."""

from __future__ import annotations

import pytest

from benchmarks.growth import bends, gpu_seconds, zero_efficiency


def curve(name: str, costs: dict[int, float]) -> list[dict]:
    return [{"curve": name, "size": size, "each": each} for size, each in costs.items()]


def test_a_curve_bends_where_a_position_costs_half_as_much_again():
    points = curve("straight", {1: 3.0, 2: 1.1, 4: 1.0, 8: 1.4}) + curve("bent", {1: 1.0, 2: 1.2, 4: 1.6, 8: 4.0})
    assert bends(points) == {"straight": None, "bent": 4}


def test_a_step_takes_its_flops_at_the_share_of_the_rate():
    assert gpu_seconds(1e9, 1000, 0.5, 1e12) == pytest.approx(12.0)


def test_communication_grows_with_gpus_and_stage():
    # 1e9 parameters, stage 2: 2 x 2 bytes x 7 / 8 through NVLink take 7.8 ms.
    assert zero_efficiency(8, 2, 1e9, 1.0) == pytest.approx(1 / (1 + 3.5e9 / 450e9))
    assert zero_efficiency(1, 3, 1e9, 1.0) == 1
    shares = [zero_efficiency(n, stage, 1e9, 1.0) for stage in (2, 3) for n in (8, 64, 1024)]
    assert shares[0] > shares[1] > shares[2] > shares[5] and all(a > b for a, b in zip(shares, shares[3:]))
