// node build.js [FROM [TO]]: one minified file for <script>, by default of this package: it defines `OutboxRelay`.

import { build } from 'esbuild';

const [entry = 'index.js', outfile = 'dist/outbox-relay-client.js'] = process.argv.slice(2);

await build({
  entryPoints: [entry],
  outfile,
  bundle: true,
  minify: true,
  format: 'iife',
  globalName: 'OutboxRelay',
  target: 'es2021',
  nodePaths: ['node_modules'],
  alias: { 'outbox-relay-client': './index.js' },
});
