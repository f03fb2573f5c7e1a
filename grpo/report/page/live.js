// A run that goes on: the page asks its server for what is new, and shows it where the reader is.

const Live = {listeners: [], every: 3000};

function startLive() {
  if (DATA.live) setTimeout(ask, Live.every);
}

async function ask() {
  const began = performance.now(), [status, data] = await answer();
  if (data) update(data);
  tellLive(status === 200 || status === 204 ? `as of ${new Date().toLocaleTimeString("en-GB")}` : "the server does not answer");
  if (DATA.live) setTimeout(ask, Math.max(Live.every, 5 * (performance.now() - began)));  // a large run takes a while to read
  else tellLive("");
}

// Its status, 204 when nothing is new, and the data; 0 when there is none: the server may come back.
const answer = () => fetch(`data?stamp=${DATA.live.stamp}`, {cache: "no-store"})
  .then(async found => [found.status, found.status === 200 ? await found.json() : null])
  .catch(() => [0, null]);

function update(data) {
  if (DATA.waiting && !data.waiting) return location.reload();  // there is no place to keep yet
  if (data.waiting && !DATA.waiting) return DATA.live = data.live;  // cut back by a resumption: what is shown stays
  [DATA, RUNS] = [data, data.runs];
  keepingPlace(() => Live.listeners.forEach(listener => listener()));
}

// What grows above the place where the reader is must not move it.
function keepingPlace(change) {
  const seen = [...document.querySelectorAll("section:not([hidden])")].findLast(section => section.getBoundingClientRect().top <= innerHeight / 2);
  document.documentElement.style.overflowAnchor = "none";  // else the browser does it too, now and then
  const before = seen?.getBoundingClientRect().top;
  change();
  if (seen && scrollY > 0) scrollBy({top: seen.getBoundingClientRect().top - before, behavior: "instant"});
}

function tellLive(said) { $("live").textContent = said; }
