// A client in another language: the contract's page, a socket, JSON for the values.
const fs = require("fs"), net = require("net"), path = require("path"), readline = require("readline");

const page = fs.readFileSync(path.join(__dirname, "../../cdc_invalidator/reader/CONTRACT.md"), "utf8");
const scripts = Object.fromEntries([...page.matchAll(/```lua\n-- (\w+)\n([^]*?)```/g)].map((found) => found.slice(1)));

class Redis {
  constructor() {
    const { hostname, port } = new URL(process.env.CONFORMANCE_REDIS);
    this.socket = net.connect(port, hostname);
    this.rest = "";
    this.socket.on("data", (data) => { this.rest += data; this.reply(); });
    for (const end of ["error", "close"]) this.socket.on(end, () => this.fail?.(new Error("no Redis")));
  }
  reply() {
    const found = /^([$:+*-])([^\r]*)\r\n/.exec(this.rest);
    if (!found) return;
    const [line, kind, text] = found, length = Number(text), whole = line.length + length + 2;
    if (kind === "*" && !/^[^]*\r\n[^]*\r\n[^]*\r\n$/.test(this.rest)) return;
    if (kind === "*") return this.fail(new Error("nothing is proven"));
    if (kind === "-") return this.fail(new Error(text));
    if (kind !== "$" || length < 0) return this.done(kind === ":" ? length : null);
    if (this.rest.length >= whole) this.done(this.rest.slice(line.length, whole - 2));
  }
  ask(...words) {
    this.rest = "";
    return new Promise((done, fail) => {
      Object.assign(this, { done, fail });
      this.socket.write(`*${words.length}\r\n` + words.map((word) => `$${Buffer.byteLength(`${word}`)}\r\n${word}\r\n`).join(""));
    });
  }
  run(script, keys, ...given) { return this.ask("EVAL", scripts[script], keys.length, ...keys, ...given); }
  prove(wanted, script, keys, ...given) {
    if (!wanted.at_least) return this.run(script, keys, ...given);
    const asked = [wanted.watermark, "", wanted.cache, wanted.at_least, "", "", ""];
    return this.ask("EVAL", scripts.PROOF + scripts[script], keys.length, ...keys, ...given, ...asked);
  }
}

async function read(redis, wanted) {
  const token = Math.random().toString(36).slice(2), deadline = Date.now() + 2000;
  let key = wanted.key;
  if (wanted.version) key = key.replace("{version}", await redis.prove(wanted, "VERSION", [wanted.version], wanted.version_ttl));
  let stored = wanted.at_least ? null : await redis.ask("GET", key);
  while (stored === null) {
    const taken = await redis.prove(wanted, "TAKE", [`${key}\0lock`, key], token, 10000, "");
    if (typeof taken === "string") stored = taken;
    else if (taken) return fill(redis, key, `${token}:${taken}`, wanted);
    else if (Date.now() > deadline) return load();
    else await new Promise((later) => setTimeout(later, 50));
  }
  return JSON.parse(stored);
}

async function fill(redis, key, lease, wanted) {
  const release = () => redis.run("RELEASE", [`${key}\0lock`], lease);
  const value = await load().catch(async (failed) => { await release(); throw failed; });
  const ttl = value === null ? wanted.negative_ttl : wanted.ttl;
  const stored = ttl ? redis.run("FILL", [`${key}\0lock`, key], lease, JSON.stringify(value), ttl) : release();
  await stored.catch(() => {}); // the value is right all the same
  return value;
}

const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const hear = async () => JSON.parse((await lines.next()).value ?? "null");
const say = (message) => process.stdout.write(JSON.stringify(message) + "\n");

class Failed extends Error {}
async function load() {
  say({ load: true });
  const heard = await hear();
  if ("failed" in heard) throw new Failed(heard.failed);
  return heard.loaded;
}

(async () => {
  for (let heard = await hear(); heard; heard = await hear()) {
    const redis = new Redis();
    try { say({ value: await read(redis, heard.get) }); }
    catch (failed) { say(failed instanceof Failed ? { error: failed.message } : { value: await load() }); }
    redis.socket.destroy();
  }
})();
