"use strict";
// What the server answers, from the files of features/ instead: for a web host that serves files and nothing else.

async function fetched(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer;
}

async function unpacked(bytes, format) {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream(format))).json();
}

// Some hosts send a .gz file as content that is compressed, and the browser has unpacked it already.
async function gunzipped(path) {
  const bytes = new Uint8Array(await (await fetched(path)).arrayBuffer());
  return bytes[0] === 0x1f && bytes[1] === 0x8b ? unpacked(bytes, "gzip") : JSON.parse(new TextDecoder().decode(bytes));
}

// {name: {data, width}} of a safetensors file of (L, F) and (L, F, width) arrays.
async function tensors(path) {
  const buffer = await (await fetched(path)).arrayBuffer();
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const kinds = {F32: Float32Array, I32: Int32Array, I64: BigInt64Array};
  const found = {};
  for (const [name, {dtype, shape, data_offsets: [start, end]}] of Object.entries(header)) {
    const data = new kinds[dtype](buffer.slice(8 + size + start, 8 + size + end));
    found[name] = {data: dtype === "I64" ? Float64Array.from(data, Number) : data, width: shape[2] ?? 1};
  }
  return found;
}

function staticSource({tokens, d_features: F}) {
  let files = null;
  const read = () => files ??= Promise.all([
    tensors("features/summary.safetensors"), gunzipped("features/vocabulary.json.gz"), gunzipped("features/index.json.gz"),
  ]);

  function row(arrays, vocabulary, place) {
    const number = name => Number(arrays[name].data[place].toPrecision(4));
    const texts = name => {
      const {data, width} = arrays[name];
      return Array.from(data.subarray(place * width, (place + 1) * width)).filter(id => id >= 0).map(id => vocabulary[id]);
    };
    return {
      layer: Math.floor(place / F), feature: place % F, count: arrays.count.data[place], max: number("max_activation"),
      mean: number("mean_activation"), norm: number("decoder_norm"), tokens: texts("example_tokens"),
      top: texts("top_logits"), bottom: texts("bottom_logits"),
    };
  }

  async function select({sort = "feature", layer, min = 0, max = 1, text = "", logit = "", start = 0, limit = 100}) {
    const [arrays, vocabulary] = await read(), count = arrays.count.data;
    const tests = [place => count[place] / tokens >= min && count[place] / tokens <= max];
    if (layer !== undefined) tests.push(place => Math.floor(place / F) === Number(layer));
    for (const [part, name] of [[text.toLowerCase(), "example_tokens"], [logit.toLowerCase(), "top_logits"]]) {
      if (!part) continue;
      const {data, width} = arrays[name], hit = vocabulary.map(token => token.toLowerCase().includes(part));
      tests.push(place => data.subarray(place * width, (place + 1) * width).some(id => id >= 0 && hit[id]));
    }
    const found = Array.from(count.keys()).filter(place => tests.every(test => test(place)));
    const keys = arrays[sort.replace("-", "")]?.data, sign = sort.startsWith("-") ? -1 : 1;
    const of = keys ? place => keys[place] : place => place;
    found.sort((a, b) => sign * (of(a) - of(b)) || a - b);
    const page = found.slice(Number(start), Number(start) + Number(limit));
    return {total: found.length, rows: page.map(place => row(arrays, vocabulary, place))};
  }

  async function feature(layer, number) {
    const [arrays, vocabulary, index] = await read();
    if (!index[layer] || !(number < F)) throw new Error(`there is no feature ${number} of layer ${layer}`);
    const {filename, offsets} = index[layer], start = offsets[number], end = offsets[number + 1];
    const answer = await fetched(`features/${filename}`, {headers: {Range: `bytes=${start}-${end - 1}`}});
    const bytes = await answer.arrayBuffer();  // the whole file, where a host knows no ranges
    const record = await unpacked(answer.status === 206 ? bytes.slice(4) : bytes.slice(start + 4, end), "deflate");
    const others = record.coactive.map(other => row(arrays, vocabulary, other.layer * F + other.feature));
    return {record, row: row(arrays, vocabulary, layer * F + number), others};
  }

  return {select, feature};
}
