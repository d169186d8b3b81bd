"""In which order the launcher sees the nodes of a run."""

from __future__ import annotations

import random
from typing import Any, cast

from llm_launch import wire
from llm_launch.roster import Roster

CHANNEL = cast(wire.Channel, object())


def joined(order: list[str], arrivals: list[str], switches: dict[str, str]) -> list[str]:
    roster = Roster(order=order)
    for name in arrivals:
        hello: dict[str, Any] = {"node": name, "host": "h", "devices": [0], "copies": ["h", 1], "pid": 1}
        roster.join({**hello, "switches": switches.get(name, "")}, CHANNEL)
    return [node.name for node in roster.alive()]


def test_nodes_are_in_the_order_of_the_list_of_hosts() -> None:
    """Whatever the order in which they join; one that was not expected comes last, one that is lost leaves a gap."""
    hosts = [f"n{number}" for number in range(1, 13)]
    arrivals = random.Random(0).sample(hosts, 12)
    assert joined(hosts, arrivals, {}) == hosts
    assert joined(hosts, ["stranger", *arrivals], {}) == [*hosts, "stranger"]
    assert joined(hosts, [name for name in arrivals if name != "n5"], {}) == [name for name in hosts if name != "n5"]


def test_nodes_of_a_switch_are_side_by_side() -> None:
    """On both levels of a network; switches, and the nodes of each, in the order of the list of hosts."""
    switches = {"n1": "s.b", "n2": "t.c", "n3": "s.a", "n4": "s.b", "n5": "t.c", "n6": "s.a"}
    hosts = list(switches)
    assert joined(hosts, hosts[::-1], switches) == ["n1", "n4", "n3", "n6", "n2", "n5"]
