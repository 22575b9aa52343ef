// Charts: what is drawn of a run's columns, with hover, zoom and smoothing. The drawing itself is uPlot's.

const charts = []; // every chart made: {plot, refresh}
let smoothing = 0.8;

const colour = (place) => getComputedStyle(document.documentElement).getPropertyValue(`--c${(place % 8) + 1}`).trim();
const shade = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const FONT = '11px system-ui, sans-serif';
const HEIGHT = 160;
const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)); // between steps

/** An exponential mean that weighs what came before by `weight`, without the pull of its start; gaps stay gaps. */
function smooth(values, weight) {
  let sum = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

const axes = () => [
  { stroke: () => shade('--faint'), font: FONT, grid: { show: false }, ticks: { show: false }, size: 26, space: 60, incrs: WHOLE, values: (_, ticks) => ticks.map(tick) },
  { stroke: () => shade('--faint'), font: FONT, grid: { stroke: () => shade('--line'), width: 1 }, ticks: { show: false }, size: 48, gap: 6, space: 34 },
];

/** The range of an axis: a little room around the values, from 0 for shares, and not a hair's breadth where they are flat. */
function padded(low, high, isShare) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  if (isShare) return [0, Math.min(1, Math.max(0.05, 1.12 * high))];
  const pad = high - low > 1e-9 * Math.abs(high) ? 0.1 * (high - low) : 0.2 * Math.abs(high) || 1;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

/** Keep a plot as wide as its place. */
function fit(place, plot) {
  new ResizeObserver(() => {
    const width = Math.floor(place.clientWidth);
    if (width > 0 && width !== plot.width) plot.setSize({ width, height: HEIGHT });
  }).observe(place);
}

/**
 * A card with one chart. `lines`: [{label, x, y, place}] with `place` the number of the colour; `group` names the charts
 * whose cursors move together. `options`: what (one line), format, range.
 */
function lineChart(title, lines, group, options = {}) {
  const format = options.format || number;
  const value = h('b', {});
  const values = lines.map(() => h('span', {}));
  const keys = lines.length > 1 && h('div', { class: 'keys' }, lines.map((line, i) => h('span', {}, swatch(line.place), `${line.label} `, values[i])));
  const place = h('div', { class: 'plot' });
  const card = h('div', { class: 'panel chart' }, h('h3', {}, h('span', {}, title), value), h('p', { class: 'what' }, options.what || ''), keys, place);

  const columns = () => {
    const tables = lines.map((line) => [line.x, line.y, smooth(line.y, smoothing)]);
    return tables.length === 1 ? tables[0] : uPlot.join(tables);
  };
  const series = [{}];
  for (const line of lines) {
    series.push({ stroke: () => colour(line.place) + (smoothing ? '3d' : '00'), width: 1, spanGaps: true, points: { show: false } });
    series.push({ stroke: () => colour(line.place), width: 1.8, spanGaps: true, points: { show: line.x.length < 3 } });
  }
  const tell = (plot) => {
    const idx = plot.cursor.idx;
    const row = (i) => {
      const column = plot.data[1 + 2 * i];
      if (idx !== null && idx !== undefined) return column[idx];
      for (let j = column.length - 1; j >= 0; j--) if (isNumber(column[j])) return column[j];
      return null;
    };
    lines.forEach((_, i) => { if (lines.length > 1) values[i].textContent = format(row(i)); });
    const step = idx === null || idx === undefined ? '' : `step ${count(plot.data[0][idx])}`;
    value.replaceChildren(step && h('i', {}, step), lines.length === 1 ? format(row(0)) : '');
  };
  const range = (_, low, high) => padded(low, high, options.share);
  const axis = axes();
  axis[1].values = (_, ticks) => ticks.map((one) => (options.share ? `${+(100 * one).toPrecision(3)}%` : tick(one)));
  requestAnimationFrame(() => {
    const plot = new uPlot({
      width: Math.max(200, Math.floor(place.clientWidth)), height: HEIGHT, series, axes: axis, legend: { show: false },
      scales: { x: { time: false }, y: { range } },
      cursor: { y: false, points: { size: 6 }, sync: { key: group }, drag: { x: true, y: false } },
      hooks: { setCursor: [tell] },
    }, columns(), place);
    tell(plot);
    fit(place, plot);
    charts.push({ plot, refresh: () => plot.setData(columns(), false) });
  });
  return card;
}

/** Held-out accuracy with its intervals over the policy's steps: a line a run. */
function accuracyChart(set) {
  const lines = data.runs.map((run, place) => {
    const rows = run.evaluations.filter((row) => row.set === set && row.row !== 'export');
    return { place, rows, label: run.name, x: rows.map((row) => row.policy_step) };
  }).filter((line) => line.rows.length);
  const told = h('p', { class: 'at' });
  const place = h('div', { class: 'plot' });
  const card = h('div', { class: 'panel chart' }, h('h3', {}, h('span', {}, 'Held-out accuracy'), h('b', { class: 'unclear-text' }, set)),
    h('p', { class: 'what' }, 'greedy, over updates of the policy; the band is the 95% interval of each row'), place, told);
  const ordered = lines.map((line) => [...line.rows].sort((a, b) => a.policy_step - b.policy_step));
  const tables = ordered.map((rows) => ['policy_step', 'greedy_accuracy', 'greedy_low', 'greedy_high'].map((name) => rows.map((row) => row[name])));
  const series = [{}];
  const bands = [];
  lines.forEach((line, i) => {
    series.push({ stroke: () => colour(line.place), width: 2, spanGaps: true, points: { show: true, size: 8, fill: () => colour(line.place) } });
    series.push({ stroke: 'transparent', width: 0, spanGaps: true, points: { show: false } });
    series.push({ stroke: 'transparent', width: 0, spanGaps: true, points: { show: false } });
    bands.push({ series: [3 * i + 3, 3 * i + 2], fill: () => `${colour(line.place)}2e` });
  });
  const axis = axes();
  axis[1].values = (_, ticks) => ticks.map((one) => `${+(100 * one).toPrecision(3)}%`);
  const tell = (plot) => {
    const idx = plot.cursor.idx;
    if (idx === null || idx === undefined) { told.textContent = ''; return; }
    const step = plot.data[0][idx];
    told.textContent = ordered.flatMap((rows, i) => rows.filter((row) => row.policy_step === step)
      .map((row) => `${compares ? `${lines[i].label} ` : ''}${row.row} ${percent(row.greedy_accuracy)} (${percent(row.greedy_low)} to ${percent(row.greedy_high)})`)).join(' · ');
  };
  requestAnimationFrame(() => {
    const plot = new uPlot({
      width: Math.max(200, Math.floor(place.clientWidth)), height: HEIGHT + 40, series, bands, axes: axis, legend: { show: false },
      scales: { x: { time: false, range: (_, low, high) => { const pad = 0.04 * (high - low) || 1; return [low - pad, high + pad]; } }, y: { range: (_, low, high) => padded(low, high, true) } },
      cursor: { y: false, points: { size: 9 }, drag: { x: false, y: false } }, hooks: { setCursor: [tell] },
    }, tables.length === 1 ? tables[0] : uPlot.join(tables), place);
    new ResizeObserver(() => { const width = Math.floor(place.clientWidth); if (width > 0 && width !== plot.width) plot.setSize({ width, height: HEIGHT + 40 }); }).observe(place);
    charts.push({ plot, refresh: () => {} });
  });
  return card;
}

// title, the columns in it (by name or by beginning), and how they read
const GRPO_CHARTS = [
  ['Reward', (name) => name === 'reward_mean' || name.startsWith('reward/'), { what: 'mean a completion, the total and its parts before their weights' }],
  ['Solved share', (name) => name === 'solved_share', { share: true, format: percent }],
  ['Completion length', (name) => name === 'completion_tokens_mean', { what: 'tokens' }],
  ['Cut share', (name) => name === 'cut_share', { share: true, format: percent }],
  ['Useful groups', (name) => name === 'useful_groups', {}],
  ['Entropy', (name) => name === 'entropy', {}],
  ['KL to the reference', (name) => name === 'kl', { what: 'nats a token; 0 without a reference' }],
  ['Engine and trainer', (name) => name === 'logprob_gap_mean', {}],
  ['Largest ratio', (name) => name === 'ratio_max', {}],
  ['Gradient norm', (name) => name === 'grad_norm', {}],
  ['Learning rate', (name) => name === 'lr', {}],
  ['Tokens a second', (name) => name === 'tokens_per_s', {}],
  ['Seconds a step', (name) => ['generate_s', 'reward_s', 'logprobs_s', 'update_s', 'sync_s'].includes(name), { what: 'by part' }],
  ['Memory', (name) => name === 'peak_gib', { what: 'GiB, the most held so far' }],
];
const SFT_CHARTS = [
  ['Loss', (name) => name === 'loss', {}],
  ['Gradient norm', (name) => name === 'grad_norm', {}],
  ['Learning rate', (name) => name === 'lr', {}],
  ['Tokens a second', (name) => name === 'tokens_per_s', {}],
  ['Memory', (name) => name === 'peak_gib', { what: 'GiB, the most held so far' }],
];
const LEFT_OUT = ['groups', 'examples', 'step_s', 'trained_tokens']; // constant, or the sum of what is drawn

/** The charts of one kind of stage; every column that no chart of the table takes gets one of its own, below. */
function stageCharts(stage, table) {
  const named = data.names[stage];
  const runs = data.runs.map((run, place) => ({ run, place, ...run.curves[stage] })).filter((one) => one.x);
  const names = [...new Set(runs.flatMap((one) => Object.keys(one.series)))].filter((name) => !LEFT_OUT.includes(name));
  const measured = names.filter((name) => runs.some((one) => (one.series[name] || []).some((value) => isNumber(value))));
  const taken = new Set();
  const card = (title, several, options) => {
    const lines = several.flatMap((name, i) => runs.filter((one) => one.series[name]).map((one) => (
      { label: compares ? one.run.name : name.replace(/^reward\//, '').replace(/_s$/, '').replace('reward_mean', 'total'), x: one.x, y: one.series[name], place: compares ? one.place : i })));
    return lineChart(title, lines, stage, { ...options, what: options.what || named[several[0]] || '' });
  };
  const grid = [];
  for (const [title, takes, options] of table) {
    const several = measured.filter(takes);
    several.forEach((name) => taken.add(name));
    if (!several.length) continue;
    // A part that is the whole reward needs no line of its own.
    const shown = title === 'Reward' && several.length === 2 ? several.slice(0, 1) : several;
    if (compares) shown.forEach((name) => grid.push(card(shown.length > 1 ? `${title}: ${name}` : title, [name], options)));
    else grid.push(card(title, shown, options));
  }
  const zero = (name) => runs.every((one) => (one.series[name] || []).every((value) => !value));
  const others = measured.filter((name) => !taken.has(name) && !zero(name));
  return { grid, others: () => others.map((name) => card(name, [name], {})), numOthers: others.length, runs };
}
