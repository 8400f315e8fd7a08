// What a subscriber knows of the database: no input or output, no clock, no timers. Everything comes in through
// `step`, and what has to be loaded comes out of it. ../vectors.json says what it does, step by step, and the Python
// helper (outbox_relay/client/replica.py) does the same.

/** Milliseconds: a load without an answer has failed; time between two reloads for another epoch; longest jitters. */
const ANSWER_WITHIN = 10000;
const SUSPECT_EVERY = 5000;
const JITTER = 300;
const COLLECT = 50;
/** The first load does not wait longer than this for the subscription. */
const SUBSCRIBE_WITHIN = 1000;
const RETRY_FIRST = 250;
const RETRY_LAST = 5000;
/** Keys of one request; keys that wait before everything is loaded instead; publications that wait for one load. */
const KEYS = 100;
const KEYS_LAST = 1000;
const WAITING = 100;

/**
 * @param {import('./index.js').ReplicaOptions} options
 * @returns {import('./index.js').Replica}
 */
export function createReplica({
  key = (object) => object.id,
  version = (object) => object.version,
  keyOf = (tags) => tags.ob_id,
  reduce,
  memory = 10000,
  random = Math.random,
}) {
  const objects = new Map(); // key -> what is shown: { version, data, old, ids, arrival }
  const gone = new Map(); // key -> { version, ids, sure, arrival }: deleted, or (not sure) absent from a load
  const wanted = new Map(); // key -> { need, arrival, kept, due, tries }: behind until it is loaded
  const counters = { applied: 0, stale: 0, duplicate: 0, gaps: 0, reloads: 0 };
  let unjudged = []; // publications before the first load, and of another epoch: only a full load can judge them
  let changed = new Set();
  let epoch;
  let now = 0;
  let arrivals = 0; // counts publications: tells which of them came after a load began
  let started = false;
  let subscribed = false;
  let wasSubscribed = false;
  let loaded = false;
  let load; // the one under way: { id, keys, arrival, until }
  let loads = 0;
  let fullAt = Infinity; // when everything is to be loaded
  let notBefore = 0; // after failed loads
  let failures = 0;
  let suspectAt = Infinity; // the same, because of a publication that only a full load can judge
  let suspectedAt = -Infinity; // when the last such one began

  const backoff = (tries) => Math.min(RETRY_LAST, RETRY_FIRST * 2 ** (tries - 1)) * (0.5 + random() / 2);
  const loadAll = (at) => (fullAt = Math.min(fullAt, at));
  /** Of a format that we cannot read, or of another epoch. */
  const isForeign = ({ version: v, tags }) =>
    tags.ob !== '1' || !(v > 0) || (epoch !== undefined && tags.ob_epoch !== undefined && tags.ob_epoch !== epoch);
  const isReloading = () => Math.min(fullAt, suspectAt) < Infinity || (load !== undefined && !load.keys);
  const known = (k) => objects.get(k) ?? gone.get(k);

  function show(k, object) {
    objects.set(k, object);
    gone.delete(k);
    changed.add(k);
  }

  function bury(k, grave) {
    if (objects.delete(k)) changed.add(k);
    gone.delete(k); // so that the newest graves are the last ones
    gone.set(k, grave);
    if (gone.size <= memory) return;
    const [[oldest, { arrival }]] = gone;
    gone.delete(oldest);
    if (arrival > load?.arrival) fail(); // its answer could bring back what was just forgotten
  }

  /** What only a full load can judge. A zombie that goes on and on gets one now and then. */
  function suspect() {
    if (suspectAt === Infinity) suspectAt = Math.max(now + random() * JITTER, suspectedAt + SUSPECT_EVERY);
  }

  function want(publication, keep) {
    const { key: k, version: v, arrival } = publication;
    if (!wanted.has(k) && wanted.size >= KEYS_LAST) return loadAll(now + random() * JITTER);
    const wish = wanted.get(k) ?? { need: 0, arrival: 0, kept: [], due: now + random() * COLLECT, tries: 0 };
    wish.need = Math.max(wish.need, v);
    wish.arrival = Math.max(wish.arrival, arrival);
    if (keep) wish.kept?.push(publication);
    if (wish.kept?.length > WAITING) wish.kept = undefined; // the load has to reach `need` without them
    wanted.set(k, wish);
    const object = objects.get(k);
    if (object && !object.old) show(k, { ...object, old: true });
  }

  /** @param {import('./index.js').Publication} publication */
  function receive({ data, tags }) {
    if (tags?.ob === undefined) return; // not of the outbox
    if (tags.ob === '1' && tags.ob_bundle && Array.isArray(data?.ob)) return data.ob.forEach(receive);
    judge({ key: String(keyOf(tags)), version: Number(tags.ob_version), data, tags, arrival: ++arrivals });
  }

  function judge(publication, isAgain) {
    const { key: k, version: v, data, tags, arrival } = publication;
    const { ob_kind: kind, ob_event: id } = tags;
    const count = (what) => isAgain || (counters[what] += 1);
    if (!loaded || isForeign(publication)) {
      unjudged.push(publication);
      if (loaded) suspect();
      if (unjudged.length > memory) {
        unjudged = [];
        if (load) loadAll(now); // the one under way may not have seen them
      }
      return;
    }
    const last = known(k);
    const isSecond = v === last?.version;
    if (isSecond && last.ids?.includes(id)) return count('duplicate');
    if (v < last?.version || (isSecond && !last.ids)) return count('stale');
    const ids = isSecond ? [...last.ids, id] : [id];
    const object = objects.get(k);
    const behind = wanted.get(k)?.need > v;

    if (kind === 'gap') {
      count('gaps');
      want(publication, true);
    } else if (behind || (isSecond && ids.length > WAITING)) {
      want(publication, kind !== 'change' || reduce);
    } else if (kind === 'tombstone') {
      // Of an object that was not known, another tombstone may have been forgotten that was newer.
      bury(k, { version: v, ids, sure: Boolean(object || last?.sure), arrival });
      settled(k);
    } else if (kind === 'snapshot' && (object || last?.sure)) {
      show(k, { version: v, data, old: false, ids, arrival });
      settled(k);
    } else {
      // Without a base, what is missing before it can be told only as long as nothing was missed.
      const follows = tags.ob_base === undefined ? !isReloading() : Number(tags.ob_base) === object?.version;
      const next = follows && kind === 'change' && object && !wanted.has(k) ? reduce?.(object.data, data, tags) : undefined;
      if (next !== undefined) {
        show(k, { version: v, data: next, old: false, ids, arrival });
        counters.applied++;
      } else {
        // New here, or a change that does not follow what is shown: the database knows.
        if (object && !wanted.has(k) && tags.ob_base !== undefined && !follows) count('gaps');
        want(publication, kind !== 'change' || reduce);
      }
    }
  }

  function settled(k) {
    wanted.delete(k);
    counters.applied++;
  }

  /** @param {import('./index.js').Loaded<any> & { id: number }} state */
  function answer({ id, epoch: answered, objects: list }) {
    if (id !== load?.id) return; // it came too late
    const found = new Map(list.map((data) => [String(key(data)), { version: version(data), data }]));
    for (const { version: v } of found.values()) if (!(v > 0)) throw new TypeError(`not a version: ${v}`);
    const { keys, arrival } = load;
    load = undefined;
    failures = notBefore = 0;
    answered = answered == null ? undefined : String(answered);
    const isOther = loaded && answered !== epoch;
    if (keys && isOther) {
      suspect();
      for (const k of keys) if (wanted.has(k)) wanted.get(k).due = suspectAt; // that load has them too
      return;
    }
    if (isOther) {
      for (const k of objects.keys()) changed.add(k);
      for (const index of [objects, gone, wanted]) index.clear();
    }
    epoch = answered;
    loaded = true;
    for (const [k, { version: v, data }] of found) {
      const last = known(k);
      if (!last || v > last.version || (v === last.version && !last.sure)) {
        show(k, { version: v, data, old: false, ids: undefined, arrival });
      }
    }
    for (const k of keys ?? new Set([...objects.keys(), ...wanted.keys()])) resolve(k, found.has(k), arrival);
    if (keys) return;
    for (const grave of gone.values()) grave.sure = false; // what was missed may have been made anew and deleted again
    suspectAt = Infinity; // until something that came since then says so again
    const publications = unjudged;
    unjudged = [];
    for (const publication of publications) replay(publication, arrival);
  }

  /** A load that began after `arrival` publications has found this key, or has not. */
  function resolve(k, isFound, arrival) {
    const was = wanted.get(k);
    const last = known(k);
    wanted.delete(k);
    if (!isFound && objects.get(k)?.arrival > arrival) {
      want({ ...last, key: k }); // published and absent: which came last?
    } else if (!isFound) {
      const v = Math.max(last?.version ?? 0, was?.arrival <= arrival ? was.need : 0);
      bury(k, { version: v, ids: v === last?.version ? last.ids : undefined, arrival: last?.arrival });
    }
    for (const publication of was?.kept ?? []) replay(publication, arrival);
    if (was && was.need > (known(k)?.version ?? 0) && !wanted.has(k)) want({ ...was, key: k, version: was.need });
    const again = wanted.get(k);
    if (again?.arrival <= arrival) {
      // The load is older than what was published before it began: only time can cure that.
      again.tries = (was?.tries ?? 0) + 1;
      again.due = now + backoff(again.tries);
    } else if (!again && objects.get(k)?.old) {
      show(k, { ...objects.get(k), old: false });
    }
  }

  /** Judge what came before a load once more. What the load should have seen and did not is gone. */
  function replay(publication, arrival) {
    const { key: k, version: v, tags } = publication;
    const isSeen = publication.arrival <= arrival;
    if (isSeen && (isForeign(publication) || (!objects.has(k) && !gone.get(k)?.sure && tags.ob_kind !== 'tombstone'))) return;
    if (isSeen && tags.ob_base === undefined && tags.ob_kind === 'change' && v > known(k).version) {
      want(publication, reduce); // the load is older than it, so more may be missing
    } else {
      judge(publication, true);
    }
  }

  function fail() {
    if (!load.keys) loadAll(now);
    load = undefined;
    notBefore = now + backoff(++failures);
  }

  function nextLoad() {
    if (load && now >= load.until) fail();
    if (load || now < notBefore) return;
    const isFull = Math.min(fullAt, suspectAt) <= now;
    if (!isFull && keysAt() > now) return;
    // One request for those that are due and those that are about to be.
    const keys = isFull ? null : [...wanted.keys()].filter((k) => wanted.get(k).due <= now + COLLECT).slice(0, KEYS);
    if (isFull) {
      if (suspectAt < Infinity) suspectedAt = now;
      fullAt = suspectAt = Infinity;
    }
    if (loads) counters.reloads++;
    load = { id: ++loads, keys, arrival: arrivals, until: now + ANSWER_WITHIN };
    return { id: load.id, keys };
  }

  const keysAt = () => (loaded ? Math.min(...[...wanted.values()].map(({ due }) => due)) : Infinity);

  return {
    objects,
    counters,
    get epoch() {
      return epoch;
    },
    get old() {
      return !subscribed || !loaded || (failures > 0 && wanted.size > 0) || isReloading();
    },
    get due() {
      if (load) return load.until;
      return Math.max(Math.min(fullAt, suspectAt, keysAt()), notBefore);
    },
    takeChanged() {
      const taken = changed;
      changed = new Set();
      return taken;
    },
    step(time, input) {
      now = time;
      if (!started) {
        started = true;
        loadAll(now + SUBSCRIBE_WITHIN);
      }
      if (input.publication) receive(input.publication);
      if (input.loaded) answer(input.loaded);
      if (input.failed && input.failed === load?.id) fail();
      if (input.lost) subscribed = false;
      if (input.reload) loadAll(now);
      if (input.subscribed) {
        subscribed = true;
        if (!input.subscribed.recovered || !wasSubscribed) {
          failures = notBefore = 0;
          loadAll(wasSubscribed ? now + random() * JITTER : now);
        }
        wasSubscribed = true;
      }
      return nextLoad();
    },
  };
}
