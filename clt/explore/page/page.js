"use strict";
// One page, routed by the part of the address behind the #. Texts of tokens go into text nodes alone, never into HTML.

const main = document.getElementById("main"), errors = document.getElementById("error");
let overview, source, move = null, asked = new AbortController();  // move(±1): what j and k do on this page

// Elements

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter(child => child != null && child !== false));
  return element;
}

const number = value => value == null ? "–" : value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
  : Number(value.toPrecision(3)).toLocaleString("en", {maximumSignificantDigits: 3});
const percent = share => share == null ? "–" : number(100 * share) + " %";
const frequency = row => row.count / overview.summary.tokens;
const name = row => `${row.layer}.${row.feature}`;
const address = row => `#/feature/${row.layer}/${row.feature}`;
const chip = (text, times = 1) => [h("span", {class: "chip"}, text, times > 1 && h("small", {}, "×" + times)), "\u200b"];

function chips(texts, most = 6) {
  const times = new Map();
  for (const text of texts) times.set(text, (times.get(text) ?? 0) + 1);
  return h("div", {class: "chips"}, [...times].slice(0, most).map(([text, count]) => chip(text, count)));
}

function bars(values, {labels = [], links = [], titles = [], most = Math.max(...values, 0), log = false} = {}) {
  const height = value => log ? Math.log1p(value) : value;
  return h("div", {class: values.length > 12 ? "bars dense" : "bars"}, values.map((value, at) =>
    h(links[at] ? "a" : "div", {href: links[at], title: titles[at], "--share": most ? height(value ?? 0) / height(most) : 0},
      h("span", {}, number(value)), h("i"), labels[at] != null && h("span", {}, labels[at]))));
}

const card = (title, ...children) => h("section", {class: "card"}, title && h("h2", {}, title), ...children);
const layerName = layer => overview.summary.layers?.[layer] ?? layer;
const color = (layer, light) => `hsl(${220 + 165 * layer / Math.max(overview.summary.n_layers - 1, 1)} 70% ${light ? 45 : 62}%)`;
const isLight = () => !matchMedia("(prefers-color-scheme: dark)").matches;

// Overview

function showOverview() {
  const {summary, figures, labels, l0_per_layer: l0, silent_per_layer: silent} = overview, F = summary.d_features;
  const total = values => values.reduce((a, b) => a + b, 0), layers = l0.map((_, layer) => layerName(layer));
  const fve = figures?.fve_per_layer, link = query => l0.map((_, layer) => `#/features?layer=${layer}${query}`);
  const tiles = {
    [labels.fve]: number(figures?.fve), "L0, all layers, on this text": number(total(l0)),
    [`never fire here, of ${number(F * summary.n_layers)} features`]: number(total(silent)),
    [labels.top1_agreement]: number(figures?.top1_agreement), [labels.kl]: number(figures?.kl),
    "cross-entropy recovered": percent(figures?.ce_recovered),
  };
  const canvas = h("canvas", {id: "scatter", tabindex: 0, role: "img", "aria-label":
    "Each feature by how often it fires and its highest activation. Arrow keys go from one to the next, Enter opens it."});
  const told = h("p", {class: "soft", id: "told", "aria-live": "polite"}, "\u00a0"), legend = h("div", {class: "legend"});
  const drawn = overview.points.layer.length, firing = F * summary.n_layers - total(silent);
  main.replaceChildren(
    h("h1", {}, `Features of ${summary.transcoder_id}`),
    h("p", {class: "soft"}, `${summary.model}, ${summary.n_layers} layers of ${number(F)} features. Read on ` +
      `${number(summary.tokens)} tokens of ${summary.part === "heldout" ? "held-out" : "training"} text, ${number(summary.documents)} documents.` +
      (figures ? "" : " This checkpoint was not evaluated: see clt eval.")),
    h("dl", {class: "card tiles"}, Object.entries(tiles).map(([what, value]) => h("div", {}, h("dt", {}, what), h("dd", {}, value)))),
    h("div", {class: "charts"},
      fve && card("Variance explained by layer", bars(fve, {labels: layers, most: 1})),
      card("Features on per token by layer", bars(l0, {labels: layers, links: link("&sort=-count")})),
      card("Features that never fire here by layer", bars(silent, {labels: layers, links: link("&max=0")}))),
    h("section", {class: "card"},
      h("div", {class: "head"}, h("h2", {}, "How often a feature fires, and its highest activation"), legend),
      canvas, told,
      drawn < firing && h("p", {class: "soft"}, `Drawn are ${number(drawn)} of ${number(firing)}: one of those that would overlap.`)));
  scatter(canvas, told, legend);
}

function scatter(canvas, told, legend) {
  const {layer, feature, count, max} = overview.points, tokens = overview.summary.tokens;
  const log = count.map((value, at) => [Math.log10(value / tokens), Math.log10(Math.max(max[at], 1e-6))]);
  const range = axis => { const all = log.map(point => point[axis]).sort((a, b) => a - b); return [all[0] ?? -1, all.at(-1) ?? 0]; };
  const [left, right] = range(0), [low, high] = range(1), edge = {left: 46, right: 14, top: 12, bottom: 34};
  let width, height, only = null, chosen = null;
  const x = at => edge.left + (log[at][0] - left) / (right - left || 1) * (width - edge.left - edge.right);
  const y = at => height - edge.bottom - (log[at][1] - low) / (high - low || 1) * (height - edge.top - edge.bottom);
  const visible = [...layer.keys()].sort((a, b) => log[a][0] - log[b][0]);
  const points = () => only === null ? visible : visible.filter(at => layer[at] === only);

  function draw() {
    const scale = devicePixelRatio || 1, style = getComputedStyle(canvas), context = canvas.getContext("2d"), light = isLight();
    width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * scale, canvas.height = height * scale;
    context.scale(scale, scale);
    context.font = "12px system-ui, sans-serif";
    context.strokeStyle = style.getPropertyValue("--line"), context.fillStyle = style.getPropertyValue("--soft");
    for (const [axis, from, to] of [[0, left, right], [1, low, high]]) {
      const step = to - from < 1.5 ? Math.log10(2) : 1;
      for (let tick = Math.ceil(from / step) * step; tick <= to + 1e-9; tick += step) {
        const share = (tick - from) / (to - from || 1), across = edge.left + share * (width - edge.left - edge.right);
        const up = height - edge.bottom - share * (height - edge.top - edge.bottom);
        context.beginPath();
        if (axis) context.moveTo(edge.left, up), context.lineTo(width - edge.right, up);
        else context.moveTo(across, edge.top), context.lineTo(across, height - edge.bottom);
        context.stroke();
        context.textAlign = axis ? "right" : "center";
        context.fillText(axis ? number(10 ** tick) : percent(10 ** tick), axis ? edge.left - 6 : across, axis ? up + 4 : height - edge.bottom + 15);
      }
    }
    context.textAlign = "right";
    context.fillText("share of tokens on which it fires", width - edge.right, height - 4);
    context.textAlign = "left";
    context.fillText("highest activation", edge.left + 4, edge.top + 10);
    const size = layer.length > 5000 ? 1.6 : 2.6;
    context.globalAlpha = .55;
    for (const at of points()) {
      context.fillStyle = color(layer[at], light);
      context.beginPath(), context.arc(x(at), y(at), size, 0, 7), context.fill();
    }
    context.globalAlpha = 1;
    if (chosen === null) return;
    context.strokeStyle = style.getPropertyValue("--ink"), context.lineWidth = 2;
    context.beginPath(), context.arc(x(chosen), y(chosen), 6, 0, 7), context.stroke();
  }

  function choose(at) {
    chosen = at;
    canvas.style.cursor = at === null ? "crosshair" : "pointer";
    told.textContent = at === null ? "\u00a0" : `Feature ${layer[at]}.${feature[at]} fires on ${percent(count[at] / tokens)} ` +
      `of tokens, up to ${number(max[at])}. Click or Enter opens it.`;
    draw();
  }

  function nearest(event) {
    const {left: across, top} = canvas.getBoundingClientRect();
    let best = null, least = 14 ** 2;
    for (const at of points()) {
      const distance = (x(at) - event.clientX + across) ** 2 + (y(at) - event.clientY + top) ** 2;
      if (distance < least) [best, least] = [at, distance];
    }
    return best;
  }

  const open = at => { if (at !== null) location.hash = `#/feature/${layer[at]}/${feature[at]}`; };
  canvas.addEventListener("mousemove", event => { const at = nearest(event); if (at !== chosen) choose(at); });
  canvas.addEventListener("click", event => open(nearest(event)));
  canvas.addEventListener("keydown", event => {
    const by = {ArrowRight: 1, ArrowLeft: -1, ArrowUp: 20, ArrowDown: -20}[event.key];
    if (event.key === "Enter") open(chosen);
    if (!by || !points().length) return;
    event.preventDefault();
    const all = points();
    choose(all[Math.min(Math.max(all.indexOf(chosen) + by, 0), all.length - 1)]);
  });
  legend.append(...[null, ...overview.l0_per_layer.keys()].map(of => h("button", {
    type: "button", "aria-pressed": String(of === null), "--dot": of === null ? "transparent" : color(of, isLight()),
    onclick: event => {
      only = of;
      for (const button of legend.children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
      choose(null);
    },
  }, of === null ? "all layers" : String(layerName(of)))));
  new ResizeObserver(draw).observe(canvas);
}

// Table

const COLUMNS = [["feature", "Feature"], ["count", "Fires on"], ["max_activation", "Highest"], ["mean_activation", "Mean"],
  ["decoder_norm", "Write norm"]];
const ROWS = 100;

function showTable(params) {
  const state = Object.fromEntries(params), body = h("tbody"), total = h("span", {"aria-live": "polite"});
  const change = more => {
    Object.assign(state, {start: undefined}, more);
    for (const key of Object.keys(state)) if (state[key] === undefined || state[key] === "") delete state[key];
    history.replaceState(null, "", "#/features?" + new URLSearchParams(state));
    load();
  };
  const field = (key, label, attributes = {}, show = v => v, read = v => v) => h("label", {}, label, h("input", {
    name: key, value: state[key] === undefined ? "" : show(state[key]), autocomplete: "off", ...attributes,
    oninput: event => later(() => change({[key]: event.target.value === "" ? "" : read(event.target.value)})),
  }));
  const share = {type: "number", min: 0, max: 100, step: "any", class: "short"};
  const asShare = value => Math.min(Math.max(value / 100, 0), 1), asPercent = value => Number((100 * value).toPrecision(6));
  const layers = h("select", {onchange: event => change({layer: event.target.value})}, h("option", {value: ""}, "all"),
    overview.l0_per_layer.map((_, layer) => h("option", {value: layer, selected: state.layer === String(layer)}, layerName(layer))));
  const sorted = key => {  // numbers with the largest first, and the other way round at the second click
    const now = state.sort ?? "feature", first = key === "feature" ? key : "-" + key;
    return now !== first ? first : key === "feature" ? "-" + key : key;
  };
  const heads = COLUMNS.map(([key, label]) => h("th", {class: key === "feature" ? "" : "number", scope: "col"}, h("button", {
    type: "button", onclick: () => change({sort: sorted(key)}),
  }, label)));
  const back = h("button", {type: "button", onclick: () => change({start: Math.max(Number(state.start ?? 0) - ROWS, 0) || ""})}, "Previous");
  const next = h("button", {type: "button", onclick: () => change({start: Number(state.start ?? 0) + ROWS})}, "Next");

  async function load() {
    const {total: count, rows} = await latest(signal => source.select({...state, limit: ROWS}, signal));
    const start = Number(state.start ?? 0), [sort, down] = [(state.sort ?? "feature").replace("-", ""), state.sort?.startsWith("-")];
    heads.forEach((head, at) => {
      if (COLUMNS[at][0] === sort) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.firstChild.textContent = COLUMNS[at][1] + (COLUMNS[at][0] === sort ? down ? " ↓" : " ↑" : "");
    });
    total.textContent = count ? `${number(start + 1)} to ${number(start + rows.length)} of ${number(count)} features` : "No feature is like that.";
    back.disabled = start === 0, next.disabled = start + rows.length >= count;
    body.replaceChildren(...rows.map(row => h("tr", {},
      h("td", {}, h("a", {href: address(row)}, name(row))), h("td", {class: "number"}, percent(frequency(row))),
      ...[row.max, row.mean, row.norm].map(value => h("td", {class: "number"}, number(value))),
      h("td", {}, chips(row.tokens)), h("td", {}, chips(row.top, 5)))));
  }

  main.replaceChildren(
    h("h1", {}, "Features"),
    h("div", {class: "filters"}, h("label", {}, "Layer", layers), field("min", "Fires on, from %", share, asPercent, asShare),
      field("max", "to %", share, asPercent, asShare), field("text", "Token in examples"), field("logit", "Token that it promotes")),
    h("div", {class: "scroll"}, h("table", {}, h("thead", {}, h("tr", {}, heads, h("th", {scope: "col"}, "Its highest examples fire on"),
      h("th", {scope: "col"}, "Promotes"))), body)),
    h("div", {class: "pager"}, back, next, total));
  move = by => {
    const links = [...body.querySelectorAll("a")], at = links.indexOf(document.activeElement);
    links[Math.min(Math.max(at + by, 0), links.length - 1)]?.focus();
  };
  return load();
}

// A feature

async function showFeature([layer, feature]) {
  const {record, row, others} = await latest(signal => source.feature(layer, feature, signal)), F = overview.summary.d_features;
  const step = by => address({layer, feature: Math.min(Math.max(feature + by, 0), F - 1)});
  const most = record.act_max || 1, wrapped = localStorage.getItem("wrap") === "1";
  const groups = h("div", {id: "examples", class: wrapped ? "wrap" : ""}, record.examples_quantiles.map(({quantile_name: title, examples}) =>
    card(title, examples.length ? examples.map(example => showExample(example, most)) : h("p", {class: "soft"}, "It never fires here."))));
  for (const group of groups.children) group.classList.add("group");
  const written = record.decoder_norms ?? [], logits = (key, title, way) => h("div", {}, h("h2", {}, title), h("ol", {},
    record[key].map((text, at) => {
      const values = record[key.slice(0, -1) + "_values"] ?? [], largest = Math.max(...values.map(Math.abs)) || 1;
      return h("li", {class: way, "--share": Math.abs(values[at] ?? 0) / largest}, h("span", {class: "token"}, text), h("span", {class: "number"}, number(values[at])));
    })));
  main.replaceChildren(
    h("div", {class: "head"}, h("h1", {}, `Feature ${name(row)}`), h("span", {},
      h("a", {href: step(-1)}, "← previous"), " · ", h("a", {href: step(1)}, "next →"), " ",
      h("button", {type: "button", onclick: wrap}, "wrap examples"),
      overview.prompt && row.count > 0 && [" ", h("a", {class: "button", href: tryIt(record.examples_quantiles[0].examples[0], row)}, "change it in a prompt")])),
    h("p", {class: "soft"}, `Layer ${layerName(layer)}. Fires on ${percent(frequency(row))} of tokens (${number(row.count)}), ` +
      `up to ${number(row.max)}, on average ${number(row.mean)}. The norm of what it writes is ${number(row.norm)}.`),
    h("div", {class: "feature"}, h("div", {class: "side"},
      h("section", {class: "card logits"}, logits("top_logits", "Promotes", "up"), logits("bottom_logits", "Suppresses", "down")),
      card("Activations where it fires", bars(record.histogram, {log: true, titles: record.histogram.map(count => `${number(count)} tokens`)}),
        h("div", {class: "ends"}, h("span", {}, number(record.act_min)), h("span", {}, "log counts"), h("span", {}, number(record.act_max)))),
      card("Write norm by layer", bars(written, {labels: written.map((_, at) => layerName(layer + at)),
        titles: written.map((norm, at) => `layer ${layerName(layer + at)}: ${number(norm)}`)})),
      card("Fires together with", h("ul", {class: "near"}, others.length ? others.map((other, at) => h("li", {
        title: `on ${percent(record.coactive[at].share)} of this one's tokens`}, h("a", {href: address(other)}, name(other)),
        h("span", {class: "soft number"}, percent(record.coactive[at].share)), chips(other.tokens, 3))) : h("li", {class: "soft"}, "nothing")))),
      groups));
  move = by => { location.hash = step(by); };
}

function showExample({tokens, tokens_acts_list: acts, train_token_ind: at, document: owner, position, is_repeated_datapoint: repeated}, most) {
  const token = (text, i) => h("span", {class: `token${acts[i] > 0 ? " hot" : ""}${i === at ? " peak" : ""}`, "--share": acts[i] / most,
    title: acts[i] > 0 ? `activation ${number(acts[i])}` : null}, text);
  const spans = tokens.map(token);
  return h("div", {class: "example", title: `document ${owner}, token ${position} of its window${repeated ? ", a repeated text" : ""}`},
    h("span", {class: "number"}, number(acts[at])), h("span", {class: "text"},
      h("span", {class: "before"}, spans.slice(0, at)), h("span", {class: "after"}, spans.slice(at))));
}

function wrap() {
  const on = document.getElementById("examples")?.classList.toggle("wrap");
  if (on !== undefined) localStorage.setItem("wrap", on ? "1" : "0");
}

// Line ends stand as signs in the texts of tokens.
const plain = text => text.replaceAll("⏎", "\n").replaceAll("→", "\t").replaceAll("↵", "\r");
// The first token of a window is the special one that starts prompts too.
const tryIt = ({tokens, train_token_ind: at, position}, row) => "#/prompt?" + new URLSearchParams({
  text: plain(tokens.slice(position === at ? 1 : 0, at + 1).join("")), scale: `${name(row)}:0`});

// A prompt

function showPrompt(params) {
  const scales = new Map((params.get("scale") ?? "").split(",").filter(Boolean).map(part => part.split(":")).map(([id, by]) => [id, Number(by)]));
  const area = h("textarea", {"aria-label": "Prompt", placeholder: "A text; Enter runs it", spellcheck: "false"}), out = h("div");
  let answer = null, at = 0;
  area.value = params.get("text") ?? "";

  async function run() {
    const text = area.value;
    const scale = [...scales].map(([id, by]) => `${id}:${by}`).join(",");
    history.replaceState(null, "", "#/prompt?" + new URLSearchParams({text, ...(scale && {scale})}));
    if (!text) return out.replaceChildren();
    const changes = [...scales].map(([id, by]) => [...id.split(".").map(Number), by]);
    const same = answer?.text === text;
    if (!answer) out.replaceChildren(h("p", {class: "soft"}, "Running; the first prompt loads both models …"));
    out.setAttribute("aria-busy", "true");
    answer = await latest(signal => source.prompt(text, changes, signal)).finally(() => out.removeAttribute("aria-busy"));
    answer.text = text;
    if (!same) at = answer.tokens.length - 1;
    show();
  }

  const shift = (before, after = before) => before === after ? before : `${before} → ${after}`;
  const activation = (row, run, token) => row.runs[run]?.find(([place]) => place === token)?.[1] ?? 0;

  function slider(row) {
    const id = name(row), value = scales.get(id) ?? 1;
    const set = by => { if (by === 1) scales.delete(id); else scales.set(id, by); return run(); };
    const told = h("output", {}, "×" + value), range = h("input", {
      type: "range", min: 0, max: 4, step: .25, value, "aria-label": `Scale of feature ${id}`, "data-id": id,
      oninput: event => { told.textContent = "×" + event.target.value; later(() => set(Number(event.target.value))); }});
    return h("div", {class: "scale"}, range, told, h("button", {type: "button", onclick: () => set(value === 1 ? 0 : 1)},
      value === 1 ? "off" : "reset"));
  }

  function show() {
    const focused = document.activeElement?.dataset.id, changed = scales.size > 0, {tokens, keep, features, next, kl} = answer;
    const strength = row => Math.max(...row.runs.map((_, run) => activation(row, run, at))) * row.norm;
    const here = features.filter(row => strength(row) > 0 || scales.has(name(row)))
      .sort((a, b) => scales.has(name(b)) - scales.has(name(a)) || strength(b) - strength(a));
    const strip = h("div", {class: "strip", role: "group", "aria-label": "Tokens"}, tokens.map((text, token) => h("button", {
      type: "button", "aria-pressed": String(token === at), tabindex: token === at ? 0 : -1, "data-id": token === at ? "token" : null,
      title: `token ${token}`, onclick: () => { at = token; show(); out.querySelector("[aria-pressed=true]").focus(); }}, text || "∅")));
    strip.addEventListener("keydown", event => {
      const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (by && tokens[at + by] !== undefined) strip.children[at + by].click();
    });
    const shade = row => [...strip.children].forEach((button, token) => {
      const share = row ? activation(row, 0, token) / Math.max(...row.runs[0].map(([, value]) => value), 1e-9) : 0;
      button.classList.toggle("hot", share > 0), button.style.setProperty("--share", share);
    });
    const rows = here.map(row => h("tr", {class: scales.has(name(row)) ? "changed" : "", onmouseenter: () => shade(row),
      onmouseleave: () => shade(null), onfocusin: () => shade(row), onfocusout: () => shade(null)},
      h("td", {}, h("a", {href: address(row)}, name(row))), h("td", {class: "number"}, shift(...row.runs.map((_, run) => number(activation(row, run, at))))), h("td", {}, chips(row.tokens, 4)), h("td", {}, slider(row))));
    const models = ["original", "replaced", ...(changed ? ["changed"] : [])], likeliest = next[at].slice();
    const largest = ([, ...shares]) => Math.max(...shares);
    likeliest.sort((a, b) => largest(b) - largest(a));
    out.replaceChildren(strip, h("div", {class: "prompt"},
      card(null, h("div", {class: "head"}, h("h2", {}, "Features on ", chip(tokens[at])), changed && h("button", {type: "button",
        onclick: () => { scales.clear(); run(); }}, "Reset all")),
        keep[at] ? null : h("p", {class: "soft"}, "The MLPs keep their own output here: this is a first or a special token."),
        h("div", {class: "scroll"}, h("table", {id: "here"}, h("thead", {}, h("tr", {}, ["Feature", "Activation", "Its highest examples fire on", "Scale, on all tokens"]
          .map(label => h("th", {scope: "col"}, label)))), h("tbody", {}, rows)))),
      card(null, h("h2", {}, "What comes next"), h("table", {class: "next", id: "next"}, h("thead", {}, h("tr", {}, h("th", {scope: "col"}, "Token"),
        models.map(model => h("th", {class: "number", scope: "col"}, model)))), h("tbody", {}, likeliest.slice(0, 14).map(([text, ...shares]) =>
        h("tr", {}, h("td", {}, chip(text)), shares.map((share, m) => h("td", {class: `number meter ${models[m]}`, "--share": share / largest(likeliest[0])}, share < 1e-4 ? "< 0.01 %" : percent(share))))))),
        h("p", {class: "soft"}, `KL(original ‖ replaced) is ${number(kl[at][0])} nats` + (changed ? `, with the changes ${number(kl[at][1])}.` : ".")))));
    if (focused) out.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  }

  area.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); guarded(run); } });
  main.replaceChildren(h("h1", {}, "Prompt"),
    h("p", {class: "soft"}, "Runs the model as it is, and with its MLPs replaced by the transcoder. A slider multiplies a feature's activations."),
    area, h("p", {}, h("button", {type: "button", onclick: () => guarded(run)}, "Run (Enter)")), out);
  if (!area.value) area.focus();
  return run();
}

// The page

async function served(path, options) {
  const answer = await fetch(path, options), tree = await answer.json();
  if (!answer.ok) throw new Error(tree.error);
  return tree;
}

const server = {
  select: (query, signal) => served("features?" + new URLSearchParams(query), {signal}),
  feature: (layer, feature, signal) => served(`features/${layer}/${feature}`, {signal}),
  prompt: (text, changes, signal) => served("prompt", {method: "POST", body: JSON.stringify({text, changes}), signal}),
};

// A later question ends an earlier one: neither its answer nor its error comes any more.
async function latest(ask) {
  asked.abort();
  const {signal} = asked = new AbortController();
  try {
    const answer = await ask(signal);
    if (!signal.aborted) return answer;
  } catch (error) {
    if (!signal.aborted) throw error;
  }
  return new Promise(() => {});
}

let timer;
function later(work) {
  clearTimeout(timer);
  timer = setTimeout(() => guarded(work), 150);
}

async function guarded(work) {
  errors.hidden = true;
  try {
    await work();
  } catch (error) {
    errors.textContent = error.message;
    errors.hidden = false;
  }
}

async function random() {
  const {summary, silent_per_layer: silent} = overview;
  const firing = summary.n_layers * summary.d_features - silent.reduce((a, b) => a + b, 0);
  const {rows: [row]} = await latest(signal => source.select({min: .5 / summary.tokens, start: Math.floor(Math.random() * firing), limit: 1}, signal));
  location.replace(row ? address(row) : "#/features");
}

function route() {
  const [path, query] = location.hash.slice(1).split(/\?(.*)/s), [, page = "", ...rest] = path.split("/");
  const pages = {"": showOverview, features: showTable, feature: showFeature, random, prompt: overview.prompt && showPrompt};
  clearTimeout(timer), asked.abort(), move = null;
  main.focus();
  for (const link of document.querySelectorAll("nav a")) link.setAttribute("aria-current", link.dataset.page === page ? "page" : "false");
  guarded(async () => {
    if (!pages[page]) throw new Error(`There is no page ${location.hash}`);
    await pages[page](page === "feature" ? rest.map(Number) : new URLSearchParams(query));
    document.title = `${main.querySelector("h1")?.textContent ?? "Features"} · ${overview.summary.transcoder_id}`;
    window.scrollTo(0, 0);
  });
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return main.focus();
  if (/INPUT|TEXTAREA|SELECT/.test(event.target.tagName)) return;
  const go = {o: "#/", f: "#/features", r: "#/random", ...(overview?.prompt && {p: "#/prompt"})}[event.key];
  if (go) location.hash = go;
  else if (event.key === "/") document.querySelector("main input[name=text], #search input").focus();
  else if (event.key === "j" || event.key === "k") move?.(event.key === "j" ? 1 : -1);
  else if (event.key === "w") wrap();
  else return;
  event.preventDefault();
});

document.getElementById("search").addEventListener("submit", event => {
  event.preventDefault();
  location.hash = "#/features?" + new URLSearchParams({text: event.target.text.value});
});

guarded(async () => {
  overview = await served("overview.json");
  source = overview.prompt ? server : staticSource(overview.summary);
  document.getElementById("run").textContent = overview.summary.transcoder_id;
  for (const part of document.querySelectorAll("#to-prompt, .prompt-key")) part.hidden = !overview.prompt;
  addEventListener("hashchange", route);
  route();
});
