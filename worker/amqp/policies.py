"""Which policies of a broker could lose or reorder commands. Pure: from the policies as the management API lists them.

A policy changes what a queue does whatever it was declared with, and nothing that AMQP shows betrays it. Which one is
in effect is worked out here, by the broker's rules, rather than read off the queues: what the management API says of
a queue's policy is statistics, five seconds old, missing for ten after it was declared, and for good where statistics
are off; of an exchange it only names the policy.

    delivery-limit, message-ttl, expires, max-length     the lower of policy and argument holds, or whichever there is
    overflow                                             the policy goes before the argument
    dead-letter-exchange, -strategy, alternate-exchange  the argument goes before the policy: harmless where we have one
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import regex

from schemas import routes
from worker.amqp import topology

Definition = Mapping[str, object]

CONSUMER_TIMEOUT_MS = 60_000
"""A command may lie unacknowledged for a call (AVATAR_TIMEOUT_S, 10 s), while a listener refuses its event
(EVENT_RETRY_S, 30 s) and while the store is away; more than a minute of that is rare."""

_FOR_QUEUES = {"all", "queues", "quorum_queues"}
_FOR_EXCHANGES = {"all", "exchanges"}
_NOT_FOR_QUORUM_QUEUES = {
    *("max-priority", "queue-mode", "single-active-consumer", "queue-master-locator"),
    *("ha-mode", "ha-params", "ha-sync-mode", "ha-promote-on-shutdown", "ha-promote-on-failure"),
    *("max-age", "stream-max-segment-size-bytes", "initial-cluster-size"),
    *("selector-fields", "selector-field-max-bytes"),
}
"""A policy with any of these is not applied to a quorum queue at all."""
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy, or an `operator` policy, which is applied on top of one."""

    name: str
    pattern: str
    apply_to: str
    definition: Definition
    priority: int = 0
    operator: bool = False


@dataclass(frozen=True, slots=True)
class Harm:
    """What a key of a policy does to the queues or exchanges of these `names`."""

    policy: Policy
    key: str
    why: str
    names: tuple[str, ...]

    def told(self, vhost: str) -> str:
        """What is wrong, and the command that mends it."""
        more = len(self.names) - _SHOWN
        names = ", ".join(self.names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        clear = "clear_operator_policy" if self.policy.operator else "clear_policy"
        return (
            f"{self.key}={self.policy.definition[self.key]} on {names}: {self.why}; run `rabbitmqctl {clear} -p "
            f"{shlex.quote(vhost)} {shlex.quote(self.policy.name)}`, or change its pattern {self.policy.pattern}"
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """`harms` says whether a value does, in a definition that is as a whole like that, on what is `on` the list."""

    key: str
    on: frozenset[str]
    harms: Callable[[object, Definition], bool]
    why: str


_PARTITION, _KEPT, _ENTRY, _HASH = "partition queue", "other queue", "exchange", "hash exchange"
_PARTITIONS, _OTHERS = frozenset({_PARTITION}), frozenset({_KEPT})
_QUEUES = _PARTITIONS | _OTHERS
_ALL = _QUEUES | {_ENTRY, _HASH}


def _always(_: object, __: Definition) -> bool:
    return True


def _below(limit: int) -> Callable[[object, Definition], bool]:
    # Below zero there is no limit, from RabbitMQ 4.0 on; before, no policy can say so.
    return lambda value, _: isinstance(value, int | float) and 0 <= value < limit


def _drops_when_full(_: object, whole: Definition) -> bool:
    return whole.get("overflow") != "reject-publish"


def _has_it_drop(value: object, whole: Definition) -> bool:
    return value == whole["overflow"] != "reject-publish"


def _delays(value: object, _: Definition) -> bool:
    return value != "disabled"


_DROPPED = "a full queue drops its oldest messages"
_MIXED = "commands of another broker are mixed in, in no order with those published here"
_RULES = (
    _Rule(
        "delivery-limit",
        _QUEUES,
        _below(topology.DELIVERY_LIMIT),
        "each close of a channel counts as a delivery, so messages are given up that nobody has tried",
    ),
    _Rule("message-ttl", _QUEUES, _always, "what waits for longer is given up unspoken, or vanishes"),
    _Rule("expires", _QUEUES, _always, "unused for so long, the queue is deleted with all that is in it"),
    _Rule(
        "overflow",
        _PARTITIONS,
        _has_it_drop,
        "it goes before what was declared: a full queue drops commands, and what the broker gives up may get lost",
    ),
    _Rule("max-length", _OTHERS, _drops_when_full, _DROPPED),
    _Rule("max-length-bytes", _OTHERS, _drops_when_full, _DROPPED),
    _Rule(
        "dead-letter-routing-key",
        _PARTITIONS,
        _always,
        "what the broker gives up is taken for a command of the conversation of that name",
    ),
    _Rule(
        "consumer-timeout",
        _QUEUES,
        _below(CONSUMER_TIMEOUT_MS),
        "the broker ends the connection of a worker that waits for the API, the store or a listener, again and again",
    ),
    _Rule("delayed-retry-type", _QUEUES, _delays, "what a worker gives back comes behind what is newer"),
    _Rule("federation-upstream", _ALL, _always, _MIXED),
    _Rule("federation-upstream-set", _ALL, _always, _MIXED),
    _Rule("federation-upstream-pattern", _ALL, _always, _MIXED),
    _Rule("shards-per-node", frozenset({_HASH}), _always, "commands go to queues that no worker consumes"),
)


def harms(policies: Sequence[Policy], partitions: int) -> list[Harm]:
    """What these do on a broker with so many partitions: one for each policy and key that do harm."""
    found: dict[tuple[str, bool, str], Harm] = {}
    for name, role in _ours(partitions):
        for policy, rule in _harmful(in_effect(policies, name, queue=role in _QUEUES), role):
            at = (policy.name, policy.operator, rule.key)
            harm = found.setdefault(at, Harm(policy, rule.key, rule.why, ()))
            if name not in harm.names:
                found[at] = replace(harm, names=(*harm.names, name))
    return list(found.values())


def in_effect(policies: Sequence[Policy], name: str, *, queue: bool) -> list[tuple[Policy, ...]]:
    """The policies in effect on a queue, or else an exchange, of that name: a policy, an operator policy, both or none.

    More than one answer where several have the same priority: which of them holds is left to chance.
    """
    applied = [policy for policy in policies if _applies(policy, name, queue=queue)]
    layers: list[list[Policy] | list[None]] = []
    for operator in (False, True):
        layer = [policy for policy in applied if policy.operator is operator]
        highest = max((policy.priority for policy in layer), default=0)
        layers.append([policy for policy in layer if policy.priority == highest] or [None])
    return [tuple(policy for policy in chosen if policy is not None) for chosen in product(*layers)]


def _harmful(possible: list[tuple[Policy, ...]], role: str) -> Iterator[tuple[Policy, _Rule]]:
    for policies in possible:
        whole = {key: value for policy in policies for key, value in policy.definition.items()}
        for policy, rule in product(policies, _RULES):
            if role in rule.on and rule.key in policy.definition and rule.harms(policy.definition[rule.key], whole):
                yield policy, rule


def _applies(policy: Policy, name: str, *, queue: bool) -> bool:
    if policy.apply_to not in (_FOR_QUEUES if queue else _FOR_EXCHANGES):
        return False
    if queue and not _NOT_FOR_QUORUM_QUEUES.isdisjoint(policy.definition):
        return False
    try:
        return regex.search(policy.pattern, name) is not None
    except regex.error:
        return True  # the broker's patterns know a little more: better to name one too many


def _ours(partitions: int) -> Iterator[tuple[str, str]]:
    """Each queue and exchange that commands pass or lie in, and what it is."""
    yield from ((name, _PARTITION) for name in map(routes.partition_queue, range(partitions)))
    yield from ((name, _KEPT) for name in (routes.PARKED, routes.DEAD, topology.RECORD))
    yield from ((name, _ENTRY) for name in (routes.COMMANDS, routes.INTERRUPTS, routes.DEAD))
    yield topology.HASH, _HASH
