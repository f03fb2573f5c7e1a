// Live runs: the page polls its server for new data and keeps the reader's place.

const Live = {listeners: [], every: 3000};

function startLive() {
  if (DATA.live) setTimeout(ask, Live.every);
}

async function ask() {
  const began = performance.now(), [status, data] = await answer();
  if (data) update(data);
  showLive(status === 200 || status === 204 ? `as of ${new Date().toLocaleTimeString("en-GB")}` : "the server does not answer");
  if (DATA.live) setTimeout(ask, Math.max(Live.every, 5 * (performance.now() - began)));  // reading a large run takes the server a while
  else showLive("");
}

// Fetch the status (204 when nothing is new) and the data; status 0 without an answer: the server may come back.
const answer = () => fetch(`data?stamp=${DATA.live.stamp}`, {cache: "no-store"})
  .then(async found => [found.status, found.status === 200 ? await found.json() : null])
  .catch(() => [0, null]);

function update(data) {
  if (DATA.waiting && !data.waiting) return location.reload();  // before the first step there is no place to keep
  if (data.waiting && !DATA.waiting) return DATA.live = data.live;  // a resumption removed all steps: keep showing the old ones
  [DATA, RUNS] = [data, data.runs];
  keepingPlace(() => Live.listeners.forEach(listener => listener()));
}

// Content that grows above the reader's place must not move it.
function keepingPlace(change) {
  const seen = [...document.querySelectorAll("section:not([hidden])")].findLast(section => section.getBoundingClientRect().top <= innerHeight / 2);
  document.documentElement.style.overflowAnchor = "none";  // else the browser sometimes corrects it as well
  const before = seen?.getBoundingClientRect().top;
  change();
  if (seen && scrollY > 0) scrollBy({top: seen.getBoundingClientRect().top - before, behavior: "instant"});
}

function showLive(message) { $("live").textContent = message; }
