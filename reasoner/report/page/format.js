// Elements and numbers. Text reaches the page only as text nodes: what a model wrote is never markup.

const data = JSON.parse(document.getElementById('data').textContent);
const NONE = '–';

/** An element with attributes, listeners (on…) and children; strings become text nodes, null and false are left out. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);

/** 0.01234 -> '0.0123', 12345 -> '12,345', 1e-6 -> '1.0e-6'. */
function number(value, digits = 3) {
  if (!isNumber(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString('en');
  const decimals = size === 0 ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return Number.isInteger(value) ? String(value) : value.toFixed(Math.min(decimals, 6));
}

const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : NONE);
const signed = (value, digits) => (isNumber(value) ? (value < 0 ? '−' : '+') + Math.abs(value).toFixed(digits) : NONE);
const percent = (share, digits = 1) => (isNumber(share) ? `${(100 * share).toFixed(digits)}%` : NONE);
const count = (value) => value.toLocaleString('en');
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? '' : 's'}`;

/** 2040 -> '34 min', 90 -> '90 s', 8000 -> '2 h 13 min'. */
function duration(seconds) {
  if (seconds < 119.5) return `${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`;
}

/** Axis labels: 12000 -> '12K'. */
function tick(value) {
  if (value === null) return '';
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e3) return `${+(value / 1e3).toPrecision(3)}K`;
  if (size > 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(4));
}

const compares = data.runs.length > 1;
const swatch = (place) => h('i', { class: `k${(place % 8) + 1}` });
