"""Which node has which hash slot, as a node of a cluster says."""

from __future__ import annotations

from cdc_invalidator.redis.endpoint import Address
from cdc_invalidator.redis.hashslots import read_view

INFO = b"cluster_state:ok\r\ncluster_current_epoch:7\r\n"
SLOTS = [
    [0, 2, [b"10.0.0.1", 6379, b"aa"], [b"10.0.0.9", 6379, b"dd"]],
    [4, 9000, [b"10.0.0.1", 6379, b"aa"]],
    [9001, 16383, [b"", 6380, b"bb"]],
]
# The node that answers takes in slot 6 and gives away 9001.
NODES = b"""bb 10.0.0.2:6380@16380,host myself,master - 0 0 7 connected 9001-16383 [6-<-aa] [9001->-aa]
aa 10.0.0.1:6379@16379 master - 0 0 6 connected 0-2 4-9000
"""


def test_a_watermark_is_at_home_in_the_slots_of_its_node_that_are_not_moving() -> None:
    view = read_view("10.0.0.2", INFO, SLOTS, NODES)
    assert view.homes() == {
        Address("10.0.0.1", 6379): "aa 0-2 4-5 7-9000",
        Address("10.0.0.2", 6380): "bb 9002-16383",
    }
