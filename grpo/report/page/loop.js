// The event loop, step by step: a point in time, the coroutine that ran, and what the others waited for.

const Loop = {at: 0, window: 600000, switch: -1, playing: false, speed: 0.1, ticket: null, lanes: null, drawn: false};
const SPEEDS = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 20];
const HEAD = 0.6;  // position of the current time in the window

function startLoop() {
  options($("loop-speed"), SPEEDS.map(speed => [speed, speed === 1 ? "real time" : `× ${speed}`]));
  $("loop-speed").value = Loop.speed;
  controls();
  showTimeline();
  Live.listeners.push(showTimeline);
  Theme.listeners.push(repaintLoop);
  new ResizeObserver(drawLoop).observe($("lanes"));
}

// Load the timeline, also again during a live run: the time shown stays.
function showTimeline() {
  const timeline = DATA.timeline, first = !Loop.timeline;
  $("loop").hidden = !timeline;
  if (!timeline) return;
  Loop.timeline = timeline;
  [timeline.group, timeline.trained] = [{}, {}];
  timeline.spans.forEach(span => ticketsOf(span).forEach(ticket => { timeline[span[KIND] === "group" ? "group" : "trained"][ticket] ??= span; }));
  Loop.lanes = new Lanes($("canvas"), timeline, RUNS[0].deaths);
  const shown = timeline.spans.length < timeline.spans_in_all
    ? `The page holds ${count(timeline.spans.length)} of ${count(timeline.spans_in_all)} spans, ${clock(timeline.begin)} to ${clock(timeline.end)}; scripts/report.py --from SECONDS starts later; timeline.json has all of them. ` : "";
  $("loop-note").textContent = `${shown}Times count from the start of the run. A gap without a tick is a wait that was not recorded. Click a span to follow its group.`;
  Loop.lanes.repaint();
  legend();
  if (!first) return goTo(Loop.at);
  Loop.window = Math.min(Loop.window, Math.max(200, timeline.end - timeline.begin));
  goToSwitch(lowest(timeline.switches.length, place => timeline.switches[place][0] >= firstTraining(timeline)));
}

function repaintLoop() {
  if (!Loop.lanes) return;
  Loop.lanes.repaint();
  legend();
  drawLoop();
}

// A good time to start at: the first train step.
function firstTraining(timeline) {
  const span = timeline.spans.find(each => timeline.names[each[NAME]] === "trainer.train_step");
  return span ? span[BEGIN] : timeline.begin;
}

function controls() {
  const press = {"loop-play": play, "loop-step": () => stepLoop(1), "loop-back": () => stepLoop(-1), "loop-in": () => zoom(0.5), "loop-out": () => zoom(2)};
  for (const [id, act] of Object.entries(press)) $(id).addEventListener("click", act);
  $("loop-speed").addEventListener("change", () => { Loop.speed = +$("loop-speed").value; });
  $("loop-scrub").addEventListener("input", () => {
    const {begin, end} = Loop.timeline, share = $("loop-scrub").value / 10000;  // read before pausing, which moves the scrubber
    if (Loop.playing) pause();
    goTo(begin + (end - begin) * share);
  });
  document.addEventListener("keydown", loopKeys);
  dragging($("canvas"));
}

function loopKeys(event) {
  if (typing(event) || sectionOfKeys() !== "loop") return;
  const onButton = event.target.tagName === "BUTTON", onRange = event.target.type === "range";
  const keys = {ArrowRight: () => stepLoop(1), ArrowLeft: () => stepLoop(-1), n: () => stepLoop(1), b: () => stepLoop(-1),
                "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), " ": play};
  if (!keys[event.key] || onButton && event.key === " " || onRange && event.key.startsWith("Arrow")) return;
  event.preventDefault();
  keys[event.key]();
}

function play() {
  if (Loop.playing) return pause();
  Loop.playing = true;
  $("loop-play").textContent = "Pause";
  let before = performance.now(), described = 0;
  requestAnimationFrame(function frame(now) {
    if (!Loop.playing) return;
    const at = Math.min(Loop.timeline.end, Loop.at + Math.max(0, now - before) * 1000 * Loop.speed);
    before = now;
    goTo(at, now - described > 120);
    if (now - described > 120) described = now;
    if (at >= Loop.timeline.end) return pause();
    requestAnimationFrame(frame);
  });
}

function pause() {
  Loop.playing = false;
  $("loop-play").textContent = "Play";
  goTo(Loop.at);
}

function stepLoop(by) {
  if (Loop.playing) pause();
  const last = Loop.timeline.switches.length - 1;
  goToSwitch(Math.max(0, Math.min(last, Loop.switch + by)));
}

function goToSwitch(number) {
  if (!Loop.timeline.switches.length) return goTo(Loop.timeline.begin);
  Loop.switch = Math.min(number, Loop.timeline.switches.length - 1);
  Loop.at = Loop.timeline.switches[Loop.switch][0];
  showLoop();
}

// Go to any time; the current switch is the last one before it.
function goTo(at, describe = true) {
  Loop.at = Math.max(Loop.timeline.begin, Math.min(Loop.timeline.end, at));
  Loop.switch = lowest(Loop.timeline.switches.length, place => Loop.timeline.switches[place][0] > Loop.at) - 1;
  showLoop(describe);
}

function zoom(by) {
  Loop.window = Math.max(200, Math.min(Loop.timeline.end - Loop.timeline.begin, Loop.window * by));
  showLoop(false);
}

function showLoop(describe = true) {
  const {begin, end} = Loop.timeline;
  $("loop-scrub").value = Math.round(10000 * (Loop.at - begin) / Math.max(1, end - begin));
  $("loop-scrub").setAttribute("aria-valuetext", clock(Loop.at));
  $("loop-time").textContent = clock(Loop.at);
  $("loop-window").textContent = duration(Loop.window / 1e6);
  drawLoop();
  if (describe) { describeSwitch(); describeOthers(); }
}

function drawLoop() {
  if (!Loop.lanes) return;
  const from = Loop.at - HEAD * Loop.window;
  Loop.lanes.draw(from, from + Loop.window, Loop.at, Loop.timeline.switches[Loop.switch], Loop.ticket);
}

const nameOf = span => Loop.timeline.names[span[NAME]];
const trackName = number => Loop.timeline.tracks[number].name;
const seconds = microseconds => duration(microseconds / 1e6);
const spoken = span => nameOf(span) === "ticket" ? "a ticket" : nameOf(span);

function describeSwitch() {
  const found = Loop.timeline.switches[Loop.switch];
  if (!found) return $("loop-said").replaceChildren("No coroutine has run yet.");
  const [begin, end, track, ended, began, whole] = found, {spans} = Loop.timeline;
  const group = Loop.lanes.at(track, begin).concat(Loop.lanes.at(track, end)).find(span => span[KIND] === "group");
  const next = [h("em", {}, spoken(spans[began]))];
  const middle = whole ? [` after ${seconds(spans[ended][LENGTH])}, ran for ${seconds(end - begin)} and yielded at `, ...next, "."]
    : [` after ${seconds(spans[ended][LENGTH])}. Its next recorded wait, for `, ...next, `, started ${seconds(end - begin)} later; other coroutines ran in between.`];
  $("loop-said").replaceChildren(h("b", {}, trackName(track)), group ? ` (ticket ${ticketsOf(group)[0]})` : "",
    " was resumed from ", h("em", {}, spoken(spans[ended])), ...middle,
    h("small", {}, `Switch ${count(Loop.switch + 1)} of ${count(Loop.timeline.switches.length)}, at ${clock(begin, 10)}`));
}

// The waits of the other coroutines, grouped, the most frequent first.
function describeOthers() {
  const found = Loop.timeline.switches[Loop.switch], groups = new Map(), waiting = new Set();
  Loop.timeline.tracks.forEach((track, number) => {
    if (track.process !== "driver" || number === found?.[2] && Loop.at <= found[1]) return;
    const spans = Loop.lanes.at(number, Loop.at);
    const span = spans.find(each => each[KIND] === "wait") ?? spans.find(each => each[KIND] === "stage");
    if (!span || span[BEGIN] + span[LENGTH] <= Loop.at) return;
    waiting.add(track.name.replace(/ \(\d+\)$/, ""));
    groups.set(nameOf(span), [...(groups.get(nameOf(span)) ?? []), span]);
  });
  const rows = [...groups].sort((a, b) => b[1].length - a[1].length).map(([name, spans]) => {
    const oldest = spans.reduce((a, b) => a[BEGIN] <= b[BEGIN] ? a : b);
    const does = oldest[KIND] === "stage" ? "in" : spans.length > 1 ? "wait for" : "waits for";
    return h("div", {class: "other", title: `${name}, the oldest: ${trackName(oldest[TRACK])}`}, dot(waitColour(name)),
      h("span", {class: "what"}, h("b", {}, spans.length > 1 ? String(spans.length) : trackName(oldest[TRACK])), ` ${does} ${spoken(oldest)}`),
      h("span", {class: "age"}, `${spans.length > 1 ? "oldest " : ""}${seconds(Loop.at - oldest[BEGIN])}`));
  });
  const unknown = Loop.timeline.tracks.filter((track, number) => Loop.lanes.between(number, Loop.at)
    && number !== found?.[2] && !waiting.has(track.name)).length;
  if (unknown) rows.push(h("div", {class: "other"}, dot(css("line")), h("span", {class: "what"}, h("b", {}, String(unknown)), " ready to run, or in a wait that was not recorded")));
  $("loop-others").replaceChildren(...(rows.length ? rows : [h("span", {class: "muted"}, "No other coroutine is in a recorded wait.")]));
}

function legend() {
  const kinds = new Map();
  for (const span of Loop.timeline.spans) if (["wait", "busy"].includes(span[KIND])) kinds.set(nameOf(span), span[KIND]);
  const items = kind => [...kinds].filter(each => each[1] === kind).map(([name]) => h("li", {}, dot(waitColour(name)), name));
  $("legend").replaceChildren(h("ul", {class: "dots", "aria-label": "Colours of waits"}, h("li", {}, dot(css("run")), "runs"), items("wait")),
    h("ul", {class: "dots", "aria-label": "Colours of work"}, items("busy")));
}

// Dragging moves the time, hovering describes a span, a click follows its group.
function dragging(canvas) {
  let from = null, moved = false;
  const tip = h("div", {class: "tip", hidden: ""});
  $("lanes").append(tip);
  canvas.addEventListener("pointerdown", event => { from = event.offsetX; moved = false; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", event => {
    if (from === null) return hint(tip, event);
    if (Math.abs(event.offsetX - from) < 3 && !moved) return;
    moved = true;
    if (Loop.playing) pause();
    goTo(Loop.at - (event.offsetX - from) / Loop.lanes.scale);
    from = event.offsetX;
  });
  canvas.addEventListener("pointerup", event => { from = null; if (!moved) follow(event); });
  canvas.addEventListener("pointercancel", () => { from = null; });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.shiftKey) return;
    event.preventDefault();
    zoom((event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8);
  }, {passive: false});
}

function hint(tip, event) {
  const {time, track} = Loop.lanes.under(event.offsetX, event.offsetY);
  const span = track === null ? undefined : Loop.lanes.at(track, time)[0];
  tip.hidden = !span;
  if (!span) return;
  const args = Object.entries(span[ARGS] || {}).map(([name, value]) => `${name} ${Array.isArray(value) && value.length > 4 ? `${value.slice(0, 4).join(", ")} …` : value}`);
  tip.textContent = [`${nameOf(span)}, ${seconds(span[LENGTH])}`, ...args].join(" · ");
  tip.style.left = `${Math.max(8, Math.min(event.offsetX + 12, $("lanes").clientWidth - 300))}px`;
  tip.style.top = `${event.offsetY + 20}px`;
}

function follow(event) {
  const {time, track} = Loop.lanes.under(event.offsetX, event.offsetY);
  const spans = track === null ? [] : Loop.lanes.at(track, time);
  Loop.ticket = spans.flatMap(ticketsOf)[0] ?? null;
  drawLoop();
}
