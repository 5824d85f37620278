// The TypeScript SDK's client, 2.x in both eras of the protocol and 1.x: URL TOKEN COMMAND ARGUMENTS...
import assert from 'node:assert/strict';
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { StdioClientTransport } from '@modelcontextprotocol/client/stdio';
import { Client as ClientV1 } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport as StdioV1 } from '@modelcontextprotocol/sdk/client/stdio.js';
import { StreamableHTTPClientTransport as HttpV1 } from '@modelcontextprotocol/sdk/client/streamableHttp.js';

const [url, token, command, ...args] = process.argv.slice(2);
const requestInit = { headers: { Authorization: `Bearer ${token}` } };
const stdio = { command, args, env: process.env, stderr: 'ignore' };
const info = { name: 'interop', version: '1' };
const patient = { timeout: 300_000 };

const v2 = mode => new Client(info, { versionNegotiation: { mode, probe: { timeoutMs: 300_000 } } });
const clients = [
  ['2.x, 2026-07-28, HTTP', () => v2({ pin: '2026-07-28' }), () => new StreamableHTTPClientTransport(new URL(url), { requestInit })],
  ['2.x, legacy, HTTP', () => v2('legacy'), () => new StreamableHTTPClientTransport(new URL(url), { requestInit })],
  ['2.x, 2026-07-28, stdio', () => v2({ pin: '2026-07-28' }), () => new StdioClientTransport(stdio)],
  ['1.x, HTTP', () => new ClientV1(info), () => new HttpV1(new URL(url), { requestInit })],
  ['1.x, stdio', () => new ClientV1(info), () => new StdioV1(stdio)],
];

const text = result => result.content.filter(block => block.type === 'text').map(block => block.text).join('\n');

for (const [name, makeClient, makeTransport] of clients) {
  const client = makeClient();
  await client.connect(makeTransport(), patient);
  const call = (tool, input) => client.callTool({ name: tool, arguments: input }, ...(client instanceof ClientV1 ? [undefined, patient] : [patient]));
  const { tools } = await client.listTools(); // from here on answers are checked against their schemas
  assert.equal(tools.length, 8);

  const facts = await call('inspect_image', { image: 'itaipu_landsat8.tif' });
  assert.equal(facts.structuredContent.width, 560);

  const covers = await call('segment', { image: 'itaipu_landsat8.tif', classes: ['water'], region: [0, 0, 200, 200], preview: true });
  assert.ok(!covers.isError, text(covers));
  const links = covers.content.filter(block => block.type === 'resource_link');
  assert.ok(links.some(link => link.mimeType === 'application/geo+json'));
  const { contents } = await client.readResource({ uri: links.find(link => link.mimeType === 'application/geo+json').uri });
  assert.equal(JSON.parse(contents[0].text).type, 'FeatureCollection');

  const refused = await call('inspect_image', { image: '/etc/passwd' });
  assert.ok(refused.isError);
  assert.match(text(refused), /list_images/);
  await client.close();
  console.log(`TypeScript SDK ${name}: ${tools.length} tools, answers, links and errors as they should be`);
}
