// node follow.js WEBSOCKET CHANNEL STATE: follow a channel of orders, and print the view as a line of JSON after every
// change of it. STATE is the address of the application's own endpoint. MAP=1: it is a map channel.

import { Centrifuge } from 'centrifuge';

import { live } from '../index.js';

const [websocket, channel, state] = process.argv.slice(2);
const centrifuge = new Centrifuge(websocket, { maxReconnectDelay: 200 });

live(centrifuge, channel, {
  load: async (keys) => {
    const answer = await fetch(`${state}?ids=${keys ?? ''}`);
    if (!answer.ok) throw new Error(answer.statusText);
    return answer.json();
  },
  map: process.env.MAP === '1',
  onChange: ({ objects, old, epoch, counters }) => {
    const shown = [...objects].map(([key, { version, data }]) => [key, [version, data.status]]);
    console.log(JSON.stringify({ shown: Object.fromEntries(shown), old, epoch, counters }));
  },
});
centrifuge.connect();
