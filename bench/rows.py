"""What is measured, and the rows that come of it."""
import collections, json, os, statistics, subprocess, time
import forecast, trackers
from peers import HOPELESS_S, Age, Failed, HandOver, Held, Qemu, Vmig, Words, child, OTHER_CORE

RANDOM, ZEROS, NOTHING = 2, 1, 0
MIB_128 = 32768                         # pages
PACKET = 525632                         # bytes of one packet of a parallel channel: 128 pages and its header
SOCKETS = (1, 2, 4)
KINDS = {'huge': 'huge pages populated ahead', 'ahead': 'pages of 4 KiB populated ahead'}
HAND_OVER_GIB = (1, 8, 16)
HAND_OVER_LIMIT_MS = 20
VCPUS = (1, 2, 4, 8, 16, 32, 64)
PARK_TIMES, PARK_RATIO_MOST, PARK_MOST_US = 100, 1.5, 1000

# What memory holds, pages dirtied per millisecond, pages they go round in, words.
Guest = collections.namedtuple('Guest', 'fill burst hot_pages words')
IDLE = Guest(RANDOM, 1, 1, 'idle')
GROUPS = {
    'bulk': Guest(RANDOM, 1, 1, 'random RAM'),
    'bulk-held': Guest(RANDOM, 1, 1, 'random RAM, memory at hand'),
    'checksum': Guest(RANDOM, 1, 1, 'random RAM with checksums'),
    'zeros': Guest(ZEROS, 1, 1, 'touched zeros'),
    'untouched': Guest(NOTHING, 1, 1, 'untouched RAM'),
    'untouched-3': Guest(NOTHING, 1, 1, 'untouched RAM, 3 times as much'),
    'idle': IDLE,
    'busy-32': Guest(RANDOM, 8, MIB_128, '32 MB/s dirtied'),
    'busy-260': Guest(RANDOM, 64, MIB_128, '260 MB/s dirtied'),
    'busy-520': Guest(RANDOM, 128, MIB_128, '520 MB/s dirtied'),
    'busy-520-wide': Guest(RANDOM, 128, 2 * MIB_128, '520 MB/s over 256 MiB'),
    'rate': Guest(RANDOM, 1, 1, 'rate limit'),
    'words': Guest(NOTHING, 1, 1, 'switchover'),
    'cancel': Guest(RANDOM, 1, 1, 'cancel'),
    'converge': Guest(RANDOM, 64, MIB_128, 'a guest that dirties 260 MB/s over a link of 100'),
    'hand-over': None,
    'gate': None,
    'trackers': None,
    'forecast': None,
    'forecast-steady': None,
}
# Of the group converge: what vmig is told, and in words.
CONVERGE_MB = 100
WAYS = {'ladder': ({'ladder': 'on'}, 'ladder'),
        'ladder 300': ({'ladder': 'on', 'ladder-downtime-max': 300}, 'ladder without a longer downtime'),
        'auto-converge': ({'auto-converge': 'on'}, 'auto-converge'),
        'dirty-limit': ({'dirty-limit': 'on'}, 'dirty limit on the ring')}

WORDS_LIMIT_MS = 0.5
CANCELLED_IN = {'active': 'while memory is sent', 'pre-switchover': 'with the guest stopped',
                'silent': 'a destination that never answers'}
FELT = ['idle'] + [group for group in GROUPS if group.startswith('busy')]
# Seconds a run takes, about, for the estimate.
COST = {'vmig': 3.6, 'qemu': 5.0, 'push': 3.4, 'read': 0.8, 'rate': 6.7, 'words': 0.2, 'hello': 3.0, 'cancel': 4.0, 'hand-over': 90.0,
        'gate': 45.0, 'trackers': 150.0, 'converge': 25.0, 'hopeless': 32.0, 'forecast': 210.0, 'forecast-steady': 150.0}

Row = collections.namedtuple('Row', 'row unit better vmig qemu limit panel')


class Bench:
    """What all runs share."""

    def __init__(self, vmm, qemu, bare, images, mib, folder, lanes):
        self.vmm, self.qemu, self.bare, self.images, self.mib, self.folder = vmm, qemu, bare, images, mib, folder
        self.lanes = lanes              # connections vmig uses by default

    def pair(self, kind, group, **how):
        program = self.vmm if kind is Vmig else self.qemu
        mib = self.mib * (3 if group == 'untouched-3' else 1)
        return kind(program, self.bare, self.images[group], mib, self.folder, **how)

    def push(self, sockets, kind, pinned=False, held=False):
        """The bare program: as much, through so many sockets, into memory prepared in this way."""
        argv = [self.bare, 'push', str(self.mib), str(sockets), kind]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   preexec_fn=child({OTHER_CORE} if pinned else None))
        memory = Held(self.bare, self.mib) if held else None
        try:
            process.stdout.readline()   # its memory is filled
            while memory and not memory.ready():
                time.sleep(0.01)
            if memory:
                memory.release()
            else:
                time.sleep(Age.missing())
            took = self.took(process)
        finally:
            if memory:
                memory.end()
            process.kill()
            process.wait()
            Age.begin()
        return {'total_ms': took['seconds'] * 1e3, 'gb_per_s': self.mib * 2**20 / took['seconds'] / 1e9,
                'cpu_s_per_gib': took['cpu_s'] * 1024 / self.mib}

    def read(self, threads):
        argv = [self.bare, 'read', str(self.mib), str(threads)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=child())
        took = self.took(process)
        return {'total_ms': took['seconds'] * 1e3, 'gb_per_s': self.mib * 2**20 / took['seconds'] / 1e9}

    @staticmethod
    def took(process):
        try:
            out, _ = process.communicate(b'\n', timeout=60)
            return json.loads(out.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            process.kill()
            process.wait()
            raise Failed(f'bare: no result (status {process.returncode})') from None


def bare_runs(b, pinned_too=True, sockets=SOCKETS):
    runs = {}
    for kind in KINDS:
        for n in sockets:
            runs[f'bare {n} {kind}'] = ('push', lambda n=n, kind=kind: b.push(n, kind))
        if pinned_too:
            runs[f'bare pinned {kind}'] = ('push', lambda kind=kind: b.push(1, kind, pinned=True))
    return runs


def due(name, number, rounds):
    """Whether a run has its turn in a round: of the two ways to prepare memory one, if there is more than one round."""
    for turn, kind in enumerate(KINDS):
        if name.startswith('bare') and name.endswith(kind) and rounds > 1:
            return number % len(KINDS) == turn
    return True


def runs_of(group, b):
    """Name -> (what it costs, what to call), of everything that is measured in turn in a group."""
    def vmig(**how):
        return 'vmig', lambda: b.pair(Vmig, group, **how).move()

    def qemu(**how):
        return 'qemu', lambda: b.pair(Qemu, group, **how).move()
    if group == 'bare':
        runs = bare_runs(b, sockets=(1,))
    elif group == 'bulk':
        runs = {'vmig plain': vmig(channels=0), 'qemu 1': qemu(channels=0)}
        runs |= {f'vmig {n}': vmig(channels=n) for n in SOCKETS}
        runs |= {f'qemu {n}': qemu(channels=n) for n in SOCKETS[1:]}
        runs |= bare_runs(b)
    elif group == 'bulk-held':
        runs = {}
        for n in SOCKETS[:2]:
            runs |= {f'vmig {n}': vmig(channels=n, held=True), f'qemu {n}': qemu(channels=n if n > 1 else 0, held=True),
                     f'at hand {n} huge': ('push', lambda n=n: b.push(n, 'huge', held=True))}
    elif group == 'checksum':
        runs = {}
        for n in (0, *SOCKETS[:2]):
            runs |= {f'vmig {n}': vmig(channels=n, held=True, checksum=True), f'without {n}': vmig(channels=n, held=True)}
    elif group in ('zeros', 'untouched', 'untouched-3'):
        runs = {'vmig': vmig(), 'qemu': qemu()}
        if group == 'zeros':
            runs['read'] = ('read', lambda: b.read(b.lanes))
    elif group == 'words':
        program = os.path.join(os.path.dirname(b.vmm), 'switchover')
        runs = {'words': ('words', lambda: Words(program).run()), 'hello': ('hello', lambda: b.pair(Vmig, group).words())}
    elif group == 'cancel':
        runs = {f'{name} {phase}': ('cancel', lambda kind=kind, phase=phase: b.pair(kind, group).cancelled(phase))
                for phase in CANCELLED_IN for name, kind in (('vmig', Vmig), ('qemu', Qemu))}
    elif group == 'converge':
        runs = {f'vmig {name}': ('converge', lambda options=options, name=name: b.pair(Vmig, group, ring=name == 'dirty-limit')
                                 .converged(CONVERGE_MB, options)) for name, (options, _) in WAYS.items()}
        runs['vmig nothing'] = ('hopeless', lambda: b.pair(Vmig, group).hopeless(CONVERGE_MB))
        runs['qemu'] = ('converge', lambda: b.pair(Qemu, group).converged(CONVERGE_MB, {'auto-converge': 'on'}))
    elif group == 'rate':
        runs = {'vmig': ('rate', lambda: b.pair(Vmig, group).throttled()),
                'qemu': ('rate', lambda: b.pair(Qemu, group).throttled())}
    else:
        runs = {'vmig': vmig(), 'qemu': qemu()}
        if os.cpu_count() > 1:
            runs |= {'vmig pinned': vmig(pinned=True), 'qemu pinned': qemu(pinned=True)}
    return {name: run for name, run in runs.items() if b.qemu or not name.startswith('qemu')}


def hand_over(b, gib, rounds, record):
    """A guest is made once and handed on from process to process. Says why if it cannot be here."""
    usage = subprocess.run([b.vmm, '--help'], stdout=subprocess.PIPE, text=True).stdout
    if '--memfd' not in usage:
        return 'this vmm has no --memfd'
    with open('/proc/meminfo') as f:
        free = next(int(line.split()[1]) for line in f if line.startswith('MemAvailable')) >> 20
    if free < gib + 2:
        return f'only {free} GiB of memory are free'
    HandOver(b.vmm, b.bare, None, gib << 10, b.folder).moves(rounds, lambda took: record(f'{gib} GiB', took))
    return None


# ---- rows ----

def values(samples, name, metric):
    return [s[metric] for s in samples.get(name, []) if metric in s]


def best_bare(samples, prefix):
    """The samples of the better way to prepare memory."""
    speed = {kind: values(samples, f'{prefix} {kind}', 'gb_per_s') for kind in KINDS}
    speed = {kind: statistics.median(of) for kind, of in speed.items() if of}
    return samples[f'{prefix} {max(speed, key=speed.get)}'] if speed else []


def bulk_rows(group, found):
    samples, rows, start = found[group], [], GROUPS[group].words
    names = {'plain': ('plain stream', 'qemu 1', 1), '1': ('one stream', 'qemu 1', 1),
             '2': ('2 channels', 'qemu 2', 2), '4': ('4 channels', 'qemu 4', 4)}
    metrics = [('gb_per_s', 'GB/s', 'higher', 'throughput', 'speed'), ('total_ms', 'ms', 'lower', 'total time', None),
               ('cpu_s_per_gib', 's/GiB', 'lower', 'CPU, both sides', 'cpu')]
    for metric, unit, better, words, panel in metrics:
        for name, (shape, peer, sockets) in names.items():
            if not samples.get(f'vmig {name}'):
                continue
            bare = {'bare': best_bare(samples, f'bare {sockets}') or samples.get(f'at hand {sockets} huge', [])}
            rows.append(Row(f'{start}, {shape}: {words}', unit, better, values(samples, f'vmig {name}', metric),
                            values(samples, peer, metric), values(bare, 'bare', metric), panel))
    if group != 'bulk':
        return rows
    for kind, words in KINDS.items():
        rows += [Row(f'bare program, {n} socket{"s" * (n > 1)}, {words}: throughput', 'GB/s', 'higher', [], [],
                     values(samples, f'bare {n} {kind}', 'gb_per_s'), None) for n in SOCKETS]
    return rows


def checksum_rows(found):
    """With checksums beside the same without, which is the limit."""
    samples, start = found['checksum'], GROUPS['checksum'].words
    return [Row(f'{start}, {shape}: {words}', unit, better, values(samples, f'vmig {n}', metric), [],
                values(samples, f'without {n}', metric), None)
            for metric, unit, better, words in [('gb_per_s', 'GB/s', 'higher', 'throughput'),
                                                ('cpu_s_per_gib', 's/GiB', 'lower', 'CPU, both sides')]
            for n, shape in [(0, 'plain stream'), (1, 'one stream'), (2, '2 channels')]]


def simple_rows(group, found, b):
    samples, words, read = found[group], GROUPS[group].words, found[group].get('read', [])
    rows = []
    for metric, unit, better, what in [('gb_per_s', 'GB/s', 'higher', 'throughput'), ('total_ms', 'ms', 'lower', 'total time'),
                                       ('blackout_ms', 'ms', 'lower', 'blackout'),
                                       ('cpu_s_per_gib', 's/GiB', 'lower', 'CPU, both sides')]:
        if metric == 'gb_per_s' and group.startswith('untouched'):
            continue
        rows.append(Row(f'{words}: {what}', unit, better, values(samples, 'vmig', metric), values(samples, 'qemu', metric),
                        values({'read': read}, 'read', metric), 'total' if metric == 'total_ms' else None))
    return rows


def felt_rows(group, found, pinned):
    """Blackout and stall; the limit of a blackout follows from the bytes each run had left at the stop."""
    samples, end = found[group], ' pinned' if pinned else ''
    prefix = 'bare pinned' if pinned else 'bare 1'
    bare = best_bare(found.get('bulk') or found.get('bare') or {}, prefix)
    speed = statistics.median(s['gb_per_s'] for s in bare) if bare else None
    ours, theirs = samples.get('vmig' + end, []), samples.get('qemu' + end, [])
    if not ours and not theirs:
        return []
    limit = [3.0] if group == 'idle' else [2 * s['last_mb'] / speed + 2 for s in ours] if speed else []
    words = f"{'pinned' if pinned else 'free'}, {GROUPS[group].words}"
    def of(metric):
        return [s[metric] for s in ours], [s[metric] for s in theirs]
    panel = 'pinned' if pinned else 'free'
    return [Row(f'{words}: blackout', 'ms', 'lower', *of('blackout_ms'), limit, f'blackout {panel}'),
            Row(f'{words}: longest stall of the source', 'ms', 'lower', *of('stall_ms'), [], f'stall {panel}'),
            Row(f'{words}: bytes left at the stop', 'MB', 'lower', *of('last_mb'), [], None),
            Row(f'{words}: total time', 'ms', 'lower', *of('total_ms'), [], None)]


def rate_rows(found, b):
    samples = found['rate']
    both = lambda metric: (values(samples, 'vmig', metric), values(samples, 'qemu', metric))
    return [Row('rate limit: worst excess', 'bytes', 'lower', *both('excess_bytes'), [PACKET], None),
            Row('rate limit: achieved in steady state', 'MB/s', 'higher', *both('steady_mb'), [200 * b.mib / 1024], None)]


def converge_rows(found):
    samples, words = found['converge'], GROUPS['converge'].words
    rows = []
    for metric, unit, better, what in [('total_ms', 'ms', 'lower', 'total time'), ('blackout_ms', 'ms', 'lower', 'blackout'),
                                       ('slowed', '%', 'lower', 'guest slowed down, during the migration')]:
        rows += [Row(f'{words}, {way}: {what}', unit, better, values(samples, f'vmig {name}', metric),
                     values(samples, 'qemu', metric), [], None) for name, (_, way) in WAYS.items()]
    done = values(samples, 'vmig nothing', 'completed')
    return rows + [Row(f'{words}, neither: arrived within {HOPELESS_S} s', 'of 1', 'higher', done, [], [], None)]


def words_rows(found):
    samples = found['words']
    return [Row(f'switchover, {words}', 'ms', 'lower', values(samples, name, metric), [], limit, None)
            for name, metric, words, limit in [
                ('words', 'words_ms', 'nothing to load: READY, GO and OWNED together', [WORDS_LIMIT_MS]),
                ('words', 'ready_ms', 'nothing to load: from PREPARE to READY', []),
                ('words', 'owned_ms', 'nothing to load: from GO to OWNED, less the start', []),
                ('hello', 'hello_ms', 'from the connection to the welcome', [])]]


def cancel_rows(found):
    samples = found['cancel']
    return [Row(f'cancel, {words}', 'ms', 'lower', values(samples, f'vmig {phase}', 'cancel_ms'),
                values(samples, f'qemu {phase}', 'cancel_ms'), [], None) for phase, words in CANCELLED_IN.items()]


def gate(bench, number, record):
    """vCPU threads are stopped through the gate, and by a program that only signals and counts. Those that run have a
    processor each, or one would wait for the other's time slice to end."""
    programs = {'vmig': os.path.join(os.path.dirname(bench.vmm), 'parking'), 'bare': bench.bare}
    running = [(vcpus, ['run']) for vcpus in VCPUS if vcpus <= os.cpu_count()]
    for vcpus, how in [(vcpus, []) for vcpus in VCPUS] + running:
        for name in sorted(programs, reverse=number % 2 == 0):
            argv = [programs[name], *(['park'] if name == 'bare' else []), str(vcpus), str(PARK_TIMES), *how]
            out = subprocess.run(argv, stdout=subprocess.PIPE, timeout=120, check=True, preexec_fn=child()).stdout
            record(' '.join([name, str(vcpus), *how]), json.loads(out))


def gate_rows(found):
    found = found['gate']
    return [Row(f'parking of {n} {what} vCPU{"s" * (n > 1)}', 'us', 'lower', values(found, f'vmig {n}{how}', 'us'), [],
                values(found, f'bare {n}{how}', 'us'), None)
            for what, how in (('sleeping', ''), ('running', ' run')) for n in VCPUS if found.get(f'vmig {n}{how}')]


FORECASTS = ('forecast', 'forecast-steady')
STEADY_GUESTS = {group: GROUPS[group] for group in FELT}


def forecast_rows(found):
    """Foretold by what came, of those that were not said to be unknown."""
    return [Row(f'forecast, {kind}: {what}, foretold / came', 'x', 'lower',
                [said / came for verdict, times in all_of if verdict != 'unknown'
                 for said, came in [times.get(what, (0, 0))] if max(said, came) > forecast.SHORT_MS], [], [1.0], None)
            for kind, all_of in found.items() for what in ('total', 'blackout')]


def forecast_verdicts(found):
    """Lines of the table of what was asked."""
    for kind, all_of in [pair for group in FORECASTS for pair in found.get(group, {}).items()]:
        count = collections.Counter(verdict for verdict, _ in all_of)
        got = f"{count['right']} of {len(all_of)} came so, {count['unknown']} unknown, {count['wrong']} did not"
        yield (f'forecast, {kind}', 'within 30 % (or 5 ms), or unknown', got, 'no' if count['wrong'] else 'yes')


def hand_over_rows(found):
    return [Row(f'hand-over of {gib} GiB: {words}', 'ms', 'lower', values(found['hand-over'], f'{gib} GiB', metric), [],
                limit, None)
            for gib in HAND_OVER_GIB if found['hand-over'].get(f'{gib} GiB')
            for metric, words, limit in [('total_ms', 'total time', [HAND_OVER_LIMIT_MS]), ('blackout_ms', 'blackout', [])]]


def rows_of(found, b):
    """All rows, in the order of the tables."""
    rows = []
    for group in ('bulk', 'bulk-held'):
        rows += bulk_rows(group, found) if group in found else []
    rows += checksum_rows(found) if 'checksum' in found else []
    for group in ('zeros', 'untouched', 'untouched-3'):
        rows += simple_rows(group, found, b) if group in found else []
    for pinned in (True, False):
        for group in FELT:
            rows += felt_rows(group, found, pinned) if group in found else []
    rows += rate_rows(found, b) if 'rate' in found else []
    rows += converge_rows(found) if 'converge' in found else []
    rows += words_rows(found) if 'words' in found else []
    rows += cancel_rows(found) if 'cancel' in found else []
    rows += hand_over_rows(found) if 'hand-over' in found else []
    rows += gate_rows(found) if 'gate' in found else []
    rows += trackers.rows(found['trackers'], Row) if 'trackers' in found else []
    for group in FORECASTS:
        rows += forecast_rows(found[group]) if group in found else []
    return [row for row in rows if row.vmig or row.qemu or row.limit]


# ---- what was asked for ----

def median(of):
    return statistics.median(of) if of else None


class Verdicts:
    """The lines of the ratio table: asked, got, whether that is enough. Medians of this run."""

    def __init__(self, rows):
        self.rows, self.lines = {row.row: row for row in rows}, []

    def line(self, what, asked, got, ok):
        self.lines.append((what, asked, got, 'yes' if ok else 'no'))

    def ratio(self, name, against, least=None, most=None, words=None):
        """Compares vmig with a column: at least so many times as fast, or at most so much of it."""
        row = self.rows.get(name)
        ours, other = (median(row.vmig), median(getattr(row, against))) if row else (None, None)
        if not ours or not other:
            return
        whom = 'QEMU' if against == 'qemu' else 'the limit'
        if most:
            self.line(words or name, f'at most {most:.2g} of {whom}', f'{ours / other:.3g}', ours <= most * other)
            return
        got = ours / other if row.better == 'higher' else other / ours
        asked = f'{least:g}x as fast as QEMU' if against == 'qemu' else f'at least {least:g} of {whom}'
        self.line(words or name, asked, f'{got:.3g}', got >= least)

    def best(self):
        """2 and 4 channels: the faster one of each program, vmig's beside the bare program with as many sockets."""
        rows = [row for n in SOCKETS[1:] if (row := self.rows.get(f'random RAM, {n} channels: throughput')) and row.vmig]
        if not rows:
            return
        ours = max(rows, key=lambda row: median(row.vmig))
        got, limit = median(ours.vmig), median(ours.limit)
        theirs = max((median(row.qemu) for row in rows if row.qemu), default=None)
        name = f'random RAM, best of 2/4 channels (here {ours.row.split(", ")[1].split()[0]}): throughput'
        if theirs:
            self.line(name, "1.5x as fast as QEMU's best", f'{got / theirs:.3g}', got >= 1.5 * theirs)
        if limit:
            self.line(name, 'at least 0.8 of as many sockets', f'{got / limit:.3g}', got >= 0.8 * limit)

    def bulk(self):
        one = 'random RAM, one stream: throughput'
        self.ratio(one, 'qemu', least=3)
        self.ratio(one, 'limit', least=0.8)
        self.best()

    def felt(self, group, most, pinned):
        name = f"{'pinned' if pinned else 'free'}, {GROUPS[group].words}: blackout"
        self.ratio(name, 'qemu', most=most)
        row = self.rows.get(name)
        if not row or not row.vmig or not row.limit:
            return
        got, limit = median(row.vmig), median(row.limit)
        asked = f'under {limit:.2f} ms' + ('' if group == 'idle' else ' = 2 x (bytes left / bare speed) + 2 ms')
        limits = row.limit if len(row.limit) > 1 else row.limit * len(row.vmig)
        under = sum(one < its for one, its in zip(row.vmig, limits))
        self.line(name, asked, f'{got:.2f} ms, {under} of {len(row.vmig)} runs', got < limit)

    def stalls(self, pinned):
        end = ': longest stall of the source'
        start = 'pinned, ' if pinned else 'free, '
        shares = {row.row[len(start):-len(end)]: median(row.vmig) / median(row.qemu) for row in self.rows.values()
                  if row.row.startswith(start) and row.row.endswith(end) and row.vmig and row.qemu and median(row.qemu)}
        if shares:
            got = ', '.join(f'{words} {share:.2f}' for words, share in shares.items())
            self.line(f'{start}longest stall of the running source', 'at most 0.33 of QEMU', got,
                      all(share <= 1 / 3 for share in shares.values()))

    def cpu(self):
        for shape in ('one stream', '2 channels', '4 channels'):
            self.ratio(f'random RAM, {shape}: CPU, both sides', 'qemu', most=0.6)


def verdicts(rows):
    v = Verdicts(rows)
    v.bulk()
    for shape in ('one stream', '2 channels'):
        v.ratio(f"{GROUPS['checksum'].words}, {shape}: throughput", 'limit', least=0.95)
    v.ratio('touched zeros: total time', 'qemu', least=2)
    v.ratio('touched zeros: throughput', 'limit', least=0.5)
    v.ratio('untouched RAM: total time', 'qemu', least=10)
    v.ratio('untouched RAM, 3 times as much: total time', 'qemu', least=10)
    for pinned in (True, False):
        v.felt('idle', 1 / 20, pinned)
        v.felt('busy-260', 1 / 5, pinned)
        v.stalls(pinned)
    v.cpu()
    excess = v.rows.get('rate limit: worst excess')
    if excess and excess.vmig:
        v.line(excess.row, f'at most one packet, {PACKET} bytes', f'{median(excess.vmig):.0f}', max(excess.vmig) <= PACKET)
    words = v.rows.get('switchover, nothing to load: READY, GO and OWNED together')
    if words and words.vmig:
        got = median(words.vmig)
        v.line(words.row, f'under {WORDS_LIMIT_MS} ms', f'{got:.3f} ms', got < WORDS_LIMIT_MS)
    for n in VCPUS:
        row = v.rows.get(f'parking of {n} sleeping vCPU{"s" * (n > 1)}')
        if row:
            ours, bare = median(row.vmig), median(row.limit)
            good = ours <= PARK_RATIO_MOST * bare and ours < PARK_MOST_US
            v.line(row.row, f'{PARK_RATIO_MOST} x the bare program, under {PARK_MOST_US} us', f'{ours / bare:.2f} x, {ours:.0f} us', good)
    for gib in HAND_OVER_GIB:
        row = v.rows.get(f'hand-over of {gib} GiB: total time')
        if row:
            v.line(row.row, f'under {HAND_OVER_LIMIT_MS} ms', f'{median(row.vmig):.1f} ms', median(row.vmig) < HAND_OVER_LIMIT_MS)
    return v.lines
