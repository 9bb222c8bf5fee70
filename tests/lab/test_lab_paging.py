"""What a cache of one pool's size reads from document to document."""

from __future__ import annotations

from pager.lab.report import experts_read
from pager.types import ExpertPool


def pool(*experts: int) -> ExpertPool:
    return ExpertPool((experts, (0, 1)))


def test_what_the_last_document_had_is_not_read_again() -> None:
    assert experts_read([pool(1, 2), pool(1, 2), pool(2, 3), pool(7, 8)], num_slots=4) == [4, 0, 1, 2]


def test_with_room_for_all_every_expert_is_read_once() -> None:
    pools = [pool(1, 2), pool(3, 4), pool(1, 2), pool(3, 4)]
    assert experts_read(pools, num_slots=6) == [4, 2, 0, 0]
    assert experts_read(pools, num_slots=4) == [4, 2, 2, 2]


def test_the_least_recent_goes_first() -> None:
    three = [ExpertPool(((1,),)), ExpertPool(((2,),)), ExpertPool(((1,),)), ExpertPool(((3,),)), ExpertPool(((1,),))]
    assert experts_read(three, num_slots=2) == [1, 1, 0, 1, 0]
