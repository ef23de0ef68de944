"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (name, text = "", parent = null) => {
  const element = document.createElement(name);
  element.textContent = text;
  if (parent) parent.append(element);
  return element;
};

// A name in bold, which may be broken behind an underscore or a slash.
const named = (text, parent) => {
  const name = make("b", "", parent);
  for (const part of text.split(/(?<=[_/])/)) name.append(part, make("wbr"));
};

// Colours of a value from -1 to 1: [red, green, blue].
const between = stops => value => {
  let i = 1;
  while (i < stops.length - 1 && value > stops[i][0]) i++;
  const [low, from] = stops[i - 1], [high, to] = stops[i];
  const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
  return from.map((part, k) => part + share * (to[k] - part));
};
const signed = between([[-1, [10, 61, 145]], [-.6, [63, 127, 208]], [-.25, [169, 203, 240]], [0, [255, 255, 255]],
  [.25, [249, 184, 166]], [.6, [221, 75, 62]], [1, [160, 0, 20]]]);
const heat = between([[0, [0, 0, 0]], [.35, [150, 20, 20]], [.7, [240, 150, 20]], [1, [255, 255, 210]]]);
const scales = { signed, heat: value => heat(Math.abs(value)), grey: value => Array(3).fill(255 * Math.abs(value)) };
const tables = {};
for (const [name, scale] of Object.entries(scales))
  tables[name] = Array.from({ length: 256 }, (_, level) => scale(Math.max(-1, (level - 128) / 127)));

// The pixels of a picture, at a size; once for each.
const kept = new Map();
const pixels = (source, width, height) => {
  const key = `${width}x${height} ${source}`;
  if (!kept.has(key)) kept.set(key, new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => {
      const canvas = make("canvas");
      canvas.width = width || image.width;
      canvas.height = height || image.height;
      const pen = canvas.getContext("2d", { willReadFrequently: true });
      pen.drawImage(image, 0, 0, canvas.width, canvas.height);
      resolve(pen.getImageData(0, 0, canvas.width, canvas.height));
    };
    image.onerror = reject;
    image.src = source;
  }));
  return kept.get(key);
};

const draw = async (canvas, sample, label) => {
  const map = await pixels(sample.maps[label]);
  const share = sample.photograph ? at("overlay").value / 100 : 1;
  const photograph = share < 1 ? await pixels(sample.photograph, map.width, map.height) : null;
  const table = tables[at("scale").value];
  const result = new ImageData(map.width, map.height);
  for (let i = 0; i < map.data.length; i += 4) {
    const colour = table[map.data[i]];
    for (let k = 0; k < 3; k++)
      result.data[i + k] = share * colour[k] + (photograph ? (1 - share) * photograph.data[i + k] : 0);
    result.data[i + 3] = 255;
  }
  canvas.width = map.width;
  canvas.height = map.height;
  canvas.getContext("2d").putImageData(result, 0, 0);
};

// What the colours mean, from -1 to 1, or from 0 where only the size counts.
const ramp = () => {
  const pen = at("ramp").getContext("2d");
  const signed = at("scale").value === "signed";
  for (let x = 0; x < 96; x++) {
    const level = signed ? 1 + Math.round(x * 254 / 95) : 128 + Math.round(x * 127 / 95);
    pen.fillStyle = `rgb(${tables[at("scale").value][level].map(Math.round).join()})`;
    pen.fillRect(x, 0, 1, 1);
  }
};

const shown = () => data.methods.filter((_, i) => at(`method-${i}`).checked);
const round = value => value === null ? "-" : Number(value.toPrecision(3)).toString();

const enlarge = (sample, label) => {
  at("large-title").textContent = `${sample.id}: ${label}`;
  draw(at("large-map"), sample, label);
  at("large").showModal();
};

const article = sample => {
  const row = make("article");
  row.tabIndex = 0;
  const facts = make("div", "", row);
  facts.className = "sample";
  named(sample.id, facts);
  for (const [name, value] of sample.facts) make("div", `${name}: ${value}`, facts);
  if (sample.disagreement !== null) make("div", `disagreement: ${round(sample.disagreement)}`, facts);
  if (sample.wrong) make("span", "misclassified", facts).className = "wrong";
  const maps = make("div", "", row);
  maps.className = "maps";
  if (sample.photograph) {
    const figure = make("figure", "", maps);
    const image = make("img", "", figure);
    image.src = sample.photograph;
    image.alt = `photograph of ${sample.id}`;
    make("figcaption", "photograph", figure);
  }
  for (const label of shown()) {
    const figure = make("figure", "", maps);
    if (sample.maps[label]) {
      const button = make("button", "", figure);
      button.setAttribute("aria-label", `enlarge ${label} of ${sample.id}`);
      button.addEventListener("click", () => enlarge(sample, label));
      const canvas = make("canvas", "", button);
      draw(canvas, sample, label);
      canvas.redraw = () => draw(canvas, sample, label);
    } else make("div", sample.failed[label] || "no map", figure).className = "none";
    const caption = make("figcaption", "", figure);
    named(label, caption);
    for (const metric of data.metrics)
      if (sample.scores[metric]?.[label] !== undefined) {
        const line = make("div", "", caption);
        make("span", `${metric} `, line);
        make("span", round(sample.scores[metric][label]), line);
      }
  }
  return row;
};

const key = sample => {
  const [kind, metric, label] = JSON.parse(at("sort").value);
  return kind === "metric" ? sample.scores[metric]?.[label] ?? null : sample[kind];
};

const redraw = () => {
  ramp();
  document.querySelectorAll("#gallery canvas").forEach(canvas => canvas.redraw());
};
const refresh = () => {
  const wanted = at("find").value.toLowerCase();
  const found = data.samples.filter(sample =>
    (!at("class").value || sample.class === at("class").value) &&
    (!at("wrong").checked || sample.wrong) && sample.id.toLowerCase().includes(wanted));
  const sign = at("down").checked ? -1 : 1;
  found.sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
  });
  at("gallery").replaceChildren(...found.map(article));
  at("count").value = `${found.length} of ${data.samples.length} samples`;
};

const option = (parent, text, value) => { make("option", text, parent).value = value; };
[...new Set(data.samples.map(sample => sample.class))].sort().forEach(name => name && option(at("class"), name, name));
for (const [text, kind] of [["file order", "place"], ["name", "id"], ["score", "score"],
  ["disagreement between methods", "disagreement"]]) option(at("sort"), text, JSON.stringify([kind]));
for (const metric of data.metrics) {
  const group = make("optgroup", "", at("sort"));
  group.label = metric;
  for (const label of data.methods) option(group, `${metric} of ${label}`, JSON.stringify(["metric", metric, label]));
}
data.methods.forEach((name, i) => {
  const label = make("label", "", at("methods"));
  const box = make("input", "", label);
  box.type = "checkbox";
  box.id = `method-${i}`;
  box.checked = true;
  box.addEventListener("change", refresh);
  label.append(` ${name}`);
});
for (const id of ["class", "sort", "down", "wrong"]) at(id).addEventListener("change", refresh);
at("find").addEventListener("input", refresh);
for (const id of ["scale", "overlay"]) at(id).addEventListener("input", redraw);
at("size").addEventListener("input", () => document.documentElement.style.setProperty("--side", `${at("size").value}px`));

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select") || at("large").open) return;
  const rows = [...document.querySelectorAll("article")];
  const here = rows.indexOf(event.target.closest("article"));
  const step = { j: 1, k: -1 }[event.key];
  if (step && rows.length) rows[Math.min(rows.length - 1, Math.max(0, here + step))].focus();
  else if (event.key === "c") {
    at("scale").selectedIndex = (at("scale").selectedIndex + 1) % at("scale").length;
    redraw();
  } else if (event.key === "[" || event.key === "]") {
    at("overlay").value = Number(at("overlay").value) + (event.key === "]" ? 10 : -10);
    redraw();
  } else if (event.key === "/") {
    event.preventDefault();
    at("find").focus();
  }
});
ramp();
refresh();
document.documentElement.dataset.ready = "yes";
