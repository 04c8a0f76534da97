"""Which policies of a broker do harm, and to what. Whether the broker sees them so, an integration test looks at."""

import pytest

from worker.amqp.policies import CONSUMER_TIMEOUT_MS, Harm, Policy, harms, in_effect

P00, P01 = "avatar.commands.v1.p00", "avatar.commands.v1.p01"
KEPT = ("avatar.parked", "avatar.dead", "avatar.topology")
QUEUES = (P00, P01, *KEPT)
ENTRIES = ("avatar.commands", "avatar.interrupts", "avatar.dead")
HASH = "avatar.commands.v1.hash"
ALL = (*QUEUES, "avatar.commands", "avatar.interrupts", HASH)


def policy(
    name: str = "p", *, pattern: str = "^avatar", to: str = "all", rank: int = 0, **definition: object
) -> Policy:
    return Policy(name, pattern, to, {key.replace("_", "-"): value for key, value in definition.items()}, rank)


def operator(name: str = "o", *, pattern: str = "^avatar", rank: int = 0, **definition: object) -> Policy:
    definition = {key.replace("_", "-"): value for key, value in definition.items()}
    return Policy(name, pattern, "queues", definition, rank, operator=True)


def harmed(*policies: Policy) -> dict[tuple[str, str], tuple[str, ...]]:
    """What suffers, by policy and key."""
    return {(harm.policy.name, harm.key): harm.names for harm in harms(policies, 2)}


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("delivery-limit", 999_999, QUEUES),
        ("delivery-limit", 0, QUEUES),
        ("message-ttl", 86_400_000, QUEUES),
        ("expires", 86_400_000, QUEUES),
        ("overflow", "drop-head", (P00, P01)),
        ("overflow", "reject-publish-dlx", (P00, P01)),
        ("max-length", 1_000_000, KEPT),
        ("max-length-bytes", 1_000_000, KEPT),
        ("dead-letter-routing-key", "c", (P00, P01)),
        ("consumer-timeout", CONSUMER_TIMEOUT_MS - 1, QUEUES),
        ("delayed-retry-type", "returned", QUEUES),
        ("federation-upstream", "there", ALL),
        ("federation-upstream-set", "all", ALL),
        ("federation-upstream-pattern", ".*", ALL),
        ("shards-per-node", 2, (HASH,)),
    ],
)
def test_what_harms(key: str, value: object, names: tuple[str, ...]) -> None:
    (harm,) = harms([Policy("p", "^avatar", "all", {key: value})], 2)
    assert (harm.policy.name, harm.key) == ("p", key)
    assert set(harm.names) == set(names)
    assert len(harm.names) == len(names)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("delivery-limit", 1_000_000),
        ("delivery-limit", -1),
        ("overflow", "reject-publish"),
        ("consumer-timeout", CONSUMER_TIMEOUT_MS),
        ("delayed-retry-type", "disabled"),
        ("dead-letter-exchange", "elsewhere"),
        ("dead-letter-strategy", "at-most-once"),
        ("alternate-exchange", "elsewhere"),
        ("max-in-memory-length", 0),
        ("queue-leader-locator", "balanced"),
        ("target-group-size", 3),
        ("of-a-later-rabbitmq", 1),
    ],
)
def test_what_does_not(key: str, value: object) -> None:
    assert harms([Policy("p", "^avatar", "all", {key: value})], 2) == []


def test_a_limit_that_refuses_producers_loses_nothing() -> None:
    assert harmed(policy(pattern="commands", max_length=1)) == {}
    assert harmed(policy(max_length=1, overflow="reject-publish")) == {}
    assert harmed(policy(max_length=1), operator(overflow="reject-publish")) == {}


def test_what_is_not_for_our_queues_is_left_alone() -> None:
    assert harmed(policy(to="classic_queues", message_ttl=1), policy(to="streams", message_ttl=1)) == {}
    assert harmed(policy(pattern="^orders", message_ttl=1)) == {}
    assert harmed(policy(pattern="events|workers", to="exchanges", federation_upstream_set="all")) == {}
    assert harmed(policy(to="exchanges", message_ttl=1)) == {}
    assert harmed(policy(to="quorum_queues", pattern="p01$", message_ttl=1)) == {("p", "message-ttl"): (P01,)}
    assert harmed(policy(pattern="p02$", message_ttl=1)) == {}


def test_the_highest_priority_holds() -> None:
    harmless, harmful = policy("high", rank=2, max_in_memory_length=1), policy("low", rank=1, message_ttl=1)
    assert harmed(harmful, harmless) == {}
    assert harmed(policy("high", rank=2, pattern="p00", max_in_memory_length=1), harmful) == {
        ("low", "message-ttl"): (P01, *KEPT)
    }


def test_which_of_equals_holds_is_left_to_chance() -> None:
    first, second = policy("first", queue_leader_locator="balanced"), policy("second", pattern="p00", message_ttl=1)
    assert in_effect([first, second], P00, queue=True) == [(first,), (second,)]
    assert harmed(first, second) == {("second", "message-ttl"): (P00,)}


def test_a_policy_with_what_quorum_queues_do_not_know_is_none_for_them() -> None:
    mirrored, below = policy("ha", rank=9, ha_mode="all", message_ttl=1), policy("low", pattern="p00", expires=1)
    assert harmed(mirrored) == {}
    assert harmed(mirrored, below) == {("low", "expires"): (P00,)}


def test_an_operator_policy_is_on_top_of_a_policy() -> None:
    both = (policy(pattern="p00", delivery_limit=2), operator(pattern="p0", delivery_limit=3, message_ttl=1))
    assert in_effect(both, P00, queue=True) == [both]
    assert harmed(*both) == {
        ("p", "delivery-limit"): (P00,),
        ("o", "delivery-limit"): (P00, P01),
        ("o", "message-ttl"): (P00, P01),
    }


def test_the_operators_overflow_goes_before_the_policys() -> None:
    assert harmed(policy(overflow="drop-head"), operator(overflow="reject-publish")) == {}
    assert harmed(policy(overflow="reject-publish"), operator(overflow="drop-head")).keys() == {("o", "overflow")}


def test_a_pattern_that_cannot_be_read_here_may_be_about_us() -> None:
    assert harmed(policy(pattern=r"\Qavatar\E", message_ttl=1)) == {("p", "message-ttl"): QUEUES}


@pytest.mark.parametrize(
    ("found", "command"),
    [
        (policy("ttl all", message_ttl=1), "clear_policy -p / 'ttl all'"),
        (operator(message_ttl=1), "clear_operator_policy -p / o"),
    ],
)
def test_the_command_that_mends_it_is_told(found: Policy, command: str) -> None:
    (harm,) = harms([found], 40)
    told = harm.told("/")
    assert told.startswith(
        "message-ttl=1 on avatar.commands.v1.p00, avatar.commands.v1.p01, avatar.commands.v1.p02 and 40 more: "
    )
    assert f"`rabbitmqctl {command}`" in told
    assert Harm(found, "message-ttl", "why", (P00,)).told("/").startswith(f"message-ttl=1 on {P00}: why; run ")
