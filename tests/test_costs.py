"""What trainings took: counted right, shown on a page, and part of no result."""

from types import SimpleNamespace

import pytest

from tailcal import costs, page
from tailcal.costs import Cost
from tailcal.errors import UserError

MACHINE = {"name": "CPU, 2 cores", "gpu_memory": None}
GPU = {"name": "a <GPU>", "gpu_memory": 3 * 2**30}


def test_waiting_counts_the_time_until_each_batch_is_there_and_no_other(monkeypatch):
    now = 0
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now))

    def slow():
        nonlocal now
        for number in range(3):
            now += 2
            yield number

    cost, seen = Cost(), []
    for batch in cost.waiting(slow()):
        seen.append(batch)
        now += 5
    assert seen == [0, 1, 2]
    assert cost.waited == 3 * 2


def test_a_row_sums_images_and_averages_over_networks(tmp_path):
    seeds = {0: Cost(2.0, 0.5, 300, MACHINE, "disk", 2), 1: Cost(4.0, 0.1, 300, MACHINE, "disk", 2)}
    costs.write(tmp_path / "represent/digits_lt-ce.json", seeds)
    costs.write(tmp_path / "calibrate/digits_lt-ce-joint.json", {0: Cost()})  # took no step
    (row,) = costs.rows(tmp_path)
    assert (row["stage"], row["cell"], row["placement"]) == ("represent", "digits_lt/ce", "disk")
    assert (row["networks"], row["at_once"], row["images"]) == (2, "2", 600)
    assert (row["seconds"], row["waited"], row["rate"]) == pytest.approx((3.0, 0.3, 100.0))
    assert (row["machine"], row["gpu_memory"]) == ("CPU, 2 cores", None)


def test_a_row_of_networks_that_were_trained_in_different_ways_says_each(tmp_path):
    smaller = GPU | {"gpu_memory": 2**30}
    seeds = {0: Cost(2.0, 0.5, 300, MACHINE, "disk", 1), 1: Cost(4.0, 0.1, 300, GPU, "host", 3)}
    costs.write(tmp_path / "represent/a-b.json", seeds | {2: Cost(3.0, 0.3, 300, smaller, "host", 3)})
    (row,) = costs.rows(tmp_path)
    assert (row["machine"], row["placement"], row["at_once"]) == ("CPU, 2 cores, a <GPU>", "disk, host", "1, 3")
    assert row["gpu_memory"] == 3 * 2**30


def test_what_is_written_is_read_again(tmp_path):
    cost = Cost(2.00049, 0.50051, 300, MACHINE, "disk", 2)
    costs.write(tmp_path / "a.json", {7: cost, 0: Cost()})
    assert costs.read(tmp_path / "a.json") == {7: Cost(2.0, 0.501, 300, MACHINE, "disk", 2), 0: Cost()}


def test_the_page_says_where_images_lay_and_how_long_steps_waited(tmp_path):
    costs.write(tmp_path / "represent/big-ce.json", {0: Cost(10.0, 1.25, 12345, GPU, "host", 1)})
    text = page.render_costs(costs.rows(tmp_path))
    for expected in ("big/ce", "a &lt;GPU&gt;", "12,345", ">host<", "1.25", "3.00", "1,234"):
        assert expected in text
    assert "came out of DVC's cache" in page.render_costs(costs.rows(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"seeds": {}}', '{"0": {"second": 1}}', '{"x": {}}', '{"0": {"images": 1}}']
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "represent/a-b.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"a-b\.json is damaged"):
        costs.rows(tmp_path)
