// Any interleaving of loss, duplication, delay, reload, reconnect and restore ends in the database's state, never
// shows an older version within an epoch, and never shows what the database did not have at that version.
// SEEDS=n runs more of them, SEED=n runs that one alone.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { createReplica } from '../replica.js';

const STEPS = 250;
const KEYS = ['a', 'b', 'c', 'd', 'e'];

/** Mulberry32: the same chance for the same seed, from 0 to 1. */
function chanceOf(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A database with its outbox, a relay, a recoverable channel, a page: all that can happen happens one step at a time. */
class World {
  constructor(seed) {
    this.chance = chanceOf(seed);
    this.reduces = this.chance() < 0.6;
    this.hasBase = this.chance() < 0.7;
    this.now = 0;
    this.epoch = 1;
    this.rows = new Map(); // key -> { id, version, ...fields }
    this.versions = new Map(); // key -> the highest version there was, tombstones too
    this.backups = [];
    this.had = new Map(); // 'epoch/key/version' -> the row, as JSON
    this.outbox = []; // committed and not published
    this.published = []; // events to be copied
    this.stream = [];
    this.position = undefined; // in the stream; undefined: was never subscribed
    this.connected = false;
    this.loads = [];
    this.shown = new Map(); // 'epoch/key' -> the highest version that was shown
    this.events = 0;
    this.replica = createReplica({
      reduce: this.reduces ? (row, { version, ...fields }) => ({ ...row, ...fields, version }) : undefined,
      memory: this.pick([1, 3, 1000]),
      random: this.chance,
    });
    this.step({});
  }

  pick(list) {
    return list[Math.floor(this.chance() * list.length)];
  }

  step(input) {
    const request = this.replica.step(this.now, input);
    if (request) this.loads.push({ ...request, state: undefined });
    for (const [key, { version, data }] of this.replica.objects) {
      const epoch = this.replica.epoch;
      const before = this.shown.get(`${epoch}/${key}`) ?? 0;
      assert.ok(version >= before, `${key} went back from ${before} to ${version} in epoch ${epoch}`);
      this.shown.set(`${epoch}/${key}`, version);
      assert.equal(ordered(data), this.had.get(`${epoch}/${key}/${version}`), `${key} at ${version} in epoch ${epoch}`);
    }
  }

  write() {
    const key = this.pick(KEYS);
    const row = this.rows.get(key);
    const version = (this.versions.get(key) ?? 0) + 1;
    const fields = { version, [this.pick(['x', 'y', 'z'])]: Math.floor(this.chance() * 1000) };
    const isDeleted = row && this.chance() < 0.25;
    const kind = isDeleted ? 'tombstone' : this.reduces && row && this.chance() < 0.7 ? 'change' : 'snapshot';
    this.versions.set(key, version);
    if (isDeleted) this.rows.delete(key);
    else this.rows.set(key, { id: key, ...row, ...fields });
    this.had.set(`${this.epoch}/${key}/${version}`, isDeleted ? undefined : ordered(this.rows.get(key)));
    const tags = { ob: '1', ob_type: 't', ob_id: key, ob_version: `${version}`, ob_event: `${++this.events}`, ob_kind: kind };
    tags.ob_epoch = `${this.epoch}`;
    if (kind === 'change' && this.hasBase) tags.ob_base = `${row.version}`;
    this.outbox.push({ data: kind === 'snapshot' ? this.rows.get(key) : isDeleted ? {} : fields, tags });
  }

  backUp() {
    this.backups.push([new Map(this.rows), new Map(this.versions)]);
  }

  restore() {
    if (!this.backups.length) return;
    const [rows, versions] = this.pick(this.backups);
    this.rows = new Map(rows);
    this.versions = new Map(versions);
    this.outbox = [];
    this.epoch += 1;
    for (const [key, row] of rows) this.had.set(`${this.epoch}/${key}/${row.version}`, ordered(row));
  }

  relay() {
    const publications = this.outbox.splice(0, 1 + Math.floor(this.chance() * 4)).map((event) => {
      this.published.push(event);
      return this.chance() < 0.1 ? { data: {}, tags: { ...event.tags, ob_kind: 'gap' } } : event;
    });
    if (publications.length > 1 && this.chance() < 0.3) {
      this.stream.push({ data: { ob: publications }, tags: { ob: '1', ob_bundle: `${publications.length}` } });
    } else {
      this.stream.push(...publications);
    }
  }

  /** What a crash repeats, and what surfaces late. */
  copy() {
    if (this.published.length) this.stream.push(this.pick(this.published));
  }

  deliver() {
    if (this.connected && this.position < this.stream.length) this.step({ publication: this.stream[this.position++] });
  }

  disconnect() {
    if (this.connected) this.step({ lost: true });
    this.connected = false;
  }

  connect() {
    if (this.connected) return;
    const recovered = this.position !== undefined && this.chance() < 0.5;
    if (!recovered) this.position = this.stream.length;
    this.connected = true;
    this.step({ subscribed: { recovered } });
  }

  /** The database reads for a load some time between the question and the answer. */
  read() {
    const load = this.pick(this.loads);
    if (!load || load.state) return;
    const rows = [...this.rows.values()].filter(({ id }) => !load.keys || load.keys.includes(id));
    load.state = { id: load.id, epoch: `${this.epoch}`, objects: rows };
  }

  answer() {
    const load = this.pick(this.loads);
    if (!load?.state) return;
    this.loads.splice(this.loads.indexOf(load), 1);
    this.step({ loaded: load.state });
  }

  fail() {
    const load = this.pick(this.loads);
    if (!load) return;
    this.loads.splice(this.loads.indexOf(load), 1);
    this.step({ failed: load.id });
  }

  wait() {
    this.now += this.chance() ** 3 * 3000;
    if (this.now >= this.replica.due) this.step({});
  }

  /** Nothing fails any more: what is under way arrives. */
  heal() {
    this.write(); // or nobody would hear of a restored database
    while (this.outbox.length) this.relay();
    this.connect();
    for (let rounds = 0; rounds < 500; rounds += 1) {
      while (this.position < this.stream.length) this.deliver();
      if (this.loads.length) {
        this.read();
        this.answer();
      } else if (this.replica.due < Infinity) {
        this.now = Math.max(this.now, this.replica.due);
        this.step({});
      } else return;
    }
    assert.fail('it never comes to rest');
  }
}

const ordered = (row) => JSON.stringify(Object.entries(row).sort());

const WEIGHTS = Object.entries({
  write: 8, relay: 8, deliver: 12, copy: 2, wait: 6, read: 6, answer: 6, fail: 1, connect: 3, disconnect: 1, backUp: 1, restore: 0.3,
});
const TOTAL = WEIGHTS.reduce((sum, [, weight]) => sum + weight, 0);

function run(seed) {
  const world = new World(seed);
  for (let step = 0; step < STEPS; step += 1) {
    let ticket = world.chance() * TOTAL;
    const [action] = WEIGHTS.find(([, weight]) => (ticket -= weight) < 0);
    world[action]();
  }
  world.heal();
  const { objects, old, epoch, counters } = world.replica;
  assert.equal(old, false, 'it is still marked as old');
  assert.equal(epoch, `${world.epoch}`);
  assert.deepEqual(
    [...objects.values()].filter((object) => object.old),
    [],
  );
  assert.deepEqual(new Map([...objects].sort().map(([key, { data }]) => [key, data])), new Map([...world.rows].sort()));
  return counters;
}

test('any interleaving ends in the state of the database', () => {
  const { SEED, SEEDS = 400 } = process.env;
  const seeds = SEED ? [Number(SEED)] : Array.from({ length: Number(SEEDS) }, (_, seed) => seed);
  const totals = {};
  for (const seed of seeds) {
    try {
      for (const [name, count] of Object.entries(run(seed))) totals[name] = (totals[name] ?? 0) + count;
    } catch (error) {
      error.message = `seed ${seed}: ${error.message}`;
      throw error;
    }
  }
  for (const [name, count] of Object.entries(totals)) assert.ok(SEED || count > 0, `no run had anything ${name}`);
});
