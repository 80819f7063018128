"use strict";
// What is shown comes from others' data: it is put in as text and never as HTML.
const samples = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const mostSurprise = Math.max(1e-9, ...samples.map((sample) => sample.surprise));
const state = { order: [], place: 0, token: 0, pinned: false };

const sorts = {
  given: () => 0,
  surprise: (a, b) => samples[b].surprise - samples[a].surprise || a - b,
  calm: (a, b) => samples[a].surprise - samples[b].surprise || a - b,
  key: (a, b) => (samples[a].key < samples[b].key ? -1 : samples[a].key > samples[b].key ? 1 : 0),
};
const origins = { kept: "kept exactly", sketch: "from the tail sketch", spread: "an even share of the rest" };

function element(name, classes, text) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Characters that would not show, or would turn the reading order, by a sign or their escape.
function visible(text) {
  const shown = text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(
    /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, (character) => escaped(character.codePointAt(0)));
  return shown.trim() === "" ? shown.replace(/ /g, "␣") : shown;
}

function escaped(code) {
  const digits = code.toString(16);
  if (code < 0x100) return "\\x" + digits.padStart(2, "0");
  return code < 0x10000 ? "\\u" + digits.padStart(4, "0") : "\\U" + digits.padStart(8, "0");
}

// A token by itself: its leading space counts.
function spelled(text) {
  return visible(text).replace(/^ /, "␣");
}

function nats(value) {
  const shown = value.toFixed(3);
  return shown === "-0.000" ? "0.000" : shown;
}

function percent(logprob) {
  const value = 100 * Math.min(1, Math.exp(logprob));
  if (value >= 1) return value.toFixed(1) + " %";
  return value >= 0.001 ? value.toFixed(3) + " %" : value.toExponential(0) + " %";
}

function arrange(keep) {
  const wanted = at("search").value.toLowerCase();
  state.order = samples.map((_, index) => index)
    .filter((index) => samples[index].key.toLowerCase().includes(wanted)).sort(sorts[at("sort").value]);
  show(Math.max(0, state.order.indexOf(keep)));
}

function show(place) {
  state.place = Math.min(Math.max(place, 0), Math.max(0, state.order.length - 1));
  state.token = 0;
  state.pinned = false;
  at("position").textContent = state.order.length ? `${state.place + 1} of ${state.order.length}` : "none";
  at("previous").disabled = state.place === 0;
  at("next").disabled = state.place >= state.order.length - 1;
  showList();
  showSample();
}

function current() {
  return samples[state.order[state.place]];
}

function showList() {
  const items = state.order.map((index, place) => {
    const sample = samples[index], item = element("li"), button = element("button");
    button.type = "button";
    button.title = visible(sample.key);
    button.append(element("span", "key", visible(sample.key)), element("span", "value", sample.surprise.toFixed(3)));
    const meter = element("span", "meter"), bar = element("i");
    bar.style.width = (100 * sample.surprise / mostSurprise) + "%";
    meter.append(bar);
    button.append(meter);
    button.setAttribute("aria-current", String(place === state.place));
    button.addEventListener("click", () => show(place));
    item.append(button);
    return item;
  });
  if (!items.length) items.push(element("li", "none", `no key contains “${visible(at("search").value)}”`));
  at("list").replaceChildren(...items);
  if (state.order.length) at("list").children[state.place].scrollIntoView({ block: "nearest" });
}

function showSample() {
  const sample = current();
  if (!sample) {
    at("sample").replaceChildren(element("p", "dim", "No sample to show."));
    at("token").replaceChildren();
    return;
  }
  const parts = [element("h2", "", visible(sample.key)), facts(sample)];
  (sample.images || []).forEach((size, index) => parts.push(picture(sample.sources[index], size)));
  parts.push(conversation(sample));
  if (sample.paired) parts.push(...paired(sample));
  at("sample").replaceChildren(...parts);
  showLeastExpected(sample);
}

// Begin with the token that the teacher expected least.
function showLeastExpected(sample) {
  let least = 0;
  sample.tokens.forEach((token, index) => { if (token.logprob < sample.tokens[least].logprob) least = index; });
  if (sample.tokens.length) showToken(least);
  else at("token").replaceChildren();
}

function facts(sample) {
  const made = element("div", "facts"), agreed = sample.tokens.filter((token) => token.rank === 1).length;
  const mean = (name) => sample.tokens.reduce((sum, token) => sum + token[name], 0) / Math.max(1, sample.tokens.length);
  [["surprise", sample.surprise.toFixed(3) + " nats"], ["answer tokens", sample.tokens.length],
   ["teacher would say the same", `${agreed} of ${sample.tokens.length}`],
   ["mean entropy", mean("entropy").toFixed(3) + " nats"], ["mean k", mean("k").toFixed(1)], ["shard", sample.shard]]
    .forEach(([name, value]) => {
      const fact = element("span", "", name + " ");
      fact.append(element("b", "", value));
      made.append(fact);
    });
  return made;
}

function picture(source, size) {
  const made = element("figure"), image = element("img", Math.max(size.width, size.height) < 160 ? "tiny" : "");
  image.src = source;
  image.alt = "the sample's image";
  made.append(image, element("figcaption", "", `${size.width} × ${size.height} pixels`));
  return made;
}

function conversation(sample) {
  const made = element("div"), all = sample.tokens.map((token, index) => ({ token, index }));
  const known = sample.messages && all.every(({ token }) => token.turn !== null);
  let turn = 0;
  (sample.messages || []).forEach((message) => {
    const answer = known && message.supervised;
    const box = bubble(message.role, message.role);
    box.append(answer ? tokens(all.filter(({ token }) => token.turn === turn)) : element("div", "text", lines(message.text)));
    if (message.supervised) turn += 1;
    made.append(box);
  });
  if (!known) {
    const box = bubble("assistant", "answer tokens");
    box.append(tokens(all));
    made.append(box);
  }
  return made;
}

// A message keeps its lines.
function lines(text) {
  return text.split("\n").map((line) => (line ? visible(line) : "")).join("\n");
}

function bubble(kind, title) {
  const made = element("div", "message " + (kind === "assistant" ? "assistant" : "asked"));
  made.append(element("span", "role", title));
  return made;
}

function tokens(list) {
  const made = element("div", "tokens");
  list.forEach(({ token, index }) => {
    const chip = element("button", "token" + (token.rank > 1 ? " other" : ""), visible(token.text));
    chip.type = "button";
    chip.dataset.index = index;
    chip.style.setProperty("--p", Math.min(1, Math.exp(token.logprob)).toFixed(4));
    chip.setAttribute("aria-pressed", "false");
    chip.setAttribute("aria-label", `${visible(token.text)}, probability ${percent(token.logprob)}`);
    chip.addEventListener("mouseenter", () => { if (!state.pinned) showToken(index); });
    chip.addEventListener("focus", () => { if (!state.pinned) showToken(index); });
    chip.addEventListener("click", () => { state.pinned = !(state.pinned && state.token === index); showToken(index); });
    made.append(chip);
  });
  return made;
}

// The answer tokens beside a student's, a row for each place where one of either begins.
function paired(sample) {
  const beside = sample.paired, made = [element("h3", "", `beside ${visible(beside.student)}`)];
  const counts = `${beside.aligned} of ${beside.tokens.length} answer tokens of the student's are aligned`;
  made.push(element("p", "dim", beside.differs === null ? counts : `none is aligned: ${visible(beside.differs)}`));
  if (beside.differs !== null) {
    made.push(element("div", "pieces", beside.tokens.map((token) => spelled(token.text)).join(" | ")));
    return made;
  }
  const table = element("table", "paired"), head = element("tr");
  ["teacher", "student", "", "cell"].forEach((name) => head.append(element("th", "", name)));
  table.append(head);
  beside.places.forEach((place) => {
    const row = element("tr", place.state === "aligned" ? "aligned" : "");
    [[place.teacher, sample.tokens], [place.student, beside.tokens]].forEach(([number, side]) => {
      const cell = element("td");
      if (number !== null) cell.append(element("span", "piece", spelled(side[number].text)));
      row.append(cell);
    });
    row.append(element("td", "", place.state), element("td", "", cells(place)));
    table.append(row);
  });
  made.push(table);
  return made;
}

// The cell of an aligned place, or the two of one whose tokens are in different cells.
function cells(place) {
  const named = [[place.teacher, place.teacher_cell], [place.student, place.student_cell]]
    .filter(([number]) => number !== null).map(([, name]) => (name === null ? "none" : spelled(name)));
  if (place.state === "aligned") return named[0];
  return place.state === "other cells" ? named.join(" and ") : "";
}

function showToken(index) {
  state.token = index;
  document.querySelectorAll(".token").forEach((chip) => {
    const here = Number(chip.dataset.index) === index;
    chip.classList.toggle("shown", here);
    chip.setAttribute("aria-pressed", String(here && state.pinned));
  });
  const token = current().tokens[index], box = element("div"), list = element("dl");
  [["probability", percent(token.logprob)], ["logprob", nats(token.logprob) + " nats, " + origins[token.origin]],
   ["rank", token.rank], ["entropy", token.entropy.toFixed(3) + " nats"],
   ["kept", `${token.k} logprobs (knee at ${token.knee}), ${(100 * Math.min(1, token.kept_mass)).toFixed(2)} % of the mass`],
   ["place", `token ${index + 1} of ${current().tokens.length}` + (token.turn === null ? "" : `, answer ${token.turn + 1}`)],
   ["id", token.id]].forEach(([name, value]) => list.append(element("dt", "", name), element("dd", "", value)));
  box.append(element("p", "dim", "the answer's token" + (state.pinned ? ", pinned" : "")),
    element("div", "name", spelled(token.text)), list, element("p", "dim", "what the teacher would have said"));
  token.alternatives.forEach((one) => box.append(alternative(one, one.id === token.id)));
  if (!token.alternatives.some((one) => one.id === token.id)) box.append(alternative(token, true));
  at("token").replaceChildren(box);
}

function alternative(one, isAnswer) {
  const made = element("div", "alternative" + (isAnswer ? " answer" : "") + (one.origin === "kept" ? "" : " rebuilt"));
  const track = element("div", "bar"), bar = element("i");
  bar.style.width = (100 * Math.min(1, Math.exp(one.logprob))) + "%";
  track.append(bar);
  made.title = `${visible(one.text)} (id ${one.id}): logprob ${nats(one.logprob)}, ${origins[one.origin]}`;
  const text = element("span", "text", spelled(one.text));
  if (one.origin !== "kept") text.append(element("small", "", one.origin));
  made.append(text, element("span", "value", percent(one.logprob)), track);
  return made;
}

at("previous").addEventListener("click", () => show(state.place - 1));
at("next").addEventListener("click", () => show(state.place + 1));
at("sort").addEventListener("change", () => { const first = at("sort").value !== "given"; arrange(first ? -1 : state.order[state.place]); });
at("search").addEventListener("input", () => arrange(state.order[state.place]));
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select");
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape") {
    state.pinned = false;
    if (typing === at("search") && at("search").value) { at("search").value = ""; arrange(state.order[state.place]); }
    else if (typing) typing.blur();
    else if (current() && current().tokens.length) showToken(state.token);
  } else if (typing) return;
  else if (event.key === "/") { event.preventDefault(); at("search").focus(); }
  else if (event.key === "ArrowLeft") { event.preventDefault(); show(state.place - 1); }
  else if (event.key === "ArrowRight") { event.preventDefault(); show(state.place + 1); }
});
arrange(0);
