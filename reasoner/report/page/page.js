// The page from top to bottom.

const TITLES = { against: 'Comparison', result: 'Result', flags: 'Flags', curves: 'Curves', completions: 'Completions', problems: 'Problems', cost: 'Time and memory', settings: 'Settings' };

function themeButton() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  const redraw = () => charts.forEach((one) => one.plot.redraw());
  const button = h('button', { class: 'quiet', id: 'theme', onclick: () => {
    root.dataset.theme = dark() ? 'light' : 'dark';
    button.textContent = dark() ? 'Light' : 'Dark';
    redraw();
  } }, dark() ? 'Light' : 'Dark');
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
  return button;
}

function hero() {
  const run = data.runs[0];
  const said = compares ? data.against[0].headline : run.headline;
  const chip = (one) => h('span', { class: one.status === 'done' ? 'chip' : 'chip bad' }, compares ? `${one.name}: ${one.status}` : one.status);
  return h('div', { class: 'wrap hero' },
    h('div', { class: 'eyebrow' }, h('span', { class: `tone ${said.tone}` }), h('span', {}, compares ? `${data.runs.length} runs against one another` : run.name), data.runs.map(chip)),
    headline(said),
    data.runs.filter((one) => one.ended_by).map((one) => h('p', { class: 'detail down-text' }, `${compares ? `${one.name}: ` : ''}${one.ended_by}`)),
    !compares && h('dl', { class: 'facts' }, run.facts.map(([label, value]) => h('div', {}, h('dt', {}, label), h('dd', {}, value)))));
}

const sections = [againstSection(), resultSection(), flagSection(), curveSection(), completionSection(), problemSection(), costSection(), settingsSection()].filter(Boolean);
const bad = data.runs.flatMap((run) => run.flags).filter((flag) => flag.tone === 'bad').length;
document.body.append(
  h('header', { class: 'bar' }, h('div', { class: 'wrap' }, h('nav', { 'aria-label': 'sections' }, sections.map((one) => h('a', { href: `#${one.id}` }, TITLES[one.id], one.id === 'flags' && bad > 0 && h('sup', {}, bad)))), themeButton())),
  h('main', {}, hero(), h('div', { class: 'wrap' }, sections)),
  h('footer', { class: 'wrap' }, `Written by reasoner on ${data.made.replace('T', ' at ')}. Charts by uPlot (MIT). This page loads nothing and sends nothing.`));
