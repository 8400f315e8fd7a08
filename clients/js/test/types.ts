// Compiled by `npm run types`, never run: what the declarations allow, and what they do not.

import { Centrifuge } from 'centrifuge';
import { live } from 'outbox-relay-client';

interface Order {
  id: number;
  version: number;
  status: string;
}

const centrifuge = new Centrifuge('ws://localhost:8000/connection/websocket');

const view = live<Order>(centrifuge, 'shop:orders', {
  load: async (keys) => (await fetch(`/orders?ids=${keys?.join() ?? ''}`)).json(),
  reduce: (order, { status }, tags) => (tags.ob_kind === 'change' ? { ...order, status } : undefined),
  onChange: ({ objects, changed, old }) => {
    for (const key of changed) console.log(objects.get(key)?.data.status.toUpperCase(), old);
  },
});
view.close();

// @ts-expect-error: nothing to load with
live<Order>(centrifuge, 'shop:orders', { onChange: () => {} });
// @ts-expect-error: the view is read-only
view.objects.clear();
// @ts-expect-error: an order has no price
live<Order>(centrifuge, 'shop:orders', { load: async () => [], onChange: (all) => all.objects.get('1')?.data.price });
