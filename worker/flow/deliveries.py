"""The broker's side of what a runner has, which the core only passes on."""

from dataclasses import dataclass
from typing import cast

from worker.core.model import Entry, Marker
from worker.ports import Delivery, KeepableDelivery, Tenure


@dataclass(frozen=True, slots=True)
class ExpressDelivery:
    """`ports.Delivery` of an express copy: there is nothing to acknowledge."""

    tenure: Tenure

    async def settle(self) -> bool:
        """Nothing to do."""
        return True


def delivery_of(one: Entry | Marker) -> Delivery:
    """The broker's side of it."""
    return cast(Delivery, one.delivery)  # isinstance of a protocol costs as much as all else that is done here


def tenure_of(one: Entry | Marker) -> Tenure:
    """The ownership it was delivered under."""
    return delivery_of(one).tenure


def keepable(entry: Entry) -> KeepableDelivery:
    """The same, of an entry that did not come express."""
    return cast(KeepableDelivery, entry.delivery)
