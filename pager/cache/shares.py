"""The slots that tenants are guaranteed, and those that each of them has. Pure: no tensors, clocks or locks.

Every guaranteed tenant has an account of its own, and all others share one. An account has used the distinct experts
that its holdings pin, the slots promised to it, and its experts that are still arriving; an expert that two accounts
pin is paid for by both, so that neither depends on when the other lets go. The rule is

    sum over accounts of max(used, guaranteed)  <=  slots

and whatever would break it waits. So a tenant that uses less than its guarantee can have the rest at once, whoever
else is there. The experts that it let go of last, as many as its guarantee has room for, are no victims of strangers.

A guarantee that comes while strangers have the slots breaks the rule at first: then strangers get nothing more beyond
what was promised to them before, until it holds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from itertools import islice

from pager.types import ExpertKey

COMMON = ""
"""The account of all tenants that are guaranteed nothing."""

MOST_GUARANTEED = 0.9
"""The share of all slots that tenants may be guaranteed together: others have to be able to run."""


class _Account:
    """The slots of one account. `guaranteed` is 0 for the common one."""

    def __init__(self, guaranteed: int) -> None:
        self.guaranteed = guaranteed
        self.pins: Counter[ExpertKey] = Counter()
        self.reserved = 0
        self.num_arriving = 0
        self.kept: OrderedDict[ExpertKey, None] = OrderedDict()  # what it let go of and is still there, latest last

    @property
    def used(self) -> int:
        return len(self.pins) + self.reserved + self.num_arriving

    @property
    def owed(self) -> int:
        """The slots that it may still ask for under its guarantee."""
        return max(0, self.guaranteed - self.used)


class Shares:
    """The accounts of one slab. Owned by the ledger, which tells it of every pin and promise, under its lock."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._accounts: dict[str, _Account] = {COMMON: _Account(0)}
        self._asked: dict[str, int] = {}  # by tenant, in the order of their first requests
        self._num_holders: Counter[ExpertKey] = Counter()  # accounts that pin an expert
        self._num_paid_twice = 0  # pins of an account on experts that another one pins as well
        self._arriving: dict[ExpertKey, str] = {}  # being read and pinned by nobody: whose they are

    @property
    def is_any_guaranteed(self) -> bool:
        return len(self._accounts) > 1

    def account(self, tenant: str) -> str:
        return tenant if tenant in self._accounts else COMMON

    def guaranteed(self, tenant: str) -> int:
        """The slots that the tenant is guaranteed."""
        return self._accounts[self.account(tenant)].guaranteed

    def within_reach(self, tenant: str) -> int:
        """The slots that the tenant could have if nobody else asked for any."""
        own = self._accounts[self.account(tenant)]
        return self.num_slots - sum(each.guaranteed for each in self._accounts.values() if each is not own)

    def asked(self, tenant: str) -> int:
        """The slots that were asked for the tenant last."""
        return self._asked.get(tenant, 0)

    def guarantee(
        self, tenant: str, num_slots: int, holdings: Iterable[tuple[str, Collection[ExpertKey], int]]
    ) -> None:
        """Guarantees so many slots (0: none) to the tenant, or as many as may be guaranteed beside those of others.

        `holdings` are all that there are: of each its tenant, what it pins, and what is promised to it.
        """
        self._asked[tenant] = num_slots
        self._asked = {name: asked for name, asked in self._asked.items() if asked}
        left, guarantees = int(MOST_GUARANTEED * self.num_slots), {COMMON: 0}
        for name, asked in self._asked.items():  # those that asked first come first
            if slots := min(asked, left):
                guarantees[name], left = slots, left - slots
        if guarantees == {name: each.guaranteed for name, each in self._accounts.items()}:
            return
        kept = {name: each.kept for name, each in self._accounts.items()}
        self._accounts = {name: _Account(slots) for name, slots in guarantees.items()}
        for name, account in self._accounts.items():
            account.kept = kept.get(name, OrderedDict())
        self._num_holders, self._num_paid_twice = Counter(), 0
        arriving, self._arriving = self._arriving, {}
        for key, name in arriving.items():
            self._arrive(self.account(name), key)
        for owner, keys, num_reserved in holdings:
            for key in keys:
                self.pin(self.account(owner), key)
            self.promise(self.account(owner), num_reserved)

    def room(self, account: str, num_unreserved: int) -> int:
        """The slots that the account can have now, of those that nobody uses and nobody was promised.

        Less than 0 while a guarantee is younger than what others have.
        """
        owed = sum(each.owed for name, each in self._accounts.items() if name != account)
        return num_unreserved - self._num_paid_twice - owed

    def pays_for(self, account: str, key: ExpertKey, *, is_loading: bool) -> bool:
        """Tells whether pinning the expert takes a slot of the account."""
        if key in self._accounts[account].pins:
            return False
        owner = self._arriving.get(key) if is_loading else None
        return owner is None or (owner != account and self._accounts[owner].guaranteed > 0)

    def protected(self, account: str) -> set[ExpertKey]:
        """Returns what may not be evicted for the account: others' experts in slots that they are guaranteed."""
        found: set[ExpertKey] = set()
        for name, other in self._accounts.items():
            if name != account and other.owed:
                idle = (
                    key for key in reversed(other.kept) if key not in self._num_holders and key not in self._arriving
                )
                found.update(islice(idle, other.owed))
        return found

    def promise(self, account: str, num_slots: int) -> None:
        """Promises slots to the account, or takes promised ones back."""
        self._accounts[account].reserved += num_slots
        assert self._accounts[account].reserved >= 0

    def pin(self, account: str, key: ExpertKey) -> None:
        self._end_arriving(key)
        own = self._accounts[account]
        if key not in own.pins:
            self._num_holders[key] += 1
            self._num_paid_twice += self._num_holders[key] > 1
        own.pins[key] += 1
        own.kept.pop(key, None)

    def unpin(self, account: str, key: ExpertKey, *, is_loading: bool) -> None:
        """Takes back a pin; `is_loading` where the expert is still being read."""
        own = self._accounts[account]
        own.pins[key] -= 1
        if own.pins[key]:
            return
        del own.pins[key]
        self._num_paid_twice -= self._num_holders[key] > 1
        self._num_holders[key] -= 1
        if not self._num_holders[key]:
            del self._num_holders[key]
            if is_loading:
                self._arrive(account, key)
        if own.guaranteed:
            own.kept[key] = None

    def arrived(self, key: ExpertKey) -> None:
        """The expert has been read."""
        self._end_arriving(key)

    def gone(self, key: ExpertKey) -> None:
        """The expert was evicted, or will never come: whatever was pinned of it is void."""
        self._end_arriving(key)
        self._num_paid_twice -= max(0, self._num_holders.pop(key, 0) - 1)
        for account in self._accounts.values():
            account.pins.pop(key, None)
            account.kept.pop(key, None)

    def _arrive(self, account: str, key: ExpertKey) -> None:
        self._arriving[key] = account
        self._accounts[account].num_arriving += 1

    def _end_arriving(self, key: ExpertKey) -> None:
        owner = self._arriving.pop(key, None)
        if owner is not None:
            self._accounts[owner].num_arriving -= 1

    def check_integrity(self, num_unreserved: int) -> None:
        """Asserts that the sums are those of the parts, and that room is what the rule leaves."""
        accounts = self._accounts.values()
        assert self._num_holders == Counter(key for account in accounts for key in account.pins)
        assert self._num_paid_twice == sum(len(account.pins) for account in accounts) - len(self._num_holders)
        for name, account in self._accounts.items():
            assert account.num_arriving == list(self._arriving.values()).count(name)
            assert not account.kept.keys() & account.pins.keys()
        left = self.num_slots - sum(max(account.used, account.guaranteed) for account in accounts)
        assert left == num_unreserved - self._num_paid_twice - sum(account.owed for account in accounts)
