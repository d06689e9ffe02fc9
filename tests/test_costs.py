"""What trainings took: counted right, shown on a page, and part of no result."""

from types import SimpleNamespace

import pytest

from tailcal import costs, page
from tailcal.costs import Cost
from tailcal.errors import UserError

MACHINE = {"name": "CPU, 2 cores", "gpu_memory": None}


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
    seeds = {0: Cost(seconds=2.0, waited=0.5, images=300), 1: Cost(seconds=4.0, waited=0.1, images=300)}
    costs.write(tmp_path / "represent/digits_lt-ce.json", MACHINE, "disk", 2, seeds)
    costs.write(tmp_path / "calibrate/digits_lt-ce-joint.json", MACHINE, "device", 1, {0: Cost()})  # took no step
    (row,) = costs.rows(tmp_path)
    assert (row["stage"], row["cell"], row["placement"]) == ("represent", "digits_lt/ce", "disk")
    assert (row["networks"], row["at_once"], row["images"]) == (2, 2, 600)
    assert (row["seconds"], row["waited"], row["rate"]) == pytest.approx((3.0, 0.3, 100.0))


def test_the_page_says_where_images_lay_and_how_long_steps_waited(tmp_path):
    gpu = {"name": "a <GPU>", "gpu_memory": 3 * 2**30}
    costs.write(tmp_path / "represent/big-ce.json", gpu, "host", 1, {0: Cost(10.0, 1.25, 12345)})
    text = page.render_costs(costs.rows(tmp_path))
    for expected in ("big/ce", "a &lt;GPU&gt;", "12,345", ">host<", "1.25", "3.00", "1,234"):
        assert expected in text
    assert "came out of DVC's cache" in page.render_costs(costs.rows(tmp_path / "nothing"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"seeds": {}}', '{"seeds": {"0": {"second": 1}}}'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "represent/a-b.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"a-b\.json is damaged"):
        costs.rows(tmp_path)
