"use strict";
// Fills the heat-map from the data of its page. All text is set as text, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const firsts = [...new Set(data.rollouts.map((rollout) => rollout.first))];
  let shown = null;
  let at = -1;

  const make = (name, text, attributes = {}) => {
    const element = document.createElement(name);
    if (text !== null) element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const visible = (token) => (token === "" ? "∅" : token.replaceAll("\n", "⏎").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)));
  const percent = (logprob) => {
    if (logprob === null) return "unknown";
    const share = 100 * Math.exp(logprob);
    return share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
  };
  const of = (first) => data.rollouts.filter((rollout) => rollout.first === first);
  const size = (value) => (value === null ? 0 : Math.abs(value));

  const fill = (select, names) => {
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => make("option", name)));
    if (names.includes(chosen)) select.value = chosen;
  };

  const side = (name, entries, rank, whole) => {
    const table = make("table", null);
    const place = rank > 0 ? `rank ${rank}` : "not listed";
    table.append(make("caption", `${name}: the sampled token has ${percent(whole)}, ${place}`));
    const body = make("tbody", null);
    entries.forEach(([token, rounded], number) => {
      const isSampled = number + 1 === rank;
      const logprob = isSampled ? whole : rounded;
      const row = make("tr", null, isSampled ? { class: "is-sampled" } : {});
      const bar = make("td", null, { width: "45%" });
      if (logprob !== null) bar.append(make("span", null, { class: `bar ${name}`, style: `width: ${100 * Math.exp(logprob)}%` }));
      row.append(make("th", visible(token), { scope: "row" }), make("td", percent(logprob)), bar);
      body.append(row);
    });
    table.append(body);
    return table;
  };

  const describe = (place) => {
    const detail = byId("detail");
    if (place < 0) {
      detail.replaceChildren(make("p", "Point at a token, or move to it with Tab and the arrow keys."));
      return;
    }
    const token = shown.tokens[place];
    const head = make("h3", "");
    head.append(make("code", visible(token)), ` token ${place + 1} of ${shown.tokens.length}`);
    const parts = [head];
    if (shown.nats[place] === null) {
      parts.push(make("p", "This token was not scored."));
    } else {
      const sides = [["student", shown.entropy[place]], ["teacher", shown.teacher_entropy[place]]];
      const known = sides.filter(([, nats]) => nats !== null).map(([name, nats]) => `${name} ${nats.toFixed(2)}`);
      const entropy = known.length ? ` Entropy: ${known.join(", ")} nats.` : "";
      parts.push(make("p", `${data.divergence}: ${shown.nats[place].toFixed(3)} nats.${entropy}`));
      const top = shown.top[place];
      if (top) {
        parts.push(side("student", top.student, top.student_rank, shown.student[place]));
        parts.push(side("teacher", top.teacher, top.teacher_rank, shown.teacher[place]));
      } else {
        const both = `student ${percent(shown.student[place])}, teacher ${percent(shown.teacher[place])}`;
        parts.push(make("p", `Probability of this token: ${both}.`));
        parts.push(make("p", "What else they would have sampled was not kept for this token."));
      }
    }
    detail.replaceChildren(...parts);
  };

  const choose = (place, focus) => {
    const buttons = [...byId("tokens").children];
    if (buttons[at]) { buttons[at].tabIndex = -1; buttons[at].setAttribute("aria-pressed", "false"); }
    at = place;
    if (buttons[at]) {
      buttons[at].tabIndex = 0;
      buttons[at].setAttribute("aria-pressed", "true");
      if (focus) buttons[at].focus();
    }
    describe(at);
  };

  const show = () => {
    shown = of(byId("first").value).find((rollout) => rollout.second === byId("second").value) ?? of(byId("first").value)[0];
    const carriers = new Set(shown.heavy);
    const buttons = shown.tokens.map((token, place) => {
      const nats = shown.nats[place];
      const names = ["tok", ...(nats === null ? ["none"] : []), ...(carriers.has(place) ? ["heavy"] : [])];
      const text = token.includes("\n") ? token.replaceAll("\n", "⏎\n") : token === "" ? "∅" : token;
      const button = make("span", text, {
        class: names.join(" "), role: "button", tabindex: "-1", "aria-pressed": "false",
        style: `--n: ${Math.min(size(nats) / data.scale, 1).toFixed(3)}`,
        "aria-label": `${visible(token)}, ${nats === null ? "not scored" : `${nats.toFixed(2)} nats`}`,
      });
      return button;
    });
    byId("tokens").replaceChildren(...buttons);
    byId("context").textContent = shown.context || "The teacher was shown the student's prompt.";
    byId("prompt").textContent = shown.prompt;
    byId("text").textContent = shown.text;
    const facts = [`${shown.tokens.length} tokens`, `${(shown.size ?? 0).toFixed(2)} nats in all`, `${carriers.size} of them carry 80 %`];
    if (shown.reward !== null) facts.push(`reward ${shown.reward}`);
    if (!shown.ended) facts.push("cut at the limit");
    facts.push(shown.own ? "sampled by the student" : "not sampled by the student");
    byId("facts").textContent = facts.join(" · ");
    at = -1;
    const worst = shown.nats.reduce((best, value, place) => (size(value) > size(shown.nats[best]) ? place : best), 0);
    if (buttons.length) choose(worst, false); else describe(-1);
  };

  const pickFirst = (name) => {
    byId("first").value = name;
    fill(byId("second"), of(name).map((rollout) => rollout.second));
    show();
  };
  const move = (by) => {
    const place = data.rollouts.indexOf(shown) + by;
    const next = data.rollouts[(place + data.rollouts.length) % data.rollouts.length];
    pickFirst(next.first);
    byId("second").value = next.second;
    show();
  };

  byId("most").textContent = `${data.scale} nats and more`;
  fill(byId("first"), firsts);
  byId("first").addEventListener("change", () => pickFirst(byId("first").value));
  byId("second").addEventListener("change", show);
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("filter").addEventListener("change", (event) => byId("tokens").classList.toggle("filtered", event.target.checked));
  byId("worst").addEventListener("click", () => {
    const worstOf = (rollout) => Math.max(0, ...rollout.nats.map(size));
    const found = data.rollouts.reduce((best, rollout) => (worstOf(rollout) > worstOf(best) ? rollout : best));
    pickFirst(found.first);
    byId("second").value = found.second;
    show();
    choose(at, true);
  });
  const tokens = byId("tokens");
  tokens.addEventListener("mouseover", (event) => {
    const place = [...tokens.children].indexOf(event.target);
    if (place >= 0) describe(place);
  });
  tokens.addEventListener("mouseleave", () => describe(at));
  tokens.addEventListener("click", (event) => {
    const place = [...tokens.children].indexOf(event.target);
    if (place >= 0) choose(place, true);
  });
  tokens.addEventListener("focusin", (event) => {
    const place = [...tokens.children].indexOf(event.target);
    if (place >= 0 && place !== at) choose(place, false);
  });
  tokens.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.children.length - 1 }[event.key];
    if (to === undefined || to < 0 || to >= tokens.children.length) return;
    event.preventDefault();
    choose(to, true);
  });
  if (data.rollouts.length) pickFirst(firsts[0]);
})();
