"""The launcher on a node other than 0: it waits for node 0's run, checks that it is its own, and runs its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan, build_plan
from megacpp_stp.plan.diff import compare
from megacpp_stp.plan.facts import Side
from megacpp_stp.recipe import restore_recipe
from megacpp_stp.runs.attempts import find_continuation, read_run_plan
from megacpp_stp.runs.failures import first_failure
from megacpp_stp.runs.lock import launcher_lock
from megacpp_stp.runs.nodes import Follower, Offer, PeerEnd, Stopped, Superseded
from megacpp_stp.training.last_words import say
from megacpp_stp.training.torchrun import Signals, Start, stop_signals

if TYPE_CHECKING:
    from megacpp_stp.training.launcher import Launch

_MOST_SHOWN = 8


def follow(launch: Launch) -> int:
    """Wait for the run, and run this node's ranks. Creates and closes nothing of the run.

    Returns:
        As `Launch.run`.

    Raises:
        UserError: No run was offered, or not this one, or this machine cannot run it; node 0 is told.
    """
    with stop_signals() as signals:
        follower = Follower(
            launch.run_dir, rank=launch.rank, stopped=lambda: signals.caught is not None, pace=launch.pace
        )
        try:
            say(f"node {launch.rank} waits for node 0, up to {launch.pace.wait:g} s")
            while (ended := _take_part(launch, follower, signals)) is None:
                say("node 0 has begun anew: waits for what it offers now")
            status, ended_by = ended
        except Stopped:
            follower.end(status=128 + (signals.caught or 0), signal=signals.caught)
            return 128 + (signals.caught or 0)
        caught = signals.caught or (ended_by.signal if ended_by else None)
        follower.end(status=128 + caught if caught else min(abs(status), 1), signal=caught)
        if status and caught is None:
            caught = follower.signal_of_leader()
    if caught:
        return 128 + caught
    failure = first_failure(launch.run_dir) if status else None
    return (2 if failure and failure["kind"] == "user" else 1) if status else 0


def _take_part(launch: Launch, follower: Follower, signals: Signals) -> tuple[int, PeerEnd | None] | None:
    """Take what node 0 offers and run it.

    Returns:
        As `Launch.execute`; None where the offer was what a launch that was killed had left.
    """
    assert launch.node is not None
    offer = follower.await_offer(rdzv_id=launch.node.rdzv_id)
    try:
        launch = _agreed(launch, offer)
        launch.check()
    except UserError as error:
        follower.refuse(error.problem)
        raise
    with launcher_lock(launch.run_dir, node=launch.rank):
        try:
            follower.join()
        except Superseded:
            return None
        start = Start(attempt=offer.attempt, from_iteration=offer.from_iteration, rdzv_id=offer.rdzv_id)
        return launch.execute(start, signals, follower)


def expected_start(launch: Launch) -> int | None:
    """From which iteration node 0 will go on, as far as this node can tell; None where the run is complete."""
    try:
        return find_continuation(launch.run_dir, launch.plan.as_dict(), may_change=True)
    except UserError:
        return 0  # node 0 may be preparing it, and has the last word


def _agreed(launch: Launch, offer: Offer) -> Launch:
    """The launch of what is offered.

    Raises:
        UserError: It is another plan.
    """
    offered = read_run_plan(launch.run_dir)
    plan = launch.plan
    if not launch.own_plan:  # the run's, as this node's code plans it
        plan = build_plan(restore_recipe(offered["recipe"]), device=plan.device)
    if plan.digest != offer.plan_digest:
        raise UserError(
            f"node {launch.rank} has another plan than node 0:{_differences(offered, plan)}",
            field="--node-rank",
            value=launch.rank,
            fix="give all nodes the same command, the same recipe and the same version of megacpp-stp",
        )
    return replace(launch, plan=plan, from_iteration=offer.from_iteration or None)


def _differences(offered: Mapping[str, Any], plan: RunPlan) -> str:
    own = plan.as_dict()
    sides = (Side(given="", kind="plan", digest=content["digest"], plan=content) for content in (offered, own))
    found = compare(*sides)
    items = found.differences or found.labels
    lines = [f"\n  {item.path}: {item.a!r} on node 0, {item.b!r} here" for item in items]
    more = f"\n  and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
    return "".join(lines[:_MOST_SHOWN]) + more
