// The timeline on a canvas: one lane for each coroutine and each actor, over a window of time.

const WAIT_COLOURS = {
  ticket: 9, prompts: 6, "generator.generate": 0, "reward.score": 1, "environment.play": 1, "replay_buffer.add": 3, "dataloader.sample": 8, "reference.score": 5,
  "replay_buffer.sample": 6, "trainer.train_step": 2, "trainer.push_weights": 4, "trainer.write_weights": 4, "trainer.send_weights": 4,
  "generator.update_weights": 4, "generator.receive_weights": 4, weights: 4, send: 4, receive: 4, "trainer.snapshot": 7,
  evaluation: 5, prefill: 7, decode: 0, score: 1, turn: 0, reply: 1, episode: 9, episodes: 9, train_step: 9, forward: 2, backward: 5, optimizer: 6, publish: 4, load: 4, snapshot: 7, save: 8,
};
// A name has the same colour everywhere; unknown names get one from a hash.
function waitColour(name) {
  const known = WAIT_COLOURS[name] ?? WAIT_COLOURS[name.split(/[ (]/)[0]];
  return series(known ?? [...name].reduce((sum, letter) => (31 * sum + letter.charCodeAt(0)) % 997, 7));
}

const ROW = 16, TOP = 26, GAP = 26, TRACK = 0, BEGIN = 1, LENGTH = 2, NAME = 3, KIND = 4, DEPTH = 5, ARGS = 6;

class Lanes {
  constructor(canvas, timeline, deaths) {
    this.canvas = canvas;
    this.deaths = deaths;
    this.timeline = timeline;
    this.spans = timeline.spans;
    this.layers = timeline.tracks.map(() => []);  // by track and depth, each in order and without overlap
    this.spans.forEach((span, number) => (this.layers[span[TRACK]][span[DEPTH]] ??= []).push(number));
    this.ticks = timeline.tracks.map(() => []);
    timeline.switches.forEach((each, number) => this.ticks[each[2]].push(number));
    const driver = timeline.tracks.filter(track => track.process === "driver").length;
    this.y = timeline.tracks.map((_, place) => TOP + place * ROW + (place >= driver ? GAP : 0));
    this.actorsAt = driver < timeline.tracks.length ? TOP + driver * ROW : null;
    this.height = this.y.at(-1) + ROW + 6;
    this.colours = {};
  }

  repaint() {
    this.colours = Object.fromEntries(this.timeline.names.map((name, number) => [number, waitColour(name)]));
    Object.assign(this, {ink: css("ink"), soft: css("soft"), line: css("line"), run: css("run"), bad: css("bad")});
  }

  get left() { return this.canvas.clientWidth < 600 ? 86 : 118; }

  draw(from, to, at, current, ticket) {
    const width = this.canvas.clientWidth, ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(this.height * ratio)) {
      [this.canvas.width, this.canvas.height] = [Math.round(width * ratio), Math.round(this.height * ratio)];
      this.canvas.style.height = `${this.height}px`;
    }
    Object.assign(this, {from, to, scale: (width - this.left - 10) / (to - from), width, ticket});
    const pen = this.pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, this.height);
    pen.textBaseline = "middle";
    this.axis();
    pen.save();
    pen.beginPath();
    pen.rect(this.left, TOP - 4, width - this.left, this.height);
    pen.clip();
    this.layers.forEach((layers, track) => this.track(track, layers, current?.[2] === track));
    this.deaths.forEach(death => this.death(death));
    if (ticket !== null) this.flow(ticket);
    pen.restore();
    this.labels(current);
    this.head(at);
  }

  x(time) { return this.left + (time - this.from) * this.scale; }

  track(track, layers, running) {
    const {pen} = this, y = this.y[track];
    if (running) { pen.fillStyle = faded(this.run, 0.13); pen.fillRect(this.left, y, this.width, ROW); }
    layers.forEach((numbers, depth) => this.layer(numbers, depth, y, layers[depth + 1] ?? []));
    pen.fillStyle = this.run;
    for (let place = this.firstTick(track); place < this.ticks[track].length; place++) {
      const [begin, end, , , , whole] = this.timeline.switches[this.ticks[track][place]];
      if (begin > this.to) break;
      pen.fillRect(this.x(begin) - 0.75, y + 1, Math.max(1.5, whole ? (end - begin) * this.scale : 0), ROW - 2);
    }
  }

  layer(numbers, depth, y, inner) {
    const {pen} = this;
    for (let place = this.first(numbers); place < numbers.length; place++) {
      const span = this.spans[numbers[place]];
      if (span[BEGIN] > this.to) break;
      const x = Math.max(this.left - 2, this.x(span[BEGIN])), width = Math.min(this.width, this.x(span[BEGIN] + span[LENGTH])) - x;
      const around = span[KIND] === "group" || span[KIND] === "stage", inset = around ? ROW - 3 : 2 + Math.min(2, span[KIND] === "busy" ? depth : 0);
      const mine = this.ticket !== null && ticketsOf(span).includes(this.ticket);
      pen.fillStyle = around ? (mine ? this.run : faded(this.soft, 0.3)) : this.colour(span, depth);
      pen.fillRect(x, y + inset, Math.max(0.7, width), around ? 2 : ROW - 3 - 2 * (inset - 2));
      if (!around && width > 62 && !this.holds(span, inner)) this.caption(this.timeline.names[span[NAME]], x, y, width);
    }
  }

  // Whether a span of the next layer lies inside this one: it would cover the caption.
  holds(span, inner) {
    const next = this.spans[inner[this.first(inner, span[BEGIN])]];
    return span[KIND] === "busy" && next !== undefined && next[BEGIN] < span[BEGIN] + span[LENGTH];
  }

  colour(span) { return faded(this.colours[span[NAME]], span[KIND] === "busy" ? 0.85 : 0.5); }

  caption(name, x, y, width) {
    const {pen} = this;
    pen.font = "10.5px system-ui, sans-serif";
    if (pen.measureText(name).width > width - 10) return;
    pen.fillStyle = this.ink;
    pen.fillText(name, Math.max(x, this.left) + 5, y + ROW / 2);
  }

  // A line from the coroutine that generated a group to the train step that consumed it.
  flow(ticket) {
    const {pen} = this, group = this.timeline.group[ticket], step = this.timeline.trained[ticket];
    if (!group || !step) return;
    const [x0, y0] = [this.x(group[BEGIN] + group[LENGTH]), this.y[group[TRACK]] + ROW / 2];
    const [x1, y1] = [this.x(step[BEGIN]), this.y[step[TRACK]] + ROW / 2];
    pen.strokeStyle = pen.fillStyle = this.run;
    pen.lineWidth = 1.6;
    pen.beginPath();
    pen.moveTo(x0, y0);
    pen.bezierCurveTo((x0 + x1) / 2, y0, (x0 + x1) / 2, y1, x1, y1);
    pen.stroke();
    for (const [x, y] of [[x0, y0], [x1, y1]]) { pen.beginPath(); pen.arc(x, y, 3.5, 0, 7); pen.fill(); }
  }

  // A line through all lanes; the lanes of the dead process are shaded until a replacement serves.
  death({actor, at_s, back_s}) {
    const {pen} = this, x = this.x(at_s * 1e6), until = Math.min(this.width, this.x((at_s + (back_s ?? Infinity)) * 1e6));
    if (x > this.width || until < this.left) return;
    pen.fillStyle = faded(this.bad, 0.28);
    this.timeline.tracks.forEach(({process}, track) => { if (process === actor) pen.fillRect(x, this.y[track], until - x, ROW); });
    pen.strokeStyle = pen.fillStyle = this.bad;
    pen.lineWidth = 1.4;
    pen.setLineDash([5, 4]);
    pen.beginPath(); pen.moveTo(x, TOP - 4); pen.lineTo(x, this.height); pen.stroke();
    pen.setLineDash([]);
    pen.font = "600 11px system-ui, sans-serif";
    if (this.actorsAt !== null) pen.fillText(`${actor} died`, x + 5, this.actorsAt + GAP - 9);
  }

  labels(current) {
    const {pen} = this;
    pen.font = "11px system-ui, sans-serif";
    this.timeline.tracks.forEach(({name}, track) => {
      const running = current?.[2] === track;
      pen.fillStyle = running ? this.run : this.soft;
      pen.font = `${running ? "bold " : ""}11px system-ui, sans-serif`;
      pen.fillText(name.length > 17 ? `${name.slice(0, 16)}…` : name, 14, this.y[track] + ROW / 2, this.left - 20);
    });
    pen.font = "600 11px system-ui, sans-serif";
    pen.fillStyle = this.soft;
    pen.fillText("Coroutines", 14, 12);
    if (this.actorsAt !== null) pen.fillText("Actors", 14, this.actorsAt + GAP - 9);
  }

  axis() {
    const {pen} = this, aim = (this.to - this.from) / Math.max(2, (this.width - this.left) / 110);
    const power = 10 ** Math.floor(Math.log10(aim)), every = [1, 2, 5, 10].map(times => times * power).find(size => size >= aim);
    pen.font = "11px system-ui, sans-serif";
    for (let time = Math.ceil(this.from / every) * every; time < this.to; time += every) {
      const x = Math.round(this.x(time)) + 0.5;
      pen.strokeStyle = this.line;
      pen.lineWidth = 1;
      pen.beginPath(); pen.moveTo(x, TOP - 4); pen.lineTo(x, this.height); pen.stroke();
      pen.fillStyle = this.soft;
      pen.fillText(clock(time, every), x + 4, 12);
    }
  }

  head(at) {
    const {pen} = this, x = this.x(at);
    pen.strokeStyle = this.run;
    pen.lineWidth = 1.2;
    pen.beginPath(); pen.moveTo(x, 4); pen.lineTo(x, this.height); pen.stroke();
    pen.fillStyle = this.run;
    pen.beginPath(); pen.moveTo(x - 5, 2); pen.lineTo(x + 5, 2); pen.lineTo(x, 9); pen.fill();
  }

  // The index of the first span of a layer that ends at or after a time.
  first(numbers, time = this.from) {
    return lowest(numbers.length, place => this.spans[numbers[place]][BEGIN] + this.spans[numbers[place]][LENGTH] >= time);
  }

  firstTick(track) { return lowest(this.ticks[track].length, place => this.timeline.switches[this.ticks[track][place]][1] >= this.from); }

  // The spans of a track at a time, innermost first.
  at(track, time) {
    return this.layers[track].map(numbers => numbers[this.first(numbers, time)]).filter(number => number !== undefined)
      .filter(number => this.spans[number][BEGIN] <= time).map(number => this.spans[number]).reverse();
  }

  // Whether a coroutine is between two recorded waits.
  between(track, time) {
    const ticks = this.ticks[track], place = lowest(ticks.length, each => this.timeline.switches[ticks[each]][1] > time);
    return place < ticks.length && this.timeline.switches[ticks[place]][0] <= time;
  }

  // The time and the track at a point of the canvas.
  under(x, y) {
    const track = this.y.findIndex(top => y >= top && y < top + ROW);
    return {time: this.from + (x - this.left) / this.scale, track: x < this.left || track < 0 ? null : track};
  }
}

// Binary search: the lowest index for which a monotonic predicate holds.
function lowest(length, holds) {
  let low = 0, high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holds(middle)) high = middle; else low = middle + 1;
  }
  return low;
}

const ticketsOf = span => span[ARGS] ? [...(span[ARGS].tickets ?? []), ...(span[ARGS].ticket === undefined ? [] : [span[ARGS].ticket])] : [];
const clock = (microseconds, every = 1000) => `${(microseconds / 1e6).toFixed(Math.max(0, Math.min(6, Math.ceil(-Math.log10(every / 1e6)))))} s`;
