// The board: what is live in it are the lines from `live(` to `connect()`. The rest compares and does harm.

import { live } from 'outbox-relay-client';

const { Centrifuge } = globalThis;
const { websocket, channel } = await (await fetch('/settings')).json();
const $ = (id) => document.getElementById(id);

const load = async (keys) => {
  const answer = await fetch(`/cards?keys=${keys ?? ''}`);
  if (!answer.ok) throw new Error(answer.statusText);
  return answer.json();
};

const centrifuge = new Centrifuge(websocket, { maxReconnectDelay: 500 });
const view = live(centrifuge, channel, {
  load,
  onChange: ({ objects, old, epoch }) => {
    $('page').ariaBusy = old;
    draw('page', new Map([...objects].map(([key, { data, version, old }]) => [key, { ...data, version, old, epoch }])));
  },
});
centrifuge.connect();

/** What is drawn where: list -> key -> card. */
const drawn = { page: new Map(), truth: new Map(), naive: new Map() };

function draw(list, cards) {
  drawn[list] = cards;
  const items = new Map([...$(list).children].map((item) => [item.dataset.key, item]));
  for (const [key, item] of items) if (!cards.has(key)) item.remove();
  const sorted = [...cards].sort(([one], [other]) => one.localeCompare(other, undefined, { numeric: true }));
  for (const [position, [key, card]] of sorted.entries()) {
    const item = items.get(key) ?? newItem(list, key);
    if ($(list).children[position] !== item) $(list).insertBefore(item, $(list).children[position] ?? null);
    item.dataset.version = card.version;
    item.dataset.epoch = card.epoch ?? '';
    item.classList.toggle('old', card.old === true);
    item.querySelector('span').textContent = `${card.title}: ${card.status}`;
    item.querySelector('small').textContent = `version ${card.version}`;
  }
  compare();
}

function newItem(list, key) {
  const item = document.createElement('li');
  item.dataset.key = key;
  const press = list === 'page' ? 'button' : 'div';
  item.innerHTML = `<${press}><span></span><small></small></${press}>`;
  if (list !== 'page') return item;
  item.firstChild.type = 'button';
  item.firstChild.onclick = () => fetch(`/cards/${key}`, { method: 'POST' });
  const remove = Object.assign(document.createElement('button'), { type: 'button', textContent: 'Delete' });
  remove.ariaLabel = `Delete card ${key}`;
  remove.onclick = () => fetch(`/cards/${key}`, { method: 'DELETE' });
  item.append(remove);
  return item;
}

// Compare

let wrongSince;
let naiveWrong = 0;

const isWrong = (list, key) => {
  const [card, truth] = [drawn[list].get(key), drawn.truth.get(key)];
  return card?.version !== truth?.version || card?.status !== truth?.status;
};

function compare() {
  const keys = new Set(Object.values(drawn).flatMap((cards) => [...cards.keys()]));
  const wrong = { page: 0, naive: 0 };
  for (const list of ['page', 'naive']) {
    for (const key of keys) wrong[list] += isWrong(list, key);
    for (const item of $(list).children) item.classList.toggle('wrong', isWrong(list, item.dataset.key));
  }
  if (!wrong.page) wrongSince = undefined;
  else wrongSince ??= performance.now();
  const seconds = wrongSince === undefined ? 0 : Math.floor((performance.now() - wrongSince) / 1000);
  const differs = `${wrong.page} of ${keys.size} cards differ from the database, for ${seconds} s`;
  say('verdict', wrong.page ? differs : 'This page shows what the database has.');
  $('verdict').classList.toggle('wrong', wrong.page > 0);
  naiveWrong = wrong.naive;
  count();
}

function count() {
  const { applied, stale, duplicate, gaps, reloads } = view.counters;
  const counters = {
    Applied: applied, 'Dropped as stale': stale, 'Dropped as duplicates': duplicate, Gaps: gaps, Reloads: reloads,
    'Cards wrong on the page without versions': naiveWrong,
  };
  if (!$('counters').children.length) {
    for (const name of Object.keys(counters)) {
      $('counters').append(
        Object.assign(document.createElement('dt'), { textContent: name }),
        document.createElement('dd'),
      );
    }
  }
  for (const [number, value] of Object.values(counters).entries()) {
    $('counters').querySelectorAll('dd')[number].textContent = value;
  }
}

/** Said once, so that a screen reader does not repeat it. */
function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

async function askForTheTruth() {
  try {
    const { objects } = await load();
    draw('truth', new Map(objects.map((card) => [card.id, card])));
  } catch {
    say('verdict', 'The database cannot be asked.');
  }
  setTimeout(askForTheTruth, 250);
}
askForTheTruth();

// A page without versions: it loads, and shows what comes

const naive = new Map();
const simple = new Centrifuge(`${websocket}?naive`, { maxReconnectDelay: 500 }); // so that the network log says whose it is
const subscription = simple.newSubscription(channel);
subscription.on('publication', ({ data, tags }) => {
  if (tags.ob_kind === 'tombstone') naive.delete(tags.ob_id);
  else if (tags.ob_kind !== 'gap') naive.set(tags.ob_id, { ...data, epoch: tags.ob_epoch });
  draw('naive', naive);
});
async function loadNaive() {
  const { epoch, objects } = await load();
  naive.clear();
  for (const card of objects) naive.set(card.id, { ...card, epoch });
  draw('naive', naive);
}
$('again').onclick = () => doing($('again'), loadNaive);
await loadNaive();
subscription.subscribe();
simple.connect();

// Harm

for (const [name, label] of Object.entries(await (await fetch('/harm')).json())) {
  const button = Object.assign(document.createElement('button'), { type: 'button', textContent: label });
  button.dataset.harm = name;
  button.onclick = () =>
    doing(button, async () => {
      const answer = await fetch(`/harm/${name}`, { method: 'POST' });
      if (!answer.ok) throw new Error(answer.statusText);
    });
  $('harm').append(button);
}

$('cut').onclick = () =>
  doing($('cut'), async () => {
    centrifuge.disconnect();
    simple.disconnect();
    await new Promise((resolve) => setTimeout(resolve, 5000));
    centrifuge.connect();
    simple.connect();
  });

async function doing(button, harm) {
  const tell = (how) => {
    button.dataset.how = how;
    say('done', `${button.textContent}: ${how}.`);
  };
  button.disabled = true;
  tell('under way');
  try {
    await harm();
    tell('done');
  } catch ({ message }) {
    tell(`failed, ${message}`);
  } finally {
    button.disabled = false;
  }
}
