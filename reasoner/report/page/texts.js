// What the model wrote: completions by step, reward and prompt; the same prompt early and late; problems gained and lost.

const PAGE = 20; // cards at once

const text = (value) => h('div', { class: value ? 'text' : 'text empty' }, value || 'nothing');

/** Tokens shaded by how unlikely they were when sampled. */
function shaded(pieces) {
  return h('div', { class: 'text' }, pieces.map(([piece, logprob]) => {
    const token = h('span', { title: `${logprob.toFixed(2)} nats, probability ${percent(Math.exp(logprob))}` }, piece);
    token.style.background = `rgba(${shade('--unlikely')}, ${Math.min(0.75, -logprob / 4).toFixed(2)})`;
    return token;
  }));
}

function scores(row) {
  const parts = Object.entries(row.parts).map(([name, value]) => h('span', {}, `${name} ${number(value)}`));
  const failed = Object.entries(row.failures || {}).map(([name, why]) => h('span', { class: 'wrong' }, `${name} failed: ${why}`));
  return [h('span', {}, 'reward ', h('b', {}, row.reward === null ? 'failed' : number(row.reward))), Object.keys(row.parts).length > 1 && parts, failed,
    h('span', {}, plural(row.tokens, 'token'), row.cut && h('span', { class: 'wrong' }, ', cut')), h('span', {}, `advantage ${signed(row.advantage, 2)}`)];
}

/** A list of cards of which more are shown on demand. */
function cards(items, make) {
  const place = h('div', {});
  const more = h('button', { class: 'more', onclick: () => grow() }, 'Show more');
  let shown = 0;
  const grow = () => {
    place.append(...items.slice(shown, shown + PAGE).map(make));
    shown += PAGE;
    more.hidden = shown >= items.length;
  };
  grow();
  return h('div', {}, place, more);
}

function tabs(names, choose) {
  const buttons = names.map((name, i) => h('button', { 'aria-pressed': String(i === 0), onclick: () => {
    buttons.forEach((one, j) => one.setAttribute('aria-pressed', String(i === j)));
    choose(i);
  } }, name));
  return h('div', { class: 'tabs' }, buttons);
}

function runChoice(change) {
  return compares && h('label', {}, 'run', h('select', { onchange: (event) => change(data.runs[Number(event.target.value)]) }, data.runs.map((run, i) => h('option', { value: i }, run.name))));
}

function browser(run) {
  const { items, prompts } = run.completions;
  const steps = [...new Set(items.map((row) => row.step))];
  const wanted = { step: '', low: '', high: '', word: '', order: 'step', shades: false };
  const found = () => {
    const word = wanted.word.toLowerCase();
    const rows = items.filter((row) => (wanted.step === '' || row.step === Number(wanted.step))
      && (wanted.low === '' || (row.reward !== null && row.reward >= Number(wanted.low)))
      && (wanted.high === '' || (row.reward !== null && row.reward <= Number(wanted.high)))
      && (!wanted.shades || row.shades)
      && (!word || row.text.toLowerCase().includes(word) || prompts[row.asked].text.toLowerCase().includes(word)));
    const by = { high: (a, b) => b.reward - a.reward, low: (a, b) => a.reward - b.reward, long: (a, b) => b.tokens - a.tokens, late: (a, b) => b.step - a.step }[wanted.order];
    return by ? [...rows].sort(by) : rows;
  };
  const card = (row) => h('article', { class: 'panel card' }, h('div', { class: 'meta' }, h('span', {}, `step ${row.step}`), scores(row)),
    h('div', { class: 'sides' }, h('div', { class: 'asked' }, h('div', { class: 'text' }, prompts[row.asked].text), h('div', { class: 'answer' }, `answer: ${prompts[row.asked].answer}`)),
      h('div', {}, row.shades ? shaded(row.shades) : text(row.text))));
  const place = h('div', {});
  const told = h('p', { class: 'count', id: 'found' });
  const draw = () => {
    const rows = found();
    told.textContent = `${count(rows.length)} of ${count(items.length)} on this page`;
    place.replaceChildren(rows.length ? cards(rows, card) : h('p', { class: 'calm' }, 'No completion fits these filters.'));
  };
  const on = (key, event = 'oninput') => ({ [event]: (happened) => { wanted[key] = happened.target.type === 'checkbox' ? happened.target.checked : happened.target.value; draw(); } });
  draw();
  return h('div', {}, h('div', { class: 'tools' },
    h('label', {}, 'step', h('select', { id: 'step', ...on('step', 'onchange') }, h('option', { value: '' }, 'all'), steps.map((step) => h('option', { value: step }, step)))),
    h('label', {}, 'reward from', h('input', { id: 'low', type: 'number', step: 'any', ...on('low') })),
    h('label', {}, 'to', h('input', { id: 'high', type: 'number', step: 'any', ...on('high') })),
    h('label', {}, 'order', h('select', { id: 'order', ...on('order', 'onchange') }, [['step', 'early first'], ['late', 'late first'], ['high', 'best first'], ['low', 'worst first'], ['long', 'longest first']].map(([value, name]) => h('option', { value }, name)))),
    h('label', {}, 'in prompt or completion', h('input', { id: 'word', type: 'search', ...on('word') })),
    items.some((row) => row.shades) && h('label', { class: 'inline' }, h('input', { id: 'shades', type: 'checkbox', ...on('shades', 'onchange') }), 'with shaded tokens')), told, place);
}

function pairList(run) {
  const { pairs, prompts } = run.completions;
  if (!pairs.length) return h('p', { class: 'calm' }, 'No prompt came twice in this run. How answers to the same problem changed is shown below, under problems gained and lost.');
  const side = (rows, title, reward) => h('div', {}, h('h4', {}, `${title}, step ${rows[0].step}: mean reward ${fixed(reward, 2)}`),
    rows.map((row) => h('div', { class: 'said' }, h('div', { class: 'meta' }, scores(row)), row.shades ? shaded(row.shades) : text(row.text))));
  return h('div', {}, h('p', { class: 'count' }, `${plural(pairs.length, 'prompt')} that came at least twice, those whose mean reward changed most first; the best and the worst completion of the first and of the last visit`),
    cards(pairs, (pair) => h('article', { class: 'panel card' }, h('div', { class: 'asked' }, h('div', { class: 'text' }, prompts[pair.early[0].asked].text), h('div', { class: 'answer' }, `answer: ${prompts[pair.early[0].asked].answer}`)),
      h('div', { class: 'sides' }, side(pair.early, 'Early', pair.early_reward), side(pair.late, 'Late', pair.late_reward)))));
}

function completionSection() {
  if (!data.runs.some((run) => run.completions.items.length)) return null;
  let run = data.runs[0];
  let mode = 0;
  const place = h('div', {});
  const lead = h('p', { class: 'lead' });
  const draw = () => {
    const { total, all_steps, read_steps, items } = run.completions;
    const shades = items.some((row) => row.shades) ? ' Shaded tokens were unlikely when they were sampled; two completions a step have that.' : '';
    lead.textContent = `A sample: ${count(items.length)} of the ${count(total)} in completions.jsonl, from ${count(read_steps)} of its ${plural(all_steps, 'step')}: of each the best, the worst, and others evenly.${shades}`;
    place.replaceChildren(mode ? pairList(run) : browser(run));
  };
  draw();
  return h('section', { id: 'completions' }, h('div', { class: 'head' }, h('div', {}, h('h2', {}, 'Completions'), lead),
    h('div', { class: 'tools' }, runChoice((chosen) => { run = chosen; draw(); }), tabs(['Browse', 'Early and late'], (i) => { mode = i; draw(); }))), place);
}

const KINDS = [['lost', 'Lost'], ['gained', 'Gained'], ['neither', 'Wrong in both'], ['both', 'Right in both']];

function problemSection() {
  const lists = compares ? data.against.map((one) => ({ ...one.problems, found: one.changes[0] })).filter((one) => one.items)
    : data.runs[0].problems.map((one) => ({ ...one, found: data.runs[0].changes.find((change) => change.whole && change.set === one.set) }));
  if (!lists.length) return null;
  let list = lists[0];
  let kind = 'gained';
  const place = h('div', {});
  const bar = h('div', {});
  const side = (item, i, title) => {
    const right = item.kind === 'both' || (item.kind === 'gained') === (i === 1) && item.kind !== 'neither';
    return h('div', {}, h('h4', {}, title, ' · ', h('span', { class: right ? 'right' : 'wrong' }, right ? 'right' : 'wrong'), ` · ${plural(item.tokens[i], 'token')}${item.cut[i] ? ', cut' : ''}`), text(item.texts[i]));
  };
  const card = (item) => h('article', { class: 'panel card' }, h('div', { class: 'asked' }, item.prompt === null ? h('div', {}, item.id) : h('div', { class: 'text' }, item.prompt), item.answer !== null && h('div', { class: 'answer' }, `answer: ${item.answer}`)),
    h('div', { class: 'sides' }, side(item, 0, list.before), side(item, 1, list.after)));
  const draw = () => {
    const items = list.items.filter((item) => item.kind === kind);
    place.replaceChildren(h('p', { class: 'count' }, `${count(items.length)} of ${count(list.found[kind])} shown`), items.length ? cards(items, card) : h('p', { class: 'calm' }, 'No such problem.'));
  };
  const choose = () => {
    kind = 'gained';
    const order = [KINDS[1], KINDS[0], KINDS[2], KINDS[3]];
    bar.replaceChildren(tabs(order.map(([name, said]) => `${said} ${count(list.found[name])}`), (i) => { kind = order[i][0]; draw(); }));
    draw();
  };
  choose();
  return h('section', { id: 'problems' }, h('div', { class: 'head' }, h('div', {}, h('h2', {}, 'Problems gained and lost'),
    h('p', { class: 'lead' }, 'Held-out problems, answered greedily before and after.')), h('div', { class: 'tools' },
    lists.length > 1 && h('label', {}, 'which', h('select', { id: 'which', onchange: (event) => { list = lists[Number(event.target.value)]; choose(); } }, lists.map((one, i) => h('option', { value: i }, compares ? one.after : one.set)))), bar)), place);
}
