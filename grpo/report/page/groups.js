// Browser for sampled groups: a searchable list, and one group with its completions, scores and, if recorded, tokens.
// Completions that are episodes are shown as conversations.

const Groups = {all: [], found: [], at: 0, colouring: "logprob", words: []};
const ROWS = 300;  // rows of the list in the DOM, around the selected one
const mean = values => values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0;

const KINDS = [
  ["all", "all groups", () => true],
  ["mixed", "mixed rewards", group => new Set(group.rewards).size > 1],
  ["high", "all at the best reward", group => group.rewards.every(reward => reward >= bestReward())],
  ["low", "no reward", group => group.rewards.every(reward => reward <= 0)],
  ["limits", "ended by a limit", group => Boolean(group.ended_by?.some(end => end !== "done"))],
  ["dropped", "dropped", group => Boolean(group.dropped)],
];
const ORDERS = [
  ["new", "newest first", (a, b) => b.place - a.place], ["old", "oldest first", (a, b) => a.place - b.place],
  ["best", "highest reward", (a, b) => mean(b.rewards) - mean(a.rewards) || b.place - a.place],
  ["worst", "lowest reward", (a, b) => mean(a.rewards) - mean(b.rewards) || b.place - a.place],
];
const LIMITS = {tokens: "rollout.max_completion_tokens", timeout: "environment.timeout_s", turns: "environment.max_turns"};
const bestReward = () => Groups.best;

function startGroups() {
  options($("groups-order"), ORDERS);
  for (const id of ["groups-search", "groups-kind", "groups-order"]) $(id).addEventListener("input", () => filterGroups());
  document.addEventListener("keydown", groupKeys);
  Theme.listeners.push(showGroup);
  loadGroups();
  Live.listeners.push(loadGroups);
}

// Load the groups, also again during a live run: the selected group stays selected.
function loadGroups() {
  const shown = Groups.found[Groups.at], kind = $("groups-kind").value;
  Groups.all = DATA.rollouts ?? [];
  $("groups").hidden = !Groups.all.length;
  if (!Groups.all.length) return;
  Groups.best = Groups.all.reduce((best, group) => Math.max(best, ...group.rewards), -Infinity);
  Groups.all.forEach((group, place) => {
    group.place = place;
    group.haystack = [group.prompt, group.answer, ...group.completions].join("\n").toLowerCase();
  });
  options($("groups-kind"), KINDS.filter(each => ["all", kind].includes(each[0]) || Groups.all.some(each[2])));
  $("groups-kind").value = kind || "all";
  filterGroups(shown);
}

function filterGroups(shown) {
  const kind = KINDS.find(each => each[0] === $("groups-kind").value)[2];
  const order = ORDERS.find(each => each[0] === $("groups-order").value)[2];
  Groups.words = $("groups-search").value.toLowerCase().split(/\s+/).filter(Boolean);
  Groups.found = Groups.all.filter(group => kind(group) && Groups.words.every(word => group.haystack.includes(word))).sort(order);
  $("groups-count").textContent = `${count(Groups.found.length)} of ${count(Groups.all.length)}`;
  const again = shown ? Groups.found.findIndex(group => group.prompt_serial === shown.prompt_serial && group.step === shown.step) : -1;
  if (again < 0) return goToGroup(0);
  const below = offsetInList();
  Groups.at = again;  // its text is not redrawn: the reader may have selected some of it
  listGroups();
  $("groups-list").scrollTop += offsetInList() - below;
  $("group-place").textContent = placeOfGroup();
}

// Distance of the selected row from the top of the visible part of the list.
const offsetInList = () => ($(`row-${Groups.at}`)?.offsetTop ?? 0) - $("groups-list").scrollTop;
const placeOfGroup = () => `${Groups.at + 1} of ${count(Groups.found.length)}`;

function groupKeys(event) {
  if (typing(event) || sectionOfKeys() !== "groups") return;
  const by = {j: 1, k: -1, ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[event.key];
  if (!by) return;
  event.preventDefault();
  goToGroup(Groups.at + by);
}

function goToGroup(place) {
  Groups.at = Math.max(0, Math.min(Groups.found.length - 1, place));
  listGroups();
  showGroup();
}

function listGroups() {
  const begin = Math.max(0, Math.min(Groups.at - ROWS / 2, Groups.found.length - ROWS));
  const rows = Groups.found.slice(begin, begin + ROWS).map((group, place) => row(group, begin + place));
  const left = Groups.found.length - begin - rows.length;
  $("groups-list").replaceChildren(...rows, ...(left > 0 ? [h("div", {class: "more"}, `${count(left)} more: narrow the search, or press j to continue`)] : []));
  const selected = $(`row-${Groups.at}`);
  if (selected) {
    $("groups-list").setAttribute("aria-activedescendant", selected.id);
    const list = $("groups-list"), top = selected.offsetTop - list.offsetTop;
    if (top < list.scrollTop || top + selected.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
  }
}

function row(group, place) {
  const top = Math.max(bestReward(), 1e-9);
  const meter = group.rewards.map(reward => h("i", {style: `background:${reward > 0 ? `color-mix(in srgb, var(--good) ${25 + 75 * Math.min(1, reward / top)}%, var(--fill))` : "var(--line)"}`}));
  return h("div", {class: "row", role: "option", id: `row-${place}`, "aria-selected": place === Groups.at, onclick: () => goToGroup(place)},
    h("span", {class: "text"}, group.prompt.slice(0, 120)),
    h("small", {}, `step ${group.step}`, h("span", {class: "meter"}, meter), text(mean(group.rewards), 2)));
}

function showGroup() {
  const group = Groups.found[Groups.at];
  if (!group) return $("group").replaceChildren(h("p", {class: "muted"}, "No group matches."));
  const colouring = group.tokens ? h("span", {class: "toggle", role: "group", "aria-label": "Colour of the tokens"}) : null;
  if (colouring) toggle(colouring, [["logprob", "log-probability"], ["version", "policy version"], ["none", "plain"]], Groups.colouring,
    kind => { Groups.colouring = kind; showGroup(); });
  const versions = group.tokens ? [...new Set(group.tokens.flatMap(tokens => tokens.map(token => token[2])))].filter(isNumber).sort((a, b) => a - b) : [];
  $("group").replaceChildren(
    h("div", {class: "group-top"}, h("span", {id: "group-place"}, placeOfGroup()),
      h("span", {class: "pill"}, `step ${group.step}`), h("span", {class: "pill"}, `policy version ${group.policy_version}`),
      group.prompt_serial === undefined ? null : h("span", {class: "pill"}, `prompt ${group.prompt_serial}`),
      group.dropped ? h("span", {class: "pill bad"}, `dropped: ${group.dropped}`) : null,
      h("span", {class: "toggle"}, h("button", {type: "button", "aria-label": "Previous group", onclick: () => goToGroup(Groups.at - 1)}, "◂"),
        h("button", {type: "button", "aria-label": "Next group", onclick: () => goToGroup(Groups.at + 1)}, "▸"))),
    h("h3", {}, "Prompt"), h("div", {class: "text ask", tabindex: 0}, found(group.prompt)),
    ...(group.answer === null || group.answer === undefined || group.answer === "" ? [] : [h("h3", {}, "Answer"), h("div", {class: "text"}, found(String(group.answer)))]),
    h("h3", {class: "group-top"}, h("span", {}, `${group.completions.length} ${group.turns ? `episodes of ${compact(mean(group.turns.map(turns => turns.length)))} turns on average` : "completions"}, mean reward ${text(mean(group.rewards))}`), colouring),
    ...(colouring ? [tokenLegend(versions)] : []),
    ...group.completions.map((completion, place) => completionOf(group, place, versions)));
}

function completionOf(group, place, versions) {
  const advantage = group.advantages?.[place], shaped = group.shaped_rewards?.[place];
  const parts = Object.entries(group.reward_parts ?? {}).map(([name, values]) => h("small", {}, `${name} ${compact(values[place])}`));
  const one = parts.length === 1 && group.reward_parts[Object.keys(group.reward_parts)[0]][place] === group.rewards[place];
  return h("div", {class: "completion"},
    h("div", {class: "score"}, h("b", {}, compact(group.rewards[place])), one ? null : parts,
      shaped !== undefined && shaped !== group.rewards[place] ? h("small", {}, `shaped ${compact(shaped)}`) : null,
      isNumber(advantage) ? h("small", {class: advantage > 0 ? "up" : advantage < 0 ? "down" : "", title: "advantage"}, `${signed(advantage)} adv.`) : null),
    group.turns?.[place] ? conversation(group, place, versions)
      : h("div", {class: "text"}, saidIn(group.completions[place], group.tokens?.[place], versions)));
}

const saidIn = (content, tokens, versions) => tokens && Groups.colouring !== "none" ? tokensOf(tokens, versions)
  : content === "" ? h("span", {class: "muted"}, "(empty)") : found(content);

// An episode, turn by turn: what the policy said with its reward, and what it was given in return; then what ended it.
function conversation(group, place, versions) {
  const tokens = group.tokens?.[place], end = group.ended_by?.[place];
  let at = 0;
  const next = count => tokens?.slice(at, at += count);
  return h("div", {class: "turns"}, group.turns[place].map((turn, number) => {
    const said = saidIn(turn.sampled, next(turn.sampled_tokens), versions), given = next(turn.given_tokens);
    return h("div", {class: "turn"}, h("small", {title: `turn ${number + 1}: ${turn.sampled_tokens} tokens`}, number + 1),
      h("div", {class: "text"}, h("span", {class: "sampled"}, said), h("small", {class: turn.reward > 0 ? "earned up" : turn.reward < 0 ? "earned down" : "earned", title: "reward of the turn"},
        turn.reward ? signed(turn.reward) : "0"), turn.finish_reason === "length" ? h("small", {class: "earned"}, "cut off") : null),
      turn.given_tokens ? h("div", {class: "text given", tabindex: turn.given.length > 800 ? 0 : null, title: `given to the policy: ${turn.given_tokens} tokens`}, givenIn(turn, given)) : null);
  }), end ? h("span", {class: `pill ${end === "done" ? "" : "bad"}`, title: LIMITS[end]}, end === "done" ? "done" : `limit: ${end}`) : null);
}

// Exactly the tokens where tokens are shown, but for line breaks around them.
const givenIn = (turn, tokens) => tokens && Groups.colouring !== "none" ? tokens.map(token => token[0]).join("").replace(/^\n+|\n+$/g, "") || "↵" : found(turn.given);

// The less likely a token, the stronger its colour; a token of probability 1 has none.
const surprise = logprob => Math.min(1, Math.sqrt(Math.max(0, -logprob) / 5));
const tokensOf = (tokens, versions) => tokens.map(([piece, logprob, version]) => {
  const colour = Groups.colouring === "version" ? faded(series(versions.indexOf(version)), 0.34) : faded(css("s2"), 0.75 * surprise(logprob ?? 0));
  const title = `log-probability ${text(logprob)} (${percent(Math.exp(logprob ?? NaN))}), policy version ${version ?? "unknown"}`;
  return h("span", {class: "token", style: `background:${colour}`, title}, piece);
});

function tokenLegend(versions) {
  if (Groups.colouring === "none") return "";
  if (Groups.colouring === "version") return h("ul", {class: "dots"}, versions.map((version, place) => h("li", {}, dot(faded(series(place), 0.5)), `version ${version}`)));
  const red = css("s2");
  return h("div", {class: "dots"}, h("span", {class: "scale"}, "certain", h("i", {style: `background:linear-gradient(90deg, transparent, ${faded(red, 0.75)})`}), "surprising: log-probability −5 or less"));
}

// Text with the search words marked.
function found(content) {
  if (!Groups.words.length) return [content];
  const pattern = new RegExp(`(${Groups.words.map(word => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
  return content.split(pattern).map((part, place) => place % 2 ? h("mark", {}, part) : part);
}
