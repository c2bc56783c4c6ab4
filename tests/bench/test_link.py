"""The testbed's links: a lane's promises for any traffic, and a real one between two namespaces."""

from __future__ import annotations

import random
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.link import MAX_BACKLOG_S, Lane
from bench.netns import Host, hosts, why_not

DELAY_S, LOSS_RATIO, NUM_SENT = 0.05, 0.3, 400

ANSWER = """
import socket
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind(("0.0.0.0", 9000))
print("ready", flush=True)
while True:
    packet, sender = receiver.recvfrom(2048)
    receiver.sendto(packet, sender)
"""
ASK = f"""
import socket, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.connect(("10.213.0.1", 9000))
sender.settimeout(2.0)
sent, trips = {{}}, []
for number in range({NUM_SENT}):
    sent[number] = time.monotonic()
    sender.send(number.to_bytes(4, "big") * 25)
try:
    while True:
        number = int.from_bytes(sender.recv(2048)[:4], "big")
        trips.append(time.monotonic() - sent[number])
except TimeoutError:
    print(len(trips), min(trips))
"""


def lane(bytes_per_s=1e6, delay_s=0.0, loss_ratio=0.0, seed=0):
    return Lane(bytes_per_s, delay_s, loss_ratio, random.Random(seed))


def test_a_packet_arrives_after_it_is_sent_at_the_links_rate_and_has_travelled_for_the_delay():
    one = lane(bytes_per_s=1000, delay_s=0.5)
    one.send(b"a" * 100, 1.0)
    one.send(b"b" * 100, 1.0)
    assert one.next_s() == pytest.approx(1.6)
    assert one.arrived(1.55) == []
    assert one.arrived(1.65) == [b"a" * 100]
    assert one.arrived(1.75) == [b"b" * 100], "it waited for the one before it"
    assert one.next_s() == float("inf")


def test_a_packet_for_which_the_queue_is_too_long_is_dropped_and_takes_no_time():
    one = lane(bytes_per_s=1000)
    for _ in range(10):
        one.send(bytes(100), 0.0)
    waited = [time_s - 0.1 for time_s, _ in one.under_way]
    assert len(waited) == 5
    assert max(waited) == pytest.approx(MAX_BACKLOG_S)
    one.send(bytes(100), 10.0)
    assert one.free_s == pytest.approx(10.1)


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 1500)), min_size=1, max_size=60),
    st.floats(0, 0.3),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_packets_keep_their_order_and_none_is_faster_than_the_link(traffic, delay_s, loss_ratio, seed):
    one, now_s, sent = lane(1e5, delay_s, loss_ratio, seed), 0.0, []
    for number, (pause_s, size) in enumerate(traffic):
        now_s += pause_s
        sent.append((now_s, size))
        one.send(number.to_bytes(2, "big") + bytes(size), now_s)
    times = [time_s for time_s, _ in one.under_way]
    numbers = [int.from_bytes(packet[:2], "big") for packet in one.arrived(float("inf"))]
    assert times == sorted(times)
    assert numbers == sorted(set(numbers))
    for time_s, number in zip(times, numbers, strict=True):
        sent_s, size = sent[number]
        assert time_s >= sent_s + (size + 2) / 1e5 + delay_s - 1e-9


def test_the_share_of_packets_that_is_lost_is_the_one_asked_for_and_the_same_with_the_same_seed():
    left = []
    for seed in (1, 1, 2):
        one = lane(1e9, loss_ratio=LOSS_RATIO, seed=seed)
        for number in range(5000):
            one.send(number.to_bytes(2, "big"), number)
        left.append(one.arrived(float("inf")))
    assert len(left[0]) / 5000 == pytest.approx(1 - LOSS_RATIO, abs=0.02)
    assert left[0] == left[1] != left[2]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not(DELAY_S)), reason=why_not(DELAY_S))
def test_between_two_namespaces_a_round_trip_takes_twice_the_delay_and_both_ways_lose_their_share():
    with (
        hosts([Host(0.5, 1e6, DELAY_S, LOSS_RATIO)], "test-link") as (hub, node),
        subprocess.Popen([*hub, sys.executable, "-c", ANSWER], stdout=subprocess.PIPE, text=True) as answering,
    ):
        try:
            assert answering.stdout.readline().strip() == "ready"
            words = [*node, sys.executable, "-c", ASK]
            asked = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        finally:
            answering.kill()
    came, fastest_s = asked.stdout.split()
    assert float(fastest_s) >= 2 * DELAY_S
    assert int(came) / NUM_SENT == pytest.approx((1 - LOSS_RATIO) ** 2, abs=0.12)
    assert "pr0" not in [name for _, name in socket.if_nameindex()], "nothing is left here"
