import { createReplica } from './replica.js';

export { createReplica };

/**
 * Keep objects in memory as the database has them, by the events that come through a channel.
 *
 * @param {import('centrifuge').Centrifuge} centrifuge
 * @param {string} channel
 * @param {import('./index.js').LiveOptions} options
 * @returns {import('./index.js').Live}
 */
export function live(centrifuge, channel, { load, onChange, onError = console.error, map, subscription: how, ...options }) {
  const { reduce } = options;
  const replica = createReplica({
    ...options,
    reduce: reduce && ((object, data, tags) => attempt(() => reduce(object, data, tags))),
  });
  /** @type {any} */
  const subscription = map ? centrifuge.newMapSubscription(channel, how) : centrifuge.newSubscription(channel, how);
  let timer, announcement;
  let wasOld = true;
  let closed = false;

  const view = {
    objects: replica.objects,
    counters: replica.counters,
    changed: new Set(),
    get old() {
      return replica.old;
    },
    get epoch() {
      return replica.epoch;
    },
    reload: () => step({ reload: true }),
    close() {
      closed = true;
      clearTimeout(timer);
      clearTimeout(announcement);
      centrifuge.removeSubscription(subscription);
    },
  };

  function attempt(task) {
    try {
      return task();
    } catch (error) {
      onError(error);
    }
  }

  function step(input) {
    if (closed) return;
    const request = replica.step(performance.now(), input);
    clearTimeout(timer);
    if (replica.due < Infinity) timer = setTimeout(step, replica.due - performance.now(), {});
    if (request) answer(request);
    announcement ??= setTimeout(announce);
  }

  async function answer({ id, keys }) {
    try {
      const answered = await load(keys ?? undefined);
      step({ loaded: Array.isArray(answered) ? { id, objects: answered } : { ...answered, id } });
    } catch (error) {
      step({ failed: id });
      onError(error);
    }
  }

  function announce() {
    announcement = undefined;
    view.changed = replica.takeChanged();
    if (!view.changed.size && wasOld === view.old) return;
    wasOld = view.old;
    attempt(() => onChange(view));
  }

  subscription
    .on('subscribing', () => step({ lost: true }))
    .on('unsubscribed', ({ code, reason }) => {
      step({ lost: true });
      if (code) onError(new Error(`no subscription to ${channel}: ${reason}`));
    })
    .on('subscribed', ({ recovered }) => step({ subscribed: { recovered } }))
    // What a map has forgotten (`key_ttl`) has not changed in the database.
    .on(map ? 'update' : 'publication', (publication) => publication.removed || step({ publication }));
  step({});
  subscription.subscribe();
  return view;
}
