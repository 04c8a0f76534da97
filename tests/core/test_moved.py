"""When a moved conversation is looked after."""

from worker.core.moved import ASK_AGAIN_S, FIRST_LOOK_S, LONGEST_LOOK_S, Move

NOW = 1000.0


def test_it_is_over_where_the_row_names_the_new_partition_or_none() -> None:
    move = Move(2)
    assert [move.is_over(home) for home in (None, 1, 2)] == [True, False, True]


def test_it_asks_once_and_looks_ever_less_often() -> None:
    move = Move(2)
    now, asked, pauses = NOW, [], []
    while now < NOW + ASK_AGAIN_S:
        asked.append(move.must_ask(1, now))
        pauses.append(move.look_at - now)
        now = move.look_at
    assert asked == [True] + [False] * (len(asked) - 1)
    assert round(pauses[0], 3) == FIRST_LOOK_S
    assert max(pauses) <= LONGEST_LOOK_S + 0.001
    assert len(asked) < 30
    assert move.must_ask(1, now), "its queue may have been deleted, and the marker with it"


def test_a_row_that_has_moved_elsewhere_meanwhile_is_asked_there() -> None:
    move = Move(2)
    assert move.must_ask(1, NOW)
    assert move.must_ask(3, NOW + 0.1)
    assert not move.must_ask(3, NOW + 0.2)
    assert move.must_ask(1, NOW + 0.3)
