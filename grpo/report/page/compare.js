// Comparison of several runs: a table, plots over the differing setting, and charts with one curve per run.

const COLUMNS = [
  ["steps", each => count(each.steps)],
  ["reward first", each => text(each.reward_first), "reward_first"], ["last", each => text(each.reward_last), "reward_last"],
  ["held-out first", each => text(each.eval_first), "eval_first"], ["last", each => text(each.eval_last), "eval_last"],
  ["trainer waits", each => percent(each.trainer_wait_fraction), "trainer_wait_fraction"], ["s/step", each => text(each.step_s, 2), "step_s"],
  ["groups/s", each => text(each.groups_per_s, 2), "groups_per_s"], ["tokens/s", each => count(each.tokens_per_s), "tokens_per_s"],
  ["generators busy", each => percent(each.generator_busy_fraction), "generator_busy_fraction"],
  ["wall time", each => duration(each.wall_s), "wall_s"], ["restarts", each => count(each.restarts), "restarts"],
];

function startComparing() {
  $("runs").hidden = false;
  table();
  Theme.listeners.push(table);
  sweep();
  const runs = name => RUNS.filter(run => column(run, name)?.some(isNumber));
  const many = (name, draw) => () => runs(name).map(run => draw(run, name, escaped(run.name), colourOf(run)));
  const reward = {title: "Reward", about: "moving averages; held-out prompts with standard errors", wide: true};
  const rewards = () => RUNS.flatMap(run => [averaged(run, "reward/mean", escaped(run.name), colourOf(run)),
    {...heldOut(run, "held-out", colourOf(run)), showlegend: false}]).filter(trace => trace?.x);
  const named = [["Loss", "loss"], ["Entropy", "trainer/entropy"], ["Gradient norm", "trainer/grad_norm"], ["Policy age", "policy_age/mean"],
    ["Mismatch", "mismatch/logprob_abs_diff"], ["Trainer wait, seconds", "time/trainer_wait_s"], ["Seconds per step", "time/step_s"],
    ["Tokens per second", "generator/tokens_per_s"], ["Completion length", "generator/completion_tokens_mean"]];
  const cards = named.filter(([, name]) => runs(name).length).map(([title, name]) => Charts.card({title, layout: {showlegend: false}}, many(name, averaged)));
  $("charts").append(h("div", {class: "grid"}, Charts.card(reward, rewards), cards, anyMetric(runs)));
}

const colourOf = run => series(RUNS.indexOf(run));

function anyMetric(runs) {
  const names = [...new Set(RUNS.flatMap(run => Object.keys(run.columns)))].filter(name => !["step", "wall_s"].includes(name)).sort();
  const pick = h("select", {"aria-label": "Metric", onchange: () => Charts.draw()});
  options(pick, names.map(name => [name, name]));
  pick.value = names.includes("generator/busy_fraction") ? "generator/busy_fraction" : names[0];
  return Charts.card({title: "Any metric", extra: pick, wide: true},
    () => runs(pick.value).map(run => line(run, pick.value, escaped(run.name), colourOf(run))));
}

function table() {
  const keys = Object.keys(DATA.differing).slice(0, 6);
  const shown = value => value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const best = name => name && Math.max(...RUNS.map(run => run.figures[name] ?? -Infinity));
  const highlighted = name => ["reward_last", "eval_last", "groups_per_s", "tokens_per_s"].includes(name) && RUNS.length > 1;
  const rows = RUNS.map((run, place) => h("tr", {}, h("td", {}, dot(colourOf(run)), Object.keys(DATA.differing).length <= 2 ? run.name.split(" · ")[0] : run.name),
    h("td", {}, statusOf(run.figures)), keys.map(key => h("td", {}, shown(DATA.differing[key][place]))),
    COLUMNS.map(([, cell, name]) => h("td", {}, highlighted(name) && run.figures[name] === best(name) ? h("b", {}, cell(run.figures)) : cell(run.figures)))));
  $("runs-table").replaceChildren(h("table", {},
    h("thead", {}, h("tr", {}, ["run", "status", ...keys, ...COLUMNS.map(([title]) => title)].map(title => h("th", {scope: "col"}, title)))),
    h("tbody", {}, rows)));
}

// Throughput, trainer wait and reward over a numeric setting in which the runs differ.
function sweep() {
  const keys = Object.keys(DATA.differing).filter(key => new Set(DATA.differing[key].filter(isNumber)).size > 1);
  if (!keys.length) return;
  keys.sort((a, b) => (a === "seed") - (b === "seed"));
  const pick = h("select", {"aria-label": "Setting", onchange: () => Charts.draw()});
  options(pick, keys.map(key => [key, key]));
  const over = (name, colour) => {
    const points = RUNS.map((run, place) => [DATA.differing[pick.value][place], run.figures[name], run.name]).filter(([x, y]) => isNumber(x) && isNumber(y));
    points.sort((a, b) => a[0] - b[0]);
    return {x: points.map(p => p[0]), y: points.map(p => p[1]), text: points.map(p => escaped(p[2])), mode: "lines+markers", showlegend: false,
            line: {color: colour, width: 2}, marker: {size: 8, color: colour}, hovertemplate: "%{y:.4g}<extra>%{text}</extra>"};
  };
  const chart = (title, name, number) => {
    const spec = {title, ownAxis: true, get layout() {
      return {hovermode: "closest", showlegend: false, xaxis: {title: {text: pick.value, font: {size: 11.5}, standoff: 6}, ...logarithmic(DATA.differing[pick.value].filter((_, place) => RUNS[place].figures.steps))}, yaxis: {rangemode: "tozero"}};
    }};
    return Charts.card(spec, () => [over(name, series(number))]);
  };
  $("sweep").append(h("h3", {}, "By ", pick), h("div", {class: "grid-sweep"}, chart("Groups per second", "groups_per_s", 0),
    chart("Trainer wait, share of the time", "trainer_wait_fraction", 1), chart("Reward, last tenth of the steps", "reward_last", 4)));
}

function logarithmic(values) {
  const numbers = [...new Set(values.filter(isNumber))].sort((a, b) => a - b);
  if (numbers[0] <= 0 || numbers.at(-1) / numbers[0] < 8) return {};
  return {type: "log", tickvals: numbers, ticktext: numbers.map(String)};
}
