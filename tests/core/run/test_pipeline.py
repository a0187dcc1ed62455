import threading
import time

import pytest

from core.run.pipeline import Aborted, Pipeline


def test_items_arrive_in_order_and_the_end_is_seen():
    pipeline = Pipeline()
    numbers, received = pipeline.channel(2), []

    def produce(clock):
        for n in range(50):
            numbers.put(n, clock)
        numbers.close()

    pipeline.start("produce", produce)
    pipeline.start("consume", lambda clock: received.extend(numbers.drain(clock)))
    pipeline.join()
    assert received == list(range(50))


def test_a_full_channel_holds_its_writer_back():
    pipeline = Pipeline()
    channel, produced = pipeline.channel(2), []

    def produce(clock):
        for n in range(10):
            channel.put(n, clock)
            produced.append(n)
        channel.close()

    pipeline.start("produce", produce)
    time.sleep(0.2)
    assert produced == [0, 1]
    assert list(channel.drain(pipeline.clock("consume"))) == list(range(10))
    pipeline.join()


def test_the_first_error_stops_every_stage_and_is_raised():
    pipeline = Pipeline()
    never_read, never_written = pipeline.channel(1), pipeline.channel(1)
    aborted = threading.Barrier(3)

    def stuck_writer(clock):
        try:
            for n in range(5):
                never_read.put(n, clock)
        except Aborted:
            aborted.wait(5)
            raise

    def stuck_reader(clock):
        try:
            list(never_written.drain(clock))
        except Aborted:
            aborted.wait(5)
            raise

    def failing(clock):
        raise ValueError("broken stage")

    pipeline.start("writer", stuck_writer)
    pipeline.start("reader", stuck_reader)
    pipeline.start("failing", failing)
    aborted.wait(5)
    with pytest.raises(ValueError, match="broken stage"):
        pipeline.join()


def test_waiting_is_not_counted_as_work():
    pipeline = Pipeline()
    channel = pipeline.channel(1)

    def slow(clock):
        time.sleep(0.3)
        channel.put(1, clock)
        channel.close()

    pipeline.start("slow", slow)
    pipeline.start("idle", lambda clock: list(channel.drain(clock)))
    pipeline.join()
    assert pipeline.clock("slow").busy >= 0.29
    assert pipeline.clock("idle").busy < 0.15
    assert pipeline.clock("idle").waiting >= 0.2
