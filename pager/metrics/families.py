"""How a metric is said: what it is called, what it measures, which series it has. The door to prometheus_client.

The catalogue (`docs/metrics.md`), the series at start-up and the tests are all made of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "expert_pager"
_UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "0 to 1", "info": ""}


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Labels:
    """Label names, and every combination of values that a series can have."""

    names: tuple[str, ...] = ()
    series: tuple[tuple[str, ...], ...] = ((),)

    def values(self, name: str) -> list[str]:
        """Those of one label, each once, in their order."""
        at = self.names.index(name)
        return list(dict.fromkeys(series[at] for series in self.series))


def every(**values: Iterable[str]) -> Labels:
    """Every combination of the values."""
    return Labels(tuple(values), tuple(itertools.product(*values.values())))


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `name` is without prefix and `_total`; the series of an info metric are not known beforehand."""

    name: str
    kind: Kind
    meaning: str
    question: str
    labels: Labels = Labels()
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """As a query names it, without what a histogram appends."""
        suffix = {Kind.COUNTER: "_total", Kind.INFO: "_info"}.get(self.kind, "")
        return f"{PREFIX}_{self.name}{suffix}"

    @property
    def samples(self) -> tuple[str, ...]:
        """The names that its samples have in a scrape."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(self.exposed + suffix for suffix in ("_bucket", "_count", "_sum"))
        return (self.exposed,)

    @property
    def unit(self) -> str:
        return _UNITS.get(self.exposed.removesuffix("_total").rpartition("_")[2], "1")


class Instruments:
    """The prometheus_client objects of some families in one registry, with every series there from the start."""

    def __init__(self, families: Sequence[Family], registry: CollectorRegistry) -> None:
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        for family in families:
            made = _make(family, registry)
            for values in family.labels.series if family.labels.names else ():
                made.labels(*values)
            self._made[family.name] = made

    def counter(self, name: str) -> Counter:
        found = self._made[name]
        assert isinstance(found, Counter)
        return found

    def gauge(self, name: str) -> Gauge:
        found = self._made[name]
        assert isinstance(found, Gauge)
        return found

    def histogram(self, name: str) -> Histogram:
        found = self._made[name]
        assert isinstance(found, Histogram)
        return found


def _make(family: Family, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, text, labels = f"{PREFIX}_{family.name}", family.meaning, family.labels.names
    match family.kind:
        case Kind.COUNTER:
            return Counter(name, text, labels, registry=registry)
        case Kind.HISTOGRAM:
            return Histogram(name, text, labels, buckets=family.buckets, registry=registry)
        case Kind.GAUGE:
            return Gauge(name, text, labels, registry=registry)
        case Kind.INFO:
            return Gauge(family.exposed, text, labels, registry=registry)
