// The cases that the Python helper passes too (tests/test_client.py).

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import { createReplica } from '../replica.js';

const { cases } = JSON.parse(readFileSync(new URL('../../vectors.json', import.meta.url), 'utf8'));

const merge = (object, data) => (data.refuse ? undefined : { ...object, ...data });

function seen(replica, request, changed) {
  const objects = [...replica.objects];
  return {
    load: request ? (request.keys ?? 'all') : undefined,
    shows: Object.fromEntries(objects.map(([key, { version, data }]) => [key, [version, data]])),
    behind: objects.filter(([, { old }]) => old).map(([key]) => key),
    old: replica.old,
    due: replica.due === Infinity ? null : replica.due,
    changed: [...changed].sort(),
    counters: replica.counters,
    epoch: replica.epoch ?? null,
  };
}

for (const { name, options = {}, steps } of cases) {
  test(name, () => {
    const replica = createReplica({ ...options, reduce: options.reduce && merge, random: () => 0.5 });
    steps.forEach(({ at, expect = {}, ...input }, number) => {
      const found = seen(replica, replica.step(at, input), replica.takeChanged());
      const { load, counters, ...rest } = expect;
      const where = `step ${number + 1}`;
      assert.deepEqual(found.load, load, where);
      for (const [what, value] of Object.entries(rest)) assert.deepEqual(found[what], value, `${where}: ${what}`);
      for (const [what, value] of Object.entries(counters ?? {})) assert.equal(found.counters[what], value, `${where}: ${what}`);
    });
  });
}
