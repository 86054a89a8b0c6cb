"""Tables for the terminal and in Markdown, the chart, the list of medians."""
import math, statistics, textwrap
from html import escape

HEAD = ['what', 'unit', 'vmig', 'QEMU', 'vmig better by', 'limit']
VERDICT_HEAD = ['what', 'asked of vmig', 'got', 'enough']


def quartiles(of):
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(of, n=4, method='inclusive') if len(of) > 1 else of * 3


def figure(value):
    size = abs(value)
    return f'{value:.0f}' if size >= 100 else f'{value:.1f}' if size >= 10 else f'{value:.2f}'


def cell(of):
    if not of:
        return ''
    low, middle, high = map(figure, quartiles(of))
    return middle if len(of) == 1 else f'{middle} ({low}-{high})'


def cells(row):
    factor = ''
    if row.vmig and row.qemu:
        ours, theirs = statistics.median(row.vmig), statistics.median(row.qemu)
        if ours > 0 and theirs > 0:
            factor = f"{ours / theirs if row.better == 'higher' else theirs / ours:.2f}x"
    return [row.row, row.unit, cell(row.vmig), cell(row.qemu), factor, cell(row.limit)]


def terminal(head, lines):
    table = [head] + lines
    width = [max(len(str(line[i])) for line in table) for i in range(len(head))]
    out = ['  '.join(text.ljust(w) for text, w in zip(line, width)).rstrip() for line in table]
    return '\n'.join([out[0], '  '.join('-' * w for w in width), *out[1:]])


def markdown(head, lines, right):
    rule = ['---:' if i in right else '---' for i in range(len(head))]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in [head, rule, *map(list, lines)])


def medians(rows):
    middle = lambda of: statistics.median(of) if of else None
    return [{'row': row.row, 'unit': row.unit, 'vmig': middle(row.vmig), 'qemu': middle(row.qemu),
             'limit': middle(row.limit), 'better': row.better} for row in rows]


# ---- the chart: one panel per kind of row, bars from the left, quartiles as whiskers ----

PANELS = [('speed', 'Throughput (GB/s, more is better)', False),
          ('cpu', 'CPU seconds per GiB, both sides (less is better)', False),
          ('total', 'Total time without contents (ms, less is better)', False),
          ('blackout pinned', 'Blackout, pinned (ms, less is better, logarithmic)', True),
          ('blackout free', 'Blackout, not pinned (ms, less is better, logarithmic)', True),
          ('stall pinned', 'Longest stall of the source, pinned (ms, less is better, logarithmic)', True),
          ('stall free', 'Longest stall of the source, not pinned (ms, less is better, logarithmic)', True)]
COLOURS = {'vmig': '#1f6fb2', 'qemu': '#d98324', 'limit': '#8a8f98'}
WIDTH, LABELS, FIGURES, BAR, GAP = 860, 230, 130, 13, 9
NAMES = {'vmig': 'vmig', 'qemu': 'QEMU', 'limit': 'limit'}


class Scale:
    def __init__(self, rows, logarithmic):
        all_values = [v for row in rows for of in (row.vmig, row.qemu, row.limit) for v in quartiles(of) if v > 0]
        self.log = logarithmic
        self.low = 10 ** math.floor(math.log10(min(all_values) / 3)) if logarithmic else 0   # no bar without length
        self.high = max(all_values) * (1.15 if logarithmic else 1.05)
        if logarithmic and self.high <= self.low:
            self.high = self.low * 10

    def x(self, value):
        room = WIDTH - LABELS - FIGURES
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return LABELS + room * max(0, min(1, share))

    def ticks(self):
        if self.log:
            step, ticks = self.low, []
            while step <= self.high:
                ticks += [step] + ([3 * step] if self.high / self.low < 200 and 3 * step <= self.high else [])
                step *= 10
            return ticks
        step = 10 ** math.floor(math.log10(self.high))
        step = step / 5 if self.high / step < 2 else step / 2 if self.high / step < 5 else step
        return [n * step for n in range(int(self.high / step) + 1)]


def text(x, y, words, extra=''):
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(words)}</text>'


def bar(scale, y, name, of):
    low, middle, high = quartiles(of)
    left, right = scale.x(scale.low), scale.x(middle)
    out = [f'<rect x="{left:.1f}" y="{y}" width="{max(right - left, 1):.1f}" height="{BAR - 2}" fill="{COLOURS[name]}"/>']
    if high > low:
        mid, a, b = y + (BAR - 2) / 2, scale.x(low), scale.x(high)
        out.append(f'<path d="M{a:.1f} {mid}H{b:.1f}M{a:.1f} {mid - 3}v6M{b:.1f} {mid - 3}v6" stroke="#222" fill="none"/>')
    out.append(text(max(scale.x(high), right) + 5, y + BAR - 3.5, f'{NAMES[name]} {figure(middle)}', 'class="n"'))
    return out


def panel(title, rows, logarithmic, top):
    scale, out = Scale(rows, logarithmic), [text(8, top + 16, title, 'class="t"')]
    y = top + 28
    body = []
    for row in rows:
        bars = [(name, of) for name, of in (('vmig', row.vmig), ('qemu', row.qemu), ('limit', row.limit)) if of]
        label = row.row.rsplit(':', 1)[0].split(', ', 1)[-1]
        body.append(text(LABELS - 8, y + len(bars) * BAR / 2 + 3, label, 'text-anchor="end"'))
        for name, of in bars:
            body += bar(scale, y, name, of)
            y += BAR
        y += GAP
    for tick in scale.ticks():
        x = scale.x(tick)
        out.append(f'<path d="M{x:.1f} {top + 24}V{y - GAP + 2}" stroke="#e3e5e8"/>')
        out.append(text(x, y + 5, f'{tick:g}', 'text-anchor="middle" class="n"'))
    return out + body, y + 24


def chart(rows, words):
    """The SVG; None when no row has a place in it."""
    out, y = [], 10
    for name, title, logarithmic in PANELS:
        if chosen := [row for row in rows if row.panel == name]:
            lines, y = panel(title, chosen, logarithmic, y)
            out += lines
    if not out:
        return None
    words = textwrap.wrap(words, 140)
    height = y + 14 * len(words) + 8
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            'font-family="DejaVu Sans, Verdana, sans-serif" font-size="11" fill="#222">',
            '<style>.t{font-size:13px;font-weight:bold}.n{font-size:10px;fill:#555}</style>',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>']
    foot = [text(8, y + 8 + 14 * n, line, 'class="n"') for n, line in enumerate(words)]
    return '\n'.join([*head, *out, *foot, '</svg>', ''])
