"""How the launchers of several nodes meet, watch each other and end, through files alone."""

import json
import threading
import time
from dataclasses import replace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.runs import nodes
from megacpp_stp.runs.lock import launcher_lock
from megacpp_stp.runs.nodes import Follower, Leader, Pace, PeerEnd, Stopped, Superseded

FAST = Pace(wait=5.0, look=0.0, beat=0.02, dead=0.4, end=0.5)
FACTS = {"plan_digest": "abc", "rdzv_id": "run-1", "from_iteration": 0, "attempt": 1}


def never():
    return False


def leader(directory, nodes=2, pace=FAST, stopped=never):
    return Leader(directory, nodes=nodes, stopped=stopped, pace=pace)


def follower(directory, rank=1, pace=FAST, stopped=never):
    return Follower(directory, rank=rank, stopped=stopped, pace=pace)


def together(*calls):
    """Call all at once; what each returned or raised."""
    found = [None] * len(calls)

    def call(place):
        try:
            found[place] = calls[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def started(directory, nodes=2, pace=FAST):
    """All of them, running."""
    first = leader(directory, nodes, pace)
    others = [follower(directory, rank, pace) for rank in range(1, nodes)]

    def lead():
        first.offer(**FACTS)
        first.gather()

    def join(other):
        other.await_offer(rdzv_id=None)
        other.join()

    assert together(lead, *(lambda other=other: join(other) for other in others)) == [None] * nodes
    return first, others


def watched(node, seconds=2.0):
    """What `watch` says first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (end := node.watch()) is not None:
            return end
        time.sleep(0.01)
    return None


def test_three_nodes_meet_run_and_end(tmp_path):
    first, others = started(tmp_path, nodes=3)
    for other in others:
        other.end(status=0, signal=None)
    assert first.watch() is None  # a good end is no failure
    first.end(status=0, signal=None)
    assert first.others() == {rank: PeerEnd(node=rank, status=0) for rank in (1, 2)}
    assert others[0].signal_of_leader() is None


def test_an_offer_says_what_will_run(tmp_path):
    first = leader(tmp_path)
    first.offer(**FACTS)
    offer = follower(tmp_path).await_offer(rdzv_id="run-1")
    assert (offer.plan_digest, offer.rdzv_id, offer.from_iteration, offer.attempt) == ("abc", "run-1", 0, 1)


@pytest.mark.parametrize("state", ["ended", "refused", "running"])
def test_a_run_that_is_not_on_offer_is_not_taken(tmp_path, state):
    """An old directory of the same name."""
    first = leader(tmp_path)
    first.offer(**FACTS)
    path = tmp_path / "nodes" / "0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))
    with pytest.raises(UserError, match="did not offer"):
        follower(tmp_path, pace=Pace(wait=0.3)).await_offer(rdzv_id=None)
    assert [path.name for path in (tmp_path / "nodes").iterdir()] == ["0.json"]


def test_another_rendezvous_is_not_taken(tmp_path):
    leader(tmp_path).offer(**FACTS)
    with pytest.raises(UserError, match="--rdzv-id other"):
        follower(tmp_path, pace=Pace(wait=0.3)).await_offer(rdzv_id="other")


def test_an_answer_to_an_earlier_launch_does_not_count(tmp_path):
    started(tmp_path)
    again = leader(tmp_path, pace=Pace(wait=0.3))
    again.offer(**FACTS)
    with pytest.raises(UserError, match="node 1 did not come"):
        again.gather()


def test_a_refusal_is_told_to_node_0_and_node_0_tells_the_rest(tmp_path):
    first, good, bad = leader(tmp_path, 3), follower(tmp_path, 1), follower(tmp_path, 2)
    first.offer(**FACTS)

    def lead():
        try:
            first.gather()
        except UserError as error:
            first.refuse(error.problem)
            raise

    def refuse():
        bad.await_offer(rdzv_id=None)
        bad.refuse("no such data")

    def join():
        good.await_offer(rdzv_id=None)
        good.join()

    led, joined, refused = together(lead, join, refuse)
    assert refused is None
    assert "node 2 refused: no such data" in str(led)
    assert "node 0 gave up: node 2 refused" in str(joined)


def test_two_launchers_that_are_the_same_node_do_not_both_start(tmp_path):
    first, one, two = leader(tmp_path), follower(tmp_path), follower(tmp_path)
    first.offer(**FACTS)
    for other in (one, two):
        other.await_offer(rdzv_id=None)

    def lead():
        time.sleep(0.4)  # both have answered
        first.gather()

    def join_later():
        time.sleep(0.1)  # in one process, both would write through the same temporary file
        two.join()

    found = together(lead, one.join, join_later)
    assert found[0] is None
    assert sorted(str(error) for error in found[1:]).count("None") == 1
    assert any("another launcher has joined as this node" in str(error) for error in found[1:])


def test_a_signal_ends_the_wait(tmp_path):
    first = leader(tmp_path, stopped=lambda: True)
    first.offer(**FACTS)
    with pytest.raises(Stopped):
        first.gather()
    with pytest.raises(Stopped):
        follower(tmp_path / "nothing", stopped=lambda: True).await_offer(rdzv_id=None)


def test_a_launcher_without_a_part_in_a_launch_says_nothing(tmp_path):
    """Ctrl-C while it waits for an offer: there may be no directory, or another launcher that is this node."""
    idle = follower(tmp_path / "nothing", stopped=lambda: True)
    with pytest.raises(Stopped):
        idle.await_offer(rdzv_id=None)
    idle.end(status=130, signal=2)
    assert not (tmp_path / "nothing").exists()
    first, (other,) = started(tmp_path)
    second = follower(tmp_path, stopped=lambda: True)
    with pytest.raises(Stopped):
        second.await_offer(rdzv_id=None)
    second.end(status=130, signal=2)
    assert first.watch() is None and other.watch() is None


def test_what_a_killed_launch_left_on_offer_is_given_up_for_the_next(tmp_path):
    leader(tmp_path).offer(**FACTS)  # and killed
    again, other, taken = leader(tmp_path), follower(tmp_path), []

    def lead():
        time.sleep(0.3)
        again.offer(**{**FACTS, "attempt": 2})
        again.gather()

    def join():
        while True:
            taken.append(other.await_offer(rdzv_id=None).attempt)
            try:
                return other.join()
            except Superseded:
                other.end(status=1, signal=None)  # of no launch now

    assert together(lead, join) == [None, None]
    assert taken == [1, 2]
    assert again.watch() is None and other.watch() is None


def test_a_failure_is_seen_by_all(tmp_path):
    first, (one, two) = started(tmp_path, nodes=3)
    two.end(status=143, signal=15)
    assert watched(first) == PeerEnd(node=2, status=143, signal=15)
    assert one.watch() is None  # it watches node 0 alone
    first.end(status=143, signal=15)
    assert watched(one) == PeerEnd(node=0, status=143, signal=15)


def test_silence_is_death_and_signs_of_life_are_not(tmp_path):
    first, (other,) = started(tmp_path)
    deadline = time.monotonic() + 2 * FAST.dead
    while time.monotonic() < deadline:
        assert first.watch() is None and other.watch() is None
        time.sleep(0.01)
    assert watched(first) == PeerEnd(node=1, status=None)  # the other no longer calls
    assert first.others() == {1: PeerEnd(node=1, status=None)}


def test_nobody_waits_for_a_node_that_is_dead_to_end(tmp_path):
    first, (one, two) = started(tmp_path, nodes=3, pace=replace(FAST, end=60.0))
    assert watched(first) == PeerEnd(node=1, status=None)
    two.end(status=1, signal=None)
    assert watched(first) in (PeerEnd(node=1, status=None), PeerEnd(node=2, status=1))
    began = time.monotonic()
    assert first.others() == {1: PeerEnd(node=1, status=None), 2: PeerEnd(node=2, status=1)}
    assert time.monotonic() - began < 30


def test_a_run_is_on_offer_until_it_runs(tmp_path):
    assert not nodes.is_on_offer(tmp_path)
    first = leader(tmp_path)
    first.offer(**FACTS)
    assert nodes.is_on_offer(tmp_path)
    first.refuse("no data")
    assert not nodes.is_on_offer(tmp_path)


def test_a_file_system_that_fails_for_a_moment_costs_a_beat(tmp_path, monkeypatch):
    first, (other,) = started(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(nodes, "write_json", full)
        time.sleep(2 * FAST.beat)
        assert first.watch() is None
    time.sleep(2 * FAST.beat)
    assert first.watch() is None and other.watch() is None


def test_whoever_takes_the_directory_ends_an_older_launch(tmp_path):
    _, (other,) = started(tmp_path, pace=replace(FAST, dead=60.0))
    leader(tmp_path).offer(**FACTS)
    assert watched(other) == PeerEnd(node=0, status=None)


def test_each_node_has_a_lock_of_its_own(tmp_path):
    with launcher_lock(tmp_path), launcher_lock(tmp_path, node=1), launcher_lock(tmp_path, node=2):
        with pytest.raises(UserError, match="going on there"), launcher_lock(tmp_path, node=2):
            pass
        with pytest.raises(UserError, match="going on there"), launcher_lock(tmp_path):
            pass
