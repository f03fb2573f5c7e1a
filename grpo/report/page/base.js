"use strict";
// Shared by all sections: the data, DOM elements, number formatting and the theme.

let DATA = JSON.parse(document.getElementById("data").textContent);
let RUNS = DATA.runs;
const $ = id => document.getElementById(id);

// Create an element. Text is always added as a text node: data of a run is never parsed as HTML.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") element.style.cssText = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

const isNumber = value => typeof value === "number";
const text = (value, digits = 3) => isNumber(value) ? value.toFixed(digits) : "–";
const percent = value => isNumber(value) ? `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%` : "–";
const count = value => isNumber(value) ? Math.round(value).toLocaleString("en") : "–";
const signed = (value, digits = 2) => isNumber(value) ? (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits) : "–";
const compact = value => !isNumber(value) ? "–" : Math.abs(value) < 100 ? String(+value.toPrecision(3)) : count(value);

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  const size = Math.abs(seconds);
  if (size < 1e-3) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (size < 1) return `${(seconds * 1e3).toFixed(size < 0.01 ? 1 : 0)} ms`;
  if (size < 120) return `${seconds.toFixed(size < 10 ? 2 : 1)} s`;
  if (size < 7200) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round(seconds % 3600 / 60)} min`;
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const series = number => css(`s${number % 10}`);

// Add an opacity to a colour of the palette, #rrggbb.
function faded(hex, opacity) {
  const [r, g, b] = [1, 3, 5].map(place => parseInt(hex.slice(place, place + 2), 16));
  return `rgba(${r},${g},${b},${opacity})`;
}

const Theme = {
  listeners: [],
  system: matchMedia("(prefers-color-scheme: dark)"),
  chosen: null,
  get dark() { return this.chosen ? this.chosen === "dark" : this.system.matches; },
  apply() {
    document.documentElement.dataset.theme = this.dark ? "dark" : "light";
    $("theme").textContent = this.dark ? "Light" : "Dark";
    this.listeners.forEach(listener => listener());
  },
  toggle() {
    this.chosen = this.dark ? "light" : "dark";
    try { localStorage.setItem("report-theme", this.chosen); } catch { /* some browsers have no storage for files */ }
    this.apply();
  },
  start() {
    try { this.chosen = localStorage.getItem("report-theme"); } catch { /* as above */ }
    this.system.addEventListener("change", () => this.apply());
    $("theme").addEventListener("click", () => this.toggle());
    this.apply();
  },
};

// Fill an element with buttons of which exactly one is pressed.
function toggle(element, choices, chosen, choose) {
  const buttons = choices.map(([value, label]) => h("button", {type: "button", "aria-pressed": value === chosen, onclick() {
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", choices[place][0] === value));
    choose(value);
  }}, label));
  element.replaceChildren(...buttons);
}

const options = (select, choices) =>
  select.replaceChildren(...choices.map(([value, label]) => h("option", {value}, label)));

const dot = colour => h("span", {class: "dot", style: `background:${colour}`});

// The section that a key press is for: the one with the focus, else the one in the middle of the window.
function sectionOfKeys() {
  const focused = document.activeElement?.closest?.("section");
  if (focused) return focused.id;
  const middle = innerHeight / 2;
  const seen = [...document.querySelectorAll("section:not([hidden])")].find(section => {
    const box = section.getBoundingClientRect();
    return box.top <= middle && box.bottom >= middle;
  });
  return seen?.id;
}

const typing = event => event.ctrlKey || event.metaKey || event.altKey
  || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "range";
