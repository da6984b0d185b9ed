"""A trouble that lasts is logged when it begins, when it changes, and once a minute."""

from __future__ import annotations

import threading

from mqtt_bridge.complaints import REMEMBERED, REPEAT_S, Complaint


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_trouble_is_news_once():
    complaint = Complaint(Clock())

    assert [complaint.is_news("gone") for _ in range(5)] == [True] + [False] * 4


def test_a_trouble_that_lasts_is_news_once_a_minute():
    clock = Clock()
    complaint = Complaint(clock)
    news = []

    for clock.now_s in range(0, 181, 10):
        news.append(complaint.is_news("gone"))

    assert news.count(True) == 4
    assert REPEAT_S == 60


def test_another_trouble_is_news_at_once():
    complaint = Complaint(Clock())
    complaint.is_news("gone")

    assert complaint.is_news("forbidden")


def test_troubles_that_take_turns_are_news_once_each():
    complaint = Complaint(Clock())

    assert [complaint.is_news(text) for text in ("a", "b") * 5] == [True, True] + [False] * 8


def test_the_end_of_a_trouble_is_news_only_where_its_beginning_was():
    complaint = Complaint(Clock())
    assert not complaint.clear()

    complaint.is_news("gone")

    assert complaint.clear()
    assert not complaint.clear()


def test_a_trouble_that_comes_again_after_its_end_is_news_again():
    complaint = Complaint(Clock())
    complaint.is_news("gone")
    complaint.clear()

    assert complaint.is_news("gone")


def test_no_number_of_different_troubles_uses_up_the_memory():
    complaint = Complaint(Clock())

    assert all(complaint.is_news(f"trouble {number}") for number in range(10 * REMEMBERED))

    assert len(complaint._logged_s) <= REMEMBERED


def test_one_of_many_threads_is_told_that_it_is_news():
    complaint = Complaint(Clock())
    start, told = threading.Barrier(8), []

    def ask():
        start.wait()
        told.append(complaint.is_news("gone"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert told.count(True) == 1
