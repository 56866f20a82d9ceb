// Reads records with the code of circuit-tracer's page: `node reader.js ASSETS FEATURES`, [[layer, feature], ..] on stdin.
// FEATURES stands in for the folder features/ of the repository user/name on the hub, which knows ranges of bytes.
"use strict";
const fs = require("fs"), path = require("path"), vm = require("vm"), zlib = require("zlib");
const [assets, features] = process.argv.slice(2), hub = "https://huggingface.co/user/name/resolve/main/features/";

async function fetched(address, {method, headers} = {}) {
  if (!address.startsWith(hub)) throw new Error("asked for " + address);
  const file = path.join(features, address.slice(hub.length));
  if (!fs.existsSync(file)) return new Response("", {status: 404});
  if (method === "HEAD") return new Response();
  const bytes = fs.readFileSync(file), range = headers?.Range?.match(/^bytes=(\d+)-(\d+)$/);
  return range ? new Response(bytes.subarray(Number(range[1]), Number(range[2]) + 1), {status: 206}) : new Response(bytes);
}

// What is drawn is of no interest: anything that is asked of d3 and of elements is a function that returns the same.
const anything = new Proxy(() => {}, {get: (_, name) => name === Symbol.toPrimitive ? () => "" : anything, apply: () => anything});
const pako = {inflate: (bytes, {to}) => zlib.unzipSync(bytes).toString(to === "string" ? "utf8" : undefined)};
const page = {console, URL, Map, Uint8Array, location: new URL("http://localhost/"), fetch: fetched, d3: anything, pako};
page.window = page;
vm.createContext(page);
for (const file of ["util.js", "feature_examples/init-feature-examples.js"])
  vm.runInContext(fs.readFileSync(path.join(assets, file), "utf8"), page, file);

(async () => {
  const {loadFeature} = page.initFeatureExamples({containerSel: anything, showLogits: false, showExamples: false});
  const wanted = JSON.parse(fs.readFileSync(0, "utf8")), found = [];
  for (const [layer, feature] of wanted) {
    const record = await loadFeature("user/name", (layer + feature) * (layer + feature + 1) / 2 + feature);
    found.push({...record, colorScale: undefined});
  }
  process.stdout.write(JSON.stringify(found));
})();
