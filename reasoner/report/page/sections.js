// The sections that tell: the headline, the table of accuracies, flags, curves, time and memory, settings.

function headline(said) {
  return [h('h1', {}, said.title), h('p', { class: 'detail' }, said.detail)];
}

const toneText = { up: 'up-text', down: 'down-text', unclear: 'unclear-text' };

function changeRow(one, first) {
  return h('tr', {}, h('td', {}, first), h('td', {}, `${fixed(one.before_accuracy, 1)}%`), h('td', {}, `${fixed(one.after_accuracy, 1)}%`),
    h('td', { class: `strong ${toneText[one.verdict]}` }, signed(one.points, 1)),
    h('td', {}, h('span', { class: 'range' }, `${signed(one.low, 1)} to ${signed(one.high, 1)}`)),
    h('td', {}, count(one.gained)), h('td', {}, count(one.lost)), h('td', {}, count(one.problems)));
}

function changeTable(changes, first) {
  const head = ['', 'before', 'after', 'points', '95% interval', 'gained', 'lost', 'problems'];
  return h('div', { class: 'scroll' }, h('table', {}, h('thead', {}, h('tr', {}, head.map((name) => h('th', {}, name)))),
    h('tbody', {}, changes.map((one) => changeRow(one, first(one))))));
}

function evaluationTable(run, set) {
  const rows = run.evaluations.filter((row) => row.set === set);
  const atK = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((name) => /^(pass|maj)_at_\d+$/.test(name) && rows.some((row) => isNumber(row[name])));
  const head = ['', 'greedy', '95% interval', 'sampled', ...atK.map((name) => name.replace('_at_', '@')), 'tokens', 'cut'];
  return h('div', { class: 'scroll' }, h('table', {}, h('thead', {}, h('tr', {}, head.map((name) => h('th', {}, name)))),
    h('tbody', {}, rows.map((row) => h('tr', {}, h('td', {}, row.row), h('td', { class: 'strong' }, percent(row.greedy_accuracy)),
      h('td', {}, h('span', { class: 'range' }, `${percent(row.greedy_low)} to ${percent(row.greedy_high)}`)),
      h('td', {}, percent(row.sampled_accuracy)), atK.map((name) => h('td', {}, percent(row[name]))), h('td', {}, fixed(row.mean_tokens, 1)),
      h('td', {}, percent(row.cut_share, 0)))))));
}

function resultSection() {
  const sets = [...new Set(data.runs.flatMap((run) => run.evaluations.map((row) => row.set)))];
  if (!sets.length) return null;
  const several = data.runs.some((run) => run.changes.length);
  return h('section', { id: 'result' },
    h('div', { class: 'head' }, h('div', {}, h('h2', {}, 'Result'), h('p', { class: 'lead' }, 'Each row is a set of weights, measured on the same held-out problems. The change is paired: it counts, problem by problem, what was gained and lost.'))),
    sets.map((set) => h('div', { class: 'two sub' }, accuracyChart(set), h('div', { class: 'panel' },
      data.runs.map((run, i) => [compares && h('h3', { class: i ? 'sub' : '' }, swatch(i), run.name), evaluationTable(run, set)])))),
    !compares && several && h('div', { class: 'panel' }, changeTable(data.runs[0].changes, (one) => [`${one.after} against ${one.before}`, sets.length > 1 && ` · ${one.set}`])));
}

function againstSection() {
  if (!compares) return null;
  return h('section', { id: 'against' }, h('div', { class: 'head' }, h('div', {}, h('h2', {}, 'Against one another'),
    h('p', { class: 'lead' }, `Each run’s last weights against those of ${data.runs[0].name}, on the problems that both answered.`))),
  data.against.map((one) => h('div', { class: 'panel card' }, h('h3', {}, one.headline.title), h('p', { class: 'lead' }, one.headline.detail),
    one.changes.length > 0 && h('div', { class: 'sub' }, changeTable(one.changes, (found) => found.set)),
    h('h3', { class: 'sub' }, one.settings.length ? `${plural(one.settings.length, 'setting')} ${one.settings.length === 1 ? 'differs' : 'differ'}` : 'No setting differs'),
    one.settings.length > 0 && plainTable(['setting', data.runs[0].name, one.name], one.settings))));
}

function flagSection() {
  const all = data.runs.flatMap((run) => run.flags.map((flag) => ({ ...flag, run: run.name })));
  const practised = data.runs.some((run) => run.curves.grpo.x);
  if (!practised && !all.length) return null;
  return h('section', { id: 'flags' }, h('div', { class: 'head' }, h('div', {}, h('h2', {}, 'What looks wrong'),
    h('p', { class: 'lead' }, 'Looked for: reward without held-out gain, one reward part rising alone, collapse of length or entropy, loops, one answer for many prompts, cut completions, groups without signal, failed rewards, a gap between engine and trainer.'))),
  h('div', { class: 'panel' }, all.length ? all.map((flag) => h('div', { class: 'flag' }, h('span', { class: `tone ${flag.tone}` }),
    h('h3', {}, flag.title, compares && ` · ${flag.run}`), h('p', {}, flag.text))) : h('p', { class: 'calm' }, 'None of these was found.')));
}

function curveSection() {
  const stages = [['grpo', 'Practice (GRPO)', GRPO_CHARTS], ['sft', 'Imitation (SFT)', SFT_CHARTS]];
  const made = stages.map(([stage, title, table]) => ({ title, ...stageCharts(stage, table) })).filter((one) => one.runs.length);
  if (!made.length) return null;
  const slider = h('input', { type: 'range', min: 0, max: 0.98, step: 0.02, value: smoothing, id: 'smoothing', oninput: (event) => {
    smoothing = Number(event.target.value);
    charts.forEach((one) => one.refresh());
  } });
  const thinned = Math.max(...made.flatMap((one) => one.runs.map((run) => run.steps_a_point)));
  return h('section', { id: 'curves' }, h('div', { class: 'head' },
    h('div', {}, h('h2', {}, 'Curves'), h('p', { class: 'lead' }, 'Point at a chart to read all of a stage at that step. Drag to zoom in, double-click to go back.',
      thinned > 1 && ` Each point is the mean of ${thinned} steps.`)),
    h('div', { class: 'tools' }, compares && h('div', { class: 'legend' }, data.runs.map((run, i) => h('span', {}, swatch(i), run.name))),
      h('label', {}, 'smoothing', slider))),
  made.map((one) => [h('h3', { class: 'sub' }, one.title), h('div', { class: 'grid' }, one.grid),
    one.numOthers > 0 && later(`${plural(one.numOthers, 'more curve')} of this stage`, () => h('div', { class: 'grid' }, one.others()))]));
}

/** Folded away, and made only when it is opened. */
function later(title, make) {
  let made = false;
  return h('details', { ontoggle: (event) => { if (event.target.open && !made) { made = true; event.target.append(h('div', {}, make())); } } }, h('summary', {}, title));
}

function stack(title, pieces, say) {
  const whole = pieces.reduce((sum, [, value]) => sum + value, 0);
  if (!(whole > 0)) return null;
  const line = h('div', { class: 'bar-line', role: 'img', 'aria-label': title });
  pieces.forEach(([name, value], i) => {
    const piece = h('span', { class: `k${(i % 8) + 1}`, title: `${name}: ${say(value)}` });
    piece.style.flex = `${value / whole} 1 0`;
    line.append(piece);
  });
  return h('div', { class: 'stack' }, h('h3', {}, `${title}: ${say(whole)}`), line,
    h('ul', {}, pieces.map(([name, value], i) => h('li', {}, swatch(i), h('span', {}, name), h('span', {}, say(value)), h('em', {}, percent(value / whole))))));
}

function costSection() {
  const parts = data.runs.map((run) => [compares && h('h3', { class: 'sub' }, run.name),
    stack('The run by stage', run.time.stages, duration), stack('Practice by part', run.time.parts, duration),
    stack('Memory of the card by part', Object.entries(run.memory), (gib) => `${gib.toFixed(2)} GiB`)]);
  if (!parts.flat().some((one) => one && one.className === 'stack')) return null;
  return h('section', { id: 'cost' }, h('div', { class: 'head' }, h('h2', {}, 'Where time and memory went')), h('div', { class: 'panel' }, parts));
}

function plainTable(head, rows) {
  return h('table', { class: 'plain' }, head && h('thead', {}, h('tr', {}, head.map((name) => h('th', {}, name)))),
    h('tbody', {}, rows.map((row) => h('tr', {}, row.map((cell) => h('td', {}, cell))))));
}

function settingsSection() {
  return h('section', { id: 'settings' }, h('div', { class: 'head' }, h('h2', {}, 'Settings, versions, what the run said')),
    data.runs.map((run) => {
      const list = (word) => plainTable(null, run.config.filter(([key, value]) => `${key} ${value}`.toLowerCase().includes(word)));
      const place = h('div', {}, list(''));
      return [compares && h('h3', { class: 'sub' }, run.name),
        h('details', {}, h('summary', {}, plural(run.config.length, 'setting')), h('div', {},
          h('div', { class: 'tools' }, h('input', { type: 'search', placeholder: 'find a setting', 'aria-label': 'find a setting', oninput: (event) => place.replaceChildren(list(event.target.value.toLowerCase())) })), place)),
        Object.keys(run.versions).length > 0 && h('details', {}, h('summary', {}, 'Versions'), h('div', {}, plainTable(null, Object.entries(run.versions)))),
        run.notes.length > 0 && h('details', {}, h('summary', {}, `${plural(run.notes.length, 'line')} that the run said`), h('div', {},
          plainTable(['after', 'said'], run.notes.map((note) => [note.after || 'start', note.text]))))];
    }));
}
