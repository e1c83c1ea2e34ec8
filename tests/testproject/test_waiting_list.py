"""The shop's waiting list, with processes that really run at the same time, and one that is really killed."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.testproject.shop import opened

pytestmark = pytest.mark.timeout(300)

LARGE = 4  # orders of five seats each, which wait for an approval
IN_LINE = 22


def test_seats_that_come_back_all_at_once_go_to_one_each_though_a_worker_is_killed(tmp_path: Path, database: str):
    with opened(tmp_path, database) as shop:
        seats = re.findall(r'name="seat" value="(\d+)"', httpx.get(f"{shop.url}/events/1/", trust_env=False).text)
        assert len(seats) == 24
        with shop.worker() as first:
            shop.buy("early@example.com", seats[20:])
            large = [shop.buy(f"large{n}@example.com", seats[5 * n : 5 * n + 5]) for n in range(LARGE)]
            shop.wait_for({"paid": 1, "approval": LARGE})
            with shop.worker(), ThreadPoolExecutor(6) as pool:
                # All at the same time: people join the line, the seats come back, two workers, and one of them dies.
                asked = [pool.submit(shop.wait, f"{n}@example.com") for n in range(IN_LINE // 2)]
                asked += [pool.submit(shop.cancel, order) for order in large]
                asked += [pool.submit(shop.wait, f"{n}@example.com") for n in range(IN_LINE // 2, IN_LINE)]
                asked[IN_LINE // 2].result()
                first.kill()
                for answer in asked:
                    answer.result()
                found = shop.wait_for({"paid": 1 + 20, "cancelled": LARGE, "waiting": IN_LINE - 20})

    assert {status for _, status, _ in found["tickets"]} == {"sold"}
    assert len({seat for seat, _, _ in found["tickets"]}) == 24
    holders = Counter(holder for _, _, holder in found["tickets"])
    paid = {order: seats for order, status, seats in found["orders"] if status == "paid"}
    assert {order: seats.count(",") + 1 for order, seats in paid.items()} == holders
    waiting = [order for order, status, _ in found["orders"] if status == "waiting"]
    # Those of the killed worker may just be on their way back to where they were.
    assert {found["runs"][f"order-{order}"] for order in waiting} <= {"PENDING", "RUNNING", "WAITING"}
