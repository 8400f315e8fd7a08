import type { Centrifuge } from 'centrifuge';

/** The tags of an event: `ob_type`, `ob_id`, `ob_version` and the others, and the application's own. */
export type Tags = Readonly<Record<string, string>>;

/** What is shown of one object. */
export interface Shown<T> {
  readonly version: number;
  readonly data: T;
  /** Known to be behind the database until it has been loaded. */
  readonly old: boolean;
}

export interface Counters {
  /** Publications that changed the view; dropped as older or as copies; gaps and changes that did not follow. */
  readonly applied: number;
  readonly stale: number;
  readonly duplicate: number;
  readonly gaps: number;
  /** Loads after the first one, of everything or of keys. */
  readonly reloads: number;
}

/** What a load found: the objects, and the epoch that their versions belong to. */
export interface Loaded<T> {
  objects: readonly T[];
  epoch?: string | null;
}

interface Options<T> {
  /** The key of an object that was loaded: what `keyOf` says of its events. Default: its `id`. */
  key?: (object: T) => string | number;
  /** The version of an object that was loaded. Default: its `version`. */
  version?: (object: T) => number;
  /** The key of an event. Default: `tags.ob_id`. Give one where a channel has aggregates of several types. */
  keyOf?: (tags: Tags) => string;
  /** Makes the new object of the shown one and the data of a change; without it, and for undefined, it is loaded. */
  reduce?: (object: T, data: any, tags: Tags) => T | undefined;
  /** How many deleted objects are remembered, and publications before the state is loaded. Default: 10,000. */
  memory?: number;
}

export interface LiveOptions<T> extends Options<T> {
  /**
   * Reads from the database: these keys, or everything. What it reads may not be older than the call. It has 10 s.
   * It is called again, later each time, when it fails.
   */
  load: (keys?: readonly string[]) => Promise<Loaded<T> | readonly T[]>;
  /** Called soon after something has changed. */
  onChange: (view: Live<T>) => void;
  /** Hears what the other functions throw, and why a subscription has ended for good. Default: `console.error`. */
  onError?: (error: unknown) => void;
  /** Subscribe to a map channel. */
  map?: boolean;
  /** Given to centrifuge's `newSubscription` or `newMapSubscription`: a token, for instance. */
  subscription?: object;
}

export interface Live<T> {
  /** What to show, by key. */
  readonly objects: ReadonlyMap<string, Shown<T>>;
  /** The keys that have changed since the last `onChange`, those that are gone among them. */
  readonly changed: ReadonlySet<string>;
  /** Whether the whole may be behind the database, and nothing has told yet what has changed. */
  readonly old: boolean;
  readonly epoch: string | undefined;
  readonly counters: Counters;
  /** Load everything again. */
  reload(): void;
  /** Unsubscribe and say no more. */
  close(): void;
}

/** Follow a channel: keep its objects as the database has them. */
export function live<T>(centrifuge: Centrifuge, channel: string, options: LiveOptions<T>): Live<T>;

export interface ReplicaOptions<T = any> extends Options<T> {
  /** From 0 to 1. Default: `Math.random`. */
  random?: () => number;
}

export interface Publication {
  data?: any;
  tags?: Tags;
}

/** One of them; none: time has passed. */
export interface Input<T = any> {
  subscribed?: { recovered: boolean };
  lost?: boolean;
  reload?: boolean;
  publication?: Publication;
  loaded?: Loaded<T> & { id: number };
  failed?: number;
}

/** What `live` is made of, without input and output: for another transport, or a test. */
export interface Replica<T = any> {
  readonly objects: ReadonlyMap<string, Shown<T>>;
  readonly counters: Counters;
  readonly epoch: string | undefined;
  readonly old: boolean;
  /** When the next step without an input is due; Infinity: not before something else happens. */
  readonly due: number;
  /** The keys that have changed since the last call. */
  takeChanged(): Set<string>;
  /** Tell it something, at a time in milliseconds; it may ask for a load of keys, or of everything (null). */
  step(now: number, input: Input<T>): { id: number; keys: string[] | null } | undefined;
}

export function createReplica<T = any>(options: ReplicaOptions<T>): Replica<T>;
