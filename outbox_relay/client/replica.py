"""What a subscriber knows of the database: no input or output, no clock, no timers.

Everything comes in through the methods that take `now`, in seconds of any clock that never goes back; each returns
the load that is to be made, if there is one. `clients/vectors.json` says what it does, step by step, and the
JavaScript helper (`clients/js/replica.js`) does the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

ANSWER_WITHIN: Final = 10.0  # a load without an answer has failed
SUSPECT_EVERY: Final = 5.0  # between two reloads for what only a full load can judge
JITTER: Final = 0.3  # at most, before everything is loaded again
COLLECT: Final = 0.05  # at most, before keys are loaded
SUBSCRIBE_WITHIN: Final = 1.0  # the first load waits no longer for the subscription
RETRY_FIRST: Final = 0.25
RETRY_LAST: Final = 5.0
KEYS: Final = 100  # in one request
KEYS_LAST: Final = 1000  # that wait at once; beyond it everything is loaded
WAITING: Final = 100  # publications of one key that wait for its load, and events of one version
MEMORY: Final = 10_000  # deleted objects that are remembered, and publications that wait for the state


class Publication(NamedTuple):
    """One event as it came. `version` is NaN where there is none; `arrival` numbers publications from 1."""

    key: str
    version: float
    data: Any
    tags: Mapping[str, str]
    arrival: int


@dataclass(frozen=True, slots=True)
class Object:
    """What is shown of one object. `old`: known to be behind the database until it has been loaded.

    `ids` are the events applied at this version; None where it was loaded: then it stands for all of them.
    """

    version: int
    data: Any
    old: bool = False
    ids: tuple[str, ...] | None = None
    arrival: int = 0


@dataclass(slots=True)
class Grave:
    """A deleted object, or one that a load did not find. `sure`: what is above its version may be shown at once."""

    version: int
    ids: tuple[str, ...] | None
    sure: bool
    arrival: int


@dataclass(slots=True)
class Wish:
    """A key that waits for its load, which has to reach `need`. `kept` is None where there was too much to keep."""

    due: float
    need: int = 0
    arrival: int = 0
    kept: list[Publication] | None = field(default_factory=list)
    tries: int = 0


class Load(NamedTuple):
    """What is to be loaded: these keys, or everything (None)."""

    id: int
    keys: tuple[str, ...] | None


class UnderWay(NamedTuple):
    """A load without an answer yet; it began after `arrival` publications."""

    load: Load
    arrival: int
    until: float


class State(NamedTuple):
    """What a load found, as (key, version, data), and the epoch of those versions."""

    objects: Iterable[tuple[str, int, Any]]
    epoch: str | None = None


@dataclass(slots=True)
class Counters:
    """What became of publications, and how often something was loaded after the first time."""

    applied: int = 0
    stale: int = 0
    duplicate: int = 0
    gaps: int = 0
    reloads: int = 0


Reduce = Callable[[Any, Any, Mapping[str, str]], Any]
"""(object, data of the change, tags) -> the new object, or None if it cannot tell: then the object is loaded."""


def id_of(tags: Mapping[str, str]) -> str:
    """The key of an event where a channel has aggregates of one type."""
    return tags["ob_id"]


class Replica:
    """See the module. `objects` is what to show; treat it as read-only."""

    def __init__(
        self,
        *,
        key_of: Callable[[Mapping[str, str]], str] = id_of,
        reduce: Reduce | None = None,
        memory: int = MEMORY,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.objects: dict[str, Object] = {}
        self.counters = Counters()
        self.epoch: str | None = None
        self._key_of = key_of
        self._reduce = reduce
        self._memory = memory
        self._chance = chance
        self._gone: dict[str, Grave] = {}
        self._wanted: dict[str, Wish] = {}
        self._unjudged: list[Publication] = []
        self._changed: set[str] = set()
        self._now = 0.0
        self._arrivals = 0
        self._subscribed = False
        self._was_subscribed = False
        self._loaded = False
        self._under_way: UnderWay | None = None
        self._loads = 0
        self._full_at: float | None = None  # None: `start` has not been called
        self._suspect_at = math.inf
        self._suspected_at = -math.inf
        self._not_before = 0.0
        self._failures = 0

    # What it tells

    @property
    def old(self) -> bool:
        """Whether the whole may be behind the database and nothing has told yet what has changed."""
        failing = self._failures > 0 and bool(self._wanted)
        return not self._subscribed or not self._loaded or failing or self._is_reloading()

    @property
    def due(self) -> float:
        """When `wake` has something to do, at the latest; infinity: not before something else happens."""
        if self._under_way is not None:
            return self._under_way.until
        return max(min(self._everything_at(), self._keys_at()), self._not_before)

    def take_changed(self) -> set[str]:
        """The keys of objects that have changed since the last call, those that are gone among them."""
        taken, self._changed = self._changed, set()
        return taken

    # What it is told

    def wake(self, now: float) -> Load | None:
        """Time has passed. To be called once at the start, and when `due` has come."""
        return self._next(now)

    def subscribed(self, now: float, *, recovered: bool) -> Load | None:
        """The subscription is up; `recovered`: with everything that was published in the meantime."""
        self._at(now)
        self._subscribed = True
        if not recovered or not self._was_subscribed:
            self._failures, self._not_before = 0, 0.0
            self._load_all(now + self._chance() * JITTER if self._was_subscribed else now)
        self._was_subscribed = True
        return self._next(now)

    def lost(self, now: float) -> Load | None:
        """The subscription is down."""
        self._at(now)
        self._subscribed = False
        return self._next(now)

    def reload(self, now: float) -> Load | None:
        """Load everything."""
        self._at(now)
        self._load_all(now)
        return self._next(now)

    def published(self, now: float, data: Any, tags: Mapping[str, str] | None) -> Load | None:
        """A publication came; one without our tags is not looked at."""
        self._at(now)
        self._receive(data, tags or {})
        return self._next(now)

    def loaded(self, now: float, id_: int, state: State) -> Load | None:
        """A load was answered. One that came too late is not heard. Raises ValueError for what is no version."""
        self._at(now)
        if self._under_way is not None and self._under_way.load.id == id_:
            self._answer(self._under_way, state)
        return self._next(now)

    def failed(self, now: float, id_: int) -> Load | None:
        """A load has failed."""
        self._at(now)
        if self._under_way is not None and self._under_way.load.id == id_:
            self._fail()
        return self._next(now)

    # Publications

    def _receive(self, data: Any, tags: Mapping[str, str]) -> None:
        if "ob" not in tags:
            return
        if tags["ob"] == "1" and "ob_bundle" in tags and isinstance(data, dict) and isinstance(data.get("ob"), list):
            for item in data["ob"]:
                self._receive(item["data"], item["tags"])
            return
        self._arrivals += 1
        readable = tags["ob"] == "1" and "ob_bundle" not in tags
        key = self._key_of(tags) if readable else ""
        self._judge(Publication(key, _version(tags), data, tags, self._arrivals))

    def _judge(self, publication: Publication, *, again: bool = False) -> None:
        key, tags = publication.key, publication.tags
        if not self._loaded or self._is_foreign(publication):
            self._set_aside(publication)
            return
        version, kind, event = int(publication.version), tags.get("ob_kind"), tags.get("ob_event", "")
        last = self._known(key)
        second = last is not None and version == last.version
        if second and last is not None and last.ids is not None and event in last.ids:
            self._count("duplicate", again)
            return
        if last is not None and (version < last.version or (second and last.ids is None)):
            self._count("stale", again)
            return
        ids = (*(last.ids or ()), event) if second and last is not None else (event,)
        shown = self.objects.get(key)
        sure = shown is not None or (isinstance(last, Grave) and last.sure)
        wish = self._wanted.get(key)

        if kind == "gap":
            self._count("gaps", again)
            self._want(publication, keep=True)
        elif (wish is not None and wish.need > version) or (second and len(ids) > WAITING):
            self._want(publication, keep=kind != "change" or self._reduce is not None)
        elif kind == "tombstone":
            # Of an object that was not known, another tombstone may have been forgotten that was newer.
            self._bury(key, Grave(version, ids, sure, publication.arrival))
            self._settled(key)
        elif kind == "snapshot" and sure:
            self._show(key, Object(version, publication.data, ids=ids, arrival=publication.arrival))
            self._settled(key)
        else:
            self._change(publication, ids, again=again)

    def _change(self, publication: Publication, ids: tuple[str, ...], *, again: bool) -> None:
        """A change, or what is new here: if it does not follow what is shown, the database knows."""
        key, tags = publication.key, publication.tags
        shown = self.objects.get(key)
        # Without a base, what is missing before it can be told only as long as nothing was missed.
        if "ob_base" not in tags:
            follows = not self._is_reloading()
        else:
            follows = shown is not None and tags["ob_base"] == str(shown.version)
        is_change = tags.get("ob_kind") == "change"
        if follows and is_change and shown is not None and key not in self._wanted and self._reduce is not None:
            data = self._reduce(shown.data, publication.data, tags)
            if data is not None:
                self._show(key, Object(int(publication.version), data, ids=ids, arrival=publication.arrival))
                self.counters.applied += 1
                return
        if shown is not None and key not in self._wanted and "ob_base" in tags and not follows:
            self._count("gaps", again)
        self._want(publication, keep=not is_change or self._reduce is not None)

    def _set_aside(self, publication: Publication) -> None:
        """Only a full load can judge it."""
        self._unjudged.append(publication)
        if self._loaded:
            self._suspect()
        if len(self._unjudged) > self._memory:
            self._unjudged = []
            if self._under_way is not None:
                self._load_all(self._now)  # the one under way may not have seen them

    def _is_foreign(self, publication: Publication) -> bool:
        """Whether it is of a format that we cannot read, or of another epoch."""
        tags = publication.tags
        if tags["ob"] != "1" or not publication.version > 0:
            return True
        return self.epoch is not None and tags.get("ob_epoch", self.epoch) != self.epoch

    # What is shown, what is gone, what is wanted

    def _known(self, key: str) -> Object | Grave | None:
        return self.objects.get(key) or self._gone.get(key)

    def _show(self, key: str, shown: Object) -> None:
        self.objects[key] = shown
        self._gone.pop(key, None)
        self._changed.add(key)

    def _bury(self, key: str, grave: Grave) -> None:
        if self.objects.pop(key, None) is not None:
            self._changed.add(key)
        self._gone.pop(key, None)  # so that the newest graves are the last ones
        self._gone[key] = grave
        if len(self._gone) <= self._memory:
            return
        oldest = next(iter(self._gone))
        forgotten = self._gone.pop(oldest)
        if self._under_way is not None and forgotten.arrival > self._under_way.arrival:
            self._fail()  # its answer could bring back what was just forgotten

    def _settled(self, key: str) -> None:
        self._wanted.pop(key, None)
        self.counters.applied += 1

    def _want(self, publication: Publication, *, keep: bool) -> None:
        kept = publication if keep else None
        self._wish(publication.key, int(publication.version), publication.arrival, kept)

    def _wish(self, key: str, need: int, arrival: int, kept: Publication | None = None) -> None:
        if key not in self._wanted and len(self._wanted) >= KEYS_LAST:
            self._load_all(self._now + self._chance() * JITTER)
            return
        wish = self._wanted.get(key)
        if wish is None:
            wish = self._wanted[key] = Wish(due=self._now + self._chance() * COLLECT)
        wish.need = max(wish.need, need)
        wish.arrival = max(wish.arrival, arrival)
        if kept is not None and wish.kept is not None:
            wish.kept.append(kept)
            if len(wish.kept) > WAITING:
                wish.kept = None  # the load has to reach `need` without them
        shown = self.objects.get(key)
        if shown is not None and not shown.old:
            self._show(key, replace(shown, old=True))

    # Loads

    def _answer(self, under_way: UnderWay, state: State) -> None:
        found = {key: (version, data) for key, version, data in state.objects}
        if not all(version > 0 for version, _ in found.values()):
            raise ValueError("a version is a number from 1 on")
        keys, arrival = under_way.load.keys, under_way.arrival
        self._under_way = None
        self._failures, self._not_before = 0, 0.0
        other = self._loaded and state.epoch != self.epoch
        if keys is not None and other:
            self._suspect()
            for wish in [self._wanted[key] for key in keys if key in self._wanted]:
                wish.due = self._suspect_at  # that load has it too
            return
        if other:
            self._changed.update(self.objects)
            for index in (self.objects, self._gone, self._wanted):
                index.clear()
        self.epoch = state.epoch
        self._loaded = True
        for key, (version, data) in found.items():
            self._found(key, Object(version, data, arrival=arrival))
        for key in keys if keys is not None else list(dict.fromkeys([*self.objects, *self._wanted])):
            self._resolve(key, arrival, found=key in found)
        if keys is None:
            self._judge_set_aside(arrival)

    def _judge_set_aside(self, arrival: int) -> None:
        """Everything has been loaded."""
        for grave in self._gone.values():
            grave.sure = False  # what was missed may have been made anew and deleted again
        self._suspect_at = math.inf  # until something that came since then says so again
        publications, self._unjudged = self._unjudged, []
        for publication in publications:
            self._replay(publication, arrival)

    def _found(self, key: str, found: Object) -> None:
        last = self._known(key)
        sure = isinstance(last, Grave) and last.sure
        if last is None or found.version > last.version or (found.version == last.version and not sure):
            self._show(key, found)

    def _resolve(self, key: str, arrival: int, *, found: bool) -> None:
        """A load that began after `arrival` publications has found this key, or has not."""
        was = self._wanted.pop(key, None)
        last = self._known(key)
        if not found and isinstance(last, Object) and last.arrival > arrival:
            self._wish(key, last.version, last.arrival)  # published and absent: which came last?
        elif not found:
            version = max(last.version if last else 0, was.need if was and was.arrival <= arrival else 0)
            ids = last.ids if last and last.version == version else None
            self._bury(key, Grave(version, ids, sure=False, arrival=last.arrival if last else 0))
        for publication in (was.kept if was else None) or ():
            self._replay(publication, arrival)
        now_known = self._known(key)
        if was and key not in self._wanted and was.need > (now_known.version if now_known else 0):
            self._wish(key, was.need, was.arrival)
        wish, shown = self._wanted.get(key), self.objects.get(key)
        if wish is not None and wish.arrival <= arrival:
            # The load is older than what was published before it began: only time can cure that.
            wish.tries = (was.tries if was else 0) + 1
            wish.due = self._now + self._backoff(wish.tries)
        elif wish is None and shown is not None and shown.old:
            self._show(key, replace(shown, old=False))

    def _replay(self, publication: Publication, arrival: int) -> None:
        """Judge what came before a load once more. What the load should have seen and did not is gone."""
        key, tags = publication.key, publication.tags
        last = self._known(key)
        seen = publication.arrival <= arrival
        buried = not isinstance(last, Object) and not (last is not None and last.sure)
        if seen and (self._is_foreign(publication) or (buried and tags.get("ob_kind") != "tombstone")):
            return
        change = tags.get("ob_kind") == "change" and "ob_base" not in tags
        if seen and change and last is not None and publication.version > last.version:
            self._want(publication, keep=self._reduce is not None)  # the load is older, so more may be missing
        else:
            self._judge(publication, again=True)

    def _fail(self) -> None:
        if self._under_way is not None and self._under_way.load.keys is None:
            self._load_all(self._now)
        self._under_way = None
        self._failures += 1
        self._not_before = self._now + self._backoff(self._failures)

    def _next(self, now: float) -> Load | None:
        self._at(now)
        if self._under_way is not None and now >= self._under_way.until:
            self._fail()
        if self._under_way is not None or now < self._not_before:
            return None
        everything = self._everything_at() <= now
        if not everything and self._keys_at() > now:
            return None
        keys: tuple[str, ...] | None = None
        if everything:
            if self._suspect_at < math.inf:
                self._suspected_at = now
            self._full_at = self._suspect_at = math.inf
        else:
            # One request for those that are due and those that are about to be.
            keys = tuple([key for key, wish in self._wanted.items() if wish.due <= now + COLLECT][:KEYS])
        if self._loads:
            self.counters.reloads += 1
        self._loads += 1
        self._under_way = UnderWay(Load(self._loads, keys), self._arrivals, now + ANSWER_WITHIN)
        return self._under_way.load

    def _load_all(self, at: float) -> None:
        self._full_at = at if self._full_at is None else min(self._full_at, at)

    def _suspect(self) -> None:
        """What only a full load can judge. A zombie that goes on and on gets one now and then."""
        if self._suspect_at == math.inf:
            self._suspect_at = max(self._now + self._chance() * JITTER, self._suspected_at + SUSPECT_EVERY)

    def _is_reloading(self) -> bool:
        loading = self._under_way is not None and self._under_way.load.keys is None
        return loading or self._everything_at() < math.inf

    def _everything_at(self) -> float:
        return min(math.inf if self._full_at is None else self._full_at, self._suspect_at)

    def _keys_at(self) -> float:
        return min((wish.due for wish in self._wanted.values()), default=math.inf) if self._loaded else math.inf

    def _backoff(self, tries: int) -> float:
        return min(RETRY_LAST, math.ldexp(RETRY_FIRST, min(tries, 30) - 1)) * (0.5 + self._chance() / 2)

    def _count(self, what: str, again: bool) -> None:
        if not again:
            setattr(self.counters, what, getattr(self.counters, what) + 1)

    def _at(self, now: float) -> None:
        self._now = now
        if self._full_at is None:
            self._full_at = now + SUBSCRIBE_WITHIN


def _version(tags: Mapping[str, str]) -> float:
    """The version as a number; NaN where it cannot be read."""
    said = tags.get("ob_version", "")
    return int(said) if said.isascii() and said.isdigit() else math.nan
