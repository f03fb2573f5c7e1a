// Charts over the steps of the runs. A chart has a title and a function that returns Plotly's traces for one run.

const Axis = {kind: "step", key() { return this.kind === "step" ? "step" : "wall_s"; }};
const column = (run, name) => run.columns[name];
const has = (...names) => run => names.some(name => column(run, name)?.some(isNumber));
const xs = run => column(run, Axis.key()) ?? column(run, "step");

// The position of a step on the horizontal axis.
function xOfStep(run, step) {
  if (Axis.kind === "step" || !column(run, "wall_s")) return step;
  const steps = column(run, "step"), walls = column(run, "wall_s");
  const place = steps.findIndex(each => each >= step);
  if (step < steps[0]) return walls[0] - (column(run, "time/step_s")?.[0] ?? 0);
  return walls[place < 0 ? walls.length - 1 : place];
}

// Moving average over a centred window, which is shorter at both ends.
function smooth(values, window = Math.max(3, Math.min(25, Math.round(values.length / 12)))) {
  const half = Math.floor(window / 2);
  return values.map((_, place) => {
    const near = values.slice(Math.max(0, place - half), place + half + 1).filter(isNumber);
    return near.length ? near.reduce((a, b) => a + b, 0) / near.length : null;
  });
}

const line = (run, name, label, colour, extra = {}) => column(run, name) && {
  x: xs(run), y: column(run, name), name: label, mode: "lines", line: {color: colour, width: 1.8}, ...extra,
};
const faint = (run, name, label, colour) => line(run, name, label, colour, {line: {color: faded(colour, 0.42), width: 1}});
const averaged = (run, name, label, colour) => column(run, name) && {
  x: xs(run), y: smooth(column(run, name)), name: label, mode: "lines", line: {color: colour, width: 2.4},
};

function heldOut(run, label, colour) {
  const evaluations = run.evaluations.filter(each => isNumber(each.reward_mean));
  return evaluations.length ? {
    x: evaluations.map(each => xOfStep(run, each.step)), y: evaluations.map(each => each.reward_mean), name: label,
    error_y: {type: "data", array: evaluations.map(each => each.reward_stderr ?? 0), color: colour, thickness: 1.4, width: 4},
    mode: evaluations.length > 2 ? "lines+markers" : "markers", line: {color: colour, width: 1, dash: "dot"},
    marker: {color: css("card"), size: 8, line: {color: colour, width: 2}},
  } : null;
}

const REWARD = {
  title: "Reward", about: "training batches with moving average; held-out prompts with standard errors", wide: true,
  traces: run => [
    faint(run, "rollout/reward_mean", "all rollouts", css("s9")),
    faint(run, "reward/mean", "batch", css("s0")),
    averaged(run, "reward/mean", "batch, averaged", css("s0")),
    heldOut(run, "held-out", css("s1")),
  ],
  marks: true,
};

const withAverage = (title, name, about = "", number = 0) => ({
  title, about: about ? `${about}; averaged` : "averaged", shown: has(name), layout: {showlegend: false},
  traces: run => [faint(run, name, title, series(number)), averaged(run, name, "averaged", series(number))],
});
const plain = (title, about, named, layout = {}) => ({
  title, about, shown: has(...named.map(([name]) => name)),
  layout: {...layout, ...(named.length > 1 ? {} : {showlegend: false})},
  traces: run => named.map(([name, label], place) => line(run, name, label, series(place))),
});

const BY_AGE = /^mismatch\/age_(\d+)\/tokens$/;
function tokensByAge(run) {
  const found = Object.keys(run.columns).map(name => BY_AGE.exec(name)).filter(Boolean);
  const ages = found.map(match => +match[1]).sort((a, b) => a - b);
  const sums = ages.map(age => column(run, `mismatch/age_${age}/tokens`).reduce((sum, each) => sum + (each ?? 0), 0));
  return [{type: "bar", x: ages, y: sums, name: "tokens", marker: {color: css("s0")}, width: 0.7,
           hovertemplate: "%{y:,} tokens<extra>age %{x}</extra>"}];
}

const PARTS = [
  ["trainer waits", "time/trainer_wait_s", 1], ["train step", "time/train_step_s", 0], ["weight sync", "time/weight_sync_s", 4],
  ["evaluation", "time/eval_s", 6], ["checkpoint", "time/checkpoint_wait_s", 8], ["other", null, 9],
];

// Seconds of each stage by step. Evaluations and checkpoints that the training waits for are not part of `time/step_s`.
function timeParts(run) {
  const steps = column(run, "time/step_s") ?? [];
  const of = name => steps.map((_, place) => column(run, name)?.[place] ?? 0);
  return PARTS.map(([label, name, number]) => ({label, colour: series(number), seconds: name ? of(name) :
    steps.map((all, place) => Math.max(0, (all ?? 0) - PARTS.slice(0, 3).reduce((sum, part) => sum + of(part[1])[place], 0)))}));
}

function shares(run) {
  const parts = timeParts(run).map(part => ({...part, sum: part.seconds.reduce((a, b) => a + b, 0)})).filter(part => part.sum > 0);
  const all = parts.reduce((sum, part) => sum + part.sum, 0);
  return parts.map(part => ({...part, share: part.sum / all}));
}

const WAITING = "driver/waiting/rollouts/", SHOWN = 7;
const sum = values => values.reduce((a, b) => a + (b ?? 0), 0);

// How many rollout coroutines are in each wait; rare waits share one band.
function waits(run) {
  const bands = Object.keys(run.columns).filter(name => name.startsWith(WAITING))
    .map(name => ({name: name.slice(WAITING.length), values: column(run, name)}))
    .filter(band => sum(band.values) > 0).sort((a, b) => sum(b.values) - sum(a.values));
  const rest = bands.splice(SHOWN).map(band => band.values);
  return rest.length ? [...bands, {name: "other", values: rest[0].map((_, place) => sum(rest.map(values => values[place])))}] : bands;
}

const whoWaits = run => waits(run).map(({name, values}) => {
  const colour = name === "other" ? css("s8") : waitColour(name);
  return {x: xs(run), y: values, name, mode: "lines", stackgroup: "one", line: {width: 0.5, color: colour}, fillcolor: faded(colour, 0.65)};
});

function ratioBand(run) {
  const edge = {line: {width: 0, color: css("s0")}, showlegend: false};
  return [
    line(run, "mismatch/ratio_p01", "p01", css("s0"), edge),
    line(run, "mismatch/ratio_p99", "p99", css("s0"), {...edge, fill: "tonexty", fillcolor: faded(css("s0"), 0.22)}),
    line(run, "mismatch/ratio_p50", "median", css("s0")),
  ];
}

// Steps at which no episode was finished lack these: lines go on over them.
const ofEpisodes = (title, about, named) => ({
  ...plain(title, about, named, {yaxis: {rangemode: "tozero"}}), shown: has(...named.map(([name]) => name).filter(name => name.startsWith("episode/"))),
  traces: run => named.map(([name, label], place) => line(run, name, label, series(place), {connectgaps: true})),
});
const EPISODES = [
  ofEpisodes("Turns", "of an episode, mean", [["episode/turns", "turns"]]),
  ofEpisodes("Tokens", "of an episode, mean", [["generator/completion_tokens_mean", "sampled"], ["episode/given_tokens", "given"]]),
  ofEpisodes("Ended by a limit", "share of the episodes", ["tokens", "turns", "timeout"].map(limit => [`episode/ended_by_${limit}`, limit])),
  ofEpisodes("Time spent waiting", "seconds of an episode, mean", [["episode/generator_s", "generator"], ["episode/environment_s", "environment"]]),
  ofEpisodes("Tool calls", "of an episode, mean", [["episode/tool_calls", "calls"], ["episode/tool_errors", "failed"]]),
];
const CHARTED = /^episode\/(turns|given_tokens|ended_by_.*|generator_s|environment_s|tool_calls|tool_errors)$/;
const reported = run => Object.keys(run.columns).filter(name => name.startsWith("episode/") && !CHARTED.test(name));

const CHARTS = [
  ["Learning", [
    REWARD,
    withAverage("Loss", "loss", "", 2), withAverage("Gradient norm", "trainer/grad_norm", "before clipping", 6),
    withAverage("Entropy", "trainer/entropy", "nats per token", 3),
  ]],
  ["Off-policy", [
    plain("Mismatch of trainer and generator", "nats per token", [
      ["mismatch/logprob_abs_diff", "mean |log ratio|"], ["mismatch/logprob_abs_diff_same_version", "same weights"],
      ["mismatch/kl_k1", "k1"], ["mismatch/kl_k3", "k3"]]),
    {title: "Probability ratio", about: "median; 1st to 99th percentile", shown: has("mismatch/ratio_p50"), traces: ratioBand},
    plain("Effective sample size", "share of the tokens", [["mismatch/ess", "ESS"]]),
    plain("Policy age", "policy versions between sampling and training", [["policy_age/mean", "mean"], ["policy_age/max", "max"]], {yaxis: {rangemode: "tozero"}}),
    {title: "Tokens by age", about: "tokens trained on, over the whole run", traces: tokensByAge, shown: run => Object.keys(run.columns).some(name => BY_AGE.test(name)),
     layout: {xaxis: {title: {text: "versions", font: {size: 11.5}, standoff: 6}, dtick: 1}, bargap: 0.3, hovermode: "closest", showlegend: false}, ownAxis: true},
  ]],
  ["Time", [
    {title: "Time of a step by stage", about: "seconds", wide: true, marks: true, shown: has("time/step_s"),
     layout: {barmode: "stack", bargap: 0.12, legend: {traceorder: "normal"}, yaxis: {rangemode: "tozero"}},
     traces: run => timeParts(run).filter(part => part.seconds.some(Boolean)).map(part => (
       {type: "bar", x: xs(run), y: part.seconds, name: part.label, marker: {color: part.colour, line: {width: 0}}}))},
    {title: "Rollouts by what they wait for", about: "number of coroutines, mean over a step", wide: true, traces: whoWaits, layout: {legend: {traceorder: "normal"}, yaxis: {rangemode: "tozero"}},
     shown: run => Object.keys(run.columns).some(name => name.startsWith(WAITING))},
    plain("Event-loop lag", "milliseconds", [["driver/loop_lag_p99_ms", "p99"], ["driver/loop_lag_p50_ms", "median"], ["driver/loop_lag_max_ms", "max"]], {yaxis: {rangemode: "tozero"}}),
    plain("Groups", "", [["rollout/tickets_in_use", "tickets in use"], ["buffer/groups_waiting", "waiting in the replay buffer"]], {yaxis: {rangemode: "tozero"}}),
    {...plain("Lost and requeued", "", [["recovery/restarts", "restarts"], ["recovery/groups_requeued", "groups requeued"]], {yaxis: {rangemode: "tozero"}}),
     shown: run => ["recovery/restarts", "recovery/groups_requeued"].some(name => column(run, name)?.some(Boolean)), marks: true},
  ]],
  ["Generation", [
    withAverage("Tokens per second", "generator/tokens_per_s", "all generators", 0),
    withAverage("Generators busy", "generator/busy_fraction", "share of the time", 3),
    withAverage("Completion length", "generator/completion_tokens_mean", "tokens", 6),
    withAverage("Truncated", "generator/truncated_fraction", "share of the completions", 2),
    withAverage("Zero-variance groups", "trainer/zero_advantage_fraction", "share of the completions with advantage 0", 9),
  ]],
  ["Episodes", [
    ...EPISODES,
    {title: "Reported by the environment", about: "sums over an episode, mean", shown: run => reported(run).length > 0,
     traces: run => reported(run).map((name, place) => line(run, name, escaped(name.slice(8)), series(place), {connectgaps: true}))},
  ]],
];

// The position of a time on the horizontal axis, usually between two steps.
function xOfTime(run, seconds) {
  const steps = column(run, "step"), walls = column(run, "wall_s");
  if (Axis.kind !== "step" || !walls) return seconds;
  const place = walls.findIndex(wall => wall >= seconds);
  if (place < 0) return steps.at(-1);
  const [wall, step] = place ? [walls[place - 1], steps[place - 1]] : [walls[0] - (column(run, "time/step_s")?.[0] ?? 0), 0];
  return step + (steps[place] - step) * Math.max(0, Math.min(1, (seconds - wall) / (walls[place] - wall)));
}

// Deaths and resumptions as vertical lines; the time until a replacement serves is shaded.
function marks(run) {
  return [
    ...run.deaths.map(({actor, at_s, back_s}) => ({x: xOfTime(run, at_s), until: isNumber(back_s) ? xOfTime(run, at_s + back_s) : null,
      label: `${actor} died`, colour: css("bad")})),
    ...run.resumed_at.map(step => ({x: xOfStep(run, step), until: null, label: "resumed", colour: css("s9")})),
  ];
}

function shapesOf({x, until, colour}) {
  const common = {yref: "paper", y0: 0, y1: 1, layer: "below"};
  return [
    {...common, type: "line", x0: x, x1: x, line: {color: colour, width: 1.2, dash: "dash"}},
    ...(until === null ? [] : [{...common, type: "rect", x0: x, x1: until, fillcolor: faded(colour, 0.12), line: {width: 0}}]),
  ];
}

function layoutOf(chart, found) {
  const axis = {gridcolor: css("line"), zerolinecolor: css("line"), linecolor: css("line"), tickcolor: css("line"), automargin: true};
  const own = chart.layout ?? {};
  const title = chart.ownAxis ? undefined : {text: Axis.kind === "step" ? "step" : "seconds since the start", font: {size: 11.5}, standoff: 6};
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 44, r: 16, t: own.showlegend === false ? 10 : 30, b: 38},
    font: {family: "system-ui, sans-serif", size: 12, color: css("soft")}, hovermode: "x unified", dragmode: "zoom",
    hoverlabel: {bgcolor: css("card"), bordercolor: css("line"), font: {color: css("ink"), size: 12}},
    showlegend: true, ...own,
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: {size: 12}, ...own.legend},
    xaxis: {...axis, showgrid: false, zeroline: false, title, ...own.xaxis}, yaxis: {...axis, ...own.yaxis},
    shapes: found.flatMap(shapesOf), uirevision: chart.ownAxis ? "own" : Axis.kind,  // keeps the zoom when new data arrives
    annotations: found.slice(0, 12).map((mark, place) => ({x: mark.x, yref: "paper", y: 1 - 0.08 * (place % 4), text: escaped(mark.label), showarrow: false,
      xanchor: "left", xshift: 4, font: {size: 11, color: mark.colour}, bgcolor: css("card"), opacity: 0.9})),
  };
}

// Plotly interprets some HTML tags in names.
const escaped = name => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// Cards with charts; a chart is drawn when it scrolls into view, and again when theme, axis or data change.
const Charts = {
  all: [],
  watcher: null,
  card(chart, tracesOf) {
    const plot = h("div", {class: "plot", role: "img", "aria-label": `Chart: ${chart.title}`});
    const card = h("div", {class: chart.wide ? "card wide" : "card"},
      h("header", {}, h("h4", {}, chart.title), h("span", {}, chart.about ?? ""), chart.extra), plot);
    const entry = {plot, seen: false, draw() {
      card.hidden = Boolean(chart.shown && !chart.shown(RUNS[0]));
      if (!entry.seen || card.hidden) return;
      const traces = tracesOf(chart).filter(Boolean);
      const layout = layoutOf(chart, chart.marks && RUNS.length === 1 ? marks(RUNS[0]) : []);
      Plotly.react(plot, traces, layout, {displayModeBar: false, responsive: true});
    }};
    Charts.all.push(entry);
    Charts.watch(entry);
    entry.draw();
    return card;
  },
  watch(entry) {
    this.watcher ??= new IntersectionObserver(found => found.filter(each => each.isIntersecting).forEach(each => {
      const seen = this.all.find(candidate => candidate.plot === each.target);
      this.watcher.unobserve(each.target);
      seen.seen = true;
      seen.draw();
    }), {rootMargin: "300px"});
    this.watcher.observe(entry.plot);
  },
  draw() {
    this.all.forEach(entry => entry.draw());
    for (const block of document.querySelectorAll("#charts > div")) block.hidden = !block.querySelector(".card:not([hidden])");
  },
};

function startCurves() {
  const axes = [["step", "Steps"], ["wall", "Time"]];
  toggle($("axis"), axes, Axis.kind, kind => { Axis.kind = kind; Charts.draw(); });
  Theme.listeners.push(() => Charts.draw());
  if (RUNS.length > 1) return startComparing();
  const block = ([heading, charts]) => h("div", {}, h("h3", {}, heading),
    h("div", {class: "grid"}, charts.map(chart => Charts.card(chart, it => it.traces(RUNS[0])))));
  $("charts").append(...CHARTS.map(block));
  Charts.draw();
  Live.listeners.push(() => Charts.draw());
}
