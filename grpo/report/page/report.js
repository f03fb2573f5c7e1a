// The overview, and the start of all sections.

function startOverview() {
  showOverview();
  Theme.listeners.push(showShares);
  Live.listeners.push(showOverview);
}

function showOverview() {
  const [run] = RUNS, single = RUNS.length === 1, {figures} = run;
  const title = single ? run.name : `${DATA.title}: ${RUNS.length} runs`;
  document.title = `${title} · report`;
  $("title").textContent = $("bar-name").textContent = title;
  const notes = RUNS.flatMap(each => each.notes.map(note => single ? note : `${each.name}: ${note}`));
  $("notes").replaceChildren(...notes.map(note => h("li", {}, note)));
  for (const id of ["status", "tiles", "shares", "failures"]) $(id).hidden = !single;
  showErrors(single);
  if (!single) return;
  showStatus(figures);
  $("config").hidden = !run.config;
  $("config-text").textContent = run.config;
  $("tiles").replaceChildren(...tiles(figures));
  showShares();
  showFailures(run);
}

function showStatus(figures) {
  const [, more] = figures.status.split(": ");
  $("pill").replaceWith(DATA.live ? h("span", {class: "pill on", id: "pill"}, "live") : statusOf(figures));
  $("said").textContent = `after ${count(figures.steps)} steps in ${duration(figures.wall_s)}${more && !DATA.live ? `; ${more}` : ""}`;
}

function statusOf({status, error}) {
  const colour = status === "completed" ? "good" : error ? "bad" : "";
  return h("span", {class: `pill ${colour}`, id: RUNS.length === 1 ? "pill" : null, title: error}, status.split(":")[0]);
}

function showErrors(single) {
  const failed = RUNS.filter(each => each.figures.error);
  $("error").hidden = !failed.length;
  $("error").textContent = failed.map(each => single ? each.figures.error : `${each.name}: ${each.figures.error}`).join("\n");
}

// Processes that died, and the time until they were replaced and until the next train step.
function showFailures(run) {
  const heads = ["process", "died at", "in step", "replaced after", "next step after", "error"];
  const rows = run.deaths.map(death => h("tr", {}, h("td", {}, death.actor),
    h("td", {}, DATA.timeline ? h("button", {type: "button", class: "link", onclick: () => showMoment(death.at_s)}, duration(death.at_s)) : duration(death.at_s)),
    h("td", {}, count(death.step)), h("td", {}, duration(death.back_s)), h("td", {}, duration(death.next_step_s)), h("td", {class: "said"}, death.error)));
  $("failures").hidden = !rows.length;
  $("failures").replaceChildren(h("h3", {}, "Processes that died"),
    h("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Processes that died"},
      h("table", {}, h("thead", {}, h("tr", {}, heads.map(head => h("th", {scope: "col", class: head === "error" ? "said" : null}, head)))), h("tbody", {}, rows))));
}

function showMoment(seconds) {
  goTo(seconds * 1e6);
  $("loop").scrollIntoView();
}

function tiles(figures) {
  const change = (first, last) => isNumber(last) ? [text(first, 2), h("i", {}, " → "), text(last, 2)] : [text(first, 2)];
  const shown = [
    [change(figures.reward_first, figures.reward_last), "reward", "means over the first and the last tenth of the steps"],
    [change(figures.eval_first, figures.eval_last), "held-out reward"],
    [[percent(figures.trainer_wait_fraction)], "trainer waits", "share of the time"],
    [[percent(figures.generator_busy_fraction)], "generators busy", "share of the time"],
    [[count(figures.tokens_per_s)], "tokens per second"],
    [[text(figures.groups_per_s, 1)], "groups per second"],
    [[count(figures.restarts)], "processes replaced"],
  ];
  return shown.map(([value, label, title]) => h("div", {class: "tile", title}, h("b", {}, value), h("span", {}, label)));
}

function showShares() {
  const parts = shares(RUNS[0]);
  $("shares").replaceChildren(...(parts.length ? [
    h("h3", {}, "Training time by stage, evaluations and checkpoints included"),
    h("div", {class: "share", role: "img", "aria-label": "Training time by stage"},
      parts.map(part => h("span", {style: `flex:${part.share};background:${part.colour}`, title: part.label}))),
    h("ul", {class: "dots"}, parts.map(part => h("li", {}, dot(part.colour), part.label, h("b", {}, percent(part.share))))),
  ] : []));
}

function startNavigation() {
  document.querySelectorAll("section").forEach(section => section.setAttribute("tabindex", "-1"));
  showNavigation();
  Live.listeners.push(showNavigation);
}

function showNavigation() {
  const names = {overview: "Overview", runs: "Runs", curves: "Curves", loop: "Event loop", groups: "Groups"};
  const shown = Object.entries(names).filter(([id]) => !$(id).hidden);
  $("nav").replaceChildren(...shown.map(([id, name]) => h("a", {href: `#${id}`}, name)));
}

// No step was trained yet: show what the page waits for.
function startWaiting() {
  $("curves").hidden = $("axis").hidden = true;
  const show = () => {
    document.title = "Run report";
    $("title").textContent = DATA.name;
    $("pill").textContent = DATA.live ? "live" : "ended";
    $("pill").className = `pill ${DATA.live ? "on" : "bad"}`;
    $("said").textContent = DATA.waiting;
  };
  show();
  Live.listeners.push(show);
}

Theme.start();
if (DATA.waiting) startWaiting();
else {
  startOverview();
  startCurves();
  startLoop();
  startGroups();
  startNavigation();
}
startLive();
