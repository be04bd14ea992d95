"""The benchmarks of the server and of fleets in miniature."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import fleet, serving, serving_load

TINY = str(Path(__file__).parents[1] / "fixtures" / "tiny-sd")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.slow
def test_a_server_beside_other_ways(tmp_path):
    pytest.importorskip("fastapi")
    config = serving.BenchmarkConfig(TINY, TINY, requests=2, steps=1, max_batch=2, repeats=1)  # with random weights
    figures = serving.measure(config, tmp_path)
    speeds, ratios = figures["images_per_minute"], figures["throughput_of_engine_over_fixed_batch"]
    assert len(speeds) == 9 and min(speeds.values()) > 0
    assert ratios["8"] == pytest.approx(speeds["engine/8"] / speeds["fixed/8"], rel=0.01)
    assert figures["latency"]["load 0.9"]["p95"] >= figures["latency"]["load 0.9"]["p50"] >= 0


@pytest.mark.slow
def test_a_server_under_load_with_faults(tmp_path):
    pytest.importorskip("fastapi")
    config = serving_load.BenchmarkConfig(TINY, concepts=3, warm_up=10, requests=50, parts=1, clients=4)
    figures = serving_load.measure(config, tmp_path)
    outcomes = figures["outcomes"]
    asked = 40 - outcomes.pop("deleted before they were asked for", 0)
    assert outcomes == {"bad requests refused": 5, "clients that left": 5, "right images": asked}
    assert figures["engine runs"] and figures["jobs"]["failed"] == 0 and len(figures["later"]) == 1


def test_a_server_ends_with_what_uses_it(tmp_path):
    pytest.importorskip("fastapi")
    with (
        pytest.raises(RuntimeError, match="of the client"),
        serving_load.running(serving_load.BenchmarkConfig(TINY), tmp_path) as (_, engine),
    ):
        raise RuntimeError("of the client")
    assert not engine.is_running


def test_the_queue_of_a_fleet(tmp_path):
    output = shutil.copy(RESULTS / "fleet.json", tmp_path)  # which has the recorded times
    fleet.main(fleet.BenchmarkConfig(("queue",), queue_subjects=20, queue_workers=(1, 2), output=str(output)))
    figures = json.loads(Path(output).read_text())["figures"]
    one, two = figures["none_1_workers"], figures["none_2_workers"]
    assert 1.5 < one["makespan_hours"] / two["makespan_hours"] < 2.01 and 0.9 < two["utilization"] <= 1
    assert one["subjects_given_up"] == 0
