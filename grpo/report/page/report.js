// The page: the overview, and all sections in order.

function startOverview() {
  const [run] = RUNS, single = RUNS.length === 1, {figures} = run;
  const title = single ? run.name : `${RUNS.length} runs`;
  document.title = `${title} · report`;
  $("title").textContent = $("bar-name").textContent = title;
  const notes = RUNS.flatMap(each => each.notes.map(note => single ? note : `${each.name}: ${note}`));
  $("notes").replaceChildren(...notes.map(note => h("li", {}, note)));
  for (const id of ["status", "tiles", "shares"]) $(id).hidden = !single;
  if (!single) return;
  const colour = figures.status === "completed" ? "good" : figures.error ? "bad" : "";
  $("status").append(h("span", {class: `pill ${colour}`}, figures.status), `after ${count(figures.steps)} steps in ${duration(figures.wall_s)}`);
  $("error").hidden = !figures.error;
  $("error").textContent = figures.error ?? "";
  $("config").hidden = !run.config;
  $("config-text").textContent = run.config;
  $("tiles").append(...tiles(figures));
  showShares();
  Theme.listeners.push(showShares);
}

function tiles(figures) {
  const change = (first, last) => isNumber(last) ? [text(first, 2), h("i", {}, " → "), text(last, 2)] : [text(first, 2)];
  const shown = [
    [change(figures.reward_first, figures.reward_last), "reward, first and last tenth"],
    [change(figures.eval_first, figures.eval_last), "held-out reward"],
    [[percent(figures.trainer_wait_fraction)], "of the time the trainer waits"],
    [[percent(figures.generator_busy_fraction)], "of the time generators are busy"],
    [[count(figures.tokens_per_s)], "tokens per second"],
    [[text(figures.groups_per_s, 1)], "groups per second"],
    [[count(figures.restarts)], "processes replaced"],
  ];
  return shown.map(([value, label]) => h("div", {class: "tile"}, h("b", {}, value), h("span", {}, label)));
}

function showShares() {
  const parts = shares(RUNS[0]);
  $("shares").replaceChildren(...(parts.length ? [
    h("h3", {}, "Where the time of the training went, evaluations and checkpoints included"),
    h("div", {class: "share", role: "img", "aria-label": "Where the time of the training went"},
      parts.map(part => h("span", {style: `flex:${part.share};background:${part.colour}`, title: part.label}))),
    h("ul", {class: "dots"}, parts.map(part => h("li", {}, dot(part.colour), part.label, h("b", {}, percent(part.share))))),
  ] : []));
}

function startNavigation() {
  const names = {overview: "Overview", runs: "Runs", curves: "Curves", loop: "Event loop", groups: "Groups"};
  const shown = Object.entries(names).filter(([id]) => !$(id).hidden);
  $("nav").append(...shown.map(([id, name]) => h("a", {href: `#${id}`}, name)));
  document.querySelectorAll("section").forEach(section => section.setAttribute("tabindex", "-1"));
}

Theme.start();
startOverview();
startCurves();
startLoop();
startGroups();
startNavigation();
